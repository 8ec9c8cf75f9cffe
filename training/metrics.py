"""What a run notes of each step: rows for metrics.jsonl and for services, spikes, memory."""

import json
import math
import os
import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from training.disk import replaced, warn_once, write_text
from training.run_folder import rows_of

try:
    import resource
except ImportError:  # Windows
    resource = None


def without_nan(value):
    """Returns a value in which null stands for each number that is not finite, since JSON has no word for those."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Rows:
    """A file of JSON, a row a line, each of them of a step. On a full disk rows wait in memory for room.

    step: where the run goes on; rows of later steps are dropped, since these steps will be done again.
    evaluated: whether the evaluation of that step is done; one that will be done again is dropped as well.
    seen: is called with each row that stays.
    """

    def __init__(self, path: Path, step: int, seen=lambda row: None, evaluated: bool = True):
        self.name = path.name
        with replaced(path) as file:
            for row in rows_of(path):
                is_done = row["step"] <= step
                if row["step"] == step and not evaluated:
                    is_done = "ms" in row  # a row of the step itself says how long that took
                if step > 0 and is_done:
                    file.write(json.dumps(row) + "\n")
                    seen(row)
        self.file = open(path, "ab", buffering=0)
        self.waiting = b""  # lines for which there was no room

    def write(self, row: dict) -> dict:
        """Adds a row; returns it as the file has it, with null for what is not finite."""
        row = without_nan(row)
        self.waiting += json.dumps(row).encode() + b"\n"
        self.write_waiting()
        return row

    def write_waiting(self) -> None:
        """Writes the rows that wait, as far as there is room."""
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            warn_once(f"{self.name}: {error.strerror}: rows wait in memory for room")

    def close(self) -> None:
        """Closes the file; a full disk costs the last rows and a warning."""
        self.write_waiting()
        self.file.close()
        if self.waiting:
            rows = len(self.waiting.splitlines())
            warn_once(f"{self.name} lacks its last {rows} rows: there was no room for them")


class Log:
    """A run's metrics: rows for metrics.jsonl, and, if asked for, Weights & Biases and TensorBoard.

    wandb: online or offline. step, evaluated: as for Rows. album: the pictures, which get each row. What fails here
    ends no run: rows wait for room on the disk, and a service costs a warning.
    """

    def __init__(
        self, out: Path, step: int, config: dict, wandb: str = "", tensorboard: bool = False, album=None,
        evaluated: bool = True,
    ):  # fmt: skip
        self.album = album
        self.rows = Rows(out / "metrics.jsonl", step, album.add if album else lambda row: None, evaluated)
        self.services = []  # functions of (step, {name: number})
        self.to_close = []
        if wandb:
            self.open("wandb", self.open_wandb, out, config, wandb)
        if tensorboard:
            self.open("tensorboard", self.open_tensorboard, out, step)

    def open(self, name, service, *args):
        """Opens a service. ValueError where that fails."""
        try:
            self.services.append(service(*args))
        except Exception as error:  # theirs, of any kind
            reason = " ".join(str(error).split())
            raise ValueError(f"{name} cannot be opened: {type(error).__name__}: {reason}") from error

    def open_wandb(self, out, config, mode):
        import wandb

        if not (out / "wandb_id").exists():  # a resumed run goes on under its id there
            write_text(out / "wandb_id", uuid.uuid4().hex[:8])
        run = dict(project="nanollm", name=out.resolve().name, id=(out / "wandb_id").read_text(), dir=out)
        client = wandb.init(mode=mode, resume="allow", config=config, **run)
        self.to_close.append(client.finish)
        return lambda step, numbers: client.log(numbers, step=step)

    def open_tensorboard(self, out, step):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)
        self.to_close.append(writer.close)

        def log(step, numbers):
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        return log

    def write(self, row: dict) -> None:
        """Adds a row of numbers for a step."""
        row = self.rows.write(row)
        if self.album:
            self.album.add(row)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        for log in self.services:
            try:
                log(row["step"], numbers)
            except Exception as error:  # theirs, of any kind
                warn_once(f"a service for metrics failed: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Closes the file and the services."""
        self.rows.close()
        for close in self.to_close:
            try:
                close()
            except Exception as error:
                warn_once(f"a service for metrics failed: {type(error).__name__}: {error}")


def spiked(history: Sequence[float], value: float) -> bool:
    """Returns whether a value lies far above the last ones: 6 standard deviations, and a tenth."""
    if len(history) < 20:
        return False
    mean = statistics.fmean(history)
    spread = statistics.stdev(history)
    return value > mean + max(6 * spread, 0.1 * mean)


def spikes(loss: float, losses: Sequence[float], norm: float, norms: Sequence[float]) -> list[str]:
    """Returns the names of what spiked in a step."""
    found = []
    if spiked(losses, loss):
        found.append("loss")
    if spiked(norms, norm):
        found.append("grad_norm")
    return found


def smoothed(losses: Sequence[float]) -> float:
    """Returns the mean of the last losses, in which each counts 5 % less than the one after it; nan of none."""
    weights = [0.95**age for age in range(len(losses))]
    total = sum(weight * loss for weight, loss in zip(weights, reversed(losses)))
    return total / sum(weights) if weights else math.nan


def of_model(model, with_tables: bool) -> dict:
    """Returns the model's own metrics; tables, such as the load of each expert, are wanted now and then."""
    if not hasattr(model, "metrics"):
        return {}
    return {key: value for key, value in model.metrics().items() if with_tables or isinstance(value, float)}


# ---- what is printed -------------------------------------------------------------------------------------------------
class Clock:
    """Tells how long the rest of a run takes; the first step, which compiles, is not counted."""

    def __init__(self):
        self.steps = 0
        self.started = None

    def tick(self) -> None:
        """Says that a step is done."""
        self.steps += 1
        if self.steps == 1:
            self.started = time.perf_counter()

    def seconds_left(self, steps: int) -> float:
        if self.steps < 2:
            return 0.0
        return steps * (time.perf_counter() - self.started) / (self.steps - 1)


def evaluation_line(step: int, reports: dict) -> str:
    report = reports[""]
    bits = "n/a"
    if report["bits_per_byte"] is not None:
        bits = f"{report['bits_per_byte']:.4f}"
    texts = "".join(f" | {name} {of_text['loss']:.4f}" for name, of_text in reports.items() if name)
    return f"step {step:>6} | validation loss {report['loss']:.4f} | {bits} bits per byte{texts}"


def evaluation_row(step: int, reports: dict, tokens: int) -> dict:
    """Returns the row of an evaluation. reports: {name of a text: its loss_report}; "" stands for all of them."""
    row = {"step": step}
    for name, report in reports.items():
        of_text = f"_{name}" if name else ""
        row[f"val_loss{of_text}"] = report["loss"]
        row[f"val_bits_per_byte{of_text}"] = report["bits_per_byte"]
    return row | {"tokens": tokens}


def step_line(row: dict, max_steps: int, seconds_left: float) -> str:
    mfu = f"{row['mfu']:.1%}" if row["mfu"] else "n/a"
    memory = "n/a" if row["memory_gb"] is None else f"{row['memory_gb']:.2f} GB"
    loss = f"loss {row['loss']:.4f} (smoothed {row['smoothed_loss']:.4f})"
    learned = f"{loss} | lr {row['lr']:.2e} | norm {row['grad_norm']:.3f}"
    speed = f"{row['ms']:.0f} ms | {row['tokens_per_second']:,.0f} tokens/s | mfu {mfu} | {memory}"
    left = f"{seconds_left // 60:.0f}:{seconds_left % 60:02.0f}"
    return f"step {row['step']:>6}/{max_steps} | {learned} | {speed} | eta {left}"


# ---- memory ----------------------------------------------------------------------------------------------------------
def peak_gb(device_type: str) -> float | None:
    """Returns the most that was in use so far: of the GPU's memory, or of this process's. None where nobody counts."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, elsewhere KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def resident_gb() -> float | None:
    """Returns the memory that this process has at present: what grows over a run is a leak. None without /proc."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return None
    pages = int(status.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
