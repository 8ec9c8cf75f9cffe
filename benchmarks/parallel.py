"""`python bench.py parallel`: FSDP beside DDP, a save beside writing its bytes, how soon a resumed run goes on."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import muon
from benchmarks.timing import (
    build,
    count_parameters,
    describe,
    device_and_dtype,
    make_step,
    median_and_range,
    new_result,
    random_batch,
    ratios,
    table_row,
)
from training import checkpoint, run_folder

ROOT = Path(__file__).resolve().parent.parent
RESULT = "parallel"
SIZES = {
    "processes": 2,
    "training": "--n_layer=9 --n_embd=512 --n_inner=1408 --n_head=8 --n_kv_head=8 --head_dim=64 --block_size=256 "
                "--batch_tokens=2048 --micro_batch=4 --max_steps=8 --eval_every=100 --eval_tokens=2048",
    "first": 3,  # steps that are not counted: they make the optimizer's state
    "saving": dict(n_layer=10, n_head=10, n_kv_head=10, head_dim=64, n_embd=640, n_inner=1792, vocab_size=8192),
    "resuming": "config/quickstart.py --max_steps={steps} --eval_every=1000 --eval_tokens=2048 --save_every=1000",
}  # fmt: skip

# What train.py imports, and what of that takes time: a resumed run is judged by its time beyond this.
IMPORTS = (
    "torch",
    "tqdm",
    "matplotlib.pyplot",
    "flops",
    "muon",
    "data.loader",
    "data.shards",
    "data.tokenizers",
    "training.checkpoint",
    "training.pictures",
    "training.run_folder",
    "model_baseline",
)


def measure(args: Namespace) -> Iterator[dict]:
    """Yields one result: the seconds of all that is compared, a number for each round."""
    device, _ = device_and_dtype(args.device)
    result = new_result(["parallel"], args.rounds, device) | SIZES
    for key in ("ddp", "fsdp", "save", "stall", "dd", "resume", "imports"):
        result[key] = []

    folder = ROOT / "out/bench/saved"
    model = build("baseline", SIZES["saving"] | {"block_size": 64})
    optimizer = muon.make_optimizer(model, "adamw")
    step = make_step(model, optimizer)
    step(*random_batch(1, 8))  # makes the optimizer's state
    save_seconds(model, optimizer, folder)  # the memory for a copy is made once
    result["parameters"] = count_parameters(model)

    for i in range(args.rounds):
        print(f"round {i + 1} of {args.rounds}...", file=sys.stderr)
        took = {strategy: step_seconds(strategy, args.data) for strategy in ("ddp", "fsdp")}
        took |= save_seconds(model, optimizer, folder)
        took |= resume_seconds(args.data)
        for key, seconds in took.items():
            result[key].append(round(seconds, 4))
    yield result


# ---- what is measured -----------------------------------------------------------------------------------------------
def command_seconds(command, **options):
    """Runs a command, and returns the seconds that it took."""
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, **options)
    return time.perf_counter() - started


def step_seconds(strategy, data):
    """Returns the seconds of the median step of a run of its own, on processes that share the cores."""
    processes = SIZES["processes"]
    out = f"out/bench/{strategy}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["train.py", *SIZES["training"].split()]
    command += [f"--data={data}", f"--out_dir={out}", f"--parallel={strategy}", "--optimizer=adamw", "--overwrite"]
    threads = max(1, os.cpu_count() // processes)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command_seconds(command, env=environment)
    ms = [row["ms"] for row in run_folder.read_metrics(ROOT / out) if "ms" in row]
    return statistics.median(ms[SIZES["first"] :]) / 1000


def save_seconds(model, optimizer, folder):
    """Returns seconds: save, of a save; stall, that an asynchronous one holds training up; dd, of writing its bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    checkpoint.save(folder, 1, model, optimizer, {}, {}, keep_last=1, wait=True)
    save = time.perf_counter() - started

    started = time.perf_counter()
    checkpoint.save(folder, 1, model, optimizer, {}, {}, keep_last=1, wait=False)
    stall = time.perf_counter() - started
    saved = checkpoint.finish()

    size = sum(path.stat().st_size for path in saved.iterdir())
    megabytes = size >> 20
    shutil.rmtree(folder)
    folder.mkdir()
    dd = ["dd", "if=/dev/zero", f"of={folder}/bytes", "bs=1M", f"count={megabytes}", "conv=fsync"]
    written = command_seconds(dd, stderr=subprocess.DEVNULL)
    shutil.rmtree(folder)
    return {"save": save, "stall": stall, "dd": written}


def resume_seconds(data):
    """Returns seconds: resume, from the launch of a resumed run to its end after one step; imports, of its imports."""
    knobs = [f"--data={data}", "--out_dir=out/bench/resumed"]
    two_steps = SIZES["resuming"].format(steps=2).split()
    three_steps = SIZES["resuming"].format(steps=3).split()
    command_seconds([sys.executable, "train.py", *two_steps, *knobs, "--overwrite"])
    resume = command_seconds([sys.executable, "train.py", *three_steps, *knobs, "--resume"])
    statement = f"import {', '.join(IMPORTS)}"
    imports = command_seconds([sys.executable, "-c", statement])
    return {"resume": resume, "imports": imports}


# ---- the table ------------------------------------------------------------------------------------------------------
def markdown(result: dict) -> str:
    """Returns the table of a result."""
    million = f"{result['parameters'] / 1e6:.0f}M"
    beyond_imports = [resume - imports for resume, imports in zip(result["resume"], result["imports"])]
    lines = [
        "# Many processes, and checkpoints\n",
        describe(result),
        f"{result['rounds']} rounds in which all take turns; medians and ranges of seconds.\n",
        "| | this | beside | ratio |",
        "|---|---|---|---|",
        ratio_row(f"a step on {result['processes']} processes, FSDP beside DDP", result["fsdp"], result["ddp"]),
        ratio_row(f"a save of {million} parameters and AdamW's state beside dd", result["save"], result["dd"]),
        ratio_row("what an asynchronous save holds a step up, beside a save", result["stall"], result["save"]),
        "",
        f"A resumed run of the quickstart takes {median_and_range(beyond_imports)} s beyond its imports: it verifies "
        "and reads the checkpoint, makes one step, evaluates, saves and ends.",
    ]
    return "\n".join(lines) + "\n"


def ratio_row(label, this, beside):
    ratio = ratios(this, beside)
    return table_row([label, median_and_range(this), median_and_range(beside), median_and_range(ratio)])
