"""The folder of a run: what it is (config, manifest, source) and what it did (metrics.jsonl, loss.png).

out/run/  config.json, config.py    the resolved config; the second is one to give back to train.py
          manifest.json, source/    from what it can be repeated: command, commit, versions, hardware, data, the code
          data.json                 the data's meta.json: its tokenizer for sample.py
          metrics.jsonl, loss.png   a line a step, and a line an evaluation; metrics*.png: what the model measures
          step-*, latest, best      checkpoints (checkpoint.py)
          .lock                     held by the run at work here
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from configurator import config_source
from distributed import processes
from training.atomic import STEP, folders, write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what a disk says that has none

# Patterns, in the order of deletion: a folder without a manifest is no run.
FILES_OF_A_RUN = (
    STEP,
    STEP + ".tmp",
    STEP + ".old",
    "latest",
    "best",
    "config.json",
    "config.py",
    "source",
    "data.json",
    "metrics.jsonl",
    "loss.png",
    "metrics.png",
    "metrics-*.png",
    "tensorboard",
    "wandb",
    "wandb_id",
    "manifest.json",
)


# ---- what it is -----------------------------------------------------------------------------------------------------
def files_of_a_run(out):
    """Returns what lies in `out` under the names of a run's files, the manifest last."""
    return [path for pattern in FILES_OF_A_RUN for path in out.glob(pattern)]


def exists(out: Path) -> bool:
    """Returns whether `out` holds a run. Raises ValueError where something else has the names of a run's files."""
    manifest = out / "manifest.json"
    if manifest.exists() and '"data_fingerprint"' in manifest.read_text():
        return True
    taken = [path.name for path in files_of_a_run(out)]
    if taken:
        raise ValueError(f"{out} is no run, and holds {', '.join(taken[:3])}, which a run writes: try another out_dir")
    return False


def has_begun(out: Path) -> bool:
    """Returns whether a run has done a step: one that died before has nothing that could be lost."""
    return bool(folders(out)) or any(row["step"] > 0 for row in read_metrics(out))


def delete(out: Path) -> None:
    """Deletes a run from its folder, and nothing that is not of a run. While that takes, the folder stays a run."""
    for path in files_of_a_run(out):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def source(model: str) -> dict[str, Path]:
    """Returns the code of a run, {name: file}: ours, and of the variants the one that it trains."""
    variant = Path(sys.modules[f"model_{model}"].__file__)
    files = {variant.name: variant}
    for folder in ("", "training", "distributed", "data"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if not path.name.startswith("model_"):
                files[str(path.relative_to(ROOT))] = path
    return files


def code_of(model: str) -> dict[str, str]:
    """Returns what decides how a run computes: the version of torch, and a hash of each file of ours."""
    found = {"torch": torch.__version__}
    for name, path in source(model).items():
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return found


def git_commit():
    """Returns the commit of our code, with -dirty where it was changed since; None without git or a repository."""
    if not shutil.which("git"):
        return None
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


def describe(out: Path, config: dict, meta: dict, facts: dict) -> None:
    """Writes what a run is. config: as checkpoint.save takes it; meta: the data's; facts: more for the manifest."""
    manifest = {
        "command": [sys.executable, *sys.argv],
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "host": {"system": platform.platform(), "cores": os.cpu_count()},
        **facts,
        "config": config,
    }
    knobs = {"model": config["model"], **config["knobs"], **config["model_config"]}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")  # first: it says the rest is a run's
    write_text(out / "config.json", json.dumps(config, indent=1) + "\n")
    write_text(out / "config.py", config_source(knobs))
    write_text(out / "data.json", json.dumps(meta) + "\n")
    for name, file in source(config["model"]).items():
        target = out / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def lock(out: Path):
    """Takes a run's folder until process 0 ends, in whatever way: the kernel gives a lock back, so that none is stale.

    All processes call it, and keep what it returns. ValueError, on all, where another run has it or nothing can be
    written. Over hosts it holds where the disk passes flock on: NFS does, Lustre where it is mounted with -o flock.
    """
    file = None
    refusal = ""
    if processes.rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = open(out / ".lock", "a+")
            if not try_to_lock(file):
                print(f"WARNING: nothing can keep a second run out of {out}: no locks here", file=sys.stderr)
            if hasattr(os, "register_at_fork"):  # a child would hold it longer than this process lives
                os.register_at_fork(after_in_child=file.close)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        except BlockingIOError:
            file.seek(0)
            refusal = f"{out} is in use by {file.read()}: wait for that run, stop it, or choose another out_dir"
        except OSError as error:
            refusal = f"{out} cannot be written to ({error.strerror}): choose another out_dir"
    refusal = processes.gather(refusal)[0]
    if refusal:
        raise ValueError(refusal)
    return file


def try_to_lock(file) -> bool:
    """Locks a file, or raises BlockingIOError where another process has; returns whether there are locks at all."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def saved_knob(out: Path, name: str):
    """Returns the value of a knob of train.py that a run was begun with."""
    return json.loads((out / "config.json").read_text())["knobs"][name]


# ---- what it did ----------------------------------------------------------------------------------------------------
def read_metrics(out: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl, without one that a crash cut short."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{path}: a line was cut short, and is left out: {line[:40]}...", file=sys.stderr)
    return rows
