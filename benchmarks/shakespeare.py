"""`python bench.py shakespeare`: how soon two configs reach a validation loss, in steps and in seconds."""

import json
import math
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.timing import describe, in_turn, machine, random_batch, ratios, table_row, training_step
from training import run_folder

ROOT = Path(__file__).resolve().parent.parent
RESULT = "shakespeare_char"
TARGET = 1.88  # what nanoGPT reports for its CPU setting after 2,000 steps, from a sample of the validation split
OURS = "config/train_shakespeare_char_cpu.py"
NANOGPT = "config/train_shakespeare_char_nanogpt.py"
RUNS = {  # of each seed: the config, and the knobs that differ from it
    "ours": (OURS, dict(eval_every=20)),
    "nanogpt": (NANOGPT, dict(eval_every=100)),
    "long": (OURS, dict(eval_every=500, max_steps=2000)),
}


def measure(args: Namespace) -> Iterator[dict]:
    """Yields one result: what came of the runs of every seed, and the time of a step of both configs in turn."""
    seeds = " ".join(map(str, args.seeds))
    result = {"command": f"python bench.py shakespeare --seeds {seeds}", "machine": machine()}
    result |= {"target": TARGET, "seeds": args.seeds, "ours": [], "nanogpt": [], "long": []}
    for seed in args.seeds:
        for name, (config, knobs) in RUNS.items():
            print(f"seed {seed}: {config} {knobs}", file=sys.stderr)
            rows = run_training(config, out_dir(name, seed), args.data, seed=seed, **knobs)
            result[name].append(summary(rows))

    first = args.seeds[0]
    steps = [step_of_run(out_dir("ours", first)), step_of_run(out_dir("nanogpt", first))]
    took = in_turn(steps, random_batch(12, 64), rounds=30, times=3)
    result["step_ms"] = [[round(1000 * s, 2) for s in seconds] for seconds in took]  # ours, nanoGPT's
    yield result


# ---- what is measured -----------------------------------------------------------------------------------------------
def out_dir(name, seed):
    return f"out/bench/{name}_{seed}"


def run_training(config, out, data, **knobs):
    """Trains with train.py and returns its rows of metrics.jsonl."""
    knobs = {"data": data, "out_dir": out, "overwrite": True, **knobs}
    options = [f"--{key}={value}" for key, value in knobs.items()]
    subprocess.run([sys.executable, "train.py", config, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return run_folder.read_metrics(ROOT / out)


def summary(rows):
    """Returns what a run is judged by: its curve, the steps until its loss was TARGET, and the training time of these.

    A run that never falls to it counts with all its steps, and reached is False.
    """
    curve = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    ms = [row["ms"] for row in rows if "ms" in row]
    steps = steps_to_target(curve)
    reached = steps is not None
    if not reached:
        steps = len(ms)
    return {
        "curve": curve,
        "median_ms": statistics.median(ms),
        "reached": reached,
        "steps": steps,
        "seconds": sum(ms[:steps]) / 1000,
    }


def steps_to_target(curve):
    """Returns the step at which the line between two evaluations falls to TARGET, or None.

    With losses of 2.18 after 100 steps and 1.78 after 200, TARGET is 3 / 4 of the way from one to the other: step 175.
    """
    for (step, loss), (next_step, next_loss) in zip(curve, curve[1:]):
        if next_loss <= TARGET:
            way = (loss - TARGET) / (loss - next_loss)
            return math.ceil(step + way * (next_step - step))
    return None


def step_of_run(folder: str | Path, device: str = "cpu") -> Callable:
    """Returns the training step of a run, from the config that it saved."""
    config = json.loads((ROOT / folder / "config.json").read_text())
    return training_step(config["model"], config["model_config"], config["knobs"], device)


# ---- the table ------------------------------------------------------------------------------------------------------
def markdown(result: dict) -> str:
    """Returns the tables of a result."""
    lines = [
        f"# Tiny Shakespeare by character: steps and seconds to a validation loss of {result['target']}\n",
        describe(result),
        "Batches of 12 x 64 tokens; the loss is over the whole validation split, the time of training alone; mean and "
        "range over seeds. Evaluations are 20 steps apart (100 in nanoGPT's setting), and the step is where the line "
        "between two of them falls to the target.\n",
    ]
    lines += target_table(result)
    lines += missed_notes(result)
    lines += final_loss_table(result)
    return "\n".join(lines) + "\n"


def target_table(result):
    """Returns the table of steps and seconds to the target; steps x ms a step is free of what else a machine did."""
    ours = result["ours"]
    nanogpt = result["nanogpt"]
    our_steps = [run["steps"] for run in ours]
    their_steps = [run["steps"] for run in nanogpt]
    our_seconds = [run["seconds"] for run in ours]
    their_seconds = [run["seconds"] for run in nanogpt]
    our_ms, their_ms = result["step_ms"]
    step_share = statistics.median(ratios(our_steps, their_steps))
    ms_share = statistics.median(ratios(our_ms, their_ms))
    in_one_process = f"ms a step, {len(our_ms)} rounds in turn in one process"
    return [
        "| | nanoGPT's setting | ours | ours / nanoGPT's (median) |",
        "|---|---|---|---|",
        share_row("steps", their_steps, our_steps, "{:,.0f}".format),
        share_row("seconds", their_seconds, our_seconds, "{:.1f}".format),
        f"| {in_one_process} | {statistics.median(their_ms):.1f} | {statistics.median(our_ms):.1f} | {ms_share:.3f} |",
        f"| **time, as steps x ms a step in turn** | | | **{ms_share * step_share:.3f}** |",
    ]


def share_row(label, theirs, ours, form):
    """Returns the row of a number that each seed has one of."""
    share = statistics.median(ratios(ours, theirs))
    return table_row([label, mean_and_range(theirs, form), mean_and_range(ours, form), f"{share:.3f}"])


def mean_and_range(values, form):
    """Returns the mean over seeds and the range: 175 (172 to 179, 3 seeds)."""
    mean = form(statistics.mean(values))
    if len(values) == 1:
        return f"{mean} (1 seed)"
    return f"{mean} ({form(min(values))} to {form(max(values))}, {len(values)} seeds)"


def missed_notes(result):
    """Returns a sentence for each setting of which a run never reached the target."""
    notes = []
    for label, runs in {"nanoGPT's setting": result["nanogpt"], "ours": result["ours"]}.items():
        missed = sum(not run["reached"] for run in runs)
        if missed:
            ended = f"{missed} of {len(runs)} runs of {label} ended above {result['target']}"
            notes.append(f"\n{ended}: they count as if their last step had reached it.")
    return notes


def final_loss_table(result):
    lines = ["\n| config | steps | validation loss at the end |", "|---|---|---|"]
    labels = {"nanogpt": NANOGPT, "ours": OURS, "long": f"{OURS} --max_steps=2000"}
    for name, label in labels.items():
        ends = [run["curve"][-1] for run in result[name]]
        steps, _ = ends[0]
        losses = [loss for _, loss in ends]
        lines.append(f"| `{label}` | {steps:,} | {mean_and_range(losses, '{:.4f}'.format)} |")
    return lines
