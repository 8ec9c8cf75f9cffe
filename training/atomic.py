"""The folders of a run's checkpoints: how they are written whole or not at all, tested for damage, and deleted.

A checkpoint is written as step-N.tmp, flushed, and renamed to step-N. Before it is deleted or replaced it is renamed to
step-N.old, which after a crash may be whole or half gone. So a folder called step-N was whole once; its manifest tells
whether it still is, and finds damage, not a forger. An evaluation comes later and adds step-N/evaluation.json, which
the manifest does not list. The best checkpoint is the one with the least loss in these files. The links `latest` and
`best` are for people, and nothing is read from them.
"""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch

from training.disk import (
    TEMPORARY,
    CheckpointError,
    fsync,
    remove,
    temporary_beside,
    tensor_files,
    warn_once,
    write_text,
)

FORMAT = 1
TEXTS = ("config.json", "trainer.json")
EVALUATION = "evaluation.json"
STEP = r"step-(\d{8,})"


# ---- names ----------------------------------------------------------------------------------------------------------
def step_of(path):
    """Returns the step with which the name of a checkpoint's folder begins; None for another name."""
    found = re.match(STEP, path.name)
    return int(found[1]) if found else None


def named(out_dir, suffix=""):
    """Returns what has the name of a checkpoint with this suffix, the newest first."""
    found = [path for path in Path(out_dir).glob("step-*") if re.fullmatch(STEP + re.escape(suffix), path.name)]
    return sorted(found, key=step_of, reverse=True)


def folders(out_dir, suffix=""):
    """Returns the folders of checkpoints, the newest first."""
    return [path for path in named(out_dir, suffix) if path.is_dir()]


def entries(folder, names):
    """Returns what a manifest is to say of files, measured: {name: [size, sha256]}."""
    found = {}
    for name in names:
        with open(folder / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            found[name] = [size, hashlib.file_digest(file, "sha256").hexdigest()]
    return found


# ---- the best of them ------------------------------------------------------------------------------------------------
def write_evaluation(folder: Path, loss: float, facts: dict) -> bool:
    """Notes a checkpoint's validation loss in its folder; returns whether it is the best so far, and links it then."""
    if folder.is_symlink():
        warn_once(f"{folder} is a link, and a run writes through none: its validation loss is not noted")
        return False
    found = {"loss": loss if math.isfinite(loss) else None, **facts}
    write_text(folder / EVALUATION, json.dumps(found) + "\n")
    is_best = best(folder.parent) == folder
    if is_best:
        link(folder, "best")
    return is_best


def evaluation(folder: Path) -> dict | None:
    """Returns what an evaluation of a checkpoint found; None where there was none, or its file is something else."""
    try:
        found = json.loads((folder / EVALUATION).read_text())
        loss = found["loss"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if loss is not None and not (isinstance(loss, float | int) and math.isfinite(loss)):
        return None
    return found


def best(out_dir) -> Path | None:
    """Returns the checkpoint with the least finite validation loss, the first of equal ones; None without any.

    Whether it is whole is not tested.
    """
    losses = {}
    for folder in reversed(folders(out_dir)):
        found = evaluation(folder)
        if found and found["loss"] is not None:
            losses[folder] = found["loss"]
    return min(losses, key=losses.get, default=None)


def link(folder, name):
    """Points a relative link beside a checkpoint at it, in one step, where the disk has links."""
    place = folder.with_name(name)
    temporary = temporary_beside(place)
    try:
        temporary.symlink_to(folder.name)
        temporary.replace(place)
    except OSError as error:  # Windows asks for rights, and a copy may have made the link a folder
        temporary.unlink(missing_ok=True)
        warn_once(f"{place} cannot be made a link ({error.strerror}): the checkpoint is found without")


def repair(folder, keep_last, keep_every):
    """Does what a crash left undone around `folder`, the newest whole checkpoint; returns what it is called by then.

    It deletes what was half written, takes back one that was being replaced, links it and the best, and prunes.
    """
    clear(folder.parent)
    if folder.suffix == ".old":  # it was being replaced, and its successor is not whole
        step = folder.with_suffix("")
        if os.path.lexists(step):
            remove(step)
        folder = folder.rename(step)
    link(folder, "latest")
    best_one = best(folder.parent)
    if best_one:
        link(best_one, "best")
    prune(folder, keep_last, keep_every)
    return folder


# ---- coming and going ------------------------------------------------------------------------------------------------
def clear(out_dir):
    """Deletes what crashes left of what they were writing: checkpoints, links, and texts here and in checkpoints."""
    for leftover in named(out_dir, ".tmp"):
        remove(leftover)
    for folder in (Path(out_dir), *folders(out_dir)):
        for path in folder.glob(".*.tmp"):
            if re.fullmatch(TEMPORARY, path.name) and (path.is_symlink() or path.is_file()):
                path.unlink()


def prepare(folder, need, texts):
    """Makes `folder`.tmp with its texts, where there is room for so many bytes; deletes what crashes left."""
    clear(folder.parent)
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
    for name in (*TEXTS, "manifest.json", ""):  # and the folder itself; who wrote tensors flushed them
        fsync(tmp / name)
    if os.path.lexists(folder):
        old = Path(f"{folder}.old")
        if os.path.lexists(old):  # of a crash between these renames, or in prune
            remove(old)
        folder.rename(old)
    tmp.rename(folder)
    fsync(folder.parent)
    link(folder, "latest")


def prune(folder, keep_last, keep_every):
    """Deletes, once `folder` is in place, everything called .old, then the checkpoints older than it.

    Of these stay the newest keep_last (`folder` is one of them; 0: all), the best, and every keep_every-th step's.
    """
    for path in named(folder.parent, ".old"):
        discard(path)
    if not keep_last:
        return
    best_one = best(folder.parent)
    up_to_it = [path for path in folders(folder.parent) if step_of(path) <= step_of(folder)]
    for path in up_to_it[keep_last:]:
        is_kept = keep_every and step_of(path) % keep_every == 0
        if path != best_one and not is_kept:
            discard(path)


def discard(path):
    """Deletes a checkpoint. Where the disk refuses it stays, at the price of a warning: nothing is lost by it."""
    try:
        if path.suffix != ".old":
            path = path.rename(f"{path}.old")
        remove(path)
    except OSError as error:
        warn_once(f"{path}, which is not needed, cannot be deleted: {error.strerror}")


def give_up(folder, step, need, error):
    """Deletes what was written; returns what to tell the user."""
    shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
    reason = "No space left on device" if "No space left on device" in str(error) else error
    room = f"need ~{need / 1e6:.1f} MB, free {shutil.disk_usage(folder.parent).free / 1e6:.1f} MB"
    newest = "there is none before"
    there = folders(folder.parent) + folders(folder.parent, ".old")
    if there:
        newest = f"checkpoint {max(there, key=step_of).name} is still there"
    return f"checkpoint at step {step} failed: {reason} ({room}); {newest}"


# ---- finding ---------------------------------------------------------------------------------------------------------
def verify(path: Path) -> str:
    """Says why the checkpoint in folder `path` is not what its manifest says; "" where it is whole."""
    try:
        reason = why_unreadable(path, "manifest.json")
        if reason:
            return reason
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            return f"manifest.json: format {manifest['format']}, and this program reads format {FORMAT}"
        if step_of(path) not in (None, manifest["step"]):
            return f"manifest.json: of step {manifest['step']}, so the folder was renamed"
        kinds = ["model", "trainer"]
        if any(name.startswith("ema") for name in manifest["files"]):
            kinds.append("ema")
        parts = max(math.ceil((len(manifest["files"]) - len(TEXTS)) / len(kinds)), 1)
        names = [*TEXTS, *(name for i in range(parts) for name in tensor_files(parts, i, kinds))]
        odd = sorted(manifest["files"].keys() ^ set(names))
        if odd:  # so no name leads out of the folder
            return f"manifest.json: {odd[0]!r} refused: it must list {', '.join(names)}"
        for name in names:
            reason = why_unreadable(path, name)
            if reason:
                return reason
            size, digest = manifest["files"][name]
            found_size, found_digest = entries(path, [name])[name]
            if found_size != size:
                return f"{name}: {found_size} bytes, manifest says {size}"
            if found_digest != digest:
                return f"{name}: sha256 mismatch (corrupted)"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json: not a manifest (corrupted)"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""


def why_unreadable(path, name):
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
    found = sorted(folders(out_dir) + folders(out_dir, ".old"), key=step_of, reverse=True)
    for path in found:
        reason = verify(path)
        if not reason:
            return path
        log(f"skipping {path.name}: {reason}")
    if found:
        raise CheckpointError(
            f"no valid checkpoint in {out_dir} ({len(found)} found, all rejected); pass --overwrite to discard them"
        )
    return None


def resolve(path: Path, log) -> Path:
    """Returns the whole checkpoint that a path stands for; CheckpointError where there is none.

    It is a checkpoint's folder, or a run's, which stands for its newest whole one. The names `latest` and `best` in a
    run's folder follow from the checkpoints: a link may be old or missing, and a copied one may be a folder.
    """
    in_a_run = len(folders(path.parent)) > 0
    if in_a_run and path.name == "latest":
        path = path.parent
    if in_a_run and path.name == "best":
        path = best(path.parent) or path
    found = find(path, log)
    if found:
        return found
    reason = verify(path)
    if reason:
        raise CheckpointError(f"no checkpoint in {path}: {reason}")
    return path.resolve()
