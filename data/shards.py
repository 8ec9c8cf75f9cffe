"""Token shards: the file format, and its reader.

A shard is a header of 256 int32 (magic, version, number of tokens, zeros) and then the tokens: the format of llm.c and
modded-nanogpt, whose published shards load as they are. The shards of a split, sorted by name, are one long stream of
tokens in which every document begins with eot_id.

A mask may stand beside each shard of a split, NAME.mask.bin beside NAME.bin: the same header, and then a byte for each
token, whose bit 0 says whether the token is a target. What is no target is read by the model, and not learned.
"""

import hashlib
import mmap
import os
import re
from bisect import bisect_right
from functools import cached_property
from pathlib import Path

import numpy as np  # torch is imported where tensors are made: prepare.py and its workers start without it

from data.text import read_json

HEADER_BYTES = 256 * 4
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: (version, type of a token)
PUBLISHED = {2: (50257, 50256), 4: (128256, 128000)}  # bytes per token: vocab_size and eot_id of GPT-2 and Llama 3


def write_shard(path: str | Path, tokens: np.ndarray, vocab_size: int, mask: np.ndarray | None = None) -> None:
    """Writes one shard, and with a mask (one bool a token: is it a target?) its mask before it.

    Under either name there is never a part of it.
    """
    path = Path(path)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"{path}: tokens are {tokens.min()} to {tokens.max()}, but vocab_size is {vocab_size}")
    magic = 20240520 if vocab_size <= 1 << 16 else 20240801
    version, dtype = FORMATS[magic]
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    if mask is not None:
        if len(mask) != len(tokens):
            raise ValueError(f"{path}: a mask of {len(mask)} for {len(tokens)} tokens")
        write_whole(mask_of(path), header, np.asarray(mask, bool).astype(np.uint8))
    write_whole(path, header, np.ascontiguousarray(tokens, dtype))


def write_whole(path, *arrays):
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        for array in arrays:
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def mask_of(path: Path) -> Path:
    """Returns where the mask of a shard is, whether there is one or not."""
    return path.with_suffix(".mask.bin")


def open_shard(path: Path) -> tuple[mmap.mmap, np.ndarray]:
    """Maps one shard: (its bytes, its tokens). Raises ValueError where the file is not a whole shard."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < HEADER_BYTES:
            raise ValueError(f"{path}: {size} bytes, less than the header's {HEADER_BYTES} (empty or truncated)")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    magic, version, count = np.frombuffer(mapped, "<i4", 3).tolist()
    if magic not in FORMATS:
        advice = f"make shards of it, if it is nanoGPT's, with  python data/prepare.py {path.parent} --out data/NAME"
        raise ValueError(f"{path}: bad magic {magic} (expected 20240520 or 20240801; not a token shard?): {advice}")
    expected, dtype = FORMATS[magic]
    if version != expected:
        raise ValueError(f"{path}: version {version}, but shards with magic {magic} have version {expected}")
    held, odd = divmod(size - HEADER_BYTES, dtype.itemsize)
    if odd:
        raise ValueError(f"{path}: {size - HEADER_BYTES} bytes of tokens do not divide into tokens of {dtype.itemsize}")
    if held != count:
        what = "truncated" if held < count else "two files in one?"
        raise ValueError(f"{path}: header says {count} tokens, file holds {held} ({what}): write it again")
    if not count:
        raise ValueError(f"{path}: no tokens in it: delete it or write it again")
    return mapped, np.frombuffer(mapped, dtype, offset=HEADER_BYTES)


def open_mask(path: Path, count: int) -> tuple[mmap.mmap, np.ndarray]:
    """Maps the mask of a shard of so many tokens: (its bytes, a byte for each token)."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != HEADER_BYTES + count:
            raise ValueError(f"{path}: {size} bytes, and a mask of {count} tokens has {HEADER_BYTES + count}")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    magic, _, held = np.frombuffer(mapped, "<i4", 3).tolist()
    if magic not in FORMATS or held != count:
        raise ValueError(f"{path}: its header is not that of a shard of {count} tokens: write it again")
    return mapped, np.frombuffer(mapped, np.uint8, offset=HEADER_BYTES)


def stamp(path):
    """(which file this is, its size, when it was written to); zeros where there is none."""
    found = os.stat(path) if path.exists() else os.stat_result((0,) * 10)
    return found.st_ino, found.st_size, found.st_mtime_ns


def give_back(mapped, begin, size):
    """Unmaps pages (they stay in the system's cache), or the process would grow to the size of the data."""
    around = 1 << 16  # Linux maps the pages around the one that is read, too: 64 kB, aligned
    if hasattr(mmap, "MADV_DONTNEED"):
        first = begin - begin % around
        mapped.madvise(mmap.MADV_DONTNEED, first, min(begin + size + around, len(mapped)) - first)


def files_of_split(folder: Path, split: str, endings: tuple = (".bin",)) -> list[Path]:
    """Returns the token files of a split, in order: those with its name as a whole word of theirs.

    fineweb_train_000001.bin is train's, and pretrain_val_0.bin is val's. ValueError where a name has both words.
    """
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix not in endings or path.name.startswith(".") or path.name.endswith(".mask.bin"):
            continue
        words = re.split(r"[^a-zA-Z]+", path.stem)
        splits = [name for name in ("train", "val") if name in words]
        if len(splits) > 1:
            raise ValueError(f"{path}: is it of {' or of '.join(splits)}? Its name has both words: rename it")
        if split in words:
            found.append(path)
    return found


# ---- meta.json -------------------------------------------------------------------------------------------------------


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_of_each_split(value):
    return isinstance(value, dict) and value.keys() == {"train", "val"} and all(map(is_count, value.values()))


A_TEXT = "a text", lambda value: isinstance(value, str)
A_NUMBER = "a whole number from 0", is_count
OF_EACH_SPLIT = 'whole numbers {"train": ..., "val": ...}', is_of_each_split
FIELDS = {  # of meta.json: what each must be, where it is there
    "tokenizer": ("a tokenizer's fields or null", lambda value: value is None or isinstance(value, dict)),
    "vocab_size": ("a whole number from 1", lambda value: is_count(value) and value > 0),
    "eot_id": A_NUMBER,
    "targets": ("two whole numbers", lambda value: isinstance(value, list) and [*map(is_count, value)] == [True, True]),
    "masks": ("true or false", lambda value: isinstance(value, bool)),
    "document_tokens": ("a whole number from 1", lambda value: is_count(value) and value > 0),
    "documents": OF_EACH_SPLIT,
    "bytes": OF_EACH_SPLIT,
    "text_bytes": OF_EACH_SPLIT,
    "tokens": OF_EACH_SPLIT,
    "fingerprint": A_TEXT,
    "request": A_TEXT,
    "origin": ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value)),
}


def read_meta(path: Path, advice: str = "prepare the data again") -> dict:
    """Returns what data/prepare.py wrote about shards: in their meta.json, or a run's data.json, which is a copy.

    ValueError names the file and the field that is not what it must be.
    """
    meta = read_json(path)
    if not isinstance(meta, dict):
        raise ValueError(f"{path} holds no fields, but {type(meta).__name__}: {advice}")
    for field in ("tokenizer", "vocab_size", "eot_id"):
        if field not in meta:
            raise ValueError(f"{path} has no field {field!r}: {advice}")
    for field, (what, is_right) in FIELDS.items():
        if field in meta and not is_right(meta[field]):
            raise ValueError(f"{path}: {field!r} is {meta[field]!r:.60}, and not {what}: {advice}")
    if meta["eot_id"] >= meta["vocab_size"]:
        raise ValueError(f"{path}: 'eot_id' is {meta['eot_id']}, and 'vocab_size' {meta['vocab_size']}: {advice}")
    return meta


# ---- the reader ------------------------------------------------------------------------------------------------------


class Shards:
    """The tokens of one split of a folder, memory-mapped. Files may be replaced (by rename) while they are in use."""

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        self.split = split
        if self.folder.is_file():
            command = f"python data/prepare.py {self.folder} --out data/{self.folder.stem}"
            raise FileNotFoundError(f"{self.folder} is a file, and no folder of shards: make one with  {command}")
        if not self.folder.is_dir():
            command = f"python data/prepare.py TEXT --out {self.folder}"
            raise FileNotFoundError(f"{self.folder} not found: make it with  {command}  (a config file says of what)")
        self.paths = files_of_split(self.folder, split)
        if not self.paths:
            others = [path.name for path in sorted(self.folder.iterdir()) if path.suffix in (".bin", ".npy")]
            here = ", ".join(others[:3]) or "no .bin at all"
            source = f" {self.folder} --out data/NAME" if ".npy" in here else ""
            raise FileNotFoundError(
                f"{self.folder} holds no .bin with {split} as a word of its name, such as {split}_000000.bin ({here}): "
                f"make it with  python data/prepare.py{source}"
            )
        opened = [open_shard(path) for path in self.paths]
        self._maps = [mapped for mapped, _ in opened]
        self._tokens = [tokens for _, tokens in opened]
        self._ends = np.cumsum([len(tokens) for tokens in self._tokens]).tolist()
        self.meta = self._read_meta()
        self.mask_paths = self._find_masks()
        opened = [open_mask(path, len(tokens)) for path, tokens in zip(self.mask_paths, self._tokens)]
        self._mask_maps = [mapped for mapped, _ in opened]
        self._masks = [mask for _, mask in opened]
        self._stamps = [stamp(path) for path in self.paths + self.mask_paths]
        self.vocab_size = self.meta["vocab_size"]
        self.eot_id = self.meta["eot_id"]
        self.targets = self.meta.get("targets")  # the first id that is learned and evaluated, the last + 1; None: all
        self.learns_all = self.targets is None and not self.mask_paths
        self.document_tokens = self.meta.get("document_tokens")  # in every document; None: they differ

    def _find_masks(self):
        """Returns the masks of all shards, or none at all: what has only some would be learned by accident."""
        masks = [mask_of(path) for path in self.paths]
        missing = [path for path in masks if not path.exists()]
        if missing and (len(missing) < len(masks) or self.meta.get("masks")):
            raise ValueError(f"{missing[0]} is missing, and this data is learned by masks: prepare it again")
        return [] if missing else masks

    def _read_meta(self):
        path = self.folder / "meta.json"
        if not path.exists():  # published shards: known by the size of their tokens
            vocab_size, eot_id = PUBLISHED[self._tokens[0].itemsize]
            return {"tokenizer": None, "vocab_size": vocab_size, "eot_id": eot_id}
        return read_meta(path)

    @cached_property
    def fingerprint(self) -> str:
        """Which data this is: from meta.json, or for published shards a hash of names, sizes and first bytes."""
        if "fingerprint" in self.meta:
            return self.meta["fingerprint"]
        digest = hashlib.sha256()
        for path, mapped in zip(self.paths, self._maps):
            digest.update(f"{path.name} {len(mapped)} ".encode() + mapped[: 2 * HEADER_BYTES])
        return digest.hexdigest()

    @cached_property
    def contents(self) -> str:
        """A hash of what the files do hold, whatever meta.json says: names, sizes, and 64 kB at 8 places of each."""
        digest = hashlib.sha256()
        part = 1 << 16
        for path, mapped in zip(self.paths + self.mask_paths, self._maps + self._mask_maps):
            digest.update(f"{path.name} {len(mapped)} ".encode())
            for begin in range(0, len(mapped), max(len(mapped) // 8, part)):
                digest.update(mapped[begin : begin + part])
                give_back(mapped, begin, part)
        return digest.hexdigest()

    def changed(self) -> list[str]:
        """The files that were written to after they were opened: what was read of them since may be anything.

        One that was replaced by rename is not among them: the old file is still what is read.
        """
        found = []
        for path, before in zip(self.paths + self.mask_paths, self._stamps):
            now = stamp(path)
            if now[0] == before[0] and now != before:
                found.append(str(path))
        return found

    def __len__(self):
        return self._ends[-1]

    def read(self, start: int, n: int) -> np.ndarray:
        """Returns tokens start to start + n of the stream, across shards: (n,) int64."""
        out = self._read(start, n, self._tokens, self._maps, np.int64)
        if n and out.max() >= self.vocab_size:
            bad = int((out >= self.vocab_size).argmax())
            path = self.paths[bisect_right(self._ends, start + bad)]
            raise ValueError(f"{path}: token {out[bad]} >= vocab_size {self.vocab_size}: made with another tokenizer?")
        return out

    def read_mask(self, start: int, n: int) -> np.ndarray:
        """Returns which of the tokens start to start + n are targets by their masks: (n,) bool."""
        if not self._masks:
            return np.ones(n, bool)
        return self._read(start, n, self._masks, self._mask_maps, np.uint8) & 1 == 1

    def _read(self, start, n, arrays, maps, dtype):
        assert 0 <= start and start + n <= len(self), f"tokens {start} to {start + n} of {len(self)}"
        out = np.empty(n, dtype)
        done = 0
        while done < n:
            i = bisect_right(self._ends, start + done)
            array = arrays[i]
            first = start + done - (self._ends[i] - len(array))
            part = array[first : first + n - done]
            out[done : done + len(part)] = part
            done += len(part)
            give_back(maps[i], HEADER_BYTES + first * array.itemsize, part.nbytes)
        return out

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Where the documents begin, (D,) int64. Reads everything once, 8 bytes of memory a document."""
        found = []
        block = 1 << 22
        for start in range(0, len(self), block):
            tokens = self.read(start, min(block, len(self) - start))
            found.append(start + np.flatnonzero(tokens == self.eot_id))
        return np.concatenate(found)
