"""Trains variants at equal compute, over learning rates and seeds, and shows with error bars what each idea buys.

    python compare.py --models baseline,gpt2,moe,mla,hybrid --budget 1e13 --seeds 3 --lrs 0.5,1,2
    python compare.py --models baseline,moe --match flops_per_token --budget 1e13
    python compare.py --vary optimizer=adamw,muon --budget 1e13
    python compare.py --budgets 2e12,5e12,1e13 --sizes n_embd=96:n_inner=256,n_embd=144:n_inner=384,n_embd=192

A variant is a model with knobs of its own: moe, or moe:balance_loss=0:bias_rate=0.001. All get the same data in the
same order, the same evaluation, and each the learning rate that suited it best with the first seed. The runs are those
of train.py, one folder each: a comparison that was killed goes on where it was, and one with more seeds, rates or
variants keeps what is finished. Further arguments (config files, --knob=value) go to every run; without a config file
they have that of config/compare_cpu.py.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import bench
import flops
import record
import timing
from configurator import resolve
from data.shards import Shards

ROOT = Path(__file__).resolve().parent
MORE_RATES = 2  # at most, beyond the ends of the sweep
DIVERGED = "in a row without a finite gradient"  # how train.py says it
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student's t, 5 %, two-sided: 1, 2... of freedom
MATCHES = ("flops", "flops_per_token", "parameters")


class Variant(NamedTuple):
    name: str
    config: dict  # all knobs, as train.py would have them
    arguments: list  # that make train.py have them; what differs between the runs comes behind
    flops_per_token: int
    steps: int
    tokens: int
    budget: float
    data_fingerprint: str


class Run(NamedTuple):
    variant: Variant
    lr: float  # a multiple of the config's
    seed: int
    folder: Path


def numbers(text):
    return [float(x) for x in text.split(",")]


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add("--models", default="baseline", help="variants, with commas; the first is what the others are compared with")
    add("--vary", metavar="KNOB=A,B,...", help="the values of one knob as variants of the model, or of MODEL.KNOB")
    add("--match", default="flops", choices=MATCHES, help="what is equal: all FLOPs (tokens follow), or all tokens and "
        "FLOPs per token, or tokens and parameters (for both a knob is solved)")  # fmt: skip
    add("--knob", help="which knob to solve (default: a width that the variant has)")
    add("--budget", type=float, default=1e13, help="training FLOPs of a run; with another match, of the first variant")
    add("--budgets", type=numbers, help="several budgets: curves of loss against size at each (isoflop)")
    add("--sizes", help="the sizes for --budgets, with commas: KNOB=VALUE:KNOB=VALUE,...")
    add("--seeds", type=int, default=3, help="runs at the best learning rate, each with another seed")
    add("--lrs", type=numbers, default="0.5,1,2", help="the learning rates to try, as multiples of the config's")
    add("--data", help="a folder that data/prepare.py made (default: the config's)")
    add("--out_dir", default="out/compare", help="the runs, one folder each")
    add("--jobs", type=int, default=1, help="runs at once: each gets its share of the cores, and one of the GPUs")
    add("--results", help="where the result goes: FILE.json, FILE.md and FILE.png (default: OUT_DIR/comparison)")
    add("--title", default="Variants at equal compute")
    add("--rounds", type=int, default=5, help="of measuring the speed; 0: leave it out")
    args, more = parser.parse_known_args(argv)
    args.more = more if any(word.endswith(".py") for word in more) else [str(ROOT / "config/compare_cpu.py"), *more]
    args.argv = sys.argv[1:] if argv is None else argv
    if args.seeds < 1 or args.jobs < 1 or min(args.lrs) <= 0:
        parser.error(f"--seeds {args.seeds} --jobs {args.jobs} --lrs {args.lrs}: give numbers above 0")
    if bool(args.budgets) != bool(args.sizes):
        parser.error("--budgets and --sizes go together")
    args.results = args.results or f"{args.out_dir}/comparison"
    fixed = [word for word in args.more if word.partition("=")[0] in ("--seed", "--max_steps", "--out_dir")]
    if fixed:
        parser.error(f"{' '.join(fixed)}: compare.py sets these itself, by --seeds, --budget and --out_dir")
    return args


# ---- the plan --------------------------------------------------------------------------------------------------------
def gpt_config(config):
    """The GPTConfig among the knobs."""
    cls = importlib.import_module(f"model_{config['model']}").GPTConfig
    return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})


def plan(args, name: str, budget: float, like: Variant | None = None) -> Variant:
    """The variant of this name. like: the one whose tokens it gets, and whose parameters or FLOPs per token."""
    model, *knobs = name.split(":")
    arguments = [*args.more, f"--model={model}", *(f"--{knob}" for knob in knobs)]
    arguments += [f"--data={args.data}"] if args.data else []
    config = resolve(ROOT / "train.py", arguments)
    data = Shards(config["data"], "train")
    added = {"vocab_size": config["vocab_size"] or -(-data.vocab_size // 64) * 64}
    T, batch_tokens = config["block_size"], config["batch_tokens"]
    if like:
        by = "parameters" if args.match == "parameters" else "flops"
        knob = args.knob or flops.width_knob(gpt_config(config | added))
        target = like.flops_per_token if by == "flops" else parameters(like)
        added[knob], _ = flops.match(model, config | added, T, target, knob, by)
    config = resolve(ROOT / "train.py", arguments + [f"--{key}={value}" for key, value in added.items()])
    per_token = flops.training_flops_per_token(model, gpt_config(config), T)
    steps = like.tokens // batch_tokens if like else round(budget / (per_token * batch_tokens))
    least = config["warmup_steps"] + 1
    if steps < least:
        raise ValueError(f"--budget={budget:.3g} pays for {steps} steps of {name} ({per_token:.3g} FLOPs a token, "
                         f"{batch_tokens:,} tokens a step), and warmup_steps={least - 1}: try "
                         f"{10 * least * per_token * batch_tokens:.1g}")  # fmt: skip
    added |= {"max_steps": steps, "eval_every": -(-steps // 5), "save_every": steps, "keep_last": 1}
    arguments += [f"--{key}={value}" for key, value in added.items()]
    config = resolve(ROOT / "train.py", arguments)
    return Variant(name, config, arguments, per_token, steps, steps * batch_tokens, budget, data.fingerprint)


def parameters(variant):
    return sum(flops.parameters(variant.config["model"], gpt_config(variant.config)).values())


def plan_all(args) -> list[Variant]:
    names = args.models.split(",")
    if args.vary:
        knob, _, values = args.vary.partition("=")
        base, _, knob = knob.rpartition(".")
        names = [f"{name}:{knob}={value}" for name in ([base] if base else names) for value in values.split(",")]
    if args.sizes:
        if len({name.split(":")[0] for name in names}) < len(names):
            raise ValueError(f"--sizes draws a curve for each model: name one once, not {', '.join(names)}")
        names = [f"{name}:{size}" for name in names for size in args.sizes.split(",")]
        return [plan(args, name, budget) for budget in args.budgets for name in names]
    first = plan(args, names[0], args.budget)
    return [first, *(plan(args, name, args.budget, None if args.match == "flops" else first) for name in names[1:])]


def make_run(args, variant, lr, seed):
    name = variant.name.replace(":", "_").replace("/", "-")
    return Run(variant, lr, seed, Path(args.out_dir) / name / f"{variant.steps}steps_lr{lr:g}_seed{seed}")


# ---- the runs --------------------------------------------------------------------------------------------------------
def options(run):
    """What a run has beside its variant's arguments."""
    return {"seed": run.seed, "learning_rate": run.lr * run.variant.config["learning_rate"], "out_dir": str(run.folder)}


def is_finished(run: Run) -> bool:
    """Whether it was done before. ValueError where another one stands in its folder."""
    if not record.exists(run.folder):
        return False
    saved = json.loads((run.folder / "config.json").read_text())
    saved = {"model": saved["model"], **saved["model_config"], **saved["knobs"]}
    want = json.loads(json.dumps(run.variant.config | options(run)))
    differ = [f"{k}={v!r}, not {want.get(k)!r}" for k, v in saved.items() if k != "eot_id" and v != want.get(k)]
    manifest = json.loads((run.folder / "manifest.json").read_text())
    if manifest["data_fingerprint"] != run.variant.data_fingerprint:
        differ.append("its data was another")
    if differ:
        raise ValueError(f"{run.folder} is of another comparison: {', '.join(differ[:3])}: try another --out_dir")
    return any(row["step"] == run.variant.steps and "val_loss" in row for row in record.read_metrics(run.folder))


def train(run: Run, slots: SimpleQueue, jobs: int, processes: list) -> Run:
    """Runs train.py to its end, or goes on with it. RuntimeError where it fails. slots: of the jobs, those free."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / "train.py", *run.variant.arguments]
    command += [f"--{key}={value}" for key, value in options(run).items()]
    command += ["--resume"] if record.exists(run.folder) else []
    own = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}
    slot = slots.get()
    if torch.cuda.is_available():
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        own["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[slot % len(gpus.split(","))]
    log = Path(f"{run.folder}.log")
    try:
        with log.open("a") as file:  # an orphan of a killed comparison may still write to it
            begin = file.tell()
            process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | own)
            processes.append(process)
            code = process.wait()
    finally:
        slots.put(slot)
    printed = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    if code and DIVERGED in "".join(printed):  # a result, too
        row = {"step": run.variant.steps, "tokens": run.variant.tokens, "val_loss": None, "val_bits_per_byte": None}
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    elif code or not is_finished(run):
        last = [line for line in printed if line.startswith("error: ")][-1:] or printed[-1:]
        raise RuntimeError(f"{run.folder} ended with code {code}; in {log}: {''.join(last)}")
    return run


def train_all(runs: list[Run], jobs: int, bar: tqdm) -> None:
    """Does what is not finished, `jobs` at a time; what is finished stays, whatever happens to the rest."""
    processes, left = [], [run for run in runs if not is_finished(run)]
    finished = sum(run.variant.budget for run in runs if run not in left)
    bar.initial, bar.n = bar.initial + finished, bar.n + finished  # they say nothing of the time that the others take

    def on_sigterm(*_):  # a Ctrl-C reaches the runs by itself
        for process in processes:
            process.terminate()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_sigterm)
    pool, slots = ThreadPoolExecutor(jobs), SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    try:
        for future in as_completed([pool.submit(train, run, slots, jobs, processes) for run in left]):
            run = future.result()
            bar.write(f"{run.variant.name}, learning rate x {run.lr:g}, seed {run.seed}: {loss_of(run):.4f}")
            bar.update(run.variant.budget)
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the runs at work, which save and stop after a signal


def final(run):
    return [row for row in record.read_metrics(run.folder) if "val_loss" in row][-1]


def loss_of(run):
    """Its last validation loss; infinity where it diverged."""
    loss = final(run)["val_loss"]
    return math.inf if loss is None else loss


# ---- what came of it -------------------------------------------------------------------------------------------------
def curve(run):
    """[(tokens, validation loss)] of a run, without the loss before training."""
    rows = [row for row in record.read_metrics(run.folder) if row.get("val_loss") is not None and row["step"] > 0]
    return [(row["tokens"], row["val_loss"]) for row in rows]


def describe(variant, sweep, repeats):
    """A variant's row of the result: what it is, and its runs at the best learning rate."""
    model, c = variant.config["model"], gpt_config(variant.config)
    best = min(sweep, key=loss_of)
    device, _ = timing.device_and_dtype(variant.config["device"])
    runs, size = [best, *repeats], 2 if timing.device_and_dtype(device)[1] == "bfloat16" else 4  # as sample.py decodes
    return {
        "name": variant.name,
        "model": model,
        "config": variant.config,
        "budget": variant.budget,
        "tokens": variant.tokens,
        "parameters": sum(flops.parameters(model, c).values()),
        "active_parameters": sum(flops.active_parameters(model, c).values()),
        "flops_per_token": variant.flops_per_token,
        "cache_bytes_per_token": flops.cache_bytes_per_token(model, c, size),
        "state_bytes": flops.state_bytes(model, c, size),
        "sweep": {f"{run.lr:g}": loss_of(run) for run in sweep},
        "lr": best.lr,
        "loss": [loss_of(run) for run in runs],
        "bits_per_byte": [final(run)["val_bits_per_byte"] for run in runs],
        "memory_gb": max(row["memory_gb"] for run in runs for row in record.read_metrics(run.folder) if "ms" in row),
        "curves": [curve(run) for run in runs],
    }


def measure(runs, rounds):
    """[{"train_seconds": of a step, "decode_seconds": {context: of a token}}], each a list with one number a round.

    All variants take turns, on one device. Decoding is at batch 1 with a cache, in the dtype that sample.py would take;
    context: the tokens that are in it already.
    """
    configs = [run.variant.config for run in runs]
    device, _ = timing.device_and_dtype(configs[0]["device"])
    torch.set_float32_matmul_precision("high" if configs[0]["tf32"] and device.startswith("cuda") else "highest")
    steps = []
    for run, c in zip(runs, configs):
        batch = c["batch_tokens"] // c["block_size"], c["block_size"], c["vocab_size"], device
        steps.append(partial(bench.step_of(run.folder.absolute(), device), *timing.random_batch(*batch)))
    found = [{"train_seconds": x, "decode_seconds": {}} for x in timing.in_turn(steps, (), rounds, 1, device)]
    T = min(c["block_size"] for c in configs)
    new = max(T // 16, 1)
    for context in (T // 4, T - new):
        steps = [decoder(run.variant, context, new, device, 2 + rounds) for run in runs]  # two calls warm up
        for row, seconds in zip(found, timing.in_turn(steps, (), rounds, 1, device)):
            row["decode_seconds"][str(context)] = [x / new for x in seconds]
    return found


@torch.no_grad()
def decoder(variant, context, new, device, calls):
    """Returns a function that decodes `new` tokens behind `context` random ones, and may be called so many times.

    Each call has a copy of the prefilled cache, made before: a state cannot go back, and a copy takes time.
    """
    model = timing.build(variant.config["model"], vars(gpt_config(variant.config)), device).eval()
    model = model.to(getattr(torch, timing.device_and_dtype(device)[1]))
    prompt = torch.randint(model.config.vocab_size, (1, context), device=device)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    prefilled = model.new_cache(1, context + new)
    model(prompt, cache=prefilled, last_only=True)
    caches = [prefilled.branch(1) for _ in range(calls)]

    @torch.no_grad()
    def decode():
        cache = caches.pop()
        for _ in range(new):
            model(token, cache=cache, last_only=True)

    return decode


def standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def verdict(row, first):
    """How a variant's loss differs from the first one's, ± standard error: a win if chance gives it once in 20 or less.

    By Student's t for two means of few seeds, which asks for more than two standard errors.
    """
    if math.inf in row["loss"] + first["loss"]:
        return "diverged"
    difference = statistics.mean(row["loss"]) - statistics.mean(first["loss"])
    if row is first:
        return "-"
    if len(row["loss"]) < 2 or len(first["loss"]) < 2:
        return f"{difference:+.4f} (one seed)"
    error = math.hypot(standard_error(row["loss"]), standard_error(first["loss"]))
    freedom = len(row["loss"]) + len(first["loss"]) - 2
    sure = abs(difference) > error * T95[min(freedom, len(T95)) - 1]
    word = "no difference seen" if not sure else "better" if difference < 0 else "worse"
    return f"{difference:+.4f} ± {error:.4f}: {word}"


def with_error(values, digits=4):
    if None in values or math.inf in values:
        return "n/a" if None in values else "diverged"
    error = standard_error(values)
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def markdown(result: dict) -> str:
    if result["isoflop"]:
        return isoflop_markdown(result)
    rows = result["variants"]
    first, seeds = rows[0], len(rows[0]["loss"])
    evaluated = f"{first['config']['eval_tokens']:,}" if first["config"]["eval_tokens"] else "all"
    equal = {
        "flops": "all have the same training FLOPs (attention counted over all T keys)",
        "flops_per_token": "all have the same tokens and, by their width, the same FLOPs a token",
        "parameters": "all have the same tokens and, by their width, the same parameters",
    }[result["match"]]
    lines = [
        f"# {result['title']}\n",
        timing.describe(result),
        f"{seeds} seed(s); {equal}, the same data in the same order, and each the learning rate that suited it best at "
        f"the first seed, of {min(len(row['sweep']) for row in rows)} or more. Mean ± standard error over seeds; "
        f"{evaluated} validation tokens.\n",
        f"| variant | validation loss | bits per byte | against {first['name']} | learning rate |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        rate = row["lr"] * row["config"]["learning_rate"]
        swept = [float(x) for x in row["sweep"]]
        edge = ", at the edge" if len(swept) > 1 and row["lr"] in (min(swept), max(swept)) else ""
        lines.append(f"| {row['name']} | {with_error(row['loss'])} | {with_error(row['bits_per_byte'])} | "
                     f"{verdict(row, first)} | {rate:g}{edge} |")  # fmt: skip
    lines += ["\n| variant | parameters | of them active | FLOPs a token | tokens | training tokens/s | MFU | "
              "peak memory | cache bytes a token |" + "".join(f" decoded tokens/s at {c} |" for c in contexts(first)),
              "|---" * (9 + len(contexts(first))) + "|"]  # fmt: skip
    for row in rows:
        state = f" + {row['state_bytes']:,}" if row["state_bytes"] else ""
        speed = ratio(first, row, lambda r: r.get("train_seconds"), row["config"]["batch_tokens"])
        decoded = [ratio(first, row, lambda r, c=c: r["decode_seconds"][c], 1) for c in contexts(first)]
        lines.append(f"| {row['name']} | {row['parameters']:,} | {row['active_parameters']:,} | "
                     f"{row['flops_per_token']:.4g} | {row['tokens']:,} | {speed} | {mfu(row, result)} | "
                     f"{row['memory_gb']:.2f} GB | {row['cache_bytes_per_token']:,}{state} |"
                     + "".join(f" {x} |" for x in decoded))  # fmt: skip
    if any(row["state_bytes"] for row in rows):
        lines.append('\n"+": bytes of state, however long the text is.')
    return "\n".join(lines) + "\n"


def contexts(row):
    return list(row.get("decode_seconds", ()))


def ratio(first, row, seconds, tokens):
    """Tokens/s, and how many times those of the first variant, as medians over rounds in which all took turns."""
    if not seconds(row):
        return "n/a"
    times = statistics.median(a / b for a, b in zip(seconds(first), seconds(row)))
    return f"{tokens / statistics.median(seconds(row)):,.0f} ({times:.2f}x)"


def mfu(row, result):
    if not row.get("train_seconds") or not result["peak_flops"]:
        return "n/a"
    speed = row["config"]["batch_tokens"] / statistics.median(row["train_seconds"])
    return f"{speed * row['flops_per_token'] / result['peak_flops']:.1%}"


def best_sizes(rows):
    """{(model, budget): (its rows, the parabola of loss over ln(parameters), its minimum in parameters)}.

    The minimum is None where it lies outside of the sizes tried, or the parabola has none (arXiv 2203.15556, 3.2).
    """
    found = {}
    for key in dict.fromkeys((row["model"], row["budget"]) for row in rows):
        own = [row for row in rows if (row["model"], row["budget"]) == key]
        x, y = [math.log(row["parameters"]) for row in own], [statistics.mean(row["loss"]) for row in own]
        fit = np.polyfit(x, y, 2) if len(own) > 2 else None
        lowest = -fit[1] / (2 * fit[0]) if fit is not None and fit[0] > 0 else math.inf
        found[key] = own, fit, math.exp(lowest) if min(x) <= lowest <= max(x) else None
    return found


def isoflop_markdown(result):
    found = best_sizes(result["variants"])
    lines = [
        f"# {result['title']}\n",
        timing.describe(result),
        "Validation loss of each size at each budget of training FLOPs, and the size at which a parabola through them, "
        "over the logarithm of the parameters, is lowest.\n",
        "| budget | variant | parameters | tokens | validation loss |",
        "|---|---|---|---|---|",
    ]
    for row in result["variants"]:
        lines.append(f"| {row['budget']:.3g} | {row['name']} | {row['parameters']:,} | {row['tokens']:,} | "
                     f"{with_error(row['loss'])} |")  # fmt: skip
    lines += ["\n| model | budget | best size |", "|---|---|---|"]
    for (model, budget), (_, _, size) in found.items():
        best = f"{size:,.0f} parameters" if size else "outside of the sizes tried"
        lines.append(f"| {model} | {budget:.3g} | {best} |")
    return "\n".join(lines) + "\n"


def isoflop_plot(result, path):
    figure, axis = new_figure(result, 1, 7)
    for (model, budget), (own, fit, size) in best_sizes(result["variants"]).items():
        x, y = [row["parameters"] for row in own], [statistics.mean(row["loss"]) for row in own]
        bars = axis.errorbar(x, y, [standard_error(row["loss"]) or 0 for row in own], fmt="o", capsize=3,
                             label=f"{model}, {budget:.3g} FLOPs")  # fmt: skip
        if fit is not None:
            xs = np.geomspace(min(x), max(x))
            axis.plot(xs, np.polyval(fit, np.log(xs)), color=bars[0].get_color())
        if size:
            axis.plot(size, np.polyval(fit, math.log(size)), marker="*", markersize=14, color=bars[0].get_color())
    axis.set(xlabel="parameters", ylabel="validation loss", xscale="log")
    axis.legend()
    figure.savefig(path, dpi=110)


def new_figure(result, panels, width):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(width, 4.5), layout="constrained")
    for axis in np.atleast_1d(axes):
        axis.grid(alpha=0.3)
    figure.suptitle(result["title"])
    return figure, axes


def plot(result: dict, path: Path) -> None:
    """Loss against FLOPs and against time (means over seeds), and cache bytes against the last loss."""
    if result["isoflop"]:
        return isoflop_plot(result, path)
    figure, axes = new_figure(result, 3, 15)
    for row in result["variants"]:
        tokens, loss = zip(*([statistics.mean(x) for x in zip(*points)] for points in zip(*row["curves"])))
        axes[0].plot([x * row["flops_per_token"] for x in tokens], loss, marker=".", label=row["name"])
        if row.get("train_seconds"):
            pace = statistics.median(row["train_seconds"]) / row["config"]["batch_tokens"]
            axes[1].plot([x * pace for x in tokens], loss, marker=".")
        error = standard_error(row["loss"]) or 0.0
        axes[2].errorbar(row["cache_bytes_per_token"], statistics.mean(row["loss"]), yerr=error, marker="o", capsize=3)
        axes[2].annotate(row["name"], (row["cache_bytes_per_token"], statistics.mean(row["loss"])),
                         xytext=(4, 4), textcoords="offset points", fontsize=8)  # fmt: skip
    for axis, label in zip(
        axes, ("training FLOPs", "seconds of training, at the speed measured in turn", "cache bytes a token")
    ):
        axis.set(xlabel=label, ylabel="validation loss")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def beyond(args, sweep):
    """[a further run] of a variant that learns best at an end of its sweep, which is thus no end any more; or []."""
    rates, best = sorted(run.lr for run in sweep), min(sweep, key=loss_of).lr
    if len(args.lrs) < 2 or len(sweep) >= len(args.lrs) + MORE_RATES or best not in (rates[0], rates[-1]):
        return []
    sweep.append(make_run(args, sweep[0].variant, best * best / (rates[1] if best == rates[0] else rates[-2]), 1))
    return sweep[-1:]


def compare(args) -> dict:
    """Does all runs; what came of them, for `markdown` and `plot`."""
    planned = plan_all(args)
    sweeps = [[make_run(args, variant, lr, 1) for lr in args.lrs] for variant in planned]
    new = [run for sweep in sweeps for run in sweep]
    folders = [str(run.folder) for run in new]
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        raise ValueError(f"planned twice: {', '.join(sorted(twice))}: give each variant, budget and rate once")
    total = sum(variant.budget for variant in planned) * (len(args.lrs) + args.seeds - 1)
    with tqdm(total=total, unit="FLOP", unit_scale=True, smoothing=0) as bar:
        while new:
            train_all(new, args.jobs, bar)
            new = [run for sweep in sweeps for run in beyond(args, sweep)]
            bar.total += sum(run.variant.budget for run in new)
        best = [min(sweep, key=loss_of) for sweep in sweeps]
        repeats = [[make_run(args, run.variant, run.lr, seed) for seed in range(2, args.seeds + 1)] for run in best]
        train_all([run for runs in repeats for run in runs], args.jobs, bar)
    device, dtype = timing.device_and_dtype(planned[0].config["device"], planned[0].config["dtype"])
    result = {
        "title": args.title,
        "command": shlex.join(["python", "compare.py", *args.argv]),
        "machine": timing.machine(device),
        "peak_flops": flops.peak_flops(flops.device_name(device), dtype),
        "match": args.match,
        "isoflop": bool(args.sizes),
        "variants": [describe(*row) for row in zip(planned, sweeps, repeats)],
    }
    if args.rounds and not args.sizes:
        try:
            for row, found in zip(result["variants"], measure(best, args.rounds)):
                row |= found
        except RuntimeError as error:  # out of memory, say: what was trained is not lost for that
            print(f"the speed was not measured: {error}", file=sys.stderr)
    return result


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    json_, markdown_, png = (Path(f"{args.results}.{kind}") for kind in ("json", "md", "png"))
    try:
        json_.parent.mkdir(parents=True, exist_ok=True)
        result = compare(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    json_.write_text(json.dumps(result, indent=1) + "\n")
    markdown_.write_text(markdown(result))
    plot(result, png)
    print(markdown(result))


if __name__ == "__main__":
    main()
