"""`python bench.py parallel`: FSDP beside DDP, a save beside writing its bytes, how soon a resumed run goes on."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import muon
from benchmarks.timing import begin, build, describe, device_and_dtype, make_step, middle, random_batch, ratios
from training import checkpoint

ROOT = Path(__file__).resolve().parent
SIZES = {
    "processes": 2,
    "training": "--n_layer=9 --n_embd=512 --n_inner=1408 --n_head=8 --n_kv_head=8 --head_dim=64 --block_size=256 "
                "--batch_tokens=2048 --micro_batch=4 --max_steps=8 --eval_every=100 --eval_tokens=2048",
    "first": 3,  # steps that are not counted: they make the optimizer's state
    "saving": dict(n_layer=10, n_head=10, n_kv_head=10, head_dim=64, n_embd=640, n_inner=1792, vocab_size=8192),
    "resuming": "config/quickstart.py --max_steps={steps} --eval_every=1000 --eval_tokens=2048 --save_every=1000",
}  # fmt: skip


def run(command, **options):
    """Seconds that it took."""
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, **options)
    return time.perf_counter() - started


def step_seconds(strategy, data):
    """The median step of a run of its own."""
    launch = f"-m torch.distributed.run --standalone --nproc_per_node={SIZES['processes']} train.py {SIZES['training']}"
    out, threads = f"out/bench/{strategy}", {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // SIZES["processes"]))}
    options = [f"--data={data}", f"--out_dir={out}", f"--parallel={strategy}", "--optimizer=adamw", "--overwrite"]
    run([sys.executable, *launch.split(), *options], env=os.environ | threads)
    return (
        statistics.median([row["ms"] for row in record.read_metrics(ROOT / out) if "ms" in row][SIZES["first"] :])
        / 1000
    )


def save_seconds(model, optimizer, folder):
    """(seconds of a save, those that an asynchronous one holds training up, of writing as many bytes with dd)."""
    shutil.rmtree(folder, ignore_errors=True)
    took = []
    for wait in (True, False):
        started = time.perf_counter()
        checkpoint.save(folder, 1, model, optimizer, {}, {}, keep_last=1, wait=wait)
        took.append(time.perf_counter() - started)
    saved = checkpoint.finish()
    size = sum(path.stat().st_size for path in saved.iterdir())
    shutil.rmtree(folder)
    folder.mkdir()
    blocks = [f"of={folder}/bytes", "bs=1M", f"count={size >> 20}", "conv=fsync"]
    written = run(["dd", "if=/dev/zero", *blocks], stderr=subprocess.DEVNULL)
    shutil.rmtree(folder)
    return *took, written


def resume_seconds(data):
    """(seconds from the launch of a resumed run to its end after one step, of importing what it imports)."""
    knobs = [f"--data={data}", "--out_dir=out/bench/resumed"]
    run([sys.executable, "train.py", *SIZES["resuming"].format(steps=2).split(), *knobs, "--overwrite"])
    took = run([sys.executable, "train.py", *SIZES["resuming"].format(steps=3).split(), *knobs, "--resume"])
    imports = (
        "torch, tqdm, matplotlib.pyplot, checkpoint, flops, guard, muon, record, eval, data.shards, model_baseline"
    )
    return took, run([sys.executable, "-c", f"import {imports}"])


def parallel(args):
    """Everything that `parallel_markdown` draws."""
    device, _ = device_and_dtype(args.device)
    result = begin(args, device, ["parallel"]) | SIZES | {"ddp": [], "fsdp": [], "save": [], "stall": [], "dd": []}
    result |= {"resume": [], "imports": []}
    model = build("baseline", SIZES["saving"] | {"block_size": 64})
    optimizer = muon.make_optimizer(model, "adamw")
    make_step(model, optimizer)(*random_batch(1, 8))
    save_seconds(model, optimizer, ROOT / "out/bench/saved")  # the memory for a copy is made once
    result["parameters"] = sum(p.numel() for p in model.parameters())
    for i in range(args.rounds):
        print(f"round {i + 1} of {args.rounds}...", file=sys.stderr)
        for strategy in ("ddp", "fsdp"):
            result[strategy].append(round(step_seconds(strategy, args.data), 4))
        for names, found in ((("save", "stall", "dd"), save_seconds(model, optimizer, ROOT / "out/bench/saved")),
                            (("resume", "imports"), resume_seconds(args.data))):  # fmt: skip
            for key, took in zip(names, found):
                result[key].append(round(took, 4))
    return result


def parallel_markdown(result):
    def row(what, first, second):
        ratio = middle(ratios(result[first], result[second]))
        return f"| {what} | {middle(result[first])} | {middle(result[second])} | {ratio} |"

    later = [a - b for a, b in zip(result["resume"], result["imports"])]
    return "\n".join([
        "# Many processes, and checkpoints\n",
        describe(result),
        f"{result['rounds']} rounds in which all take turns; medians and ranges of seconds.\n",
        "| | this | beside | ratio |",
        "|---|---|---|---|",
        row(f"a step on {result['processes']} processes, FSDP beside DDP", "fsdp", "ddp"),
        row(f"a save of {result['parameters'] / 1e6:.0f}M parameters and AdamW's state beside dd", "save", "dd"),
        row("what an asynchronous save holds a step up, beside a save", "stall", "save"),
        "",
        f"A resumed run of the quickstart takes {middle(later)} s beyond its imports: it verifies and reads the "
        "checkpoint, makes one step, evaluates, saves and ends.",
    ]) + "\n"  # fmt: skip
