"""`python bench.py loader`: the loader's share of a training step, and its memory over shards of growing size."""

import multiprocessing
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import muon
from benchmarks.timing import build, describe, machine, make_step
from data.loader import Loader
from data.shards import Shards, write_shard

RESULT = "loader"
BATCH = (12, 64)  # windows, and tokens in one: the shortest step that we train with
MODEL = dict(n_layer=4, n_head=4, n_kv_head=4, head_dim=32, n_embd=128, n_inner=344, vocab_size=66, block_size=64)
WARMUP = 3  # steps that are not counted: they make the optimizer's state
SHARD_TOKENS = (2_000_000, 20_000_000, 200_000_000)


def measure(args: Namespace) -> Iterator[dict]:
    """Yields one result: microseconds of loading and of whole steps, and the memory of reading each shard."""
    command = f"python bench.py loader --steps {args.steps}"
    result = {"command": command, "machine": machine(), "steps": args.steps, "batch": BATCH}
    loading, whole = step_times(args.data, args.steps)
    result["load_us"] = 1e6 * loading / args.steps
    result["step_us"] = 1e6 * whole / args.steps
    result["memory"] = []
    for tokens in SHARD_TOKENS:
        result["memory"].append({"tokens": tokens, "peak_mb": peak_mb_of_a_reader(tokens)})
    yield result


# ---- its share of a step --------------------------------------------------------------------------------------------
def step_times(folder, steps):
    """Returns the seconds of loading the batches of so many steps, and of the steps with it."""
    windows, length = BATCH
    loader = Loader(Shards(folder, "train"), length, windows)
    model = build("baseline", MODEL)
    step = make_step(model, muon.make_optimizer(model, "adamw"))
    loading = 0.0
    whole = 0.0
    for i in range(WARMUP + steps):
        started = time.perf_counter()
        ((x, y),) = loader.batches(i)
        loaded = time.perf_counter()
        step(x, y)
        if i >= WARMUP:
            loading += loaded - started
            whole += time.perf_counter() - started
    return loading, whole


# ---- its memory -----------------------------------------------------------------------------------------------------
def peak_mb_of_a_reader(tokens):
    """Returns the peak MB of a process of its own that reads all of a shard of so many tokens."""
    with tempfile.TemporaryDirectory() as folder:
        contents = np.resize(np.arange(1000, dtype=np.uint16), tokens)
        write_shard(Path(folder) / "train_000000.bin", contents, 50257)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(read_everything, [folder])


def read_everything(folder: str) -> float:
    """Returns the peak MB of this process after it has read an epoch of a folder's windows (Linux)."""
    loader = Loader(Shards(folder, "train"), 1024, 64)
    for step in range(loader.mixture.texts[0].windows_per_epoch // 64):
        list(loader.batches(step))
    status = Path("/proc/self/status").read_text()  # getrusage's peak would begin at that of the parent
    kilobytes = status.split("VmHWM:")[1].split()[0]
    return int(kilobytes) / 1e3


# ---- the table ------------------------------------------------------------------------------------------------------
def markdown(result: dict) -> str:
    """Returns the table of a result."""
    windows, length = result["batch"]
    loading = result["load_us"]
    step = result["step_us"]
    lines = [
        "# What the loader costs\n",
        describe(result),
        f"{result['steps']} steps of the 0.8M-parameter baseline on {windows} x {length} tokens: loading takes "
        f"{loading:.0f} us of {step / 1000:.1f} ms, **{loading / step:.2%}** of a step.\n",
        "A process that reads every window of a shard once:\n",
        "| tokens | MB on disk | peak MB of the process |",
        "|---|---|---|",
    ]
    for row in result["memory"]:
        on_disk = row["tokens"] * 2 / 1e6  # two bytes a token
        lines.append(f"| {row['tokens']:,} | {on_disk:,.0f} | {row['peak_mb']:,.0f} |")
    return "\n".join(lines) + "\n"
