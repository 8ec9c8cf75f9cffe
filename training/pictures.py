"""The pictures of a run, drawn beside it from what metrics.jsonl says."""

import gc
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.disk import warn_once

# What train.py notes of each step, besides its number and its loss; all else is the model's own.
NOT_DRAWN = "lr grad_norm ms tokens_per_second mfu memory_gb resident_gb tokens skipped spikes".split()


class Curve(NamedTuple):
    """What a run is about: a number of each step, and one of each evaluation, with their names in metrics.jsonl."""

    step: str
    evaluation: str
    label: str


LOSS = Curve("loss", "val_loss", "loss (nats per token)")


class Thinned:
    """Every n-th of what is added, with n such that `most` at the most are kept; and besides the last one."""

    def __init__(self, most: int = 4000):
        self.most = most
        self.kept = []
        self.last = None
        self.every = 1
        self.added = 0

    def add(self, item) -> None:
        if self.added % self.every == 0:
            self.kept.append(item)
            if len(self.kept) > self.most:
                del self.kept[1::2]
                self.every *= 2
        self.last = item
        self.added += 1

    def items(self) -> list:
        if self.kept and self.kept[-1] is not self.last:
            return [*self.kept, self.last]
        return list(self.kept)


class Album:
    """The pictures of a run, drawn in a thread from a thinned history: a long run's cost no more than a short one's.

    Rows are those of metrics.jsonl. loss.png has the loss, or that of another name what the run is about; what the
    model's own metrics() gave is drawn by its shape: numbers share metrics.png, an axis each, and a table, such as
    (layers, experts), has a picture metrics-<name>.png.
    """

    def __init__(self, out: Path, title: str, stages: Sequence[int] = (), curve: Curve = LOSS):
        self.out = out
        self.curve = curve
        self.stages = stages  # the steps from which later stages hold
        self.title = title.replace("$", r"\$")  # which begins a formula
        self.steps = Thinned()
        self.evaluations = Thinned()
        self.with_tables = Thinned()
        self.drawer = ThreadPoolExecutor(1)  # one thread for all: each new one would leave its memory behind
        self.drawing = None

    def add(self, row: dict) -> None:
        if self.curve.evaluation in row:
            self.evaluations.add(row)
        if any(is_table(value) for value in row.values()):
            self.with_tables.add(row)
        if self.curve.step in row:
            self.steps.add({key: x for key, x in row.items() if key not in NOT_DRAWN and isinstance(x, int | float)})

    def draw(self) -> None:
        """Begins to draw, unless a drawing is still at work. One that fails costs a warning."""
        if self.drawing is None or self.drawing.done():
            self.warn()
            kinds = (self.steps, self.evaluations, self.with_tables)
            self.drawing = self.drawer.submit(
                plot, self.out, self.title, self.curve, self.stages, *(thinned.items() for thinned in kinds)
            )

    def finish(self) -> None:
        """Draws all there is, and waits for it."""
        if self.drawing:
            self.drawing.exception()  # waits for it
        self.draw()
        self.warn()

    def warn(self) -> None:
        """Says of the drawing that was begun last, once it is done, why it failed."""
        error = self.drawing.exception() if self.drawing else None
        if error:
            warn_once(f"no pictures of {self.out}: {type(error).__name__}: {error}")


def plot(out, title, curve, stages, steps, evaluations, with_tables):
    plot_curve(curve, steps, evaluations, stages, title, out / f"{curve.step}.png")
    own = sorted({key for row in steps for key in row} - {"step", curve.step, f"smoothed_{curve.step}"})
    if own:
        plot_numbers(steps, own, title, out / "metrics.png")
    for name in sorted({key for row in with_tables for key, value in row.items() if is_table(value)}):
        plot_table([row for row in with_tables if name in row], name, title, out / f"metrics-{name}.png")
    gc.collect()  # a figure is in cycles of references: Python would keep dozens of them before it looks


def new_figure(size, **options):
    """Returns a figure and its axes. pyplot would keep them, and is for one thread alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(**options)


def is_table(value):
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], list)


def plot_curve(curve, steps, evaluations, stages, title, path):
    """Draws what a run is about over the steps, and a line where a stage begins."""
    figure, axis = new_figure((8, 4.5))
    for first in stages:
        axis.axvline(first, color="gray", ls=":")
    training = [row for row in steps if curve.step in row]  # it was finite
    values = [row[curve.step] for row in training]
    axis.plot([row["step"] for row in training], values, label="training", color="C0", alpha=0.4, lw=1)
    smoothed = [row for row in steps if f"smoothed_{curve.step}" in row]
    smoothed_values = [row[f"smoothed_{curve.step}"] for row in smoothed]
    axis.plot([row["step"] for row in smoothed], smoothed_values, label="smoothed", color="C0")

    validation = [row for row in evaluations if row[curve.evaluation] is not None]
    found = [row[curve.evaluation] for row in validation]
    name = curve.evaluation.removeprefix("val_").replace("_", " ")
    axis.plot([row["step"] for row in validation], found, label="validation", color="C1", marker="o", ms=3)

    if curve is LOSS and len(values) > 20:
        # 2 % are higher, as the first steps are, and would flatten the rest.
        high = sorted(values)[-1 - len(values) // 50]
        axis.set_ylim(top=high * 1.03)
    if found:
        title = f"{title}, validation {name} {found[-1]:.3f}"
    axis.set(xlabel="step", ylabel=curve.label, title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def plot_numbers(rows, names, title, path):
    """Draws each of the named numbers over the steps, three axes to a line."""
    lines = math.ceil(len(names) / 3)
    figure, axes = new_figure((12, 2.6 * lines), nrows=lines, ncols=3, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names):
        points = [row for row in rows if row.get(name) is not None]
        axis.plot([row["step"] for row in points], [row[name] for row in points], lw=1)
        axis.set(xlabel="step", title=name.replace("_", " "), visible=True)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_table(rows, name, title, path):
    """Draws a band for each row of a table, in it a line for each column: its share of the row, 1 where all are equal.

    For the load of experts (layers, experts) a red line is an expert that is chosen too often, a blue one too seldom.
    """
    values = np.array([row[name] for row in rows], dtype=float)  # (times, rows, columns)
    times, bands, columns = values.shape
    share = values / values.mean(axis=2, keepdims=True).clip(min=1e-12)
    rows_of_image = share.reshape(times, bands * columns).T
    first = rows[0]["step"]
    last = rows[-1]["step"] + 1

    figure, axis = new_figure((8, 1.5 + bands))
    extent = (first, last, bands, 0)
    colors = dict(cmap="RdBu_r", vmin=0, vmax=2)
    image = axis.imshow(rows_of_image, aspect="auto", extent=extent, interpolation="nearest", **colors)
    axis.hlines(range(1, bands), first, last, color="black", lw=0.8)
    label = name.replace("_", " ")
    axis.set(xlabel="step", ylabel="row of the table", yticks=range(bands + 1), title=f"{title}: {label}")
    figure.colorbar(image, label=f"{label} / mean of its row", extend="max")
    figure.savefig(path, dpi=120)
