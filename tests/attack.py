"""Kills and signals at random, in fifteen ways to train, each against an undisturbed run: python -m tests.attack

    python -m tests.attack --kills 3        how often each run is killed; about 15 minutes on 2 free cores

Every run is killed with -9, one process or all, at random moments, and begun again by the same command until it is
done. Then its losses, weights and optimizer state must be those of the undisturbed run to the last bit. After that each
signal is sent to torchrun, to its ranks, and to both in either order, and the step at work must be on the disk. Last,
the memory of two processes is watched over 5,000 steps. What came of it goes to results/attack.json, .md and .png.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the ranks

from matplotlib.figure import Figure
from safetensors.torch import load_file

from benchmarks import timing
from tests.soak import ROOT, children, last_step, rows
from training import checkpoint

SIZES = (
    "--block_size=64 --batch_tokens=768 --micro_batch=2 --eval_every=20 --eval_tokens=1024 --save_every=5 --keep_last=2"
)
SIZES += " --deterministic --device=cpu --warmup_steps=4 --max_steps=40 --n_layer=2 --n_head=2 --n_embd=64"
DENSE = "--n_kv_head=1 --head_dim=32 --n_inner=128"
MOE = f"--model=moe {DENSE} --n_expert=4 --n_expert_per_token=2 --n_expert_inner=64 --bias_rate=0.01"
HYBRID = "--model=hybrid --n_kv_head=1 --head_dim=32 --n_inner=128 --layer_pattern=da --document_mask"
WAYS = {  # {name: (processes, what differs)}
    "one process": (1, DENSE),
    "AdamW, dropout": (1, f"{DENSE} --optimizer=adamw --dropout=0.1"),
    "async saves": (1, f"{DENSE} --async_save"),
    "mixture of experts with biases": (1, MOE),
    "hybrid with documents": (1, HYBRID),
    "gpt2": (1, "--model=gpt2 --dropout=0.1"),
    "fp16": (1, f"{DENSE} --dtype=float16"),
    "bf16": (1, f"{DENSE} --dtype=bfloat16"),
    "gradient checkpointing": (1, f"{DENSE} --gradient_checkpointing --dropout=0.1"),
    "ddp": (2, DENSE),
    "ddp, mixture of experts": (2, MOE),
    "ddp of three": (3, f"{DENSE} --dropout=0.1"),
    "fsdp": (2, f"{DENSE} --parallel=fsdp"),
    "fsdp, async saves": (2, f"{DENSE} --parallel=fsdp --async_save"),
    "fsdp, offload": (2, f"{DENSE} --parallel=fsdp --cpu_offload"),
}
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
ORDERS = ("torchrun alone", "ranks alone", "torchrun, then ranks", "ranks, then torchrun")


class Run:
    """A training in a folder, which may be begun again as often as it ends."""

    def __init__(self, folder: Path, data: str, processes: int, flags: str):
        self.folder = folder
        self.log = Path(f"{folder}.log")
        self.processes = processes
        program = [str(ROOT / "train.py"), *SIZES.split(), *flags.split()]
        program += [f"--data={data}", f"--out_dir={folder}", "--resume=auto"]
        self.command = [sys.executable, *program]
        if processes > 1:
            self.command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", *program]  # fmt: skip

    def begin(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = list(self.command)
        if self.processes > 1:
            command[3:3] = [f"--master_port={port}"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def ranks(self):
        return children(self.process.pid) if self.processes > 1 else [self.process.pid]

    def kill(self, victims):
        for process in victims:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.wait()

    def wait(self):
        """Waits for all of it, and ends what a killed launcher left."""
        self.process.wait()
        for process in self.group():
            os.kill(process, signal.SIGKILL)

    def group(self):
        """Returns its processes that are alive: those of its session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found

    def finish(self):
        self.begin()
        if self.process.wait():
            sys.exit(f"error: see {self.log}")

    def left(self):
        """Returns what must be equal: rows of metrics without times, and the last step's tensors."""
        keys = ("step", "loss", "grad_norm", "val_loss", "skipped")
        last = checkpoint.folders(self.folder)[0]
        tensors = {}
        for path in sorted(last.glob("*.safetensors")):  # their headers list the tensors in any order
            for name, tensor in load_file(path).items():
                tensors[path.name, name] = (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
        return [[{key: row.get(key) for key in keys} for row in rows(self.folder)], tensors]


def until(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        if time.time() > end:
            return False
        time.sleep(0.005)
    return True


def kills(args, rng, name):
    """Returns how often a run was killed, from which steps it went on, and whether nothing shows of it."""
    processes, flags = WAYS[name]
    folder = Path(args.out_dir) / name.replace(" ", "_").replace(",", "")
    alone = Run(folder / "alone", args.data, processes, flags)
    disturbed = Run(folder / "disturbed", args.data, processes, flags)
    folder.mkdir(parents=True)
    alone.finish()
    reached = []
    for i in range(args.kills):
        disturbed.begin()
        after = rng.randrange(1, 40 // args.kills)
        before = last_step(disturbed.folder) if i else 0
        until(lambda after=after, before=before: last_step(disturbed.folder) >= min(before + after, 39)
              or disturbed.process.poll() is not None)  # fmt: skip
        time.sleep(rng.random() * 0.05)
        ranks = disturbed.ranks()
        disturbed.kill([rng.choice(ranks)] if rng.random() < 0.5 else [disturbed.process.pid, *ranks])
        reached.append(last_step(disturbed.folder))
    disturbed.finish()
    return {"processes": processes, "reached": reached, "equal": alone.left() == disturbed.left()}


def stops(args, name, order):
    """Returns whether a signal to torchrun and its ranks, in this order, left the step at work on the disk."""
    folder = Path(args.out_dir) / f"{name}_{order}".replace(" ", "_").replace(",", "")
    run = Run(folder, args.data, 2, f"{DENSE} --max_steps=100000 --save_every=100000 --eval_every=100000")
    run.begin()
    if not until(lambda: last_step(run.folder) >= 3):
        sys.exit(f"error: see {run.log}")
    targets = {"torchrun": [run.process.pid], "ranks": run.ranks()}
    for who in order.removesuffix(" alone").split(", then "):
        for process in targets[who]:
            try:
                os.kill(process, signal.Signals[name])
            except ProcessLookupError:
                pass
        time.sleep(0.02)
    run.wait()
    saved = checkpoint.folders(run.folder)
    state = json.loads((run.folder / "state.json").read_text())["state"]
    return bool(saved) and int(saved[0].name[5:]) == last_step(run.folder) and state == "stopped"


def memory(args):
    """Returns the resident MB of each of two processes over many steps: {"steps": [...], "mb": [[...], [...]]}."""
    flags = f"{DENSE} --max_steps={args.steps} --save_every=250 --eval_every=250 --log_every=1000"
    run = Run(Path(args.out_dir) / "memory", args.data, 2, flags)
    run.begin()
    if not until(lambda: last_step(run.folder) >= 1):
        sys.exit(f"error: see {run.log}")
    ranks = run.ranks()
    steps = []
    mb = [[] for _ in ranks]
    while run.process.poll() is None:
        time.sleep(1)
        try:
            pages = [int(Path(f"/proc/{rank}/statm").read_text().split()[1]) for rank in ranks]
        except (OSError, IndexError):  # they end
            continue
        steps.append(last_step(run.folder))
        for found, n in zip(mb, pages):
            found.append(n * os.sysconf("SC_PAGE_SIZE") / 1e6)
    return {"steps": steps, "mb": mb}


def draw_memory(found, path):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for rank, mb in enumerate(found["mb"]):
        axis.plot(found["steps"], mb, label=f"rank {rank}")
    axis.set(xlabel="step", ylabel="resident MB", title="Memory of two processes that save every 250 steps")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def attack(args):
    rng = random.Random(args.seed)
    shutil.rmtree(args.out_dir, ignore_errors=True)
    result = {
        "command": shlex.join(["python", "-m", "tests.attack", *sys.argv[1:]]),
        "machine": timing.machine("cpu"),
        "ways": {},
        "signals": {},
    }
    for name in WAYS:
        result["ways"][name] = kills(args, rng, name)
        print(name, result["ways"][name], flush=True)
    for name in SIGNALS:
        result["signals"][name] = {order: stops(args, name, order) for order in ORDERS}
        print(name, result["signals"][name], flush=True)
    result["memory"] = memory(args)
    return result


def markdown(result):
    lines = [
        "# Kills and signals\n",
        timing.describe(result),
        "Each run is killed with -9, one process or all of them, and begun again by the same command; at the end its "
        "losses, weights and optimizer state are compared with those of a run that was left alone, to the last bit.\n",
        "| way to train | processes | killed after steps | equal |",
        "|---|---|---|---|",
    ]
    for name, found in result["ways"].items():
        steps = ", ".join(map(str, found["reached"]))
        lines.append(f"| {name} | {found['processes']} | {steps} | {'yes' if found['equal'] else 'NO'} |")
    lines += [
        "\nA signal is sent to torchrun of two processes, to the processes, or to both, 20 ms apart. Saved: the step "
        "at work is on the disk when all have ended.\n",
        f"| signal | {' | '.join(ORDERS)} |",
        "|---" * (len(ORDERS) + 1) + "|",
    ]
    for name, found in result["signals"].items():
        lines.append(f"| {name} | {' | '.join('saved' if found[order] else 'LOST' for order in ORDERS)} |")
    found = result["memory"]
    late = [i for i, step in enumerate(found["steps"]) if step > found["steps"][-1] / 5]
    grown = [f"rank {rank} from {mb[late[0]]:.0f} to {mb[-1]:.0f} MB" for rank, mb in enumerate(found["mb"])]
    lines += [
        f"\nResident memory over {found['steps'][-1]:,} steps of two processes, from a fifth of them on: "
        f"{', '.join(grown)}.\n",
        "![Memory of two processes](attack.png)",
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=3, help="of each run")
    add("--steps", type=int, default=5000, help="over which memory is watched")
    add("--seed", type=int, default=1, help="of when, and of whom")
    add("--data", default="data/stdlib")
    add("--out_dir", default="out/attack", help="is deleted first")
    add("--results", default="results/attack")
    args = parser.parse_args()
    result = attack(args)
    Path(f"{args.results}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{args.results}.md").write_text(markdown(result))
    draw_memory(result["memory"], f"{args.results}.png")
    print(markdown(result))


if __name__ == "__main__":
    main()
