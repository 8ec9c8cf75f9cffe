"""A long run to which something happens about every 100 steps, against one that is left alone: python tests/soak.py

Both are the quickstart at a small size under torchrun --max-restarts. Where torchrun itself was killed or told to stop,
the same command is given again. In the end losses and weights must be equal to the last bit. What happened, how often
and what was lost goes to results/reliability.md and .json. About 10 minutes on 2 free cores; --steps 300 --every 40
shows in 2 that it works.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the ranks
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import timing  # noqa: E402
from training import checkpoint  # noqa: E402

SIZES = "--n_layer=2 --n_embd=96 --n_inner=256 --n_head=2 --n_kv_head=2 --block_size=128 --batch_tokens=2048"
SIZES += " --micro_batch=4 --eval_every=100 --eval_tokens=8192 --save_every=20 --device=cpu --deterministic"
FAULTS = {  # what is done, and to whom
    "a rank": "kill -9 of a rank, any: torchrun restarts all",
    "a save": "kill -9 of rank 0 while it writes a checkpoint: torchrun restarts all",
    "torchrun": "kill -9 of torchrun and of all ranks: the same command again",
    "SIGTERM": "SIGTERM to torchrun: the same command again",
    "a byte": "kill -9 of all, and a bit of the newest checkpoint flipped: the same command again",
    "a line": "kill -9 of all, and metrics.jsonl cut within a line: the same command again",
}


def children(pid):
    """The processes that this one started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return sorted(found)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_step(folder):
    """The step of the last whole line of metrics.jsonl, from its end alone: this asks often."""
    path = folder / "metrics.jsonl"
    if not path.exists() or not path.stat().st_size:
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


class Run:
    """A training under torchrun, in `folder`, which may be begun again as often as it ends."""

    def __init__(self, args, folder):
        self.folder, self.log = folder, Path(f"{folder}.log")
        self.command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1000",
                        f"--nproc_per_node={args.processes}", ROOT / "train.py", ROOT / "config/quickstart.py",
                        *SIZES.split(), f"--max_steps={args.steps}", f"--data={args.data}", f"--out_dir={folder}",
                        "--resume=auto"]  # fmt: skip
        self.log.write_text("")

    def begin(self):
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

    def kill_all(self):
        """torchrun first, so that it restarts nobody."""
        ranks = children(self.process.pid)
        for pid in (self.process.pid, *ranks):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))

    def resumed(self):
        """The steps from which it went on so far."""
        text = self.log.read_text()
        return [int(line.rpartition("step-")[2]) for line in text.splitlines() if line.startswith("resuming from ")]

    def until(self, condition, seconds=300):
        end = time.time() + seconds
        while not condition():
            if time.time() > end:
                sys.exit(f"error: waited {seconds} s in vain: see {self.log}")
            time.sleep(0.005)


def inject(run, fault, rng):
    """Does it, and has the run go on: (steps that were done in vain, seconds until a new one was done)."""
    known, began = len(run.resumed()), time.time()
    if fault == "a save":
        run.until(lambda: list(run.folder.glob("*.tmp")))
    if fault in ("a rank", "a save"):
        ranks = children(run.process.pid)
        os.kill(rng.choice(ranks) if fault == "a rank" else ranks[0], signal.SIGKILL)
    elif fault == "SIGTERM":
        run.process.terminate()
        run.process.wait()
    else:
        run.kill_all()
    reached = last_step(run.folder)
    if fault == "a byte":
        file = rng.choice(sorted(checkpoint.folders(run.folder)[0].glob("*.safetensors")))
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    if fault == "a line":
        path = run.folder / "metrics.jsonl"
        os.truncate(path, path.stat().st_size - rng.randrange(2, 40))
    if fault not in ("a rank", "a save"):
        run.begin()
    run.until(lambda: len(run.resumed()) > known)
    first = run.resumed()[-1]
    run.until(lambda: first < last_step(run.folder) <= first + 100 or run.process.poll() == 0)
    return reached - first, time.time() - began


def soak(args):
    rng, out = random.Random(args.seed), Path(args.out_dir)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    alone, disturbed = Run(args, out / "alone"), Run(args, out / "disturbed")
    seconds = []
    # 1. the run that nothing happens to
    began = time.time()
    alone.begin()
    if alone.process.wait():
        sys.exit(f"error: see {alone.log}")
    seconds.append(time.time() - began)
    # 2. the other
    began, happened = time.time(), {fault: [] for fault in FAULTS}
    disturbed.begin()
    for at, fault in zip(range(args.every, args.steps, args.every), cycle(FAULTS)):
        at = min(at + rng.randrange(-args.every // 4, args.every // 4), args.steps - 21)
        disturbed.until(lambda at=at: last_step(disturbed.folder) >= at)
        happened[fault].append(inject(disturbed, fault, rng))
        print(f"step {at}: {FAULTS[fault]}: {happened[fault][-1]}", flush=True)
    if disturbed.process.wait():
        sys.exit(f"error: see {disturbed.log}")
    seconds.append(time.time() - began)
    # 3. what they left
    keys, files = ("step", "loss", "grad_norm", "val_loss"), f"step-{args.steps:08d}/*.safetensors"
    metrics = [[{k: row.get(k) for k in keys} for row in rows(run.folder)] for run in (alone, disturbed)]
    weights = [{p.name: p.read_bytes() for p in run.folder.glob(files)} for run in (alone, disturbed)]
    memory = [[1e3 * row["resident_gb"] for row in rows(run.folder) if "loss" in row] for run in (alone, disturbed)]
    return {
        "command": shlex.join(["python", "tests/soak.py", *sys.argv[1:]]),
        "machine": timing.machine("cpu"),
        "train": shlex.join(map(str, alone.command[1:])).replace(f"{ROOT}/", ""),
        "steps": args.steps,
        "processes": args.processes,
        "seconds": seconds,
        "faults": {FAULTS[fault]: found for fault, found in happened.items()},
        "losses_equal": metrics[0] == metrics[1] and len(metrics[0]) > args.steps,
        "weights_equal": weights[0] == weights[1] and len(weights[0]) > 0,
        "memory_mb": [statistics.mean(memory[0][i : i + 50]) for i in range(50, args.steps - 49, 50)],
        "memory_mb_disturbed": max(memory[1]),
    }


def markdown(result):
    faults, m = result["faults"], result["memory_mb"]
    total = sum(map(len, faults.values()))
    verdict = {True: "equal to the last bit", False: "NOT equal"}
    lines = [
        "# A run to which things happen\n",
        timing.describe(result),
        f"{result['steps']:,} steps of the quickstart at a small size on {result['processes']} processes, with a "
        f"checkpoint every 20 steps, and {total} faults; beside it the same run left alone. All losses and gradient "
        f"norms: {verdict[result['losses_equal']]}; weights and optimizer state: {verdict[result['weights_equal']]}. "
        f"{result['seconds'][1]:.0f} s instead of {result['seconds'][0]:.0f} s.\n",
        "| fault | how often | lost: steps that were done again, mean (most) | seconds until the next new step, most |",
        "|---|---|---|---|",
    ]
    for fault, found in faults.items():
        if found:
            lost, back = zip(*found)
            again = f"{statistics.mean(lost):.0f} ({max(lost)})"
            lines.append(f"| {fault} | {len(found)} | {again} | {max(back):.1f} |")
    lines += [f"\nMemory of rank 0 in the run left alone: {m[0]:.0f} MB after 100 steps, {m[-1]:.0f} MB at the end "
              f"(most: {max(m):.0f} MB; in the other run: {result['memory_mb_disturbed']:.0f} MB)."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=2000)
    add("--every", type=int, default=100, help="steps from one fault to the next, about")
    add("--processes", type=int, default=2)
    add("--seed", type=int, default=1, help="of when and what happens")
    add("--data", default="data/stdlib")
    add("--out_dir", default="out/soak", help="is deleted first")
    add("--results", default="results/reliability")
    args = parser.parse_args()
    result = soak(args)
    Path(f"{args.results}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{args.results}.md").write_text(markdown(result))
    print(markdown(result))
    sys.exit(not (result["losses_equal"] and result["weights_equal"]))


if __name__ == "__main__":
    main()
