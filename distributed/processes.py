"""How processes meet, agree and end. A single process is the case of one: nothing is opened, and all is agreed at once.

torchrun --nproc_per_node=4 train.py --parallel=ddp     each process holds the whole model; gradients are averaged
torchrun --nproc_per_node=4 train.py --parallel=fsdp    each holds a quarter of everything (fsdp.py)
"""

import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import nullcontext
from datetime import timedelta
from threading import Thread
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel

START = 300  # seconds for what comes before the first step is done: the processes meet, read and compile


# ---- who is here -----------------------------------------------------------------------------------------------------
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def launched() -> tuple[int, int]:
    """Returns this process's rank and the number of processes, as torchrun says it before they have met."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def meet(device: str, timeout: float) -> str:
    """Joins what torchrun started; returns this process's device.

    One that waits too long for another gives up: START seconds, and after `set_timeout` as many as that says. Each
    restart of torchrun has names of its own in the store: those of the last one may be there still.
    """
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    own_rank, n_processes = launched()
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=max(timeout, START))
    serves = own_rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    store = dist.TCPStore(host, port, n_processes, is_master=serves, timeout=patience, multi_tenant=True)
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=n_processes, timeout=patience)
    warnings.filterwarnings("ignore", ".*broadcast_buffers")  # DDP's: deprecated in torch 2.13, alone in 2.11
    return device


def say_in_one_line(kind, error, trace) -> None:
    """As sys.excepthook: says that another process is gone or stuck, or that memory ran out, without a stack."""
    reason = next(iter(str(error).splitlines()), kind.__name__)
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        print(
            f"error: process {rank()} waited for another one that died, or is stuck: {reason}; go on with --resume",
            file=sys.stderr,
        )
    elif isinstance(error, MemoryError) or "out of memory" in reason or "can't allocate memory" in reason:
        print(f"error: out of memory: {reason}: try a smaller micro_batch, or a smaller model", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    if dist.is_initialized():  # gloo's threads may abort a process that ends otherwise
        os._exit(1)


def set_timeout(seconds: float) -> None:
    """Sets how long a process waits for another from here on."""
    if dist.is_initialized():
        _set_pg_timeout(timedelta(seconds=seconds))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def finish() -> None:
    """Ends this process once all are here. gloo's threads may abort one that ends otherwise."""
    if not dist.is_initialized():
        return
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def leave() -> NoReturn:
    """Ends this process, where all is done, once all are here."""
    finish()
    sys.exit(0)


def fail(message, code: int = 2) -> NoReturn:
    """Ends this process with one line on stderr."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized():  # gloo's threads may abort a process that ends otherwise
        os._exit(code)
    sys.exit(code)


# ---- agreement -------------------------------------------------------------------------------------------------------
# Every process calls each of these, except start. What takes as long as a disk does runs in threads, which know nothing
# of each other; the main threads ask each other whether all are done, in short collectives: so a slow disk is never
# taken for a dead process, whatever the timeout.
def gather(value) -> list:
    """Returns every process's value, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_sum(values, device: str = "cpu") -> list[float]:
    """Returns the sums of a few numbers over all processes, in fp64."""
    total = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        if str(device).startswith("cuda"):
            total = total.to(device)
        dist.all_reduce(total)
    return total.tolist()


def check_same(**facts: dict) -> None:
    """Raises ValueError, on every process, where one's facts, {what: {key: value}}, are not those of rank 0."""
    first, *others = gather(facts)
    for other, theirs in enumerate(others, 1):
        for what, ours in first.items():
            keys = {**ours, **theirs[what]}
            odd = [
                f"{k}={theirs[what].get(k)!r}, not {ours.get(k)!r}" for k in keys if ours.get(k) != theirs[what].get(k)
            ]
            if odd:
                raise ValueError(f"rank {other} has a different {what} than rank 0: {'; '.join(odd[:3])}")


def start(call: Callable, *args) -> Future:
    """Begins call(*args) in a thread; the future holds its result or its exception."""
    future = Future()

    def run():
        try:
            future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def start_on_first(call: Callable, *args) -> Future:
    return start(call, *args) if rank() == 0 else start(lambda: None)


def all_done(future: Future) -> bool:
    return all(gather(future.done()))


def results(future: Future) -> list:
    """Returns every process's result; if some failed, the first one's exception is raised on all."""
    while True:
        wait([future], timeout=0.1)  # seconds
        if all_done(future):
            break
    error = future.exception()
    outcomes = gather((None if error else future.result(), error))
    for _, error in outcomes:
        if error:
            raise error
    return [value for value, _ in outcomes]


def on_first(call: Callable, *args):
    """Calls on process 0 alone: what it returns or raises there is returned or raised on all."""
    return results(start_on_first(call, *args))[0]


# ---- gradients -------------------------------------------------------------------------------------------------------
def averaging_gradients(model: torch.nn.Module, device: str, some_stand_still: bool = False) -> torch.nn.Module:
    """Returns the model wrapped so that its backward averages gradients over the processes (DDP).

    some_stand_still: there are steps in which some parameters have no gradient, for which DDP would wait.

    Gradients go in buckets, which DDP fills in another order after its first step; and where a number stands in its
    bucket decides in which order three processes add it up. On CPUs a resumed run has to be the same to the last bit,
    so each parameter has a bucket of its own there.
    """
    index = torch.device(device).index
    options = {"broadcast_buffers": False, "find_unused_parameters": some_stand_still}  # counts are each process's own
    if index is not None:
        options["device_ids"] = [index]
    if torch.device(device).type == "cpu":
        options["bucket_cap_mb_list"] = [1e-6]
    return DistributedDataParallel(model, **options)


def backward_of(model: torch.nn.Module, last: bool, reshard: bool = True):
    """Returns the context of a micro-batch: gradients go between processes in the last one of a step alone.

    Between the others they add up where they are. reshard=False: under FSDP gathered weights stay till the last, too.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last or reshard)
    return nullcontext()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of which each process may hold a share as one that each holds whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
