"""Batches of windows of tokens, in an order that is computed and not stored.

A run sees windows 0, 1, 2, ... Which text a window is of, and where it begins in it, is a function of (seed, number of
the window), and of how far earlier stages of the run got in each text (Position). There is no state to save, any step
is reached at once, and the number of ranks and micro_batch change nothing.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np  # torch is imported where tensors are made: prepare.py and its workers start without it

from data.shards import Shards

ROUND = 1024  # windows of a mixture, among which every text has its share exactly
GRID, DOCUMENTS, TEXTS = range(3)  # what is drawn: each has random orders of its own


class Position(NamedTuple):
    """How far a run is in a text."""

    tokens: int = 0  # that windows of the grid have had, over all epochs
    documents: int = 0  # at which a window began


BEGINNING = Position()


class Piece(NamedTuple):
    """A part of the stream of tokens."""

    start: int
    length: int
    follows: bool = False  # it goes on with a document that was cut, and has eot_id before it as if it were one


class Window(NamedTuple):
    """Where the tokens of a window are, and how many of its first targets are there to be learned."""

    shards: Shards
    pieces: list[Piece]  # which stand one behind the other
    targets: int


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


def draw(k: np.ndarray, n: int, seed: int, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """The k-th draws from range(n), all of it once before any comes again: (draws, a random number of their epoch)."""
    drawn = np.empty_like(k)
    epoch_number = np.empty_like(k)
    epochs = k // n
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        keys = np.random.SeedSequence((seed, kind, epoch)).generate_state(7, np.uint64)
        drawn[here] = shuffled(k[here] % n, n, keys[1:])
        epoch_number[here] = keys[0] >> np.uint64(1)
    return drawn, epoch_number


# ---- one text --------------------------------------------------------------------------------------------------------
class Stream:
    """The windows of one text, documents one behind the other: an order without end.

    An epoch is every cell of a grid once, in an order drawn from (seed, epoch); each epoch shifts the grid by a random
    phase. A cell is as long as the longest window that the run's stages have. With stages of 512 and of 1,024 tokens
    the first reads two windows of each cell, one after the other: the cells that are left in the epoch are whole, and
    the second stage reads those.

    document_start_probability: this share of the windows begins where a document begins (every document once before any
    comes again) and runs on into the next document where the document is shorter.
    """

    def __init__(
        self,
        shards: Shards,
        block_size: int,
        seed: int = 0,
        document_start_probability: float = 0.0,
        cell: int = 0,
        position: Position = BEGINNING,
    ):
        self.cell = cell or block_size
        if len(shards) < block_size + 1:
            why = f"{len(shards)} {shards.split} tokens are less than one window of block_size + 1 = {block_size + 1}"
            raise ValueError(f"{shards.folder}: {why}: use a smaller block_size or more text")
        if self.cell % block_size:
            raise ValueError(f"block_size={block_size} does not divide the longest of the stages, {self.cell}")
        check_whole_documents(shards, block_size)
        if not 0 <= document_start_probability <= 1:
            raise ValueError(f"document_start_probability={document_start_probability} is not between 0 and 1")
        self.shards = shards
        self.block_size = block_size
        self.seed = seed
        self.begin = position._replace(tokens=math.ceil(position.tokens / block_size) * block_size)
        # One cell is left out, where there is more than one, so that the grid can begin at any place of a cell.
        self.cells = max(1, len(shards) // self.cell - 1)
        self.phases = min(self.cell, len(shards) - self.cells * self.cell)
        if shards.document_tokens:
            self.phases = 1  # a grid that begins at 0 cuts no document
        self.windows_per_epoch = self.cells * (self.cell // block_size)
        self.share = round(document_start_probability * (1 << 20))  # in integers, so that counting never drifts
        if self.share:
            self.document_starts = shards.document_starts[shards.document_starts < len(shards) - self.cell]
            if not len(self.document_starts):
                why = f"no document (eot_id={shards.eot_id}) starts {self.cell} tokens before the end"
                raise ValueError(f"{shards.folder}: {why}")

    def starts(self, k: np.ndarray) -> np.ndarray:
        """Where its k-th windows begin in the stream of tokens: int64 of the shape of k."""
        documents = k * self.share >> 20  # windows before this one that began with a document
        tokens = self.begin.tokens + (k - documents) * self.block_size
        cell, epoch_number = draw(tokens // self.cell, self.cells, self.seed, GRID)
        starts = cell * self.cell + epoch_number % self.phases + tokens % self.cell
        if self.share:
            place, _ = draw(self.begin.documents + documents, len(self.document_starts), self.seed, DOCUMENTS)
            begins_document = (k + 1) * self.share >> 20 > documents
            starts = np.where(begins_document, self.document_starts[place], starts)
        return starts

    def windows(self, k: np.ndarray) -> list[Window]:
        size = self.block_size
        return [Window(self.shards, [Piece(start, size)], size) for start in self.starts(k).tolist()]

    def position_after(self, n: int) -> Position:
        """Returns how far a run is in this text after n of these windows."""
        documents = n * self.share >> 20
        tokens = self.begin.tokens + (n - documents) * self.block_size
        return Position(tokens, self.begin.documents + documents)

    def epochs(self, n: int) -> float:
        """Returns how often the run has gone through the grid after n of these windows."""
        return self.position_after(n).tokens / (self.cells * self.cell)


class Packed:
    """The windows of one text that hold whole documents: an order without end. Each block_size has its own.

    Documents are put into windows by best fit: the longest first, each into the fullest window in which there is room.
    What is left of a window is filled with eot_id, which is no target; the one that follows a document is. A document
    longer than a window is left out with long_documents="skip", and else cut: each piece but the first has an eot_id
    before it, and the last target of each but the last is the token with which the next one goes on.
    """

    def __init__(self, shards, block_size, seed=0, long_documents="cut", position=BEGINNING):
        self.shards = shards
        self.block_size = block_size
        self.seed = seed
        starts = shards.document_starts
        lengths = np.diff(starts, append=len(shards))
        is_long = lengths > block_size
        self.n_long = int(is_long.sum())
        if long_documents == "skip":
            starts = starts[~is_long]
            lengths = lengths[~is_long]
        if not len(starts):
            raise ValueError(f"{shards.folder}: no document fits into block_size={block_size}, and others are left out")
        self.bins = best_fit(cut(starts.tolist(), lengths.tolist(), block_size), block_size)
        self.windows_per_epoch = len(self.bins)
        self.n_without_target = self.count_without_target()
        self.utilisation = sum(map(room_of, sum(self.bins, []))) / (len(self.bins) * block_size)
        self.first = position.tokens // block_size

    def count_without_target(self) -> int:
        """Returns in how many windows the masks leave nothing to be learned."""
        if not self.shards.mask_paths:
            return 0
        return sum(not any(map(self.has_target, pieces)) for pieces in self.bins)

    def has_target(self, piece: Piece) -> bool:
        _, is_target = read_with_next(self.shards, piece.start, piece.length)
        return bool(is_target[1:].any())

    def windows(self, k: np.ndarray) -> list[Window]:
        place, _ = draw(self.first + k, len(self.bins), self.seed, GRID)
        bins = [self.bins[i] for i in place.tolist()]
        return [Window(self.shards, pieces, sum(map(room_of, pieces))) for pieces in bins]

    def position_after(self, n: int) -> Position:
        return Position((self.first + n) * self.block_size)

    def epochs(self, n: int) -> float:
        return (self.first + n) / len(self.bins)


def room_of(piece: Piece) -> int:
    """Returns how many tokens of a window a piece takes."""
    return piece.length + piece.follows


def cut(starts, lengths, size) -> list[Piece]:
    """Returns documents as pieces that take at most `size` tokens each."""
    pieces = []
    for start, length in zip(starts, lengths):
        pieces.append(Piece(start, min(length, size)))
        done = size
        while done < length:
            pieces.append(Piece(start + done, min(length - done, size - 1), follows=True))
            done += size - 1
    return pieces


def best_fit(pieces: list[Piece], size: int) -> list[list[Piece]]:
    """Returns bins of pieces, at most `size` tokens each: the longest first, into the fullest with room."""
    bins = []
    with_room = [[] for _ in range(size + 1)]  # [room]: bins that have exactly so much
    rooms = np.zeros(size + 1, bool)
    for piece in sorted(pieces, key=room_of, reverse=True):
        needed = room_of(piece)
        fitting = int(rooms[needed:].argmax()) + needed  # the least room that is enough
        if rooms[fitting]:
            place = with_room[fitting].pop()
            rooms[fitting] = bool(with_room[fitting])
        else:
            place = len(bins)
            bins.append([])
            fitting = size
        bins[place].append(piece)
        left = fitting - needed
        if left:
            with_room[left].append(place)
            rooms[left] = True
    return bins


# ---- many texts ------------------------------------------------------------------------------------------------------
def read_mixture(data: str | list) -> list[tuple[Path, float]]:
    """Returns [(folder, weight)] of the knob `data`: one folder, or a list of them with a weight after a colon."""
    if isinstance(data, str):
        return [(Path(data), 1.0)]
    found = []
    for item in data:
        if not isinstance(item, str):
            raise ValueError(f'data={data}: {item!r} is no text: write "FOLDER:WEIGHT"')
        folder, _, weight = item.rpartition(":")
        try:
            weight = float(weight)
        except ValueError:
            folder = ""
        if not folder:
            folder, weight = item, 1.0
        if not 0 < weight < math.inf:
            raise ValueError(f"data: the weight of {item!r} is not above 0")
        found.append((Path(os.path.expanduser(folder)), weight))
    folders = [folder.resolve() for folder, _ in found]
    if not found or len(set(folders)) < len(folders):
        raise ValueError(f"data={data}: give one folder or more, each of them once")
    return found


class Mixture:
    """Windows of several texts, each in its own order and epochs, in the proportion of their weights.

    Of every ROUND windows each text has its share exactly, and at least one; their order is drawn from (seed, round).
    """

    def __init__(self, texts: list, weights: list[float], seed: int = 0):
        if min(weights) <= 0:
            raise ValueError(f"weights of a mixture are {weights}: try numbers above 0")
        self.texts = texts
        self.seed = seed
        exact = np.array(weights) / sum(weights) * ROUND
        counts = np.maximum(np.floor(exact).astype(int), 1)
        while counts.sum() != ROUND:  # what rounding left over, or took too much, is of those that it wronged most
            step = 1 if counts.sum() < ROUND else -1
            counts[np.argmax(step * (exact - counts) - (counts + step < 1) * ROUND)] += step
        self.counts = counts  # of each text, in a round

    def choose(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns which text window g is of, and how many windows of that text came before it: both of g's shape."""
        text = np.zeros_like(g)
        before = g.copy()
        if len(self.texts) == 1:
            return text, before
        rounds = g // ROUND
        ends = np.cumsum(self.counts)
        for number in np.unique(rounds).tolist():
            order, _ = draw(number * ROUND + np.arange(ROUND), ROUND, self.seed, TEXTS)
            chosen = np.searchsorted(ends, order, side="right")  # (ROUND,)
            earlier = np.empty(ROUND, int)
            for i in range(len(self.texts)):
                here = chosen == i
                earlier[here] = np.arange(self.counts[i])
            at = rounds == number
            text[at] = chosen[g[at] % ROUND]
            before[at] = number * self.counts[text[at]] + earlier[g[at] % ROUND]
        return text, before

    def counts_before(self, g: int) -> list[int]:
        """Returns how many of the windows before g each text has."""
        begun, _ = self.choose(np.arange(g - g % ROUND, g))
        return [int(g // ROUND * n + (begun == i).sum()) for i, n in enumerate(self.counts)]


class Loader:
    """Batches of windows of block_size + 1 tokens: the inputs and, shifted by one, the targets.

    Step s has the windows s * batch_windows and following, of which a rank takes a contiguous slice. After `go_on` they
    are those that follow what came before.

    texts: Shards, or [(Shards, weight)] for a mixture.
    mask_document_crossing: a target that belongs to the next document becomes -1, which the loss ignores. Documents
    begin with eot_id, so these are the targets that are eot_id.
    pack: stream cuts a text wherever a window ends (class Stream), documents fills windows with whole documents (class
    Packed), for which long_documents says what becomes of those that are too long.
    positions, cells: {folder: where the text stands, how long the cells of its grid are} in a run of several stages.
    """

    def __init__(
        self,
        texts: Shards | list[tuple[Shards, float]],
        block_size: int,
        batch_windows: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | None = None,
        device: str = "cpu",
        document_start_probability: float = 0.0,
        mask_document_crossing: bool = False,
        pack: str = "stream",
        long_documents: str = "cut",
        positions: dict | None = None,
        cells: dict | None = None,
    ):
        if batch_windows < world_size:
            why = f"a batch of {batch_windows} windows is too small for {world_size} ranks"
            raise ValueError(f"{why}: raise batch_tokens")
        if isinstance(texts, Shards):
            texts = [(texts, 1.0)]
        orders = []
        for shards, _ in texts:
            position = (positions or {}).get(shards.folder, BEGINNING)
            if pack == "documents":
                orders.append(Packed(shards, block_size, seed, long_documents, position))
            else:
                cell = (cells or {}).get(shards.folder, 0)
                orders.append(Stream(shards, block_size, seed, document_start_probability, cell, position))
        self.mixture = Mixture(orders, [weight for _, weight in texts], seed)
        self.block_size = block_size
        self.batch_windows = batch_windows
        self.first = batch_windows * rank // world_size
        self.last = batch_windows * (rank + 1) // world_size
        self.micro_batch = micro_batch or self.last - self.first
        self.device = device
        self.mask_document_crossing = mask_document_crossing
        # A GPU's next step is read while it computes. A CPU would pay more for the thread than for the reading.
        self._thread = ThreadPoolExecutor(1) if device != "cpu" else None
        self._drawn = None, None  # (64 steps, their windows)
        self._ahead = None, None  # (step, its future batches)
        self._offset = 0  # how many windows more than step * batch_windows came before a step

    def go_on(self, step: int, windows: int) -> None:
        """Says that so many windows came before a step: a run may have had another batch in its earlier steps."""
        self._offset = windows - step * self.batch_windows
        self._drawn = None, None
        self._ahead = None, None

    def windows(self, step: int) -> list[Window]:
        """Returns this rank's windows of a step."""
        block, place = divmod(step, 64)  # drawing for 64 steps takes hardly longer than for one
        known, drawn = self._drawn
        if known != block:
            drawn = self._draw(block * 64 + np.arange(64))
            self._drawn = block, drawn
        size = self.last - self.first
        return drawn[place * size : (place + 1) * size]

    def _draw(self, steps):
        g = self._offset + steps[:, None] * self.batch_windows + np.arange(self.first, self.last)
        g = np.maximum(g, 0).flatten()  # of steps before the one at which this loader goes on
        text, k = self.mixture.choose(g)
        found = [None] * len(g)
        for i, order in enumerate(self.mixture.texts):
            at = np.flatnonzero(text == i)
            for place, window in zip(at.tolist(), order.windows(k[at])):
                found[place] = window
        return found

    def _load(self, step):
        windows = self.windows(step)
        parts = [windows[i : i + self.micro_batch] for i in range(0, len(windows), self.micro_batch)]
        return [make_batch(part, self.block_size, self.device, self.mask_document_crossing) for part in parts]

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

    def positions_before(self, step: int) -> dict:
        """Returns {folder: Position} of its texts before a step."""
        counts = self.mixture.counts_before(self._offset + step * self.batch_windows)
        return {order.shards.folder: order.position_after(n) for order, n in zip(self.mixture.texts, counts)}

    def epochs_before(self, step: int) -> dict:
        """Returns {folder: how often it was gone through, from the run's beginning} before a step."""
        counts = self.mixture.counts_before(self._offset + step * self.batch_windows)
        return {order.shards.folder: order.epochs(n) for order, n in zip(self.mixture.texts, counts)}


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


def make_batch(windows: list[Window], block_size: int, device: str, mask_document_crossing: bool = False) -> tuple:
    """Returns x, y (windows, block_size), in pinned memory for a GPU; y is -1 where there is nothing to be learned."""
    import torch

    x = np.empty((len(windows), block_size), np.int64)
    y = np.full((len(windows), block_size), -1, np.int64)
    for i, (shards, pieces, targets) in enumerate(windows):
        x[i] = shards.eot_id
        end = 0
        for start, length, follows in pieces:
            end += follows  # of the eot_id before it nothing is learned
            tokens, is_target = read_with_next(shards, start, length)
            x[i, end : end + length] = tokens[:-1]
            y[i, end : end + length] = np.where(is_target[1:], tokens[1:], -1)
            end += length
        y[i, targets:] = -1
        if shards.targets:
            first, last = shards.targets
            y[i, (y[i] < first) | (y[i] >= last)] = -1
        if mask_document_crossing:
            y[i, y[i] == shards.eot_id] = -1
    x = torch.from_numpy(x)
    y = torch.from_numpy(y)
    if torch.device(device).type == "cuda":
        return x.pin_memory(), y.pin_memory()
    return x, y


def read_with_next(shards, start, length):
    """Returns length + 1 tokens, and which are targets. After the last token of the text comes eot_id."""
    n = min(length + 1, len(shards) - start)
    tokens = np.full(length + 1, shards.eot_id, np.int64)
    tokens[:n] = shards.read(start, n)
    is_target = np.empty(length + 1, bool)
    is_target[:n] = shards.read_mask(start, n)
    is_target[n:] = is_target[n - 1]  # the end of a document is learned where its last token is
    return tokens, is_target


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
    starts = range(0, targets, block_size)
    starts = starts[len(starts) * rank // world_size : len(starts) * (rank + 1) // world_size]
    for i in range(0, len(starts), micro_batch):
        windows = []
        for start in starts[i : i + micro_batch]:
            piece = Piece(start, min(block_size, len(shards) - start))
            windows.append(Window(shards, [piece], min(block_size, targets - start)))
        x, y = make_batch(windows, block_size, device)
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
