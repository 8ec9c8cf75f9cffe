"""The folders of a run's checkpoints: whole or not there, found to be damaged where they are, deleted last.

One is written as step-N.tmp, flushed, then renamed; one to be deleted is first renamed to step-N.old. So what is called
step-N was whole once, and the manifest tells whether it still is (it finds damage, not a forger). What an evaluation
finds comes later, as step-N/evaluation.json, which the manifest does not list. The best checkpoint is the one with the
least loss in these files: the links `latest` and `best` are for people, and nothing is read from them.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import torch

FORMAT = 1
TEXTS = ("config.json", "trainer.json")
EVALUATION = "evaluation.json"
STEP = "step-" + 8 * "[0-9]"  # padded, so that names sort like numbers


class CheckpointError(RuntimeError):
    """What was wrong with which checkpoint, for the user to read."""


# ---- files -----------------------------------------------------------------------------------------------------------
def write_text(path: Path, text: str) -> None:
    """Writes a file that has all of the text, or what it had before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def fsync(path):
    """Waits until a file, or what a folder lists, is on the disk."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def folders(out_dir, suffix=""):
    """Returns the folders of checkpoints, the newest first."""
    return sorted(Path(out_dir).glob(STEP + suffix), reverse=True)


def tensor_files(parts: int, i: int = 0) -> list[str]:
    """Returns the names of the i-th process's files, where `parts` processes write some."""
    end = f"-{i + 1:05d}-of-{parts:05d}" if parts > 1 else ""
    return [f"model{end}.safetensors", f"trainer{end}.safetensors"]


def entries(folder, names):
    """Returns what the manifest says of files: {name: [size, sha256]}."""
    found = {}
    for name in names:
        with open(folder / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            found[name] = [size, hashlib.file_digest(file, "sha256").hexdigest()]
    return found


# ---- the best of them ------------------------------------------------------------------------------------------------
def write_evaluation(folder: Path, loss: float, facts: dict) -> bool:
    """Notes a checkpoint's validation loss in its folder; returns whether it is the best so far, and links it then."""
    text = {"loss": loss if math.isfinite(loss) else None, **facts}
    write_text(folder / EVALUATION, json.dumps(text) + "\n")
    is_best = best(folder.parent) == folder
    if is_best:
        link(folder, "best")
    return is_best


def evaluation(folder: Path) -> dict | None:
    """Returns what an evaluation of a checkpoint found; None where there was none, or its file is something else."""
    try:
        found = json.loads((folder / EVALUATION).read_text())
        loss = found["loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if loss is not None and not isinstance(loss, float | int):
        return None
    return found


def best(out_dir) -> Path | None:
    """Returns the checkpoint with the least finite validation loss, the first of equal ones; None without any."""
    losses = {}
    for folder in reversed(folders(out_dir)):
        found = evaluation(folder)
        if found and found["loss"] is not None:
            losses[folder] = found["loss"]
    return min(losses, key=losses.get, default=None)


def link(folder, name):
    """Points a relative link beside a checkpoint at it, in one step, where the disk has links."""
    temporary = folder.with_name(f"{name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        temporary.replace(folder.with_name(name))
    except OSError:  # Windows asks for rights; resolve() finds both without
        pass


# ---- coming and going ------------------------------------------------------------------------------------------------
def prepare(folder, need, texts):
    """Makes `folder`.tmp with its texts, where there is room for so many bytes; deletes what crashes left."""
    for leftover in folders(folder.parent, ".tmp"):
        shutil.rmtree(leftover)
    if need > shutil.disk_usage(folder.parent).free:
        raise OSError("No space left on device")
    tmp = Path(f"{folder}.tmp")
    tmp.mkdir()
    for name, text in texts.items():
        (tmp / name).write_text(text + "\n")


def commit(folder, step, files):
    """Puts in place what all have written, the manifest last."""
    tmp = Path(f"{folder}.tmp")
    manifest = {"format": FORMAT, "step": step, "torch": torch.__version__, "files": entries(tmp, TEXTS) | files}
    (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for name in (*TEXTS, "manifest.json", ""):
        fsync(tmp / name)
    if folder.exists():
        shutil.rmtree(f"{folder}.old", ignore_errors=True)  # of a crash between these renames
        folder.rename(f"{folder}.old")
    tmp.rename(folder)
    fsync(folder.parent)
    link(folder, "latest")


def prune(folder, keep_last, keep_every):
    """With its successor in place: deletes what was replaced, what a crash left while deleting, then the oldest."""
    for path in folders(folder.parent, ".old"):
        shutil.rmtree(path)
    if not keep_last:
        return
    best_one = best(folder.parent)
    older = [path for path in folders(folder.parent) if path.name <= folder.name]
    for path in older[keep_last:]:
        step = int(path.name.removeprefix("step-"))
        is_kept = keep_every and step % keep_every == 0
        if path != best_one and not is_kept:
            shutil.rmtree(path.rename(f"{path}.old"))


def give_up(folder, step, need, error):
    """Deletes what was written; returns what to tell the user."""
    shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
    reason = "No space left on device" if "No space left on device" in str(error) else error
    room = f"need ~{need / 1e6:.1f} MB, free {shutil.disk_usage(folder.parent).free / 1e6:.1f} MB"
    before = "there is none before"
    earlier = folders(folder.parent)
    if earlier:
        before = f"previous checkpoint {earlier[0].name} is intact"
    return f"checkpoint at step {step} failed: {reason} ({room}); {before}"


# ---- finding ---------------------------------------------------------------------------------------------------------
def verify(path: Path) -> str:
    """Says why the checkpoint in folder `path` is not what its manifest says; "" where it is whole."""
    try:
        reason = cannot_be_read(path, "manifest.json")
        if reason:
            return reason
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            return f"manifest.json: format {manifest['format']}, and this program reads format {FORMAT}"
        parts = max((len(manifest["files"]) - 1) // 2, 1)
        names = [*TEXTS, *(name for i in range(parts) for name in tensor_files(parts, i))]
        odd = sorted(manifest["files"].keys() ^ set(names))
        if odd:  # so no name leads out of the folder
            return f"manifest.json: {odd[0]!r} refused: it must list {', '.join(names)}"
        for name in names:
            reason = cannot_be_read(path, name)
            if reason:
                return reason
            size, digest = manifest["files"][name]
            found_size, found_digest = entries(path, [name])[name]
            if found_size != size:
                return f"{name}: {found_size} bytes, manifest says {size} (truncated)"
            if found_digest != digest:
                return f"{name}: sha256 mismatch (corrupted)"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json: not a manifest (corrupted)"
    return ""


def cannot_be_read(path, name):
    if (path / name).is_symlink():
        return f"{name} is a symbolic link: refused"
    if not (path / name).is_file():
        return f"incomplete: {name} missing"
    return ""


def find(out_dir, log):
    """Returns the newest whole checkpoint, None where there is none at all; CheckpointError if all are damaged."""
    for path in folders(out_dir, ".tmp"):
        log(f"skipping {path.name}: incomplete: saving was interrupted")
    # A crash while a step is saved again may leave only its .old.
    found = sorted(folders(out_dir) + folders(out_dir, ".old"), key=lambda path: path.stem, reverse=True)
    for path in found:
        reason = verify(path)
        if not reason:
            return path
        log(f"skipping {path.name}: {reason}")
    if found:
        count = f"{len(found)} found, {len(found)} rejected"
        raise CheckpointError(f"no valid checkpoint in {out_dir} ({count}); pass --overwrite to discard them")
    return None
