"""Many processes, one training: their group, a model's shares under FSDP, and what keeps the processes in step.

    torchrun --nproc_per_node=4 train.py --parallel=ddp     each process holds the whole model; gradients are averaged
    torchrun --nproc_per_node=4 train.py --parallel=fsdp    each holds a quarter of every weight, gradient and moment

Under FSDP (https://arxiv.org/abs/2304.11277; here PyTorch's fully_shard) dim 0 of a weight is cut as torch.chunk does.
A block's weights are gathered for its forward and again for its backward, and its gradient is summed into shares. So
a forward is everybody's: all processes must run the same number of them. Parameters are DTensors.
"""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

START = 300  # seconds for what comes before the first step is done: the processes meet, read and compile


# ---- the processes --------------------------------------------------------------------------------------------------
def setup(device: str, timeout: float) -> str:
    """Joins what torchrun started, and returns this process's device. One that waits too long for another gives up:
    START seconds, and after `set_timeout` as many as that says.

    Each restart of torchrun has names of its own in the store: those of the last one may be there still.
    """
    device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port, wait = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=max(timeout, START))
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    store = dist.TCPStore(host, port, world_size, is_master=serves, timeout=wait, multi_tenant=True)
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
    sys.excepthook = left_alone
    warnings.filterwarnings("ignore", ".*broadcast_buffers")  # DDP's: deprecated in torch 2.13, alone in 2.11
    return device


def left_alone(kind, error, trace) -> None:
    """What is said where another process is gone or stuck: one line, not a stack from each that is left."""
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        reason = next(iter(str(error).splitlines()), kind.__name__)
        print(f"error: process {dist.get_rank()} waited for another one that died, or is stuck: {reason}; go on with "
              "--resume", file=sys.stderr)  # fmt: skip
    else:
        sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


def set_timeout(seconds: float) -> None:
    """How long a process waits for another from here on."""
    _set_pg_timeout(timedelta(seconds=seconds))


def finish() -> None:
    """Ends this process once all are here. gloo's threads may abort one that ends otherwise."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ---- a model in shares ----------------------------------------------------------------------------------------------
def empty(GPT: type, config) -> nn.Module:
    """GPT(config) on the meta device, which has shapes and no memory. torch's generator goes to where `GPT(config)` on
    the CPU would call init_weights, which waits till there is something to fill."""
    with torch.device("meta"), Draws(), patch.object(GPT, "init_weights", lambda self: None):
        return GPT(config)


def shard(
    model: nn.Module,
    GPT: type,
    device: str,
    dtype: torch.dtype = torch.float32,
    reshard: bool = True,
    cpu_offload: bool = False,
    compile: bool = False,
) -> None:
    """Cuts what `empty` gave into shares, and fills them with what GPT(config) would hold, bit for bit.

    No process ever holds more than its shares and one whole weight. dtype: that gathered weights have, to compute with;
    shares, gradients and their sums are float32, or dtype where that is wider. reshard=False keeps a block's weights
    from its forward to its backward. cpu_offload: shares and optimizer state are in the CPU's memory. compile: a block
    at a time.
    """
    # 1. cut: a block at a time, then what is left: embedding, last norm and head
    device = torch.device(device)
    exact = torch.promote_types(dtype, torch.float32)
    half = None if dtype == exact else dtype
    options = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=exact, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy(),
    }
    for block in model.blocks:
        if compile:
            block.forward = torch.compile(block.forward)  # the gathering stays outside
        last = block is model.blocks[-1]  # its backward comes at once
        fully_shard(block, reshard_after_forward=reshard and not last, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    # 2. fill
    model.to_empty(device="cpu" if cpu_offload else device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    GPT.init_weights(SimpleNamespace(config=model.config, named_parameters=lambda: whole_weights(model)))


class Draws(TorchDispatchMode):
    """What would be drawn at random on the meta device is drawn on the CPU and forgotten: its generator moves on."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in op.tags:
            op(torch.empty_like(args[0], device="cpu"), *args[1:], **(kwargs or {}))
        return op(*args, **(kwargs or {}))


def whole_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each name and an empty tensor of the whole shape: of what is written there this process's share is kept."""
    for name, p in model.named_parameters():
        whole = torch.empty(p.shape)
        yield name, whole
        p.to_local().copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local())


def before_backward(model: nn.Module, last: bool, reshard: bool) -> None:
    """Gradients are summed over processes in a step's last backward; with reshard=False weights stay till then."""
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)
    model.set_reshard_after_backward(last or reshard)


def in_step(model: nn.Module, batches: Iterable[tuple], block_size: int, device: str) -> Iterator[tuple]:
    """The batches for forwards without a backward, and empty ones while another process has more of them."""
    batches = iter(batches)
    nothing = torch.zeros(1, block_size, dtype=torch.long, device=device)
    while True:
        batch = next(batches, None)
        more = torch.tensor(int(batch is not None), device=device)
        dist.all_reduce(more)
        if not more:
            break
        yield batch or (nothing, nothing - 1)
    for module in model.modules():  # no backward has done it
        if isinstance(module, FSDPModule):
            module.reshard()
