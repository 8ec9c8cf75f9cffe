"""The folder of a run: what it is (config, manifest, source) and what it did (metrics.jsonl, loss.png).

out/run/  config.json, config.py    the resolved config; the second is one to give back to train.py
          manifest.json, source/    from what it can be repeated: command, commit, versions, hardware, data, the code
          data.json                 the data's meta.json: its tokenizer for sample.py
          metrics.jsonl, loss.png   a line a step, and a line an evaluation
          step-*, latest, best      checkpoints (checkpoint.py)
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from configurator import config_source

OURS = ("step-*", "latest", "best", "manifest.json", "config.*", "data.json", "source", "metrics.jsonl*", "loss.png",
        "tensorboard")  # fmt: skip


def exists(out: Path) -> bool:
    return (out / "manifest.json").exists()


def delete(out: Path) -> None:
    """Deletes a run from its folder, and nothing that is not of a run."""
    for pattern in OURS:
        for old in out.glob(pattern):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def describe(out: Path, config: dict, meta: dict, facts: dict) -> None:
    """Writes what a run is. config: as checkpoint.save takes it; meta: the data's; facts: more for the manifest."""
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "config.py").write_text(config_source({"model": config["model"]} | config["knobs"] | config["model_config"]))
    (out / "data.json").write_text(json.dumps(meta) + "\n")
    root = Path(__file__).parent
    for file in [*root.glob("*.py"), *root.glob("data/*.py")]:
        if not file.name.startswith("model_") or file.stem == f"model_{config['model']}":
            target = out / "source" / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    manifest = {
        "command": [sys.executable, *sys.argv],
        "git_commit": commit or None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "host": {"system": platform.platform(), "cores": os.cpu_count()},
        **facts,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def read_metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, without one that a crash cut short."""
    rows = []
    for line in (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else ():
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
        temporary = out / "metrics.jsonl.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(out / "metrics.jsonl")
        self.file, self.wandb, self.writer = open(out / "metrics.jsonl", "a", buffering=1), None, None
        if wandb:
            import wandb as client

            name = out.resolve().name
            run = dict(project="nanollm", name=name, id=name, dir=out, config=config)
            self.wandb = client.init(mode=wandb, resume="allow", **run)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(out / "tensorboard", purge_step=step)

    def write(self, row: dict) -> None:
        self.file.write(json.dumps(row) + "\n")
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        if self.wandb:
            self.wandb.log(numbers, step=row["step"])
        for key, value in numbers.items() if self.writer else ():
            self.writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self.file.close()
        if self.wandb:
            self.wandb.finish()
        if self.writer:
            self.writer.close()


def plot(out: Path, title: str) -> None:
    """loss.png: the loss of each step and of each evaluation, from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(out)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label, style in (("loss", "training", dict(color="C0", alpha=0.4, lw=1)),
                              ("val_loss", "validation", dict(color="C1", marker="o", ms=3))):  # fmt: skip
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
    last = [row["val_loss"] for row in rows if "val_loss" in row]
    losses = sorted(row["loss"] for row in rows if "loss" in row)
    if len(losses) > 20:
        axis.set_ylim(top=losses[-1 - len(losses) // 50] * 1.03)  # the first steps would flatten the rest
    axis.set(xlabel="step", ylabel="loss (nats per token)", title=title + (f": {last[-1]:.3f}" if last else ""))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out / "loss.png", dpi=120)
    plt.close(figure)
