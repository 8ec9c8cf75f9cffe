"""A model in shares (FSDP, https://arxiv.org/abs/2304.11277; here PyTorch's fully_shard): each process holds 1 / N.

Dim 0 of a weight is cut as torch.chunk does. A block's weights are gathered for its forward and again for its backward,
and its gradient is summed into shares. So a forward is everybody's: all processes must run the same number of them.
Parameters are DTensors.
"""

from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flops import without_contents


def empty(GPT: type, config) -> nn.Module:
    """Returns GPT(config) on the meta device, which has shapes and no memory. init_weights waits for `shard`.

    torch's generator goes to where `GPT(config)` on the CPU would call init_weights. ValueError names a buffer that
    `shard` could not fill, since the meta device has no values.
    """
    with Draws():
        model = without_contents(GPT, config)
    for path, module in model.named_modules():
        if type(module)._apply is not nn.Module._apply:  # as a router's, it sets the buffers that leave the meta device
            continue
        for name, buffer in module.named_buffers(prefix=path, recurse=False):
            if buffer.is_meta:
                raise ValueError(
                    f"parallel=fsdp does not know what is in the buffer {name}: set it in _apply where it leaves the "
                    f"meta device, as Router in model_moe.py does, or try parallel=ddp"
                )
    return model


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

    No process ever holds more than its shares and one whole weight.

    dtype: of the blocks' matrices once they are gathered, for a model that runs under autocast. All else is float32, or
    dtype where that is wider: the other weights, all shares, all gradients and their sums.
    reshard: False keeps a block's matrices from its forward to its backward.
    cpu_offload: shares and optimizer state are in the CPU's memory.
    compile: each block by itself.
    """
    # 1. cut: the matrices a block at a time, and all else with the model. That comes first, since it passes by whatever
    # is cut already. So norms, routers, decays and the embedding, with which the residual stream begins, are as exact
    # as under autocast where each process has the whole model.
    device = torch.device(device)
    wide = torch.promote_types(dtype, torch.float32)
    narrow = None if dtype == wide else dtype  # None: as the shares are
    options = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy(),
    }
    in_narrow = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=wide, cast_forward_inputs=False)
    in_wide = MixedPrecisionPolicy(reduce_dtype=wide, cast_forward_inputs=False)
    matrices = {p for block in model.blocks for p in weights_of_products(block)}
    fully_shard(model, reshard_after_forward=False, mp_policy=in_wide, ignored_params=matrices, **options)
    others = set(model.parameters()) - matrices  # new ones: shares
    for block in model.blocks:
        if compile:
            block.forward = torch.compile(block.forward)  # the gathering stays outside
        last = block is model.blocks[-1]  # its backward comes at once
        keep = not reshard or last
        fully_shard(block, reshard_after_forward=not keep, mp_policy=in_narrow, ignored_params=others, **options)
    # 2. fill
    model.to_empty(device="cpu" if cpu_offload else device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    GPT.init_weights(SimpleNamespace(config=model.config, named_parameters=lambda: whole_weights(model)))


def weights_of_products(block: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the weights that autocast would cast: those of nn.Linear, and stacks (E, in, out) of experts' matrices."""
    for module in block.modules():
        for p in module.parameters(recurse=False):
            is_stack = p.ndim == 3 and min(p.shape) > 1  # a convolution's (channels, 1, taps) is none
            if isinstance(module, nn.Linear) or is_stack:
                yield p


class Draws(TorchDispatchMode):
    """Draws on the CPU, and forgets, what would be drawn at random on the meta device: its generator moves on."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in op.tags:
            op(torch.empty_like(args[0], device="cpu"), *args[1:], **(kwargs or {}))
        return op(*args, **(kwargs or {}))


def whole_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each name with an empty tensor of the whole shape, and copies this process's share of what is put there.

    The copy is made when the next one is asked for, so only one whole tensor exists at a time.
    """
    for name, p in model.named_parameters():
        whole = torch.empty(p.shape)
        yield name, whole
        p.to_local().copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local())


def in_step(model: nn.Module, batches: Iterable[tuple], block_size: int, device: str) -> Iterator[tuple]:
    """Yields the batches for forwards without a backward, and empty ones while another process has more of them."""
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
