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

from training.atomic import write_text
from training.run_folder import read_metrics

try:
    import resource
except ImportError:  # Windows
    resource = None


class Log:
    """A run's metrics: rows for metrics.jsonl, and, if asked for, Weights & Biases and TensorBoard.

    wandb: online or offline. step: where the run goes on; rows of later steps are dropped, since these steps will be
    done again.
    """

    def __init__(self, out: Path, step: int, config: dict, wandb: str = "", tensorboard: bool = False):
        rows = [row for row in read_metrics(out) if step > 0 and row["step"] <= step]
        write_text(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self.file = open(out / "metrics.jsonl", "a", buffering=1)

        self.wandb = None
        if wandb:
            import wandb as client

            if not (out / "wandb_id").exists():  # a resumed run goes on under its id there
                write_text(out / "wandb_id", uuid.uuid4().hex[:8])
            run = dict(project="nanollm", name=out.resolve().name, id=(out / "wandb_id").read_text(), dir=out)
            self.wandb = client.init(mode=wandb, resume="allow", config=config, **run)

        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def write(self, row: dict) -> None:
        """Adds a row of numbers for a step; what is not finite becomes null, since JSON has no word for it."""
        row = dict(row)
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[key] = None
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:  # the row waits in the file's buffer for room
            print(f"WARNING: metrics.jsonl: {error.strerror}", file=sys.stderr)

        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        if self.wandb:
            self.wandb.log(numbers, step=row["step"])
        if self.writer:
            for key, value in numbers.items():
                self.writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Closes the file and the services; a full disk costs the last rows and a warning."""
        try:
            self.file.close()
        except OSError as error:
            print(f"WARNING: metrics.jsonl lacks its last rows: {error.strerror}", file=sys.stderr)
        if self.wandb:
            self.wandb.finish()
        if self.writer:
            self.writer.close()


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


def evaluation_line(step: int, report: dict) -> str:
    bits = "n/a"
    if report["bits_per_byte"] is not None:
        bits = f"{report['bits_per_byte']:.4f}"
    return f"step {step:>6} | validation loss {report['loss']:.4f} | {bits} bits per byte"


def step_line(row: dict, max_steps: int, seconds_left: float) -> str:
    mfu = f"{row['mfu']:.1%}" if row["mfu"] else "n/a"
    memory = "n/a" if row["memory_gb"] is None else f"{row['memory_gb']:.2f} GB"
    learned = f"loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {row['grad_norm']:.3f}"
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
    unit = 1 if sys.platform == "darwin" else 1000  # bytes there, elsewhere KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def resident_gb() -> float | None:
    """Returns the memory that this process has at present: what grows over a run is a leak. None without /proc."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return None
    pages = int(status.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
