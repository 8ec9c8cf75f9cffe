"""What a checkpoint needs where many processes hold one state: files of rows, and agreement. In one process the same.

A sharded tensor is a DTensor split along its first dimension, as fully_shard leaves parameters and what an optimizer
makes like them: each process holds some consecutive rows, the last ones fewer, or none. Each process writes its rows,
their first number in the file's metadata; all other tensors are equal everywhere and process 0's to write.
"""

import json
import re
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from atomic import CheckpointError, tensor_files


# ---- agreement ------------------------------------------------------------------------------------------------------
# What takes as long as a disk does runs in threads, which know nothing of each other. The main threads ask each other
# whether all are done, in short collectives: so a slow disk is never taken for a dead process, whatever the timeout.
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value) -> list:
    """Every process's value; to be called on all of them, like all that follows but start."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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
    """Every process's result, on all of them; if some failed, the first one's exception is raised on all."""
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
    """call(*args) on process 0 alone: what it returns or raises there is returned or raised on all."""
    return results(start_on_first(call, *args))[0]


# ---- rows -----------------------------------------------------------------------------------------------------------
def is_sharded(tensor) -> bool:
    return hasattr(tensor, "placements")  # a DTensor: to import that doubles the time to start of sample.py


def local(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(the rows that this process holds, the number of the first one in the whole)."""
    tensor = tensor.detach()
    if not is_sharded(tensor):
        return tensor, 0
    mesh = tensor.device_mesh
    assert mesh.ndim == 1 and tensor.placements[0].is_shard(0), tensor
    rows = -(-len(tensor) // mesh.size())  # of every process but the last ones
    return tensor.to_local(), min(mesh.get_local_rank() * rows, len(tensor))


def own_files(kinds: dict, copy: bool = False) -> dict:
    """What this process has to write of {"model": {name: tensor}, "trainer": ...}: {file: (its rows, metadata)}, where
    metadata = {name: number of the first row} of what is sharded. copy: what is to be written may change meanwhile."""
    everything = [tensor for tensors in kinds.values() for tensor in tensors.values()]
    parts = dist.get_world_size() if any(map(is_sharded, everything)) else 1
    files = {}
    names = tensor_files(parts, rank()) if parts > 1 or rank() == 0 else []
    for name, tensors in zip(names, kinds.values()):
        mine = {key: tensor for key, tensor in tensors.items() if rank() == 0 or is_sharded(tensor)}
        rows = {key: host_copy(key, local(tensor)[0]) if copy else local(tensor)[0] for key, tensor in mine.items()}
        files[name] = rows, {key: str(local(tensor)[1]) for key, tensor in mine.items() if is_sharded(tensor)}
    return files


copies = {}  # they stay for the next save: memory that is new to a process costs five times the copying


def host_copy(key, tensor):
    """A copy in host memory, which is good until the next one of that key."""
    if key not in copies or (copies[key].shape, copies[key].dtype) != (tensor.shape, tensor.dtype):
        copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copies[key].copy_(tensor)


class Stored:
    """The tensors of one kind in a checkpoint's folder, each whole in a file or its rows in several."""

    def __init__(self, folder: Path, kind: str):
        self.parts = {}  # {name: [(number of the first row, the rows: a slice of the file)]}
        listed = json.loads((folder / "manifest.json").read_bytes())["files"]
        for path in (folder / name for name in listed if re.fullmatch(rf"{kind}\b.*\.safetensors", name)):
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as e:
                raise CheckpointError(f"{path}: {e} (truncated or damaged)") from None
            firsts = file.metadata() or {}
            for name in file.keys():
                self.parts.setdefault(name, []).append((int(firsts.get(name, 0)), file.get_slice(name)))

    def like(self, name: str) -> torch.Tensor:
        """An empty tensor on the meta device, of the whole one's shape and dtype."""
        slices = [rows for _, rows in self.parts[name]]
        first = slices[0][:0] if slices[0].get_shape() else slices[0][...]  # not yet its data
        shape = [sum(rows.get_shape()[0] for rows in slices), *first.shape[1:]] if first.ndim else []
        return torch.empty(shape, dtype=first.dtype, device="meta")

    def copy_to(self, tensor: torch.Tensor, name: str):
        """Copies what this process holds of a tensor of that name and shape into it."""
        target, first = local(tensor)
        for begin, rows in self.parts[name]:
            if not rows.get_shape():
                target.copy_(rows[...])
                continue
            a, b = max(begin, first), min(begin + rows.get_shape()[0], first + len(target))
            if a < b:
                target[a - first : b - first].copy_(rows[a - begin : b - begin])
