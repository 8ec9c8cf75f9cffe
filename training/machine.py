"""Where a command computes: how many processes there are, on which device each of them, and in what dtype."""

import os
import sys
from contextlib import nullcontext
from typing import NamedTuple

import torch
from tqdm import tqdm

import flops
from distributed import processes
from training.knobs import find_device, find_dtype, why_not_compiled


class Machine(NamedTuple):
    rank: int
    world_size: int  # processes
    device: str  # of this one, as "cuda:1"
    dtype: str
    parallel: str  # none, ddp or fsdp
    compile: bool
    name: str  # of the device
    peak_flops: float | None  # of the device at this dtype; None where it is not known, on CPUs for example

    def say(self, text: str) -> None:
        """Prints a line at once, also into a file, in the first process alone."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def share(self, items):
        """Returns this process's part of what all processes have to do."""
        return items[len(items) * self.rank // self.world_size : len(items) * (self.rank + 1) // self.world_size]

    @property
    def device_type(self) -> str:
        return torch.device(self.device).type

    def autocast(self):
        """Returns the context in which models compute."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device_type, getattr(torch, self.dtype))

    def facts(self) -> dict:
        """Returns what a resumed run compares, since numbers are equal to the bit on the same machine alone."""
        return {"processes": self.world_size, "device": self.name, "torch": torch.__version__}

    def described(self) -> dict:
        """Returns what a manifest says of the hardware."""
        return {
            "device": self.name,
            "processes": self.world_size,
            "parallel": self.parallel,
            "dtype": self.dtype,
            "compile": self.compile,
            "peak_flops": self.peak_flops,
        }

    def __str__(self):
        how = "compiled" if self.compile else "eager"
        return f"{self.world_size} x {self.name}, {self.dtype}, {how}, parallel={self.parallel}"


def join(
    device: str,
    dtype: str,
    timeout: float,
    parallel: str = "auto",
    compile: bool | str = False,
    tf32: bool = False,
    deterministic: bool = False,
) -> Machine:
    """Finds this process's device, and meets the others that torchrun started. The arguments are train.py's knobs.

    One process is the case of one of many: no group is opened. ValueError says what is not here, or not together.
    """
    rank, world_size = processes.launched()
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if parallel == "auto":
        parallel = "ddp" if world_size > 1 else "none"
    device = find_device(device)
    if parallel != "none":
        device = processes.meet(device, timeout)
    sys.excepthook = processes.say_in_one_line  # after the meeting, in which torch sets one that keeps what ours prints
    device_type = torch.device(device).type
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dtype = find_dtype(dtype, device)
    if parallel == "fsdp" and dtype == "float16":
        raise ValueError("dtype=float16 needs a loss scaler, which parallel=fsdp has not: try bfloat16 or float32")
    if compile == "auto":
        compile = device_type == "cuda"
    obstacle = why_not_compiled(device) if compile else ""
    compile = bool(compile) and not obstacle
    torch.set_float32_matmul_precision("high" if tf32 and device_type == "cuda" else "highest")
    name = flops.device_name(device)
    here = Machine(rank, world_size, device, dtype, parallel, compile, name, flops.peak_flops(name, dtype))
    if obstacle:
        here.say(f"not compiled: {obstacle}")
    here.say(str(here))
    return here
