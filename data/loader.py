"""Batches of windows of tokens, in an order that is computed and not stored.

A run sees windows 0, 1, 2, ... Which text a window is of, and where it begins in it, is a function of (seed, number of
the window) and of what was drawn before the run's stage. There is no state to save, any step is reached at once, and
the number of ranks and micro_batch change nothing.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np  # torch is imported where tensors are made: prepare.py and its workers start without it

from data.shards import Shards

ROUND = 1024  # windows of a mixture, among which every text has its share exactly


class Position(NamedTuple):
    """How far a run is in a text."""

    tokens: int = 0  # that windows of the grid have had, over all epochs
    documents: int = 0  # at which a window began


BEGINNING = Position()


class Window(NamedTuple):
    """Where the tokens of a window are, and how many of its first targets are there to be learned."""

    shards: Shards
    pieces: list  # [(start, number of tokens)], which stand one behind the other
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
    """The k-th draws from range(n), all of it once before any comes again: (draws, a number for each epoch)."""
    drawn = np.empty_like(k)
    noise = np.empty_like(k)
    epochs = k // n
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        keys = np.random.SeedSequence((seed, kind, epoch)).generate_state(7, np.uint64)
        drawn[here] = shuffled(k[here] % n, n, keys[1:])
        noise[here] = keys[0] >> np.uint64(1)
    return drawn, noise


# ---- one text --------------------------------------------------------------------------------------------------------
class Stream:
    """The windows of one text, documents one behind the other: an order without end.

    An epoch is every cell of a grid once, in an order drawn from (seed, epoch); each epoch shifts the grid by a random
    phase. A cell is as long as the longest window that the run's stages have: the windows of a shorter one follow each
    other in it, so that no stage sees what one before it saw in the same epoch.

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
        self.before = position._replace(tokens=math.ceil(position.tokens / block_size) * block_size)
        # One cell is left out, where there is more than one, so that the grid can begin at any place of a cell.
        self.cells = max(1, len(shards) // self.cell - 1)
        self.phases = min(self.cell, len(shards) - self.cells * self.cell)
        if shards.document_tokens:
            self.phases = 1  # a grid that begins at 0 cuts no document
        self.windows_per_epoch = self.cells * (self.cell // block_size)
        self.share = round(document_start_probability * (1 << 20))  # in integers, so that counting never drifts
        if self.share:
            self.document_starts = shards.document_starts[shards.document_starts < len(shards) - block_size]
            if not len(self.document_starts):
                why = f"no document (eot_id={shards.eot_id}) starts block_size before the end"
                raise ValueError(f"{shards.folder}: {why}")

    def starts(self, k: np.ndarray) -> np.ndarray:
        """Where its k-th windows begin in the stream of tokens: int64 of the shape of k."""
        documents = k * self.share >> 20  # windows before this one that began with a document
        tokens = self.before.tokens + (k - documents) * self.block_size
        cell, noise = draw(tokens // self.cell, self.cells, self.seed, 0)
        starts = cell * self.cell + noise % self.phases + tokens % self.cell
        if self.share:
            place, _ = draw(self.before.documents + documents, len(self.document_starts), self.seed, 1)
            begins_document = (k + 1) * self.share >> 20 > documents
            starts = np.where(begins_document, self.document_starts[place], starts)
        return starts

    def windows(self, k: np.ndarray) -> list[Window]:
        length = self.block_size + 1
        return [Window(self.shards, [(start, length)], self.block_size) for start in self.starts(k).tolist()]

    def position_after(self, n: int) -> Position:
        """Returns how far a run is in this text after n of these windows."""
        documents = n * self.share >> 20
        tokens = self.before.tokens + (n - documents) * self.block_size
        return Position(tokens, self.before.documents + documents)

    def epochs(self, n: int) -> float:
        """Returns how often n windows have gone through the text, from its beginning."""
        return self.position_after(n).tokens / (self.cells * self.cell)


class Packed:
    """The windows of one text that hold whole documents: an order without end.

    Documents are put into windows by best fit: the longest first, each into the fullest window in which there is room.
    What is left of a window is filled with eot_id, which is no target; the one that follows a document is, so that
    every document's end is learned. A document longer than a window is cut, or left out with long_documents="skip".
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
        self.bins = best_fit(*cut(starts, lengths, block_size), block_size)
        self.windows_per_epoch = len(self.bins)
        self.utilisation = sum(n for pieces in self.bins for _, n in pieces) / (len(self.bins) * block_size)
        self.before = math.ceil(position.tokens / block_size)  # windows: another size begins an epoch of other windows

    def windows(self, k: np.ndarray) -> list[Window]:
        place, _ = draw(self.before + k, len(self.bins), self.seed, 0)
        found = []
        for i in place.tolist():
            pieces = self.bins[i]
            found.append(Window(self.shards, pieces, sum(n for _, n in pieces)))
        return found

    def position_after(self, n: int) -> Position:
        return Position((self.before + n) * self.block_size)

    def epochs(self, n: int) -> float:
        return (self.before + n) / len(self.bins)


def cut(starts, lengths, size):
    """Returns starts and lengths of pieces, none longer than size, that documents are cut into."""
    pieces = -(-lengths // size)  # of each document
    document = np.repeat(np.arange(len(starts)), pieces)
    place = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece in its document
    return starts[document] + place * size, np.minimum(lengths[document] - place * size, size)


def best_fit(starts, lengths, size):
    """Returns bins [(start, length), ...] of at most `size` tokens: the longest first, into the fullest with room."""
    bins = []
    with_room = [[] for _ in range(size + 1)]  # [room]: bins that have exactly so much
    rooms = np.zeros(size + 1, bool)
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        fitting = rooms[length:].argmax() + length  # the least room that is enough
        if rooms[fitting]:
            place = with_room[fitting].pop()
            rooms[fitting] = bool(with_room[fitting])
        else:
            place = len(bins)
            bins.append([])
            fitting = size
        bins[place].append((int(starts[i]), length))
        left = fitting - length
        if left:
            with_room[left].append(place)
            rooms[left] = True
    return bins


# ---- many texts ------------------------------------------------------------------------------------------------------
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
        while counts.sum() != ROUND:  # the largest remainder gets what rounding left over
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
            order, _ = draw(number * ROUND + np.arange(ROUND), ROUND, self.seed, 2)
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

    tokens = np.empty((len(windows), block_size + 1), np.int64)
    is_target = np.zeros((len(windows), block_size + 1), bool)
    for i, (shards, pieces, targets) in enumerate(windows):
        tokens[i] = shards.eot_id
        end = 0
        for start, n in pieces:
            tokens[i, end : end + n] = shards.read(start, n)
            is_target[i, end : end + n] = shards.read_mask(start, n)
            end += n
        if end <= block_size:  # the end of the last document is learned where that document's last token is
            is_target[i, end] = is_target[i, end - 1]
        is_target[i, targets + 1 :] = False
        if shards.targets:
            first, last = shards.targets
            is_target[i] &= (first <= tokens[i]) & (tokens[i] < last)
        if mask_document_crossing:
            is_target[i] &= tokens[i] != shards.eot_id
    x = np.ascontiguousarray(tokens[:, :-1])
    y = np.where(is_target, tokens, -1)[:, 1:].copy()
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
    starts = range(0, targets, block_size)
    starts = starts[len(starts) * rank // world_size : len(starts) * (rank + 1) // world_size]
    for i in range(0, len(starts), micro_batch):
        windows = []
        for start in starts[i : i + micro_batch]:
            pieces = [(start, min(block_size + 1, len(shards) - start))]
            windows.append(Window(shards, pieces, min(block_size, targets - start)))
        x, y = make_batch(windows, block_size, device)
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
