"""Token shards: the file format, the reader, and the loader that makes batches of them.

A shard is a header of 256 int32 (magic, version, number of tokens, zeros) and then the tokens: the format of llm.c and
modded-nanogpt, whose published shards load as they are. The shards of a split, sorted by name, are one long stream of
tokens in which every document begins with eot_id.

A run sees windows 0, 1, 2, ... Window g is a function of (seed, g) alone: g // windows_per_epoch is its epoch, and
g % windows_per_epoch its place in that epoch's order, which is computed and not stored. There is no state to save, any
step is reached at once, and the number of ranks and micro_batch change nothing.
"""

import hashlib
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np  # torch is imported where tensors are made: prepare.py and its workers start without it

from data.text import read_json

HEADER_BYTES = 256 * 4
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: (version, type of a token)
PUBLISHED = {2: (50257, 50256), 4: (128256, 128000)}  # bytes per token: vocab_size and eot_id of GPT-2 and Llama 3


def write_shard(path: str | Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Writes one shard; under its name there is never a part of it."""
    path = Path(path)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"{path}: tokens are {tokens.min()} to {tokens.max()}, but vocab_size is {vocab_size}")
    magic = 20240520 if vocab_size <= 1 << 16 else 20240801
    version, dtype = FORMATS[magic]
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype).data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
        if path.suffix not in endings or path.name.startswith("."):
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
        if not self.folder.is_dir():
            command = f"python data/prepare.py {self.folder.name} --out {self.folder}"
            raise FileNotFoundError(f"{self.folder} not found: make it with  {command}")
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
        self._stamps = [stamp(path) for path in self.paths]
        self._ends = np.cumsum([len(tokens) for tokens in self._tokens]).tolist()
        self.meta = self._read_meta()
        self.vocab_size = self.meta["vocab_size"]
        self.eot_id = self.meta["eot_id"]
        self.targets = self.meta.get("targets")  # the first id that is learned and evaluated, the last + 1; None: all
        self.document_tokens = self.meta.get("document_tokens")  # in every document; None: they differ

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
        for path, mapped in zip(self.paths, self._maps):
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
        for path, before in zip(self.paths, self._stamps):
            now = stamp(path)
            if now[0] == before[0] and now != before:
                found.append(str(path))
        return found

    def __len__(self):
        return self._ends[-1]

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens start to start + n of the stream, across shards: (n,) int64."""
        assert 0 <= start and start + n <= len(self), f"tokens {start} to {start + n} of {len(self)}"
        out = np.empty(n, np.int64)
        done = 0
        while done < n:
            i = bisect_right(self._ends, start + done)
            tokens = self._tokens[i]
            first = start + done - (self._ends[i] - len(tokens))
            part = tokens[first : first + n - done]
            out[done : done + len(part)] = part
            done += len(part)
            give_back(self._maps[i], HEADER_BYTES + first * tokens.itemsize, part.nbytes)
        if n and out.max() >= self.vocab_size:
            bad = int((out >= self.vocab_size).argmax())
            path = self.paths[bisect_right(self._ends, start + bad)]
            raise ValueError(f"{path}: token {out[bad]} >= vocab_size {self.vocab_size}: made with another tokenizer?")
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


def shuffled(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Places `index` of a random order of range(n): a permutation that is computed, not stored.

    A Feistel network, one round a key, permutes the numbers of an even number of bits whatever its round function is;
    a number that lands outside of range(n) goes through again until it is inside (cycle walking: Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002). The round function is splitmix64's finalizer.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    out = index.astype(np.uint64)
    outside = np.arange(len(index))
    while len(outside):
        left = out[outside] >> half
        right = out[outside] & low
        for key in keys:
            z = right + key  # wraps at 64 bits, like the products below
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
            mixed = left ^ (z & low)
            left = right
            right = mixed
        out[outside] = left << half | right
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


class Loader:
    """Batches of windows of block_size + 1 tokens: the inputs and, shifted by one, the targets.

    An epoch is every window of a grid once, in an order drawn from (seed, epoch); each epoch shifts the grid by a
    random phase. Step s has the windows s * batch_windows and following, of which a rank takes a contiguous slice.
    After `go_on` they are those that follow what came before.

    document_start_probability: this share of the windows begins where a document begins (every document once before any
    comes again) and runs on into the next document where the document is shorter.
    mask_document_crossing: a target that belongs to the next document becomes -1, which the loss ignores. Documents
    begin with eot_id, so these are the targets that are eot_id.
    """

    def __init__(
        self,
        shards: Shards,
        block_size: int,
        batch_windows: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | None = None,
        device: str = "cpu",
        document_start_probability: float = 0.0,
        mask_document_crossing: bool = False,
    ):
        if len(shards) < block_size + 1:
            why = f"{len(shards)} {shards.split} tokens are less than one window of block_size + 1 = {block_size + 1}"
            raise ValueError(f"{shards.folder}: {why}: use a smaller block_size or more text")
        if batch_windows < world_size:
            why = f"a batch of {batch_windows} windows is too small for {world_size} ranks"
            raise ValueError(f"{why}: raise batch_tokens")
        check_whole_documents(shards, block_size)
        if not 0 <= document_start_probability <= 1:
            raise ValueError(f"document_start_probability={document_start_probability} is not between 0 and 1")
        self.shards = shards
        self.block_size = block_size
        self.batch_windows = batch_windows
        self.seed = seed
        self.first = batch_windows * rank // world_size
        self.last = batch_windows * (rank + 1) // world_size
        self.micro_batch = micro_batch or self.last - self.first
        self.device = device
        self.mask_document_crossing = mask_document_crossing
        # One window is left out, where there is more than one, so that the grid can begin at any of block_size places.
        self.windows_per_epoch = max(1, len(shards) // block_size - 1)
        self.phases = min(block_size, len(shards) - self.windows_per_epoch * block_size)
        if shards.document_tokens:
            self.phases = 1  # a grid that begins at 0 cuts no document
        self.share = round(document_start_probability * (1 << 20))  # in integers, so that counting never drifts
        if self.share:
            self.document_starts = shards.document_starts[shards.document_starts < len(shards) - block_size]
            if not len(self.document_starts):
                why = f"no document (eot_id={shards.eot_id}) starts block_size before the end"
                raise ValueError(f"{shards.folder}: {why}")
        # A GPU's next step is read while it computes. A CPU would pay more for the thread than for the reading.
        self._thread = ThreadPoolExecutor(1) if device != "cpu" else None
        self._drawn = None, None  # (64 steps, where their windows start)
        self._ahead = None, None  # (step, its future batches)
        self._offset = 0  # how many windows more than step * batch_windows came before a step

    def go_on(self, step: int, windows: int) -> None:
        """Says that so many windows came before a step: a run may have had another batch in its earlier steps."""
        self._offset = windows - step * self.batch_windows
        self._drawn = None, None

    def _draw(self, k, n, kind):
        """The k-th draws from range(n), all of it once before any comes again: (draws, a number for each epoch)."""
        drawn = np.empty_like(k)
        noise = np.empty_like(k)
        epochs = k // n
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            keys = np.random.SeedSequence((self.seed, kind, epoch)).generate_state(7, np.uint64)
            drawn[here] = shuffled(k[here] % n, n, keys[1:])
            noise[here] = keys[0] >> np.uint64(1)
        return drawn, noise

    def starts(self, step: int) -> np.ndarray:
        """Where this rank's windows of a step begin in the stream of tokens: (windows,) int64."""
        block, place = divmod(step, 64)  # drawing for 64 steps takes hardly longer than for one
        known, starts = self._drawn
        if known != block:
            starts = self._draw_starts(block * 64 + np.arange(64))
            self._drawn = block, starts
        return starts[place]

    def _draw_starts(self, steps):
        g = self._offset + steps[:, None] * self.batch_windows + np.arange(self.first, self.last)  # (steps, windows)
        g = np.maximum(g, 0)  # of steps before the one at which this loader goes on
        documents = g * self.share >> 20  # windows before this one that began with a document
        window, noise = self._draw(g - documents, self.windows_per_epoch, 0)
        starts = window * self.block_size + noise % self.phases
        if self.share:
            place, _ = self._draw(documents, len(self.document_starts), 1)
            begins_document = (g + 1) * self.share >> 20 > documents
            starts = np.where(begins_document, self.document_starts[place], starts)
        return starts

    def _load(self, step):
        starts = self.starts(step)
        ignored = self.shards.eot_id if self.mask_document_crossing else None
        loaded = []
        for i in range(0, len(starts), self.micro_batch):
            some = starts[i : i + self.micro_batch]
            loaded.append(make_batch(self.shards, some, self.block_size, self.device, ignored))
        return loaded

    def batches(self, step: int) -> Iterator[tuple]:
        """This rank's micro-batches (x, y) of a step, on the device."""
        if self._thread:
            ahead_of, here = self._ahead
            if ahead_of != step:
                here = self._thread.submit(self._load, step)
            self._ahead = step + 1, self._thread.submit(self._load, step + 1)
            loaded = here.result()
        else:
            loaded = self._load(step)
        for x, y in loaded:
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


def check_whole_documents(shards, block_size):
    n = shards.document_tokens
    if n and block_size % n:
        near = sorted({max(block_size // n, 1) * n, -(-block_size // n) * n})
        why = f"block_size={block_size} would cut documents, all of {n} tokens"
        raise ValueError(f"{shards.folder}: {why}: try {' or '.join(map(str, near))}")


def check_evaluation(shards: Shards, block_size: int) -> None:
    """Raises ValueError where there is nothing to evaluate, or not in windows of that size."""
    check_whole_documents(shards, block_size)
    if len(shards) < 2:
        few = f"the {shards.split} split has {len(shards)} token, and to predict one takes 2"
        raise ValueError(f"{shards.folder}: {few}: prepare more text, or with another --val_fraction")


def make_batch(shards, starts, block_size, device, ignored=None, targets=None):
    """Windows that begin at `starts` as (x, y), in pinned memory for a GPU; y past `targets` of the stream is -1."""
    import torch

    tokens = np.full((len(starts), block_size + 1), shards.eot_id, np.int64)
    for row, start in zip(tokens, starts.tolist()):
        n = min(block_size + 1, len(shards) - start)
        row[:n] = shards.read(start, n)
    x = np.ascontiguousarray(tokens[:, :-1])
    y = tokens[:, 1:].copy()
    if ignored is not None:
        y[y == ignored] = -1
    if targets is not None:
        y[starts[:, None] + 1 + np.arange(block_size) > targets] = -1
    if shards.targets:
        first, end = shards.targets
        y[(y < first) | (y >= end)] = -1
    x = torch.from_numpy(x)
    y = torch.from_numpy(y)
    if torch.device(device).type == "cuda":
        return x.pin_memory(), y.pin_memory()
    return x, y


def eval_batches(
    shards: Shards,
    block_size: int,
    n_tokens: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
) -> Iterator[tuple]:
    """Yields the first n_tokens targets of the split (0: all of them), each exactly once, the same at every call.

    The last window is filled up with targets of -1, so weigh a batch's loss by its targets that are not -1.
    Ranks get contiguous parts, whose numbers of batches may differ by one or be 0.
    """
    check_evaluation(shards, block_size)
    targets = min(n_tokens or len(shards), len(shards) - 1)
    starts = np.arange(0, targets, block_size)
    starts = starts[len(starts) * rank // world_size : len(starts) * (rank + 1) // world_size]
    for i in range(0, len(starts), micro_batch):
        x, y = make_batch(shards, starts[i : i + micro_batch], block_size, device, targets=targets)
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
