"""The tensors of a checkpoint where many processes hold one state: files of rows. In one process the same.

A sharded tensor is a DTensor split along its first dimension, as fully_shard leaves parameters and what an optimizer
makes like them: each process holds some consecutive rows, the last ones fewer, or none. Each process writes its rows,
their first number in the file's metadata; all other tensors are equal everywhere and process 0's to write.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from distributed.processes import is_sharded, rank
from training.disk import CheckpointError, tensor_files


def own_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns the rows that this process holds, and the number of the first one in the whole."""
    tensor = tensor.detach()
    if not is_sharded(tensor):
        return tensor, 0
    mesh = tensor.device_mesh
    assert mesh.ndim == 1 and tensor.placements[0].is_shard(0), tensor
    rows = math.ceil(len(tensor) / mesh.size())  # of every process but the last ones
    first = min(mesh.get_local_rank() * rows, len(tensor))
    return tensor.to_local(), first


def own_files(kinds: dict, copy: bool = False) -> dict:
    """Returns what this process has to write of {"model": {name: tensor}, "trainer": ...}, as {file: (rows, metadata)}.

    metadata: {name: number of the first row} of what is sharded. copy: what is to be written may change meanwhile.
    """
    everything = [tensor for tensors in kinds.values() for tensor in tensors.values()]
    parts = 1
    if any(is_sharded(tensor) for tensor in everything):
        parts = dist.get_world_size()
    elif rank() > 0:
        return {}
    own_part = rank() if parts > 1 else 0
    names = tensor_files(parts, own_part, kinds)
    files = {}
    for file, (kind, tensors) in zip(names, kinds.items()):
        rows = {}
        metadata = {}
        for name, tensor in tensors.items():
            if rank() > 0 and not is_sharded(tensor):
                continue
            own, first = own_rows(tensor)
            rows[name] = host_copy((kind, name), own) if copy else own
            if is_sharded(tensor):
                metadata[name] = str(first)
        files[file] = rows, metadata
    return files


copies = {}  # they stay for the next save: memory that is new to a process costs five times the copying


def host_copy(key, tensor):
    """Returns a copy in host memory, which is good until the next one of that key."""
    if key not in copies or (copies[key].shape, copies[key].dtype) != (tensor.shape, tensor.dtype):
        copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copies[key].copy_(tensor)


class Stored:
    """The tensors of one kind in a checkpoint's folder, each whole in a file or its rows in several."""

    def __init__(self, folder: Path, kind: str):
        self.parts = {}  # {name: [(number of the first row, the rows: a slice of the file)]}
        listed = json.loads((folder / "manifest.json").read_bytes())["files"]
        for name in listed:
            if re.fullmatch(rf"{kind}\b.*\.safetensors", name):
                self.open(folder / name)

    def open(self, path):
        try:
            file = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error} (truncated or damaged)") from None
        first_rows = file.metadata() or {}
        for name in file.keys():
            self.parts.setdefault(name, []).append((int(first_rows.get(name, 0)), file.get_slice(name)))

    def like(self, name: str) -> torch.Tensor:
        """Returns an empty tensor on the meta device, of the whole one's shape and dtype."""
        slices = [rows for _, rows in self.parts[name]]
        if not slices[0].get_shape():  # a number
            return torch.empty([], dtype=slices[0][...].dtype, device="meta")
        none = slices[0][:0]  # not yet its data
        n_rows = sum(rows.get_shape()[0] for rows in slices)
        return torch.empty([n_rows, *none.shape[1:]], dtype=none.dtype, device="meta")

    def copy_to(self, tensor: torch.Tensor, name: str):
        """Copies what this process holds of a tensor of that name and shape into it."""
        target, first = own_rows(tensor)
        for begin, rows in self.parts[name]:
            if not rows.get_shape():
                target.copy_(rows[...])
                continue
            low = max(begin, first)
            high = min(begin + rows.get_shape()[0], first + len(target))
            if low < high:
                target[low - first : high - first].copy_(rows[low - begin : high - begin])
