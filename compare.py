"""Trains variants at equal compute, over learning rates and seeds, and shows with error bars what each idea buys.

    python compare.py --models baseline,gpt2,moe,mla,hybrid --budget 1e13 --seeds 3 --lrs 0.5,1,2
    python compare.py --models baseline,moe --match flops_per_token --budget 1e13
    python compare.py --vary optimizer=adamw,muon --budget 1e13
    python compare.py --budgets 2e12,5e12,1e13 --sizes n_embd=96:n_inner=256,n_embd=144:n_inner=384,n_embd=192

A variant is a model with knobs of its own: moe, or moe:balance_loss=0:bias_rate=0.001. All get the same data in the
same order, the same evaluation, and each the learning rate that suits it, found with seeds of its own. The runs are
those of train.py, one folder each: a comparison that was killed goes on where it was, and one with more rates or
variants keeps what is finished. Further arguments (config files, --knob=value) go to every run; without a config file
they have that of config/compare_cpu.py. What can fail is tried before anything trains, and the plan is printed.
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
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from tqdm import tqdm

import flops
from benchmarks import comparison, timing, verdicts
from configurator import resolve
from data.shards import Shards
from data.text import print_any_text
from training import output, run_folder
from training.arguments import Parser, not_empty, number
from training.disk import read_json
from training.knobs import check
from training.signals import DIVERGED

ROOT = Path(__file__).resolve().parent
TRAIN = ROOT / "train.py"
MORE_RATES = 2  # at most, beyond the ends of the sweep
EVALUATIONS = 5  # of a run at most, after the one before its first step
MATCHES = ("flops", "flops_per_token", "parameters")
# It sets these for each run, and those that end a run in another way have no place in a comparison.
OWN_KNOBS = {"seed", "max_steps", "out_dir", "eval_every", "save_every", "keep_last"}
OTHER_ENDS = {"minutes", "eval_only", "dry_run"}
NOT_COMPARED = ("eot_id", "out_dir", "data")  # eot_id is the data's, a run may have moved, data have a fingerprint
FROM_LENGTH = ("max_steps", "eval_every", "save_every")  # they follow from a variant's steps: no difference to print


class Variant(NamedTuple):
    name: str
    config: dict  # all knobs, as train.py would have them
    arguments: list  # of train.py, without those that differ between its runs, which options() adds
    flops_per_token: float  # forward and backward
    optimizer_flops: int  # of a step; 0 with --match_optimizer=False
    steps: int
    tokens: int
    budget: float
    data_fingerprint: str

    def step_flops(self):
        return self.flops_per_token * self.config["batch_tokens"] + self.optimizer_flops


class Run(NamedTuple):
    variant: Variant
    lr: float  # a multiple of the config's
    seed: int
    folder: Path


# ---- arguments -------------------------------------------------------------------------------------------------------
above_0 = number("(0, 1e30]", float)


def numbers(text):
    return [above_0(x) for x in text.split(",")]


def folder(text):
    return str(Path(not_empty(text)).expanduser())


def yes_or_no(text):
    if text not in ("True", "False"):
        raise ValueError(text)  # argparse names the option
    return text == "True"


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--models", default="baseline", help="variants, with commas; the first is what the others are compared with")
    add("--vary", metavar="KNOB=A,B,...", help="the values of one knob as variants of the model, or of MODEL.KNOB")
    add("--match", default="flops", choices=MATCHES, help="what is equal: all FLOPs (tokens follow), or all tokens and "
        "FLOPs per token, or tokens and parameters (for both a knob is solved)")  # fmt: skip
    add("--match_optimizer", type=yes_or_no, nargs="?", default=True, const=True, metavar="False",
        help="count the optimizer's FLOPs of each step, too (%(default)s)")  # fmt: skip
    add("--knob", help="which knob to solve (default: a width that the variant has)")
    about_budget = "training FLOPs of a run; with another match, of the first variant"
    add("--budget", type=above_0, default=1e13, help=about_budget)
    add("--budgets", type=numbers, help="several budgets: curves of loss against size at each (isoflop)")
    add("--sizes", help="the sizes for --budgets, with commas: KNOB=VALUE:KNOB=VALUE,...")
    add("--seeds", type=number("[1, 1000]"), default=3, help="runs at the best learning rate, each with another seed; "
        "a third as many try each of the rates before")  # fmt: skip
    add("--lrs", type=numbers, default="0.5,1,2", help="the learning rates to try, as multiples of the config's")
    add("--data", type=not_empty, help="a folder that data/prepare.py made (default: the config's)")
    add("--out_dir", type=folder, default="out/compare", help="the runs, one folder each")
    about_jobs = "runs at once: each gets its share of the cores, and one of the GPUs"
    add("--jobs", type=number("[1, 1000]"), default=1, help=about_jobs)
    add("--results", type=folder, help="where the result goes: FILE.json, FILE.md and FILE.png (default: "
        "OUT_DIR/comparison)")  # fmt: skip
    add("--title", default="Variants at equal compute")
    add("--rounds", type=number("[0, 1e9]"), default=5, help="of measuring the speed; 0: leave it out")
    args, more = parser.parse_known_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.more = more
    if not any(word.endswith(".py") for word in more):
        args.more = [str(ROOT / "config/compare_cpu.py"), *more]
    if args.results is None:
        args.results = f"{args.out_dir}/comparison"
    args.sweep_seeds = verdicts.sweep_seeds(len(args.lrs), args.seeds)
    args.compared_seeds = range(args.sweep_seeds + 1, args.sweep_seeds + args.seeds + 1)
    if bool(args.budgets) != bool(args.sizes):
        parser.error("--budgets and --sizes go together")
    if args.sizes and args.match != "flops":
        parser.error(f"--match {args.match} is not for --sizes: each size gets the same FLOPs")
    if args.knob and args.match == "flops":
        parser.error("--knob says what another --match solves: give --match flops_per_token or --match parameters")
    check_knobs(args.more)
    return args


def check_knobs(words):
    """Raises ValueError where knobs, each given as "--KNOB=VALUE" or "KNOB=VALUE", would be lost."""
    given = {word.removeprefix("--").partition("=")[0]: word for word in words}
    if "model" in given:
        raise ValueError("--model is one run's: name the variants by --models")
    fixed = [word for knob, word in given.items() if knob in OWN_KNOBS]
    if fixed:
        raise ValueError(f"{' '.join(fixed)}: compare.py sets these itself, by --seeds, --budget and --out_dir")
    others = [word for knob, word in given.items() if knob in OTHER_ENDS]
    if others:
        raise ValueError(f"{' '.join(others)}: each run of a comparison trains for its --budget")


# ---- the plan --------------------------------------------------------------------------------------------------------
def gpt_config(config: dict):
    """Returns the GPTConfig among the knobs."""
    cls = importlib.import_module(f"model_{config['model']}").GPTConfig
    return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})


def parameters(variant: Variant) -> int:
    return sum(flops.parameters(variant.config["model"], gpt_config(variant.config)).values())


def plan(args, name: str, budget: float, like: Variant | None = None) -> Variant:
    """Returns the variant of this name. like: the one whose tokens it gets, and whose cost a token or parameters."""
    # 1. its knobs
    model, *knobs = name.split(":")
    check_knobs(knobs)
    arguments = [*args.more, f"--model={model}", *(f"--{knob}" for knob in knobs)]
    if args.data:
        arguments.append(f"--data={args.data}")
    config = resolve(TRAIN, arguments)
    check(config, world_size=1)
    if config["stages"] or not isinstance(config["data"], str):
        raise ValueError(f"{name} has stages or a mixture of texts, and what is compared has one stage and one text")
    data = Shards(config["data"], "train")
    if 0 < config["vocab_size"] < data.vocab_size:
        raise ValueError(f"{name}: the data has {data.vocab_size} tokens, more than vocab_size={config['vocab_size']}")
    Shards(config["data"], "val")
    T = config["block_size"]
    batch_tokens = config["batch_tokens"]
    if batch_tokens % T:
        raise ValueError(
            f"batch_tokens={batch_tokens} is not a multiple of block_size={T}: try {batch_tokens // T * T}"
        )

    # 2. its size
    added = {"vocab_size": config["vocab_size"] or math.ceil(data.vocab_size / 64) * 64}
    if like is not None:
        sizes = config | added
        knob = args.knob or flops.width_knob(gpt_config(sizes))
        if args.match == "parameters":
            value, _ = flops.match(model, sizes, T, parameters(like), knob, "parameters")
        else:
            target = like.step_flops() / like.config["batch_tokens"]
            optimizer = (config["optimizer"], batch_tokens) if args.match_optimizer else None
            value, _ = flops.match(model, sizes, T, target, knob, "flops", optimizer)
        added[knob] = value
    config = resolve(TRAIN, arguments + as_arguments(added))

    # 3. its length
    per_token = flops.training_flops_per_token(model, gpt_config(config), T)
    of_optimizer = 0
    if args.match_optimizer:
        of_optimizer, _ = flops.optimizer_cost(model, gpt_config(config), config["optimizer"])
    step_flops = per_token * batch_tokens + of_optimizer
    steps = round(budget / step_flops)
    if like is not None:
        steps = like.tokens // batch_tokens
    least = config["warmup_steps"] + 1
    if steps < least:
        pays = f"--budget={budget:.3g} pays for {steps} steps of {name}"
        if like is not None:
            pays = f"{name} has {steps} steps for the {like.tokens:,} tokens of {like.name}"
        raise ValueError(
            f"{pays} ({step_flops:.3g} FLOPs a step of {batch_tokens:,} tokens), and warmup_steps={least - 1}: "
            f"try --budget={10 * least * step_flops:.1g}"
        )
    added["max_steps"] = steps
    added["eval_every"] = math.ceil(steps / EVALUATIONS)
    added["save_every"] = steps
    added["keep_last"] = 1
    arguments += as_arguments(added)
    config = resolve(TRAIN, arguments)
    tokens = steps * batch_tokens
    return Variant(name, config, arguments, per_token, of_optimizer, steps, tokens, budget, data.fingerprint)


def as_arguments(knobs):
    return [f"--{key}={value}" for key, value in knobs.items()]


def plan_all(args) -> list[Variant]:
    names = args.models.split(",")
    if args.vary:
        knob, _, values = args.vary.partition("=")
        base, _, knob = knob.rpartition(".")
        models = [base] if base else names
        names = [f"{model}:{knob}={value}" for model in models for value in values.split(",")]
    if args.sizes:
        if len({name.split(":")[0] for name in names}) < len(names):
            raise ValueError(f"--sizes draws a curve for each model: name one once, not {', '.join(names)}")
        names = [f"{name}:{size}" for name in names for size in args.sizes.split(",")]
        return [plan(args, name, budget) for budget in args.budgets for name in names]
    first = plan(args, names[0], args.budget)
    like = None if args.match == "flops" else first
    others = [plan(args, name, args.budget, like) for name in names[1:]]
    for variant in others:
        evaluated = (variant.data_fingerprint, variant.config["eval_tokens"])
        if evaluated != (first.data_fingerprint, first.config["eval_tokens"]):
            raise ValueError(f"{variant.name} is evaluated on other tokens than {first.name}: give all the same data")
    return [first, *others]


def make_run(args, variant, lr, seed):
    name = variant.name.replace(":", "_").replace("/", "-")
    return Run(variant, lr, seed, Path(args.out_dir) / name / f"{variant.steps}steps_lr{lr:g}_seed{seed}")


def runs_at(args, variant, lr, seeds):
    return [make_run(args, variant, lr, seed) for seed in seeds]


def differences(variant: Variant, first: Variant) -> str:
    """Returns the knobs that are not as in the first variant, with its value where it has such a knob."""
    found = []
    for key, value in variant.config.items():
        if key not in first.config:
            found.append(f"{key}={value}")
        elif value != first.config[key] and key not in FROM_LENGTH:
            found.append(f"{key}={value} ({first.config[key]})")
    return ", ".join(found)


def print_plan(args, planned, sweeps, step_seconds):
    """Prints, to stderr, the runs, what sets the variants apart, and about how long it will take."""
    say = partial(print, file=sys.stderr)
    first = planned[0]
    rates = ", ".join(f"{lr:g}" for lr in args.lrs)
    seeds = f"with {args.sweep_seeds} seed(s), and the best of them " if args.sweep_seeds else ""
    say(f"learning rate(s) {rates} x the config's, {seeds}with {args.seeds} seed(s), which are compared:")
    seconds = 0.0
    for variant, sweep in zip(planned, sweeps):
        size = f"{parameters(variant):,} parameters, {variant.steps:,} steps = {variant.tokens:,} tokens"
        say(f"  {variant.name}: {size}, {variant.step_flops() * variant.steps:.3g} FLOPs")
        if variant is not first and differences(variant, first):
            say(f"    differs from {first.name} in {differences(variant, first)}")
        left = [run for run in sweep if not is_finished(run)]
        if variant.name in step_seconds:
            # An evaluated token costs a third of a trained one.
            evaluated = variant.config["eval_tokens"] / (3 * variant.config["batch_tokens"])
            steps = variant.steps + EVALUATIONS * evaluated
            seconds += step_seconds[variant.name] * steps * (len(left) + args.seeds)
    if step_seconds:
        minutes = max(seconds / args.jobs / 60, 0.1)
        say(f"about {minutes:.1f} minutes with --jobs {args.jobs}; more where the best rate lies at an end of a sweep")


# ---- a rehearsal -----------------------------------------------------------------------------------------------------
def training_step(variant, device):
    """Returns a function that does one step of the variant's training, on the same random tokens each time."""
    c = variant.config
    step = timing.training_step(c["model"], vars(gpt_config(c)), c, device)
    batch = timing.random_batch(c["batch_tokens"] // c["block_size"], c["block_size"], c["vocab_size"], device)
    return partial(step, *batch)


def rehearse(variant: Variant, jobs: int) -> float:
    """Tries what will be done with a variant, training and decoding, at its real size; returns a step's seconds.

    ValueError says where its model failed.
    """
    device, _ = timing.device_and_dtype(variant.config["device"])
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, os.cpu_count() // jobs))
    try:
        step = training_step(variant, device)
        step()  # makes the optimizer's state
        seconds = timing.seconds(step, device=device)
        cost(variant)  # is counted again for the result: where that fails, nothing has trained yet
        decoder(variant, context=1, new=1, device=device, calls=1)()
        return seconds
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        for frame in traceback.extract_tb(error.__traceback__):
            if Path(frame.filename).name == f"model_{variant.config['model']}.py":
                place = frame
        where = f"{Path(place.filename).name} line {place.lineno}"
        raise ValueError(f"{variant.name} cannot be trained: {where}: {type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(threads)


# ---- the runs --------------------------------------------------------------------------------------------------------
def options(run):
    """Returns what a run has beside its variant's arguments."""
    return {"seed": run.seed, "learning_rate": run.lr * run.variant.config["learning_rate"], "out_dir": str(run.folder)}


def is_finished(run: Run) -> bool:
    """Returns whether a run has come to its end. ValueError where its folder has a run of other knobs or data."""
    if not (run_folder.exists(run.folder) and run_folder.has_begun(run.folder)):
        return False
    saved = read_json(run.folder / "config.json", model=str, model_config=dict, knobs=dict)
    saved = {"model": saved["model"], **saved["model_config"], **saved["knobs"]}
    want = json.loads(json.dumps(run.variant.config | options(run)))
    differ = []
    for key, value in saved.items():
        if key not in NOT_COMPARED and value != want.get(key):
            differ.append(f"{key}={value!r}, not {want.get(key)!r}")
    manifest = read_json(run.folder / "manifest.json", data_fingerprint=str)
    if manifest["data_fingerprint"] != run.variant.data_fingerprint:
        differ.append("its data was another")
    if differ:
        raise ValueError(f"{run.folder} is of another comparison: {', '.join(differ[:3])}: try another --out_dir")
    return any(row["step"] == run.variant.steps and "val_loss" in row for row in run_folder.read_metrics(run.folder))


def train(run: Run, slots: SimpleQueue, jobs: int, processes: list) -> Run:
    """Runs train.py to its end, or goes on with it; ChildProcessError where it fails. slots: the free ones of jobs."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, TRAIN, *run.variant.arguments, *as_arguments(options(run))]
    if run_folder.exists(run.folder):
        command.append("--resume")
    log = Path(f"{run.folder}.log")
    slot = slots.get()
    try:
        with log.open("a") as file:  # an orphan of a killed comparison may still write to it
            begin = file.tell()
            environment = os.environ | share_of_the_machine(slot, jobs)
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
            processes.append(process)
            code = process.wait()
    finally:
        slots.put(slot)
    if code == DIVERGED:  # a result, too
        row = {"step": run.variant.steps, "tokens": run.variant.tokens, "val_loss": None, "val_bits_per_byte": None}
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    elif code or not is_finished(run):
        printed = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
        errors = [line for line in printed if line.startswith("error: ")]
        last = (errors or printed or [""])[-1]
        raise ChildProcessError(f"{run.folder} ended with code {code}; in {log}: {last}")
    return run


def share_of_the_machine(slot, jobs):
    """Returns the environment that gives a job its cores, and one of the GPUs that the user has or gave."""
    own = {}
    if jobs > 1:
        own["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // jobs))
    if torch.cuda.is_available():
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
        own["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return own


def train_all(runs: list[Run], jobs: int, bar: tqdm) -> None:
    """Does what is not finished, `jobs` at a time; what is finished stays, whatever happens to the rest."""
    left = [run for run in runs if not is_finished(run)]
    finished = sum(run.variant.budget for run in runs if run not in left)
    bar.initial += finished  # they say nothing of the time that the others take
    bar.n += finished
    processes = []

    def on_sigterm(*_):  # a Ctrl-C reaches the runs by itself
        for process in processes:
            process.terminate()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_sigterm)
    slots = SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(train, run, slots, jobs, processes) for run in left]):
            run = future.result()
            bar.write(f"{run.variant.name}, learning rate x {run.lr:g}, seed {run.seed}: {loss_of(run):.4f}")
            bar.update(run.variant.budget)
    finally:
        # Waits for the runs at work: after a signal they save and stop, after the failure of one they go on to the end.
        pool.shutdown(cancel_futures=True)


def final(run):
    """Returns the row of its last evaluation."""
    return [row for row in run_folder.read_metrics(run.folder) if "val_loss" in row][-1]


def loss_of(run):
    """Returns its last validation loss; infinity where it diverged."""
    loss = final(run)["val_loss"]
    return math.inf if loss is None else loss


def mean_losses(sweep):
    """Returns {learning rate: mean loss over its seeds}."""
    losses = {}
    for run in sweep:
        losses.setdefault(run.lr, []).append(loss_of(run))
    return {lr: statistics.mean(found) for lr, found in losses.items()}


def beyond(args, sweep):
    """Adds to a sweep the runs at one more rate where it learns best at an end: best at 2 of 0.5, 1, 2 adds 4.

    Returns what it adds.
    """
    losses = mean_losses(sweep)
    if not verdicts.is_at_the_edge(losses) or len(losses) >= len(args.lrs) + MORE_RATES:
        return []
    further = runs_at(args, sweep[0].variant, verdicts.rate_beyond(losses), range(1, args.sweep_seeds + 1))
    sweep.extend(further)
    return further


# ---- what came of them -----------------------------------------------------------------------------------------------
def curve(run):
    """Returns [(tokens, validation loss)] of a run, without the loss before training."""
    rows = [row for row in run_folder.read_metrics(run.folder) if row.get("val_loss") is not None and row["step"] > 0]
    return [(row["tokens"], row["val_loss"]) for row in rows]


def none_if_infinite(loss):
    """Returns None for infinity, which JSON has not: the mean loss at a rate at which a run diverged."""
    return loss if math.isfinite(loss) else None


def cost(variant: Variant) -> dict:
    """Returns what a variant costs, counted from its model."""
    model = variant.config["model"]
    c = gpt_config(variant.config)
    device, _ = timing.device_and_dtype(variant.config["device"])
    _, dtype = timing.device_and_dtype(device)
    size = 4 if dtype == "float32" else 2  # as it is decoded here
    return {
        "parameters": parameters(variant),
        "active_parameters": sum(flops.active_parameters(model, c).values()),
        "flops_per_token": variant.flops_per_token,
        "optimizer_flops": variant.optimizer_flops,
        "cache_bytes_per_token": flops.cache_bytes_per_token(model, c, size),
        "state_bytes": flops.state_bytes(model, c, size),
    }


def outcome(variant: Variant, sweep: list[Run], repeats: list[Run]) -> dict:
    """Returns a variant's row of the result: what it is and costs, and its runs at its learning rate."""
    return {
        "name": variant.name,
        "model": variant.config["model"],
        "config": variant.config,
        "budget": variant.budget,
        "tokens": variant.tokens,
        **cost(variant),
        "sweep": {f"{lr:g}": none_if_infinite(loss) for lr, loss in mean_losses(sweep).items()},
        "sweep_seeds": len({run.seed for run in sweep}),
        "lr": repeats[0].lr,
        "loss": [final(run)["val_loss"] for run in repeats],
        "bits_per_byte": [final(run)["val_bits_per_byte"] for run in repeats],
        "memory_gb": max(
            row["memory_gb"] for run in repeats for row in run_folder.read_metrics(run.folder) if "ms" in row
        ),
        "curves": [curve(run) for run in repeats],
    }


def measure(variants: list[Variant], rounds: int) -> list[dict]:
    """Returns [{"train_seconds": of a step, "decode_seconds": {context: of a token}}], lists with a number a round.

    All variants take turns, on one device. Decoding is at batch 1 with a cache, in the dtype that training takes with
    dtype=auto; context: the tokens that are in it already.
    """
    config = variants[0].config
    device, _ = timing.device_and_dtype(config["device"])
    torch.set_float32_matmul_precision("high" if config["tf32"] and device.startswith("cuda") else "highest")
    steps = [training_step(variant, device) for variant in variants]
    found = [{"train_seconds": x, "decode_seconds": {}} for x in timing.in_turn(steps, (), rounds, 1, device)]
    T = min(variant.config["block_size"] for variant in variants)
    new = max(T // 16, 1)
    for context in (T // 4, T - new):
        steps = [decoder(variant, context, new, device, 2 + rounds) for variant in variants]  # two calls warm up
        for row, seconds in zip(found, timing.in_turn(steps, (), rounds, 1, device)):
            row["decode_seconds"][str(context)] = [x / new for x in seconds]
    return found


@torch.no_grad()
def decoder(variant, context, new, device, calls):
    """Returns a function that passes `new` tokens one by one after `context` random ones; it takes `calls` calls.

    Each uses up a copy of the prefilled cache, made before: a state cannot go back, and a copy takes time.
    """
    model = timing.build(variant.config["model"], vars(gpt_config(variant.config)), device).eval()
    _, dtype = timing.device_and_dtype(device)
    model = model.to(getattr(torch, dtype))
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


# ---- all of it -------------------------------------------------------------------------------------------------------
def compare(args) -> dict:
    """Does all runs; returns what came of them, for `comparison.markdown` and `comparison.plot`."""
    # 1. plan, and try what can fail
    planned = plan_all(args)
    sweeps = []
    for variant in planned:
        sweeps.append([run for lr in args.lrs for run in runs_at(args, variant, lr, range(1, args.sweep_seeds + 1))])
    possible = [[run for lr in args.lrs for run in runs_at(args, v, lr, args.compared_seeds)] for v in planned]
    folders = [str(run.folder) for runs in sweeps + possible for run in runs]
    twice = sorted({folder for folder in folders if folders.count(folder) > 1})
    if twice:
        raise ValueError(f"planned twice: {', '.join(twice)}: give each variant, budget and rate once")
    step_seconds = {}
    for variant, sweep, repeats in zip(planned, sweeps, possible):
        finished = [is_finished(run) for run in sweep + repeats]  # refuses a folder of another comparison
        if not all(finished[: len(sweep)]) or sum(finished[len(sweep) :]) < args.seeds:
            step_seconds[variant.name] = rehearse(variant, args.jobs)
    print_plan(args, planned, sweeps, step_seconds)

    # 2. find each variant's learning rate, then repeat it with other seeds
    total = sum(variant.budget for variant in planned) * (len(args.lrs) * args.sweep_seeds + args.seeds)
    with tqdm(total=total, unit="FLOP", unit_scale=True, smoothing=0) as bar:
        new = [run for sweep in sweeps for run in sweep]
        while new:
            train_all(new, args.jobs, bar)
            new = [run for sweep in sweeps for run in beyond(args, sweep)]
            bar.total += sum(run.variant.budget for run in new)
        repeats = []
        for variant, sweep in zip(planned, sweeps):
            lr = verdicts.best_rate(mean_losses(sweep)) if sweep else args.lrs[0]
            repeats.append(runs_at(args, variant, lr, args.compared_seeds))
        train_all([run for runs in repeats for run in runs], args.jobs, bar)

    # 3. say what came of it
    device, dtype = timing.device_and_dtype(planned[0].config["device"], planned[0].config["dtype"])
    result = {
        "title": args.title,
        "command": shlex.join(["python", "compare.py", *args.argv]),
        "machine": timing.machine(device),
        "peak_flops": flops.peak_flops(flops.device_name(device), dtype),
        "match": args.match,
        "optimizer_counted": args.match_optimizer,
        "isoflop": bool(args.sizes),
        "variants": [outcome(*row) for row in zip(planned, sweeps, repeats)],
    }
    if args.rounds and not args.sizes:
        try:
            for row, found in zip(result["variants"], measure(planned, args.rounds)):
                row |= found
        except RuntimeError as error:  # out of memory, say: what was trained is not lost for that
            print(f"the speed was not measured: {error}", file=sys.stderr)
    return result


def main(argv: list[str] | None = None) -> None:
    print_any_text()
    with output.errors_in_one_line():
        args = parse_arguments(argv)
        json_file, markdown_file, picture = [Path(f"{args.results}.{kind}") for kind in ("json", "md", "png")]
        folder = json_file.parent
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--results {args.results}: {folder} cannot be written to: choose another folder")
        try:
            result = compare(args)
        except KeyboardInterrupt:
            print("stopped: the same command goes on from here", file=sys.stderr)
            sys.exit(130)
    json_file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    markdown_file.write_text(comparison.markdown(result))
    comparison.plot(result, picture)
    print(comparison.markdown(result))


if __name__ == "__main__":
    output.outlast_readers()
    main()
