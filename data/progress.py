"""What an interrupted prepare.py leaves for the same command to go on with: whole shards, and a note.

The note has what the shards do not say: how much of the text they are, and the tokens behind them.
"""

import json
import os
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.shards import mask_of, open_shard

NOTE = "progress.npz"


class Progress(NamedTuple):
    """How far a text is written."""

    fields: dict  # as JSON has them; "counts" has the number of "shards" of each split
    rests: dict[str, np.ndarray]  # tokens, and their masks, that fill no shard yet


def shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}_{number:06d}.bin"


def write_note(folder: Path, request: str, progress: Progress) -> None:
    """Replaces the note in a folder of shards, at once. request: a hash of all that decides what is written."""
    temporary = folder / f".{NOTE}.tmp"
    with open(temporary, "wb") as file:
        fields = json.dumps({"request": request, **progress.fields})
        np.savez(file, fields=np.array(fields), **progress.rests)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / NOTE)


def find_note(folder: Path, request: str) -> Progress | None:
    """Returns how far an interrupted run of the same request came, and deletes what is none of its shards.

    None where there was no such run: the folder is empty then.
    """
    progress = read_note(folder, request)
    wanted = set()
    if progress:
        for split, counts in progress.fields["counts"].items():
            shards = [shard_path(folder, split, i) for i in range(counts["shards"])]
            wanted |= {folder / NOTE, *shards, *map(mask_of, shards)}
    elif (folder / NOTE).exists():
        print(f"{folder} is of an interrupted run that was asked for something else: begun anew", file=sys.stderr)
    for path in folder.iterdir():
        if path not in wanted:
            path.unlink()
    return progress


def read_note(folder, request):
    try:
        with np.load(folder / NOTE) as arrays:
            rests = dict(arrays)
        fields = json.loads(str(rests.pop("fields")))
        if fields["request"] != request:
            return None
        for split, counts in fields["counts"].items():
            for i in range(counts["shards"]):
                open_shard(shard_path(folder, split, i))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # nothing is there, or a disk lost some of it
        return None
    return Progress(fields, rests)
