"""The folders of a run's checkpoints: whole or not there, found to be damaged where they are, deleted last.

One is written as step-N.tmp, flushed, then renamed; one to be deleted is first renamed to step-N.old. So what is called
step-N was whole once, and the manifest tells whether it still is (it finds damage, not a forger).
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

FORMAT = 1
TEXTS = ("config.json", "trainer.json")
STEP = "step-" + 8 * "[0-9]"  # padded, so that names sort like numbers


class CheckpointError(RuntimeError):
    """What was wrong with which checkpoint, for the user to read."""


def folders(out_dir, suffix=""):
    return sorted(Path(out_dir).glob(STEP + suffix), reverse=True)  # newest first


def tensor_files(parts: int, i: int = 0) -> list[str]:
    """The names of the i-th process's files, where `parts` processes write some."""
    end = f"-{i + 1:05d}-of-{parts:05d}" if parts > 1 else ""
    return [f"model{end}.safetensors", f"trainer{end}.safetensors"]


def fsync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def entries(folder, names):
    """What the manifest says of files: {name: [size, sha256]}."""
    found = {}
    for name in names:
        with open(folder / name, "rb") as f:
            found[name] = [os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()]
    return found


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


def commit(folder, step, files, best):
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
    for name in ("latest", "best") if best else ("latest",):
        link = folder.with_name(f"{name}.tmp")
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.rename(folder.with_name(name))


def prune(folder, keep_last, keep_every):
    """With its successor in place: deletes what was replaced, what a crash left while deleting, then the oldest."""
    for path in folders(folder.parent, ".old"):
        shutil.rmtree(path)
    kept = [path for path in folders(folder.parent) if path.name <= folder.name]
    for path in kept[keep_last or len(kept) :]:
        nth = keep_every and int(path.name.removeprefix("step-")) % keep_every == 0
        if not nth and path.name != folder.with_name("best").resolve().name:
            shutil.rmtree(path.rename(f"{path}.old"))


def give_up(folder, step, need, error):
    """Deletes what was written; what to tell the user."""
    shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
    reason = "No space left on device" if "No space left on device" in str(error) else error
    room = f"need ~{need / 1e6:.1f} MB, free {shutil.disk_usage(folder.parent).free / 1e6:.1f} MB"
    before = folders(folder.parent)
    before = f"previous checkpoint {before[0].name} is intact" if before else "there is none before"
    return f"checkpoint at step {step} failed: {reason} ({room}); {before}"


def verify(path: Path) -> str:
    """Why the checkpoint in folder `path` is not what its manifest says; "" where it is whole."""
    names = ["manifest.json"]
    try:
        for name in names:  # the manifest names the others
            if (path / name).is_symlink():
                return f"{name} is a symbolic link: refused"
            if not (path / name).is_file():
                return f"incomplete: {name} missing"
            if name == "manifest.json":
                manifest = json.loads((path / name).read_bytes())
                if manifest["format"] != FORMAT:
                    return f"{name}: format {manifest['format']}, and this program reads format {FORMAT}"
                parts = max((len(manifest["files"]) - 1) // 2, 1)
                names += [*TEXTS, *(file for i in range(parts) for file in tensor_files(parts, i))]
                if odd := sorted(manifest["files"].keys() ^ set(names[1:])):  # so no name leads out of the folder
                    return f"{name}: {odd[0]!r} refused: it must list {', '.join(names[1:])}"
                continue
            size, digest = manifest["files"][name]
            found_size, found = entries(path, [name])[name]
            if found_size != size:
                return f"{name}: {found_size} bytes, manifest says {size} (truncated)"
            if found != digest:
                return f"{name}: sha256 mismatch (corrupted)"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json: not a manifest (corrupted)"
    return ""


def find(out_dir, log):
    for path in folders(out_dir, ".tmp"):
        log(f"skipping {path.name}: incomplete: saving was interrupted")
    found = folders(out_dir) + folders(out_dir, ".old")  # a crash while a step is saved again may leave only its .old
    for path in sorted(found, key=lambda path: path.stem, reverse=True):
        if not (reason := verify(path)):
            return path
        log(f"skipping {path.name}: {reason}")
    if found:
        count = f"{len(found)} found, {len(found)} rejected"
        raise CheckpointError(f"no valid checkpoint in {out_dir} ({count}); pass --overwrite to discard them")
