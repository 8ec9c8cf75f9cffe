"""How a run writes files, whole and through no link, and reads JSON with the fields that it expects; its warnings."""

import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class CheckpointError(RuntimeError):
    """What was wrong with which checkpoint, for the user to read."""


already_said = set()


def warn_once(text: str) -> None:
    if text not in already_said:
        already_said.add(text)
        print(f"WARNING: {text}", file=sys.stderr)


TEMPORARY = r"\..+\.[0-9a-f]{16}\.tmp"  # the names that temporary_beside returns


def temporary_beside(path: Path) -> Path:
    """Returns a name in the same folder, which nobody can have put a link at since nobody can guess it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def replaced(path: Path) -> Iterator[TextIO]:
    """Opens a text file that takes the place of another when the block ends, and leaves nothing where it fails.

    What a link at its name points to stays as it is. The text is on the disk before it takes that place: after a power
    cut the file holds the new text or the old one.
    """
    temporary = temporary_beside(path)
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            yield file
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file that has all of the text, or what it had before if this process or the machine dies meanwhile."""
    with replaced(path) as file:
        file.write(text)


def read_json(path: Path, **kinds: type) -> dict:
    """Returns the object that a file holds. kinds: {field: its type}; other fields may be there.

    ValueError names the file, and the field that is missing or of another type.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, and not an object")
    for field, kind in kinds.items():
        if not isinstance(found.get(field), kind):
            value = repr(found[field])[:40] if field in found else "missing"
            raise ValueError(f"{path}: {field} is {value}, and must be a {kind.__name__}")
    return found


def fsync(path):
    """Waits until a file, or what a folder lists, is on the disk, where the disk can say so."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not Path(path).is_dir():
            raise
        warn_once(f"{path} is on a disk that flushes no folders: a power cut may lose the newest checkpoint")
    finally:
        os.close(descriptor)


def remove(path):
    """Deletes a folder with what is in it, or a file, or a link and not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def tensor_files(parts: int, i: int = 0, kinds: Iterable[str] = ("model", "trainer")) -> list[str]:
    """Returns the names of the i-th process's files (from 0) in a checkpoint that `parts` processes write."""
    end = f"-{i + 1:05d}-of-{parts:05d}" if parts > 1 else ""
    return [f"{kind}{end}.safetensors" for kind in kinds]
