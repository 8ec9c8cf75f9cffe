"""The pictures of a run: loss.png, and what the model's own metrics() gave, drawn by its shape."""

import gc
import math
from pathlib import Path

import numpy as np

from training.run_folder import read_metrics

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
        title = f"{title}, validation loss {val_losses[-1]:.3f}"
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
