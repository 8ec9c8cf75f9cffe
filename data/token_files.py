"""Token files of other tools, for data/prepare.py to make shards of.

nanoGPT writes train.bin and val.bin without a header, 16 bits a token, or 32 where a vocabulary needs them;
build-nanogpt writes arrays, such as edufineweb_train_000001.npy. In nanoGPT's a document ends with the token that
begins one here, which is the same but for the first document. Which tokenizer made them no file says: they are GPT-2's
unless one is named.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.shards import FORMATS, files_of_split

BLOCK = 1 << 24  # tokens that are read at a time


def find(folder: Path) -> dict[str, list[Path]] | None:
    """Returns {split: its token files} of a folder, None where there is none."""
    found = {}
    for split in ("train", "val"):
        found[split] = files_of_split(folder, split, (".bin", ".npy"))
    if not any(found.values()):
        return None
    for split, paths in found.items():
        if not paths:
            raise ValueError(f"{folder} has token files, but none with {split} as a word of its name")
    if (folder / "meta.pkl").exists():
        why = "its tokens are numbers of a table in meta.pkl, a pickle, which could run any code and is never read"
        raise ValueError(f"{folder}: {why}: prepare the text itself, for characters with --tokenizer char")
    return found


def read(path: Path, vocab_size: int) -> Iterator[np.ndarray]:
    """Yields a file's tokens, some (n,) uint32 at a time."""
    tokens = open_array(path) if path.suffix == ".npy" else open_raw(path, vocab_size)
    for begin in range(0, len(tokens), BLOCK):
        block = np.asarray(tokens[begin : begin + BLOCK])
        if block.min() < 0 or block.max() >= vocab_size:
            range_ = f"tokens from {block.min()} to {block.max()}"
            raise ValueError(f"{path}: {range_}, and a vocabulary of {vocab_size}: name its tokenizer with --tokenizer")
        yield block.astype(np.uint32)


def open_array(path):
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: no array of numbers: {error}") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: an array of {tokens.dtype} of shape {tokens.shape}, and not one row of whole numbers"
        )
    return tokens


def open_raw(path, vocab_size):
    size = path.stat().st_size
    if size % 2 or size < 4:
        raise ValueError(f"{path}: {size} bytes are no tokens of 2 bytes each")
    if np.fromfile(path, "<i4", 1)[0] in FORMATS:
        raise ValueError(f"{path} is a shard as it is: train with --data={path.parent}")
    # In a file of 4 bytes a token every second number of 2 bytes is its upper half, nearly always 0: 5 0 7 0 is 5 7.
    upper_halves = np.fromfile(path, "<u2", BLOCK)[1::2]
    if size % 4 == 0 and upper_halves.max() <= vocab_size >> 16:
        return np.memmap(path, "<u4", "r")
    return np.memmap(path, "<u2", "r")
