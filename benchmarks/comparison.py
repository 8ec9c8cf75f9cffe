"""What came of a comparison: tables and pictures, all drawn from one JSON file.

A result is the dictionary that compare.py writes: title, command, machine, match, and under "variants" a row for each
variant, with the losses of its seeds, its learning-rate sweep, its costs and its measured times.
"""

import math
import statistics
from pathlib import Path

import numpy as np

from benchmarks import timing
from benchmarks.verdicts import is_at_the_edge, rates_of, verdicts


# ---- the tables ------------------------------------------------------------------------------------------------------
def standard_error(values: list[float]) -> float | None:
    """Returns the standard error of the mean; None of a single value."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def mean_and_error(values: list, digits: int = 4, missing: str = "diverged") -> str:
    """missing: what is said where a value is None."""
    if None in values:
        return missing
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {standard_error(values):.{digits}f}"


def markdown(result: dict) -> str:
    """Returns the report of a comparison as Markdown."""
    if result["isoflop"]:
        return isoflop_markdown(result)
    lines = [f"# {result['title']}\n", timing.describe(result), what_is_equal(result)]
    lines += loss_table(result["variants"])
    lines += cost_table(result)
    return "\n".join(lines) + "\n"


def what_is_equal(result):
    rows = result["variants"]
    config = rows[0]["config"]
    optimizer = "the optimizer's among them; " if result.get("optimizer_counted") else ""
    equal = {
        "flops": f"all have the same training FLOPs ({optimizer}attention counted over all T keys)",
        "flops_per_token": "all have the same tokens and, by their width, the same FLOPs a token"
        + (", with the optimizer's" if optimizer else ""),
        "parameters": "all have the same tokens and, by their width, the same parameters",
    }
    evaluated = f"{config['eval_tokens']:,}" if config["eval_tokens"] else "all"
    return (
        f"{len(rows[0]['loss'])} seed(s); {equal[result['match']]}, and the same data in the same order. "
        f"Mean ± standard error over seeds; {evaluated} validation tokens. {how_they_are_tuned(rows)}Better or worse "
        f"is said where chance would say it in at most one of 20 tables of equal variants (benchmarks/verdicts.py).\n"
    )


def how_they_are_tuned(rows):
    if not rows[0]["sweep"]:
        return ""
    rates = min(len(row["sweep"]) for row in rows)
    return (
        f"Each learns at the rate that was best of {rates} or more at {rows[0]['sweep_seeds']} other seed(s); what a "
        f"rate between them would gain, by a parabola, is in the differences from {rows[0]['name']}. "
    )


def loss_table(rows):
    first = rows[0]
    lines = [
        f"| variant | validation loss | bits per byte | against {first['name']} | learning rate |",
        "|---|---|---|---|---|",
    ]
    for row, verdict in zip(rows, verdicts(rows)):
        rate = f"{row['lr'] * row['config']['learning_rate']:g}"
        if is_at_the_edge(rates_of(row)):
            rate += ", at the edge"
        loss = mean_and_error(row["loss"])
        bits = mean_and_error(row["bits_per_byte"], missing="n/a")
        lines.append(f"| {row['name']} | {loss} | {bits} | {verdict} | {rate} |")
    return lines


def cost_table(result):
    rows = result["variants"]
    first = rows[0]
    contexts = list(first.get("decode_seconds", ()))
    heads = ["variant", "parameters", "of them active", "FLOPs a token", "tokens", "training tokens/s", "MFU"]
    heads += ["peak memory", "cache bytes a token"]
    heads += [f"decoded tokens/s at {context}" for context in contexts]
    if result.get("optimizer_counted"):
        heads.insert(4, "of a step's FLOPs the optimizer's")
    lines = [f"\n| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cache = f"{row['cache_bytes_per_token']:,}"
        if row["state_bytes"]:
            cache += f" + {row['state_bytes']:,}"
        speed = ratio(first.get("train_seconds"), row.get("train_seconds"), row["config"]["batch_tokens"])
        cells = [row["name"], f"{row['parameters']:,}", f"{row['active_parameters']:,}"]
        cells.append(f"{row['flops_per_token']:.4g}")
        if result.get("optimizer_counted"):
            step = row["flops_per_token"] * row["config"]["batch_tokens"]
            cells.append(f"{row['optimizer_flops'] / (step + row['optimizer_flops']):.1%}")
        cells += [f"{row['tokens']:,}", speed, mfu(row, result), f"{row['memory_gb']:.2f} GB", cache]
        cells += [ratio(first["decode_seconds"][c], row["decode_seconds"][c], 1) for c in contexts]
        lines.append(f"| {' | '.join(cells)} |")
    if any(row["state_bytes"] for row in rows):
        lines.append('\n"+": bytes of state, however long the text is.')
    return lines


def ratio(first_seconds, seconds, tokens):
    """Returns tokens/s, and how many times the first variant's: the median over rounds in which all took turns."""
    if not seconds:
        return "n/a"
    times = statistics.median(timing.ratios(first_seconds, seconds))
    return f"{tokens / statistics.median(seconds):,.0f} ({times:.2f}x)"


def mfu(row, result):
    if not row.get("train_seconds") or not result["peak_flops"]:
        return "n/a"
    speed = row["config"]["batch_tokens"] / statistics.median(row["train_seconds"])
    return f"{speed * row['flops_per_token'] / result['peak_flops']:.1%}"


# ---- loss against size, at several budgets ---------------------------------------------------------------------------
def best_sizes(rows: list[dict]) -> dict:
    """Returns {(model, budget): (its rows, the parabola of loss over ln(parameters), its minimum in parameters)}.

    The minimum is None where it lies outside of the sizes tried, or the parabola has none (arXiv 2203.15556, 3.2).
    """
    found = {}
    for key in dict.fromkeys((row["model"], row["budget"]) for row in rows):
        own = [row for row in rows if (row["model"], row["budget"]) == key and None not in row["loss"]]
        x = [math.log(row["parameters"]) for row in own]
        y = [statistics.mean(row["loss"]) for row in own]
        parabola = None
        size = None
        if len(own) > 2:
            parabola = np.polyfit(x, y, 2)
            if parabola[0] > 0:
                lowest = -parabola[1] / (2 * parabola[0])
                if min(x) <= lowest <= max(x):
                    size = math.exp(lowest)
        found[key] = own, parabola, size
    return found


def isoflop_markdown(result):
    lines = [
        f"# {result['title']}\n",
        timing.describe(result),
        "Validation loss of each size at each budget of training FLOPs, and the size at which a parabola through them, "
        "over the logarithm of the parameters, is lowest.\n",
        "| budget | variant | parameters | tokens | validation loss |",
        "|---|---|---|---|---|",
    ]
    for row in result["variants"]:
        cells = [f"{row['budget']:.3g}", row["name"], f"{row['parameters']:,}", f"{row['tokens']:,}"]
        lines.append(f"| {' | '.join(cells)} | {mean_and_error(row['loss'])} |")
    lines += ["\n| model | budget | best size |", "|---|---|---|"]
    for (model, budget), (_, _, size) in best_sizes(result["variants"]).items():
        best = f"{size:,.0f} parameters" if size else "outside of the sizes tried"
        lines.append(f"| {model} | {budget:.3g} | {best} |")
    return "\n".join(lines) + "\n"


# ---- the pictures ----------------------------------------------------------------------------------------------------
def new_figure(title, panels, width):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(width, 4.5), layout="constrained")
    for axis in np.atleast_1d(axes):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    return figure, axes


def plot(result: dict, path: Path) -> None:
    """Draws loss against FLOPs and against time (means over seeds), and the last loss against cache bytes."""
    if result["isoflop"]:
        isoflop_plot(result, path)
        return
    figure, axes = new_figure(result["title"], 3, 15)
    for row in result["variants"]:
        points = [np.mean(same_step, axis=0) for same_step in zip(*row["curves"])]  # over seeds
        tokens = np.array([point[0] for point in points])
        loss = np.array([point[1] for point in points])
        batch = row["config"]["batch_tokens"]
        flops_per_token = row["flops_per_token"] + row.get("optimizer_flops", 0) / batch
        axes[0].plot(tokens * flops_per_token, loss, marker=".", label=row["name"])
        if row.get("train_seconds"):
            axes[1].plot(tokens * statistics.median(row["train_seconds"]) / batch, loss, marker=".")
        if None in row["loss"]:  # it diverged
            continue
        last = statistics.mean(row["loss"])
        error = standard_error(row["loss"]) or 0.0
        axes[2].errorbar(row["cache_bytes_per_token"], last, yerr=error, marker="o", capsize=3)
    name_points(axes[2], [row for row in result["variants"] if None not in row["loss"]])
    axes[0].set(xlabel="training FLOPs", ylabel="validation loss")
    axes[1].set(xlabel="seconds of training, at the speed measured in turn", ylabel="validation loss")
    axes[2].set(xlabel="cache bytes a token", ylabel="validation loss")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def name_points(axis, rows):
    """Writes each variant's name beside its point: to the right, unless another point or the edge is near there."""
    points = {row["name"]: (row["cache_bytes_per_token"], statistics.mean(row["loss"])) for row in rows}
    axis.margins(x=0.2)
    left, right = axis.get_xlim()
    bottom, top = axis.get_ylim()
    near = 0.15 * (right - left)  # about as wide as a name
    line = (top - bottom) / 22  # of the height of the letters
    for name, (x, y) in points.items():
        others = [point for other, point in points.items() if other != name]
        crowded = any(0 <= x2 - x < near and abs(y2 - y) < 2 * line for x2, y2 in others)
        on_the_left = crowded or x + near > right
        axis.annotate(
            name,
            (x, y),
            xytext=(-8 if on_the_left else 8, -3),
            textcoords="offset points",
            ha="right" if on_the_left else "left",
            fontsize=8,
        )


def isoflop_plot(result, path):
    figure, axis = new_figure(result["title"], 1, 7)
    for (model, budget), (own, parabola, size) in best_sizes(result["variants"]).items():
        x = [row["parameters"] for row in own]
        y = [statistics.mean(row["loss"]) for row in own]
        errors = [standard_error(row["loss"]) or 0 for row in own]
        bars = axis.errorbar(x, y, errors, fmt="o", capsize=3, label=f"{model}, {budget:.3g} FLOPs")
        color = bars[0].get_color()
        if parabola is not None:
            between = np.geomspace(min(x), max(x))
            axis.plot(between, np.polyval(parabola, np.log(between)), color=color)
        if size:
            axis.plot(size, np.polyval(parabola, math.log(size)), marker="*", markersize=14, color=color)
    axis.set(xlabel="parameters", ylabel="validation loss", xscale="log")
    axis.legend()
    figure.savefig(path, dpi=110)
