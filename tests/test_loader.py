"""The loader: the order of windows, mixtures, stages, masks and packed documents."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from data.loader import Loader, Piece, Position, eval_batches, room_of, shuffled
from data.shards import Shards, write_shard

EOT = 50256


def make_shards(folder, tokens, cuts=(), split="train", mask=None):
    folder.mkdir(exist_ok=True)
    masks = [None] * (len(cuts) + 1) if mask is None else np.split(np.asarray(mask), cuts)
    for i, part in enumerate(np.split(np.asarray(tokens), cuts)):
        write_shard(folder / f"{split}_{i:06d}.bin", part, 50257, masks[i])
    return Shards(folder, split)


@pytest.fixture
def numbered(tmp_path):
    """1,000 tokens in three shards, each its own position, so that a window tells where it came from."""
    return make_shards(tmp_path / "numbered", np.arange(1000), [300, 301])


def rows(batches):
    return np.concatenate([x.numpy() for x, _ in batches])


def starts(loader, step):
    """Where the windows of a step begin."""
    return [window.pieces[0].start for window in loader.windows(step)]


def windows_per_epoch(loader):
    return loader.mixture.texts[0].windows_per_epoch


# ---- the order of windows --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000])
def test_the_order_is_a_permutation_that_each_key_changes(n):
    orders = [
        shuffled(np.arange(n), n, np.random.SeedSequence(i).generate_state(6, np.uint64)).tolist() for i in range(20)
    ]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 5 or len({tuple(order) for order in orders}) > 15
    assert n < 64 or np.mean(np.abs(np.diff(orders[0]))) > n / 5  # neighbours do not stay together


def test_targets_are_the_inputs_shifted_by_one(numbered):
    for x, y in Loader(numbered, 16, 5, micro_batch=2).batches(3):
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape and x.shape[1] == 16
        assert x.is_contiguous() and y.is_contiguous() and torch.equal(y, x + 1)
        assert torch.equal(x, x[:, :1] + torch.arange(16))


def test_an_epoch_has_every_window_once_and_the_next_has_others(numbered):
    loader = Loader(numbered, 16, 1, seed=3)
    n = windows_per_epoch(loader)
    assert n == 61  # 1000 // 16 - 1
    epochs = [[starts(loader, epoch * n + i)[0] for i in range(n)] for epoch in range(4)]
    for places in epochs:
        assert np.diff(sorted(places)).tolist() == [16] * (n - 1) and 0 <= min(places) and max(places) + 17 <= 1000
    assert len({min(places) for places in epochs}) > 1  # the grid moves
    assert len({tuple(np.argsort(places)) for places in epochs}) == 4  # so does the order


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_ranks_and_micro_batches_only_cut_the_same_batch(tmp_path, world_size, p):
    tokens = np.arange(1000)
    tokens[::37] = EOT
    shards = make_shards(tmp_path, tokens)
    options = {"seed": 5, "document_start_probability": p}
    for step in (0, 7, 1000):  # 1000 * 13 windows are many epochs
        whole = rows(Loader(shards, 16, 13, **options).batches(step))
        assert len(whole) == 13
        for micro_batch in (None, 1, 2, 5):
            ranks = [Loader(shards, 16, 13, rank=r, world_size=world_size, micro_batch=micro_batch, **options)
                     for r in range(world_size)]  # fmt: skip
            assert np.array_equal(np.concatenate([rows(loader.batches(step)) for loader in ranks]), whole)


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_batch_is_a_function_of_seed_and_step_alone(numbered, prefetch):
    loader = Loader(numbered, 16, 4, seed=1)
    loader._thread = ThreadPoolExecutor(1) if prefetch else None
    forwards = [rows(loader.batches(step)) for step in range(30)]
    for step in (29, 3, 17, 17, 18, 10**9):
        assert np.array_equal(rows(Loader(numbered, 16, 4, seed=1).batches(step)), rows(loader.batches(step)))
        if step < 30:
            assert np.array_equal(rows(loader.batches(step)), forwards[step])
    assert not np.array_equal(rows(Loader(numbered, 16, 4, seed=2).batches(3)), forwards[3])


def test_windows_start_uniformly_over_the_text(tmp_path):
    shards = make_shards(tmp_path, np.arange(100))
    places = []
    for seed in range(500):
        loader = Loader(shards, 8, 1, seed=seed)
        places += [starts(loader, step)[0] for step in range(0, 64, 11)]  # one of each of 6 epochs
    counts = np.bincount(places)
    assert len(counts) == 88  # 11 windows of 8: phases 0 to 7, and the last one ends at 88 + 8 < 100
    chi_square = ((counts - 3000 / 88) ** 2 / (3000 / 88)).sum()
    assert 50 < chi_square < 140  # 87 degrees of freedom: 99.9 % lie between 51 and 134


def test_with_probability_one_windows_start_at_documents_each_once_before_any_again(tmp_path):
    tokens = np.arange(500)
    beginnings = [0, 3, 120, 250, 251, 400]
    tokens[[*beginnings, 490]] = EOT
    shards = make_shards(tmp_path, tokens, [100])  # the document at 490 is too near the end
    loader = Loader(shards, 16, 6, document_start_probability=1.0)
    for step in range(5):
        assert sorted(starts(loader, step)) == beginnings
    assert len({tuple(starts(loader, step)) for step in range(5)}) > 1
    with pytest.raises(ValueError, match="no document .eot_id=50256. starts"):
        Loader(make_shards(tmp_path / "none", np.arange(99)), 16, 6, document_start_probability=0.5)


def test_with_probability_p_that_share_starts_at_documents_and_the_grid_stays_complete(tmp_path):
    tokens = np.arange(2000)
    tokens[5::100] = EOT  # no grid phase has these places only
    shards = make_shards(tmp_path, tokens)
    loader = Loader(shards, 16, 4, document_start_probability=0.25)
    places = np.concatenate([starts(loader, step) for step in range(4 * windows_per_epoch(loader) // 3 // 4)])
    at_document = tokens[places] == EOT
    plain = Loader(shards, 16, 1)
    grid = {starts(plain, g)[0] for g in range(windows_per_epoch(plain))}
    assert abs(at_document.mean() - 0.25) < 0.03
    assert len(set(places[~at_document])) == (~at_document).sum() and set(places[~at_document]) <= grid


def test_masked_are_exactly_the_targets_that_begin_the_next_document(tmp_path):
    tokens = np.arange(400)
    tokens[::9] = EOT
    shards = make_shards(tmp_path, tokens)
    masked = list(Loader(shards, 16, 8, mask_document_crossing=True).batches(0))
    plain = list(Loader(shards, 16, 8).batches(0))
    for (x, y), (x_plain, y_plain) in zip(masked, plain):
        assert torch.equal(x, x_plain) and (y == -1).sum() > 8
        assert torch.equal(y == -1, y_plain == EOT) and torch.equal(y[y != -1], y_plain[y != -1])


def test_text_shorter_than_one_window_is_an_error_with_the_numbers(tmp_path):
    shards = make_shards(tmp_path, np.arange(32))
    with pytest.raises(ValueError, match="32 train tokens are less than one window of block_size . 1 = 33"):
        Loader(shards, 32, 4)
    assert rows(Loader(shards, 31, 2).batches(0)).tolist() == [list(range(31))] * 2


def test_a_batch_too_small_for_the_ranks_is_an_error(numbered):
    with pytest.raises(ValueError, match="2 windows is too small for 3 ranks"):
        Loader(numbered, 16, 2, world_size=3)


@pytest.mark.parametrize("n_tokens, expected", [(0, 999), (100, 100), (96, 96), (5000, 999)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_has_each_of_the_first_targets_once_over_all_ranks(numbered, n_tokens, expected, world_size):
    for micro_batch in (1, 4):
        seen = []
        for rank in range(world_size):
            for x, y in eval_batches(numbered, 16, n_tokens, micro_batch, rank, world_size):
                assert x.shape == y.shape and x.shape[1] == 16 and len(x) <= micro_batch
                assert torch.equal(y[y != -1], x[y != -1] + 1)
                seen += y[y != -1].tolist()
        assert seen == list(range(1, expected + 1))


def test_after_a_change_of_batch_every_window_comes_once_an_epoch(tmp_path):
    write_shard(tmp_path / "train_0.bin", np.arange(20 * 101) % 300, 300)
    shards = Shards(tmp_path, "train")
    before, after, back = (Loader(shards, 20, windows, seed=3) for windows in (8, 5, 8))
    seen = [start for step in range(4) for start in starts(before, step)]  # 32 windows
    after.go_on(4, 32)
    seen += [start for step in range(4, 12) for start in starts(after, step)]  # and 40
    back.go_on(12, 72)
    seen += [start for step in range(12, 16) for start in starts(back, step)]  # and 32
    epoch = windows_per_epoch(before)
    assert len(set(seen[:epoch])) == epoch == 100
    whole = [start for step in range(13) for start in starts(Loader(shards, 20, 8, seed=3), step)]
    assert seen == whole


# ---- masks -----------------------------------------------------------------------------------------------------------
def test_a_target_is_what_its_own_mask_says(tmp_path):
    mask = np.arange(1000) % 3 == 0
    shards = make_shards(tmp_path, np.arange(1000), [300, 301], mask=mask)
    for x, y in Loader(shards, 16, 8).batches(2):
        assert torch.equal(y, torch.where((x + 1) % 3 == 0, x + 1, -1))
    seen = [y[y >= 0].tolist() for _, y in eval_batches(shards, 16, 0, 4)]
    assert [target for targets in seen for target in targets] == list(range(3, 1000, 3))


def test_a_mask_that_is_missing_or_of_another_size_is_refused_and_a_changed_one_is_other_data(tmp_path):
    mask = np.ones(1000, bool)
    shards = make_shards(tmp_path, np.arange(1000), [300, 301], mask=mask)
    before = shards.contents
    make_shards(tmp_path, np.arange(1000), [300, 301], mask=~mask)
    assert Shards(tmp_path, "train").contents != before
    path = tmp_path / "train_000001.mask.bin"
    path.write_bytes(path.read_bytes() + b"1")
    with pytest.raises(ValueError, match="train_000001.mask.bin: 1026 bytes, and a mask of 1 tokens has 1025"):
        Shards(tmp_path, "train")
    path.unlink()
    with pytest.raises(ValueError, match="train_000001.mask.bin is missing"):
        Shards(tmp_path, "train")
    for path in tmp_path.glob("*.mask.bin"):
        path.unlink()
    assert Shards(tmp_path, "train").learns_all  # of published shards nobody knows that they had masks
    (tmp_path / "meta.json").write_text('{"tokenizer": null, "vocab_size": 50257, "eot_id": 50256, "masks": true}')
    with pytest.raises(ValueError, match="train_000000.mask.bin is missing"):
        Shards(tmp_path, "train")


# ---- mixtures --------------------------------------------------------------------------------------------------------
def texts_of(tmp_path, *weights):
    """Texts whose tokens tell which they are: 0 to 999, 1,000 to 1,999 and so on."""
    texts = [make_shards(tmp_path / str(i), 1000 * i + np.arange(1000)) for i in range(len(weights))]
    return list(zip(texts, weights))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (5, 3, 2), (0.9985, 0.001, 0.0005)])
def test_every_text_of_a_mixture_has_its_share(tmp_path, weights):
    loader = Loader(texts_of(tmp_path, *weights), 16, 64, seed=1)
    chosen = np.array([starts_with // 1000 for step in range(80) for starts_with in rows(loader.batches(step))[:, 0]])
    for window in (len(chosen), 1024):  # over the run, and over each round of it
        for begin in range(0, len(chosen), window):
            counts = np.bincount(chosen[begin : begin + window], minlength=len(weights))
            assert np.abs(counts / window - np.array(weights) / sum(weights)).max() < 0.01 and counts.min() > 0


def test_each_text_of_a_mixture_has_every_window_once_an_epoch_in_its_own_order(tmp_path):
    texts = texts_of(tmp_path, 0.7, 0.3)
    loader = Loader(texts, 16, 8, seed=1)
    seen = np.concatenate([rows(loader.batches(step))[:, 0] for step in range(160)])  # more than a round
    for i, (shards, _) in enumerate(texts):
        alone = Loader(shards, 16, 1, seed=1)
        own = [first for first in seen.tolist() if first // 1000 == i]
        assert own == [1000 * i + starts(alone, k)[0] for k in range(len(own))] and len(own) > windows_per_epoch(alone)


def test_ranks_and_micro_batches_only_cut_a_mixed_batch(tmp_path):
    texts = texts_of(tmp_path, 0.6, 0.4)
    whole = rows(Loader(texts, 16, 12, seed=2).batches(7))
    ranks = [Loader(texts, 16, 12, seed=2, rank=rank, world_size=3, micro_batch=3) for rank in range(3)]
    assert np.array_equal(np.concatenate([rows(loader.batches(7)) for loader in ranks]), whole)


def test_a_weight_of_0_is_refused(tmp_path):
    with pytest.raises(ValueError, match="numbers above 0"):
        Loader(texts_of(tmp_path, 1.0, 0.0), 16, 4)


# ---- stages ----------------------------------------------------------------------------------------------------------
def test_a_longer_window_goes_on_in_the_same_epoch_without_what_was_seen(tmp_path):
    shards = make_shards(tmp_path, np.arange(20_000) % 50_000)
    cells = {shards.folder: 64}
    short = Loader(shards, 16, 8, seed=3, cells=cells)
    first = [start for step in range(77) for start in starts(short, step)]  # 616 windows of 16: 154 cells of 64
    short_of_a_cell = Loader(shards, 16, 7, seed=3, cells=cells)
    more = [start for step in range(89) for start in starts(short_of_a_cell, step)]  # 623 windows, 3 in the last cell
    for places, loader, steps in ((first, short, 77), (more, short_of_a_cell, 89)):
        long = Loader(shards, 64, 1, seed=3, cells=cells, positions=loader.positions_before(steps))
        left = windows_per_epoch(long) - -(-len(places) // 4)
        seen = [place + i for place in places for i in range(16)]
        seen += [starts(long, step)[0] + i for step in range(left) for i in range(64)]
        assert len(seen) == len(set(seen)) >= 64 * (windows_per_epoch(long) - 1)


def test_a_text_that_rests_for_a_stage_stands_where_it_was(tmp_path):
    texts = texts_of(tmp_path, 0.5, 0.5)
    both = Loader(texts, 16, 8, seed=1)
    positions = both.positions_before(5)
    assert sum(position.tokens for position in positions.values()) == 5 * 8 * 16
    alone = Loader(texts[1][0], 16, 1, seed=1, positions=positions)
    order = Loader(texts[1][0], 16, 1, seed=1)
    before = positions[texts[1][0].folder].tokens // 16
    assert [starts(alone, step) for step in range(9)] == [starts(order, before + step) for step in range(9)]


def test_documents_that_began_windows_do_not_come_again_in_the_next_stage(tmp_path):
    tokens = np.arange(3000)
    tokens[::100] = EOT
    shards = make_shards(tmp_path, tokens)
    options = dict(seed=1, document_start_probability=0.5, cells={shards.folder: 32})
    first = Loader(shards, 16, 10, **options)
    seen = [start for step in range(2) for start in starts(first, step) if start % 100 == 0]  # 10 of 30 documents
    positions = first.positions_before(2)
    assert positions[shards.folder] == Position(tokens=160, documents=10)
    second = Loader(shards, 32, 4, positions=positions, **options)
    seen += [window for step in range(9) for window in starts(second, step)[1::2]]  # each second one begins a document
    assert len(set(seen)) == len(seen) == 28


def test_a_window_that_does_not_divide_the_longest_is_refused(numbered):
    with pytest.raises(ValueError, match="block_size=24 does not divide the longest of the stages, 64"):
        Loader(numbered, 24, 4, cells={numbered.folder: 64})


# ---- whole documents -------------------------------------------------------------------------------------------------
@pytest.fixture
def documents(tmp_path):
    """60 documents of 1 to 40 tokens: EOT, and then numbers that occur once."""
    lengths = np.random.default_rng(1).integers(1, 41, 60)
    tokens = np.arange(lengths.sum())
    tokens[np.cumsum(lengths) - lengths] = EOT
    return make_shards(tmp_path / "documents", tokens, [500]), lengths


@pytest.mark.parametrize("long_documents", ["cut", "skip"])
def test_packed_windows_hold_every_document_once_an_epoch_and_whole(documents, long_documents):
    shards, lengths = documents
    loader = Loader(shards, 32, 1, seed=1, pack="documents", long_documents=long_documents)
    text = loader.mixture.texts[0]
    assert text.n_long == (lengths > 32).sum() > 5
    for epoch in range(2):
        pieces = []
        for step in range(text.windows_per_epoch):
            (window,) = loader.windows(epoch * text.windows_per_epoch + step)
            assert sum(map(room_of, window.pieces)) == window.targets <= 32
            pieces += window.pieces
        assert len(pieces) == len(set(pieces))
        wanted = set()
        for end, n in zip(np.cumsum(lengths).tolist(), lengths.tolist()):
            if n <= 32 or long_documents == "cut":
                wanted.add(Piece(end - n, min(n, 32)))
            if n > 32 and long_documents == "cut":  # no document is longer than 32 + 31
                wanted.add(Piece(end - n + 32, n - 32, follows=True))
        assert set(pieces) == wanted
    held = sum(map(room_of, wanted))
    assert text.utilisation == held / (32 * text.windows_per_epoch) > 0.9
    assert text.windows_per_epoch <= held / 32 * 11 / 9 + 1  # best fit by falling length needs no more than that


def test_of_a_packed_window_every_token_but_the_filling_is_a_target_and_so_is_each_end(documents):
    """Whole documents and pieces of those that were cut: what comes next is what comes next in the text."""
    shards, _ = documents
    stream = [*shards.read(0, len(shards)).tolist(), EOT]
    loader = Loader(shards, 32, 4, seed=2, pack="documents")
    cut = 0
    for step in range(12):
        ((x, y),) = loader.batches(step)
        for row, targets, window in zip(x.tolist(), y.tolist(), loader.windows(step)):
            inputs = []
            outputs = []
            for start, length, follows in window.pieces:
                inputs += [EOT] * follows + stream[start : start + length]
                outputs += [-1] * follows + stream[start + 1 : start + length + 1]
                cut += follows
            filling = 32 - len(inputs)
            assert row == inputs + [EOT] * filling and targets == outputs + [-1] * filling
    assert cut > 3


def test_a_packed_window_without_a_target_is_all_ignored(tmp_path):
    tokens = np.tile([EOT, 1, 2, 3], 10)
    shards = make_shards(tmp_path, tokens, mask=np.zeros(40, bool))
    for _, y in Loader(shards, 8, 2, pack="documents").batches(0):
        assert (y == -1).all()


def test_packed_windows_without_a_target_are_counted(tmp_path):
    mask = np.zeros(40, bool)
    mask[[1, 2, 9]] = True  # of the first document and of the third
    shards = make_shards(tmp_path, np.tile([EOT, 1, 2, 3], 10), mask=mask)
    loader = Loader(shards, 4, 10, pack="documents")
    ((_, y),) = loader.batches(0)
    assert loader.mixture.texts[0].n_without_target == (y == -1).all(1).sum() == 8


def test_without_a_document_that_fits_there_is_nothing_to_pack(tmp_path):
    shards = make_shards(tmp_path, np.tile([EOT, 1, 2, 3], 10))
    with pytest.raises(ValueError, match="no document fits into block_size=3, and others are left out"):
        Loader(shards, 3, 1, pack="documents", long_documents="skip")
