"""The folder of a run: what it is (config, manifest, source) and what it did (metrics.jsonl, loss.png).

out/run/  config.json, config.py    the resolved config; the second is one to give back to train.py
          manifest.json, source/    from what it can be repeated: command, commit, versions, hardware, data, the code
          data.json                 the data's meta.json: its tokenizer for sample.py
          state.json                for scripts: running, stopped, finished or diverged, at which step, how to go on
          metrics.jsonl             a line a step, and a line an evaluation
          loss.png, metrics*.png    its curve, or reward.png or accuracy.png; and what the model measures
          samples.jsonl             of reinforcement learning: what the model wrote, with its rewards
          tensorboard/, wandb*      what these services were told, where they were asked for
          step-*, latest, best      checkpoints (checkpoint.py)
          .lock                     held by the run at work here
"""

import errno
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import hf
from configurator import config_source
from distributed import processes
from training.atomic import STEP, folders
from training.checkpoint import flat
from training.disk import read_json, remove, warn_once, write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what a disk says that has none

# Patterns, in the order of deletion: a folder without a manifest is no run.
FILES_OF_A_RUN = (
    STEP,
    STEP + r"\.tmp",
    STEP + r"\.old",
    "latest",
    "best",
    r"config\.json",
    r"config\.py",
    "source",
    r"data\.json",
    r"state\.json",
    r"metrics\.jsonl",
    r"samples\.jsonl",
    r"(loss|reward|accuracy)\.png",
    r"metrics\.png",
    r"metrics-.*\.png",
    "tensorboard",
    "wandb",
    "wandb_id",
    r"manifest\.json",
)
NOT_SAVED = ("resume", "overwrite", "eval_only", "dry_run")  # knobs: how a run is begun, and not what it is
MAY_BE_LINKS = (STEP, "latest", "best")  # nothing is written through them


# ---- what it is -----------------------------------------------------------------------------------------------------
def files_of_a_run(out):
    """Returns what lies in `out` under the names of a run's files, the manifest last."""
    there = sorted(out.iterdir()) if out.is_dir() else []
    return [path for pattern in FILES_OF_A_RUN for path in there if re.fullmatch(pattern, path.name)]


def exists(out: Path) -> bool:
    """Returns whether `out` holds a run. Raises ValueError where something else has the names of a run's files."""
    manifest = out / "manifest.json"
    if manifest.exists() and b'"data_fingerprint"' in manifest.read_bytes():
        return True
    taken = [path.name for path in files_of_a_run(out)]
    if taken:
        raise ValueError(f"{out} is no run, and holds {', '.join(taken[:3])}, which a run writes: try another out_dir")
    return False


def is_from_hugging_face(path: Path) -> bool:
    """Returns whether a folder has a config.json, and none of our runs."""
    file = path / "config.json"
    return file.exists() and "knobs" not in hf.read_json(file)


def claim(out: Path, resume: bool | str, overwrite: bool) -> tuple:
    """Takes a run's folder as the knobs say; returns (its lock, whether a run is there). ValueError where one is.

    The lock is held while this process lives.
    """
    already_there = bool(resume and folders(out)) or exists(out)
    if resume is True and not already_there:
        raise ValueError(f"--resume given but no checkpoint in {out}")
    held = lock(out)
    if already_there and not (resume or overwrite) and has_begun(out):
        choices = "go on with --resume, delete it with --overwrite, or choose another --out_dir"
        raise ValueError(f"{out} already holds a run: {choices}")
    return held, already_there


def has_begun(out: Path) -> bool:
    """Returns whether a run has done a step: one that died before has nothing that could be lost."""
    return bool(folders(out)) or any(row["step"] > 0 for row in rows_of(out / "metrics.jsonl"))


def delete(out: Path) -> None:
    """Deletes a run from its folder, and nothing that is not of a run. While that takes, the folder stays a run."""
    for path in files_of_a_run(out):
        remove(path)


def source(model: str) -> dict[str, Path]:
    """Returns the code of a run, {name: file}: ours, and of the variants the one that it trains."""
    variant = Path(sys.modules[f"model_{model}"].__file__)
    files = {variant.name: variant}
    for folder in ("", "training", "distributed", "data", "evals"):
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


def to_save(model: str, fields: dict, config: dict) -> dict:
    """Returns the config of a run as checkpoint.save takes it. fields: of the model; config: these, and the knobs."""
    knobs = {key: value for key, value in config.items() if key not in (*fields, "model", *NOT_SAVED)}
    return {"model": model, "model_config": fields, "knobs": knobs}


def resume_command(parallel: str) -> str:
    """Returns the command that goes on with the run of this one. Of several nodes each has its own options."""
    words = [word for word in sys.argv if word.split("=")[0] not in ("--resume", "--overwrite")]
    script = shlex.join([*words, "--resume"])
    if parallel == "none":
        return f"python {script}"
    n_processes = processes.launched()[1]
    on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", n_processes))
    if on_this_node < n_processes:
        return f"torchrun, with the options that each node was started with, {script}"
    return f"torchrun --standalone --nproc_per_node={n_processes} {script}"


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
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")  # first: it says the rest is a run's
    write_text(out / "config.json", json.dumps(config, indent=1) + "\n")
    write_text(out / "config.py", config_source(flat(config)))
    write_text(out / "data.json", json.dumps(meta) + "\n")
    if (out / "source").exists():  # of an earlier start: a link in it would be written through
        remove(out / "source")
    for name, file in source(config["model"]).items():
        target = out / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def write_state(out: Path, state: str, step: int, max_steps: int, command: str) -> None:
    """Notes for scripts how a run stands, when it begins and when it ends.

    One that is "running" is at a later step than this says: metrics.jsonl has the last one. One that died is still
    "running", and nobody holds its .lock.
    """
    text = {"state": state, "step": step, "max_steps": max_steps, "command": command}
    try:
        write_text(out / "state.json", json.dumps(text) + "\n")
    except OSError as error:
        warn_once(f"{out / 'state.json'} does not say that the run is {state}: {error.strerror}")


# ---- whose it is ----------------------------------------------------------------------------------------------------
def refuse_links(out):
    """Raises ValueError where a file that a run writes is a link: it may lead to a file of the user's own."""
    for path in [*files_of_a_run(out), out / ".lock"]:
        if path.is_symlink() and not any(re.fullmatch(pattern, path.name) for pattern in MAY_BE_LINKS):
            raise ValueError(f"{path} is a link, and a run writes through none: delete it, or choose another out_dir")


def check_ours(out: Path, lock) -> None:
    """Raises ValueError where the folder that this run locked is gone, or is another one by now."""
    try:
        there = os.stat(out / ".lock")
    except FileNotFoundError:
        there = None
    if lock is not None and (there is None or not os.path.samestat(there, os.fstat(lock.fileno()))):
        raise ValueError(f"{out} was deleted or replaced while this run was at work: it writes nothing more there")


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
            refuse_links(out)
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
        except ValueError as error:
            refusal = str(error)
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
    return read_json(out / "config.json", knobs=dict)["knobs"][name]


# ---- what it did ----------------------------------------------------------------------------------------------------
def rows_of(path: Path) -> Iterator[dict]:
    """Yields the rows of a file; a line that is none, such as one that a crash cut short, is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row
            else:
                print(
                    f"{path}: a line that was cut short or is none of a run's is left out: {line[:40]!r}",
                    file=sys.stderr,
                )


def read_metrics(out: Path) -> list[dict]:
    """Returns the rows of a run's metrics.jsonl."""
    return list(rows_of(out / "metrics.jsonl"))
