"""The folder of a run: what it is (config, manifest, source) and what it did (metrics.jsonl, loss.png).

out/run/  config.json, config.py    the resolved config; the second is one to give back to train.py
          manifest.json, source/    from what it can be repeated: command, commit, versions, hardware, data, the code
          data.json                 the data's meta.json: its tokenizer for sample.py
          metrics.jsonl, loss.png   a line a step, and a line an evaluation; experts.png where there are experts
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

CHECKPOINTS = [checkpoint.STEP + end for end in ("", ".tmp", ".old")]
OURS = [*CHECKPOINTS, "latest", "best", "config.json", "config.py", "source", "data.json", "metrics.jsonl", "loss.png",
        "experts.png", "tensorboard", "wandb", "wandb_id", "manifest.json"]  # fmt: skip


def exists(out: Path) -> bool:
    """Whether `out` holds a run. ValueError where it holds something else under the names of a run's files."""
    manifest = out / "manifest.json"
    if manifest.exists() and '"data_fingerprint"' in manifest.read_text():
        return True
    if taken := [path.name for pattern in OURS for path in out.glob(pattern)]:
        raise ValueError(f"{out} is no run, and holds {', '.join(taken[:3])}, which a run writes: try another out_dir")
    return False


def delete(out: Path) -> None:
    """Deletes a run from its folder, and nothing that is not of a run. The manifest goes last: till then it is one."""
    for pattern in OURS:
        for old in out.glob(pattern):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def write(path, text):
    """All of it, or what was there before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def source(model: str) -> dict[str, Path]:
    """The code of a run, {name: file}: ours, and of the variants the one that it trains."""
    root, variant = Path(__file__).parent, Path(sys.modules[f"model_{model}"].__file__)
    ours = [path for path in root.glob("*.py") if not path.name.startswith("model_")]
    return {path.name: path for path in [*ours, variant]} | {f"data/{p.name}": p for p in root.glob("data/*.py")}


def describe(out: Path, config: dict, meta: dict, facts: dict) -> None:
    """Writes what a run is. config: as checkpoint.save takes it; meta: the data's; facts: more for the manifest."""
    root = Path(__file__).parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    manifest = {
        "command": [sys.executable, *sys.argv],
        "git_commit": commit or None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "host": {"system": platform.platform(), "cores": os.cpu_count()},
        **facts,
        "config": config,
    }
    out.mkdir(parents=True, exist_ok=True)
    write(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")  # first: it says that the rest is a run's
    write(out / "config.json", json.dumps(config, indent=1) + "\n")
    write(out / "config.py", config_source({"model": config["model"]} | config["knobs"] | config["model_config"]))
    write(out / "data.json", json.dumps(meta) + "\n")
    for name, file in source(config["model"]).items():
        target = out / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def read_metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, without one that a crash cut short."""
    rows, path = [], out / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{out}/metrics.jsonl: a line was cut short, and is left out: {line[:40]}...", file=sys.stderr)
    return rows


class Log:
    """Appends rows to metrics.jsonl, and to Weights & Biases (wandb: online or offline) and TensorBoard if asked to.

    step: where the run goes on; rows of later steps are dropped, since these steps will be done again.
    """

    def __init__(self, out: Path, step: int, config: dict, wandb: str = "", tensorboard: bool = False):
        rows = [row for row in read_metrics(out) if step > 0 and row["step"] <= step]
        write(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self.file, self.wandb, self.writer = open(out / "metrics.jsonl", "a", buffering=1), None, None
        if wandb:
            import wandb as client

            if not (out / "wandb_id").exists():  # what is resumed goes on there, too, and what begins does not
                write(out / "wandb_id", uuid.uuid4().hex[:8])
            run = dict(project="nanollm", name=out.resolve().name, id=(out / "wandb_id").read_text(), dir=out)
            self.wandb = client.init(mode=wandb, resume="allow", config=config, **run)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def write(self, row: dict) -> None:
        """A row of numbers for a step; what is not finite becomes null, since JSON has no word for it."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:  # the row waits in the file's buffer for room
            print(f"WARNING: metrics.jsonl: {error.strerror}", file=sys.stderr)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        if self.wandb:
            self.wandb.log(numbers, step=row["step"])
        for key, value in numbers.items() if self.writer else ():
            self.writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as error:
            print(f"WARNING: metrics.jsonl lacks its last rows: {error.strerror}", file=sys.stderr)
        if self.wandb:
            self.wandb.finish()
        if self.writer:
            self.writer.close()


def spiked(history: Sequence[float], value: float) -> bool:
    """Whether a value lies far above the last ones: 6 standard deviations, and a tenth."""
    if len(history) < 20:
        return False
    mean, spread = statistics.fmean(history), statistics.stdev(history)
    return value > mean + max(6 * spread, 0.1 * mean)


def plot(out: Path, title: str) -> None:
    """From metrics.jsonl: loss.png, and experts.png where a row has the load of experts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(out)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label, style in (("loss", "training", dict(color="C0", alpha=0.4, lw=1)),
                              ("val_loss", "validation", dict(color="C1", marker="o", ms=3))):  # fmt: skip
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axis.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
    last = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    losses = sorted(row["loss"] for row in rows if row.get("loss") is not None)
    if len(losses) > 20:
        axis.set_ylim(top=losses[-1 - len(losses) // 50] * 1.03)  # the first steps would flatten the rest
    axis.set(xlabel="step", ylabel="loss (nats per token)", title=title + (f": {last[-1]:.3f}" if last else ""))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out / "loss.png", dpi=120)
    plt.close(figure)
    loads = [(row["step"], row["expert_load"]) for row in rows if "expert_load" in row]
    if loads:  # a band for each layer, a line in it for each expert: its share of the layer's choices, 1 in balance
        load = np.array([load for _, load in loads], dtype=float)  # (times, layers, experts)
        share = load / load.mean(axis=2, keepdims=True)
        size = (loads[0][0], loads[-1][0] + 1, load.shape[1], 0)
        figure, axis = plt.subplots(figsize=(8, 1.5 + load.shape[1]), layout="constrained")
        style = dict(aspect="auto", extent=size, cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        image = axis.imshow(share.reshape(len(loads), -1).T, **style)
        axis.hlines(range(1, load.shape[1]), *size[:2], color="black", lw=0.8)
        axis.set(xlabel="step", ylabel="layers with experts", yticks=range(load.shape[1] + 1), title=f"{out}: load")
        figure.colorbar(image, label="choices of an expert / mean of its layer", extend="max")
        figure.savefig(out / "experts.png", dpi=120)
        plt.close(figure)
    gc.collect()  # a figure is in cycles of references: Python would keep dozens of them before it looks
