"""Measures speed and writes results/NAME.json and the table drawn from it, results/NAME.md.

    python bench.py shakespeare    how soon two configs reach validation loss 1.88, in steps and in seconds
    python bench.py train          training tokens/s of model_baseline.py and model_gpt2.py at two sizes
    python bench.py loader         the loader's share of a step, and its memory over a large shard

Machines differ and get busy, so nothing is said in absolute times alone: what is compared runs in turn, round by round,
and the median of the rounds' ratios counts.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TARGET = 1.88  # what nanoGPT reports for its CPU setting after 2,000 steps, from a sample of the validation split
OURS, NANOGPT = "config/train_shakespeare_char_cpu.py", "config/train_shakespeare_char_nanogpt.py"


def machine() -> dict:
    """What it was measured on."""
    import torch

    models = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x] if (
        Path("/proc/cpuinfo").exists()
    ) else []  # fmt: skip
    cpu = models[0] if models else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def write(folder: Path, name: str, result: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(MARKDOWN[name](result))
    print(MARKDOWN[name](result))


def describe(result):
    m = result["machine"]
    return f"{m['cores']} x {m['cpu']}, {m['threads']} thread(s), torch {m['torch']}. `{result['command']}`\n"


def make_step(model_name, sizes, dtype="float32", compiled=False, optimizer="adamw", learning_rate=1e-3, **options):
    """(a function that does one training step of train.py on tokens x, y; the number of parameters)"""
    import importlib

    import torch

    import muon

    torch.manual_seed(0)
    variant = importlib.import_module(f"model_{model_name}")
    model = variant.GPT(variant.GPTConfig(**sizes))
    net = torch.compile(model) if compiled else model
    optimizer = muon.make_optimizer(model, optimizer, learning_rate, **options)

    def step(x, y):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = net(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in model.parameters())


def random_batch(windows, length):
    import torch

    tokens = torch.randint(66, (windows, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def in_turn(functions, batch, rounds, times):
    """Seconds of a call of each function, [rounds] for each: all of them are measured in every round."""
    for function in functions:
        for _ in range(3):  # compiles, and makes the optimizer's state
            function(*batch)
    took = [[] for _ in functions]
    for _ in range(rounds):
        for function, seconds in zip(functions, took):
            begin = time.perf_counter()
            for _ in range(times):
                function(*batch)
            seconds.append((time.perf_counter() - begin) / times)
    return took


# ---- shakespeare: steps and seconds to a loss -----------------------------------------------------------------------
def run_training(config, out, data, **knobs):
    """Trains with train.py and returns its rows of metrics.jsonl."""
    options = [f"--{key}={value}" for key, value in {"data": data, "out_dir": out, "overwrite": True, **knobs}.items()]
    subprocess.run([sys.executable, "train.py", config, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (ROOT / out / "metrics.jsonl").read_text().splitlines()]


def summary(rows):
    """What a run is judged by: where the line between two evaluations falls to TARGET, and training time to there.

    A run that never falls to it counts with all its steps, and reached is False.
    """
    curve = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    ms = [row["ms"] for row in rows if "ms" in row]
    found = {"curve": curve, "median_ms": statistics.median(ms)}
    for (s0, l0), (s1, l1) in zip(curve, curve[1:]):
        if l1 <= TARGET:
            steps = int(-(-(s0 + (l0 - TARGET) / (l0 - l1) * (s1 - s0)) // 1))
            return found | {"reached": True, "steps": steps, "seconds": sum(ms[:steps]) / 1000}
    return found | {"reached": False, "steps": len(ms), "seconds": sum(ms) / 1000}


def step_of(folder):
    """The training step of a run, from the config it saved."""
    config = json.loads((ROOT / folder / "config.json").read_text())
    names = ("optimizer", "learning_rate", "weight_decay", "beta1", "beta2", "muon_momentum", "muon_steps")
    options = {key: config["knobs"][key] for key in names}
    import torch

    dtype = config["knobs"]["muon_dtype"]
    options["muon_dtype"] = None if dtype == "auto" else getattr(torch, dtype)
    return make_step(config["model"], config["model_config"], **options)[0]


def shakespeare(args):
    result = {
        "command": f"python bench.py shakespeare --seeds {' '.join(map(str, args.seeds))}",
        "machine": machine(),
        "target": TARGET,
        "seeds": args.seeds,
    }
    result |= {"ours": [], "nanogpt": [], "long": []}
    for seed in args.seeds:
        for who, config, knobs in (
            ("ours", OURS, dict(eval_every=20)),
            ("nanogpt", NANOGPT, dict(eval_every=100)),
            ("long", OURS, dict(eval_every=500, max_steps=2000)),
        ):
            print(f"seed {seed}: {config} {knobs}", file=sys.stderr)
            rows = run_training(config, f"out/bench/{who}_{seed}", args.data, seed=seed, **knobs)
            result[who].append(summary(rows))
    steps = [step_of(f"out/bench/{who}_{args.seeds[0]}") for who in ("ours", "nanogpt")]
    took = in_turn(steps, random_batch(12, 64), rounds=30, times=3)
    result["step_ms"] = [[round(1000 * x, 2) for x in seconds] for seconds in took]  # ours, nanoGPT's
    write(Path(args.out), "shakespeare_char_cpu", result)


def spread(values, form):
    whole = f" ({form(min(values))} to {form(max(values))}, {len(values)} seeds)" if len(values) > 1 else " (1 seed)"
    return form(statistics.mean(values)) + whole


def shakespeare_markdown(result):
    ours, nanogpt, target = result["ours"], result["nanogpt"], result["target"]
    lines = [
        f"# Tiny Shakespeare by character: steps and seconds to a validation loss of {target}\n",
        describe(result),
        "Batches of 12 x 64 tokens; the loss is over the whole validation split, the time of training alone; mean and "
        "range over seeds. Evaluations are 20 steps apart (100 in nanoGPT's setting), and the step is where the line "
        "between two of them falls to the target.\n",
        "| | nanoGPT's setting | ours | ours / nanoGPT's (median) |",
        "|---|---|---|---|",
    ]
    for key, form in (("steps", "{:,.0f}".format), ("seconds", "{:.1f}".format)):
        theirs_, ours_ = [run[key] for run in nanogpt], [run[key] for run in ours]
        ratio = statistics.median(a / b for a, b in zip(ours_, theirs_))
        lines.append(f"| {key} | {spread(theirs_, form)} | {spread(ours_, form)} | {ratio:.3f} |")
    step_ratio = statistics.median(a / b for a, b in zip(*result["step_ms"]))
    ours_, theirs_ = map(statistics.median, result["step_ms"])
    share = step_ratio * statistics.median(a["steps"] / b["steps"] for a, b in zip(ours, nanogpt))
    lines += [
        f"| ms a step, {len(result['step_ms'][0])} rounds in turn in one process | {theirs_:.1f} | {ours_:.1f} | "
        f"{step_ratio:.3f} |",
        f"| **time, as steps x ms a step in turn** | | | **{share:.3f}** |",
    ]
    for label, runs in (("nanoGPT's setting", nanogpt), ("ours", ours)):
        missed = sum(not run["reached"] for run in runs)
        if missed:
            lines.append(f"\n{missed} of {len(runs)} runs of {label} ended above {target}: they count as if their last "
                         "step had reached it.")  # fmt: skip
    lines += ["\n| config | steps | validation loss at the end |", "|---|---|---|"]
    for who, label in (("nanogpt", NANOGPT), ("ours", OURS), ("long", f"{OURS} --max_steps=2000")):
        ends = [run["curve"][-1] for run in result[who]]
        lines.append(f"| `{label}` | {ends[0][0]:,} | {spread([loss for _, loss in ends], '{:.4f}'.format)} |")
    return "\n".join(lines) + "\n"


# ---- train: tokens per second ---------------------------------------------------------------------------------------
SIZES = {  # (windows, tokens in one), sizes of both models, and the baseline's own
    "n_embd 128": ((12, 64), dict(n_layer=4, n_head=4, n_embd=128), dict(n_kv_head=4, head_dim=32, n_inner=344)),
    "n_embd 384": ((4, 256), dict(n_layer=6, n_head=6, n_embd=384), dict(n_kv_head=6, head_dim=64, n_inner=1024)),
}
SETTINGS = (("gpt2", "float32", False), ("baseline", "float32", False), ("baseline", "float32", True),
            ("baseline", "bfloat16", True))  # fmt: skip


def train(args):
    result = {
        "command": f"python bench.py train --rounds {args.rounds} --tokens {args.tokens}",
        "machine": machine(),
        "rounds": args.rounds,
        "sizes": {},
    }
    for size, (batch, both, own) in SIZES.items():
        rows, steps = [], []
        for name, dtype, compiled in SETTINGS:
            sizes = both | (own if name == "baseline" else {"bias": False}) | {"block_size": batch[1], "vocab_size": 66}
            step, parameters = make_step(name, sizes, dtype, compiled)
            steps.append(step)
            rows.append(dict(model=name, dtype=dtype, compile=compiled, parameters=parameters))
        times = max(1, args.tokens // (batch[0] * batch[1]))
        for row, seconds in zip(rows, in_turn(steps, random_batch(*batch), args.rounds, times)):
            row["seconds"] = [round(x, 4) for x in seconds]
        result["sizes"][size] = {"batch": batch, "rows": rows}
        write(Path(args.out), "training_speed_cpu", result)


def train_markdown(result):
    lines = [
        "# Training tokens per second\n",
        describe(result),
        f"One step of AdamW with clipping; {result['rounds']} rounds in which all settings take turns; medians.\n",
        "| size | model | parameters | dtype | compiled | tokens/s | x gpt2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, measured in result["sizes"].items():
        windows, length = measured["batch"]
        first = measured["rows"][0]["seconds"]
        for row in measured["rows"]:
            speed = statistics.median(windows * length / s for s in row["seconds"])
            ratio = statistics.median(a / b for a, b in zip(first, row["seconds"]))
            compiled = "yes" if row["compile"] else "no"
            lines.append(f"| {size}, {windows} x {length} | {row['model']} | {row['parameters']:,} | {row['dtype']} | "
                         f"{compiled} | {speed:,.0f} | {ratio:.2f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


# ---- loader: its share of a step, and its memory --------------------------------------------------------------------
def read_everything(folder):
    """Peak MB of this process after it has read an epoch of a folder's windows (Linux)."""
    from data.shards import Loader, Shards

    loader = Loader(Shards(folder, "train"), 1024, 64)
    for step in range(loader.windows_per_epoch // 64):
        list(loader.batches(step))
    status = Path("/proc/self/status").read_text()  # getrusage's peak would begin at that of the parent
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def loader(args):
    import multiprocessing
    import tempfile

    import numpy as np

    from data.shards import Loader, Shards, write_shard

    result = {
        "command": f"python bench.py loader --steps {args.steps}",
        "machine": machine(),
        "steps": args.steps,
        "memory": [],
    }
    # 1. its share of the shortest step that we train with
    batch, both, own = SIZES["n_embd 128"]
    batches = Loader(Shards(args.data, "train"), batch[1], batch[0])
    step, _ = make_step("baseline", both | own | {"block_size": batch[1], "vocab_size": 66})
    load = total = 0.0
    for i in range(-3, args.steps):
        begin = time.perf_counter()
        ((x, y),) = batches.batches(i + 3)
        loaded = time.perf_counter()
        step(x, y)
        if i >= 0:
            load, total = load + loaded - begin, total + time.perf_counter() - begin
    result |= {"batch": batch, "load_us": 1e6 * load / args.steps, "step_us": 1e6 * total / args.steps}
    # 2. the memory of a process that reads all of a shard, for each size a process of its own
    for tokens in (2_000_000, 20_000_000, 200_000_000):
        with tempfile.TemporaryDirectory() as folder:
            write_shard(Path(folder) / "train_000000.bin", np.resize(np.arange(1000, dtype=np.uint16), tokens), 50257)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                result["memory"].append({"tokens": tokens, "peak_mb": pool.apply(read_everything, [folder])})
    write(Path(args.out), "loader_cpu", result)


def loader_markdown(result):
    load, step = result["load_us"], result["step_us"]
    windows, length = result["batch"]
    lines = [
        "# What the loader costs\n",
        describe(result),
        f"{result['steps']} steps of the 0.8M-parameter baseline on {windows} x {length} tokens: loading takes "
        f"{load:.0f} us of {step / 1000:.1f} ms, **{load / step:.2%}** of a step.\n",
        "A process that reads every window of a shard once:\n",
        "| tokens | MB on disk | peak MB of the process |",
        "|---|---|---|",
    ]
    lines += [f"| {m['tokens']:,} | {m['tokens'] * 2 / 1e6:,.0f} | {m['peak_mb']:,.0f} |" for m in result["memory"]]
    return "\n".join(lines) + "\n"


MARKDOWN = {
    "shakespeare_char_cpu": shakespeare_markdown,
    "training_speed_cpu": train_markdown,
    "loader_cpu": loader_markdown,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "results"), help="where the results go")
    parser.add_argument("--data", default=str(ROOT / "data/shakespeare"), help="a folder that data/prepare.py made")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("shakespeare", help="steps and seconds to a validation loss")
    command.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    command.set_defaults(run=shakespeare)
    command = commands.add_parser("train", help="training tokens/s")
    command.add_argument("--rounds", type=int, default=9)
    command.add_argument("--tokens", type=int, default=4096, help="at least so many in each turn")
    command.set_defaults(run=train)
    command = commands.add_parser("loader", help="the loader's share of a step, and its memory")
    command.add_argument("--steps", type=int, default=200)
    command.set_defaults(run=loader)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
