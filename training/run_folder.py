"""The folder of a run: what it is (config, manifest, source) and what it did (metrics.jsonl, loss.png).

out/run/  config.json, config.py    the resolved config; the second is one to give back to train.py
          manifest.json, source/    from what it can be repeated: command, commit, versions, hardware, data, the code
          data.json                 the data's meta.json: its tokenizer for sample.py
          metrics.jsonl, loss.png   a line a step, and a line an evaluation; metrics*.png: what the model measures
          step-*, latest, best      checkpoints (checkpoint.py)
          .lock                     held by the run at work here (guard.py)
"""

import gc
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import checkpoint
from configurator import config_source

# Patterns, in the order of deletion: a folder without a manifest is no run.
FILES_OF_A_RUN = (
    checkpoint.STEP,
    checkpoint.STEP + ".tmp",
    checkpoint.STEP + ".old",
    "latest",
    "best",
    "config.json",
    "config.py",
    "source",
    "data.json",
    "metrics.jsonl",
    "loss.png",
    "metrics.png",
    "metrics-*.png",
    "tensorboard",
    "wandb",
    "wandb_id",
    "manifest.json",
)


# ---- what it is -----------------------------------------------------------------------------------------------------
def files_of_a_run(out):
    """Returns what lies in `out` under the names of a run's files, the manifest last."""
    return [path for pattern in FILES_OF_A_RUN for path in out.glob(pattern)]


def exists(out: Path) -> bool:
    """Returns whether `out` holds a run. Raises ValueError where something else has the names of a run's files."""
    manifest = out / "manifest.json"
    if manifest.exists() and '"data_fingerprint"' in manifest.read_text():
        return True
    taken = [path.name for path in files_of_a_run(out)]
    if taken:
        raise ValueError(f"{out} is no run, and holds {', '.join(taken[:3])}, which a run writes: try another out_dir")
    return False


def delete(out: Path) -> None:
    """Deletes a run from its folder, and nothing that is not of a run. While that takes, the folder stays a run."""
    for path in files_of_a_run(out):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def replace_text(path, text):
    """Writes a file that has all of the text, or what it had before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def source(model: str) -> dict[str, Path]:
    """Returns the code of a run, {name: file}: ours, and of the variants the one that it trains."""
    root = Path(__file__).parent
    files = {path.name: path for path in root.glob("*.py") if not path.name.startswith("model_")}
    variant = Path(sys.modules[f"model_{model}"].__file__)
    files[variant.name] = variant
    for path in root.glob("data/*.py"):
        files[f"data/{path.name}"] = path
    return files


def git_commit():
    """Returns the commit of our code, with -dirty where it was changed since; None without git or a repository."""
    if not shutil.which("git"):
        return None
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


def describe(out: Path, config: dict, meta: dict, facts: dict) -> None:
    """Writes what a run is. config: as checkpoint.save takes it; meta: the data's; facts: more for the manifest."""
    manifest = {
        "command": [sys.executable, *sys.argv],
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "host": {"system": platform.platform(), "cores": os.cpu_count()},
        **facts,
        "config": config,
    }
    knobs = {"model": config["model"], **config["knobs"], **config["model_config"]}
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")  # first: it says the rest is a run's
    replace_text(out / "config.json", json.dumps(config, indent=1) + "\n")
    replace_text(out / "config.py", config_source(knobs))
    replace_text(out / "data.json", json.dumps(meta) + "\n")
    for name, file in source(config["model"]).items():
        target = out / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


# ---- what it did ----------------------------------------------------------------------------------------------------
def read_metrics(out: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl, without one that a crash cut short."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{path}: a line was cut short, and is left out: {line[:40]}...", file=sys.stderr)
    return rows


class Log:
    """A run's metrics: rows for metrics.jsonl, and, if asked for, Weights & Biases and TensorBoard.

    wandb: online or offline. step: where the run goes on; rows of later steps are dropped, since these steps will be
    done again.
    """

    def __init__(self, out: Path, step: int, config: dict, wandb: str = "", tensorboard: bool = False):
        rows = [row for row in read_metrics(out) if step > 0 and row["step"] <= step]
        replace_text(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self.file = open(out / "metrics.jsonl", "a", buffering=1)

        self.wandb = None
        if wandb:
            import wandb as client

            if not (out / "wandb_id").exists():  # a resumed run goes on under its id there
                replace_text(out / "wandb_id", uuid.uuid4().hex[:8])
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


OF_EVERY_RUN = (
    "step loss lr grad_norm ms tokens_per_second mfu memory_gb resident_gb tokens skipped val_loss val_bits_per_byte"
).split()


def plot(out: Path, title: str) -> None:
    """Draws metrics.jsonl: loss.png, and by their shape what the model's own metrics() gave.

    Numbers share metrics.png, an axis each; a table, such as (layers, experts), has a picture metrics-<name>.png.
    """
    import matplotlib

    matplotlib.use("Agg")
    rows = read_metrics(out)
    plot_loss(rows, title, out / "loss.png")
    numbers = {key for row in rows for key, value in row.items() if isinstance(value, float)}
    own = sorted(numbers.difference(OF_EVERY_RUN))
    if own:
        plot_numbers(rows, own, title, out / "metrics.png")
    for name in sorted({key for row in rows for key, value in row.items() if is_table(value)}):
        plot_table([row for row in rows if name in row], name, title, out / f"metrics-{name}.png")
    gc.collect()  # a figure is in cycles of references: Python would keep dozens of them before it looks


def is_table(value):
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], list)


def plot_loss(rows, title, path):
    """Draws the losses of training and validation over the steps."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    training = [row for row in rows if row.get("loss") is not None]
    losses = [row["loss"] for row in training]
    axis.plot([row["step"] for row in training], losses, label="training", color="C0", alpha=0.4, lw=1)

    validation = [row for row in rows if row.get("val_loss") is not None]
    val_losses = [row["val_loss"] for row in validation]
    axis.plot([row["step"] for row in validation], val_losses, label="validation", color="C1", marker="o", ms=3)

    if len(losses) > 20:
        high = sorted(losses)[-1 - len(losses) // 50]  # 2 % are higher: the first steps, which would flatten the rest
        axis.set_ylim(top=high * 1.03)
    if val_losses:
        title = f"{title}: {val_losses[-1]:.3f}"
    axis.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_numbers(rows, names, title, path):
    """Draws each of the named numbers over the steps, three axes to a line."""
    import matplotlib.pyplot as plt

    lines = math.ceil(len(names) / 3)
    figure, axes = plt.subplots(lines, 3, figsize=(12, 2.6 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names):
        points = [row for row in rows if row.get(name) is not None]
        axis.plot([row["step"] for row in points], [row[name] for row in points], lw=1)
        axis.set(xlabel="step", title=name.replace("_", " "), visible=True)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_table(rows, name, title, path):
    """Draws a band for each row of a table, in it a line for each column: its share of the row, 1 where all are equal.

    For the load of experts (layers, experts) a red line is an expert that is chosen too often, a blue one too seldom.
    """
    import matplotlib.pyplot as plt

    values = np.array([row[name] for row in rows], dtype=float)  # (times, rows, columns)
    times, bands, columns = values.shape
    share = values / values.mean(axis=2, keepdims=True).clip(min=1e-12)
    lines = share.reshape(times, bands * columns).T
    first = rows[0]["step"]
    last = rows[-1]["step"] + 1

    figure, axis = plt.subplots(figsize=(8, 1.5 + bands), layout="constrained")
    size = (first, last, bands, 0)
    colors = dict(cmap="RdBu_r", vmin=0, vmax=2)
    image = axis.imshow(lines, aspect="auto", extent=size, interpolation="nearest", **colors)
    axis.hlines(range(1, bands), first, last, color="black", lw=0.8)
    label = name.replace("_", " ")
    axis.set(xlabel="step", ylabel="row of the table", yticks=range(bands + 1), title=f"{title}: {label}")
    figure.colorbar(image, label=f"{label} / mean of its row", extend="max")
    figure.savefig(path, dpi=120)
    plt.close(figure)
