"""Multi-query associative recall: what data/prepare.py mqar writes, and what the loader makes of it."""

import json
import os

import numpy as np
import pytest
import torch

from data.loader import Loader, eval_batches
from data.prepare import main as prepare
from data.shards import Shards, write_shard
from data.synthetic import MQAR

PAIRS, QUERIES, KEYS, VALUES = 5, 4, 12, 7
TOKENS = 1 + 2 * PAIRS + 2 * QUERIES
ANSWERS = range(1 + KEYS + VALUES, 1 + KEYS + 2 * VALUES)
SIZES = [f"--pairs={PAIRS}", f"--queries={QUERIES}", f"--keys={KEYS}", f"--values={VALUES}"]


def make(out, *more):
    prepare(["mqar", "--out", str(out), *SIZES, "--documents=6000", "--val_fraction=0.1", *more])
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "mqar")


def documents_of(shards):
    return shards.read(0, len(shards)).reshape(-1, TOKENS)


def look_up(x):
    """What a perfect model predicts after each token of x: a key's answer where its value came before, else -1."""
    seen, expected = {}, []
    for i, token in enumerate(x):
        seen = {} if token == 0 else seen
        expected.append(seen[token] + VALUES if token in seen else -1)
        if i and 1 <= x[i - 1] <= KEYS < token <= KEYS + VALUES:
            seen[x[i - 1]] = token
    return expected


@pytest.mark.parametrize("split, n", [("train", 5400), ("val", 600)])
def test_a_document_is_pairs_of_different_keys_and_then_queries_with_the_answers_of_their_keys(folder, split, n):
    shards = Shards(folder, split)
    assert (len(shards), shards.eot_id, shards.vocab_size) == (n * TOKENS, 0, 1 + KEYS + 2 * VALUES)
    asked_at = []
    for eot, *rest in documents_of(shards).tolist():
        keys, values = rest[: 2 * PAIRS : 2], rest[1 : 2 * PAIRS : 2]
        queries, answers = rest[2 * PAIRS :: 2], rest[2 * PAIRS + 1 :: 2]
        assert eot == 0
        assert len(set(keys)) == PAIRS and set(keys) <= set(range(1, 1 + KEYS))
        assert set(values) <= set(range(1 + KEYS, 1 + KEYS + VALUES))
        assert len(set(queries)) == QUERIES and set(queries) <= set(keys)
        assert answers == [dict(zip(keys, values))[query] + VALUES for query in queries]
        asked_at.append([keys.index(query) for query in queries])
    places = np.array([np.bincount(column, minlength=PAIRS) for column in np.array(asked_at).T]) / n
    assert abs(places - 1 / PAIRS).max() < 5 * (0.2 * 0.8 / n) ** 0.5  # no place in the queries tells which pair


def test_keys_and_values_are_uniform_and_values_independent_of_what_surrounds_them(folder):
    documents = documents_of(Shards(folder, "train"))
    keys, values = documents[:, 1 : 2 * PAIRS : 2] - 1, documents[:, 2 : 2 * PAIRS + 1 : 2] - 1 - KEYS
    n = keys.size

    def far(counts, p):  # from a binomial's mean, in standard deviations
        return abs((counts - n * p) / (n * p * (1 - p)) ** 0.5).max()

    assert far(np.bincount(keys.ravel(), minlength=KEYS), 1 / KEYS) < 5
    joint = np.zeros((KEYS, VALUES))
    np.add.at(joint, (keys, values), 1)
    assert far(joint, 1 / KEYS / VALUES) < 5
    assert far(np.bincount((values - np.roll(values, 1, axis=1)).ravel() % VALUES, minlength=VALUES), 1 / VALUES) < 5


@pytest.mark.parametrize("windows", [1, 3])
def test_a_lookup_in_the_window_gets_every_learned_answer_and_nothing_else_is_learned(folder, windows):
    block = windows * TOKENS
    loader = Loader(Shards(folder, "train"), block, 8, seed=3, micro_batch=3)
    seen = 0
    for step in range(2 * loader.mixture.texts[0].windows_per_epoch // 8):  # two epochs, of different order
        for x, y in loader.batches(step):
            for row, targets in zip(x.tolist(), y.tolist()):
                assert row[::TOKENS] == [0] * windows and row.count(0) == windows  # whole documents and nothing else
                assert look_up(row) == targets and sum(t >= 0 for t in targets) == windows * QUERIES
                assert {t for t in targets if t >= 0} <= set(ANSWERS)
                seen += 1
    assert seen > 1.9 * 5400 // windows


def test_evaluation_has_every_answer_of_the_split_once_and_whole_documents(folder):
    shards = Shards(folder, "val")
    batches = [(x.tolist(), y.tolist()) for x, y in eval_batches(shards, TOKENS, 0, 7)]
    rows = [row for x, _ in batches for row in x]
    assert rows == documents_of(shards).tolist()
    assert [t for _, y in batches for t in y] == [look_up(row) for row in rows]
    few = [y for _, y in eval_batches(shards, TOKENS, 3 * TOKENS, 7)]
    assert sum((y >= 0).sum().item() for y in few) == 3 * QUERIES


def test_targets_in_the_middle_of_the_vocabulary_leave_out_the_ids_below_and_above(tmp_path):
    write_shard(tmp_path / "train_000000.bin", np.arange(100) % 10, 10)
    (tmp_path / "meta.json").write_text('{"tokenizer": null, "vocab_size": 10, "eot_id": 0, "targets": [4, 7]}')
    shards = Shards(tmp_path, "train")
    for batches in (Loader(shards, 20, 3).batches(0), eval_batches(shards, 20, 0, 2)):
        for x, y in batches:
            follows = (x + 1) % 10
            assert (y == torch.where((follows >= 4) & (follows <= 6), follows, -1)).all()


def test_a_window_that_would_cut_documents_is_an_error_with_sizes_that_do_not(folder):
    for block, near in ((64, "57 or 76"), (10, "19"), (20, "19 or 38")):
        message = f"block_size={block} would cut documents, all of {TOKENS} tokens: try {near}"
        with pytest.raises(ValueError, match=message):
            Loader(Shards(folder, "train"), block, 4)
        with pytest.raises(ValueError, match=message):
            next(eval_batches(Shards(folder, "val"), block, 0, 4))


def test_data_is_a_function_of_sizes_and_seed_and_no_document_is_in_both_splits(folder, tmp_path):
    again, other = make(tmp_path / "a"), make(tmp_path / "b", "--seed=2")
    longer = make(tmp_path / "c", "--documents=9000")
    for name in ("train_000000.bin", "val_000000.bin"):
        assert (folder / name).read_bytes() == (again / name).read_bytes() != (other / name).read_bytes()
    fingerprints = [Shards(path, "train").fingerprint for path in (folder, again, other, longer)]
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints)) == 3
    train, val = (documents_of(Shards(folder, split)) for split in ("train", "val"))
    assert (documents_of(Shards(longer, "train"))[: len(train)] == train).all()  # crosses a block of 4,096 documents
    assert len({row.tobytes() for row in train}) == len(train)
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in val}


def test_a_second_run_reuses_and_any_change_rebuilds(tmp_path, capsys):
    def rebuilt(*more):
        make(tmp_path / "mqar", *more)
        printed = capsys.readouterr().out
        assert f"has {Shards(tmp_path / 'mqar', 'val').document_tokens} tokens" in printed
        return "nothing has changed" not in printed

    assert rebuilt() and not rebuilt()
    for change in ("--pairs=6", "--queries=5", "--keys=13", "--values=8", "--documents=7000", "--seed=4",
                   "--val_fraction=0.2", "--shard_tokens=5000"):  # fmt: skip
        assert rebuilt(change) and not rebuilt(change) and rebuilt()
    meta = json.loads((tmp_path / "mqar" / "meta.json").read_text())
    assert meta["tokenizer"] is None and meta["targets"] == [ANSWERS.start, ANSWERS.stop]
    assert meta["documents"] == {"train": 5400, "val": 600}


def test_the_fingerprint_tells_apart_the_same_tokens_with_other_targets(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(MQAR, "targets", (1 + KEYS, 1 + KEYS + VALUES))
    assert Shards(make(tmp_path / "mqar"), "train").fingerprint != Shards(folder, "train").fingerprint


def test_by_default_all_keys_but_one_are_asked_for(tmp_path):
    prepare(["mqar", "--out", str(tmp_path / "mqar"), "--documents=300", "--pairs=16"])
    shards = Shards(tmp_path / "mqar", "train")
    assert shards.document_tokens == 4 * 16 - 1 and len(shards) == 297 * 63


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mqar", "--pairs=0"], "--pairs=0 is not in 1 to --keys=16"),
        (["mqar", "--pairs=17"], "--pairs=17 is not in 1 to --keys=16"),
        (["mqar", "--queries=0"], "--queries=0 is not in 1 to --pairs=8"),
        (["mqar", "--queries=9"], "--queries=9 is not in 1 to --pairs=8"),
        (["mqar", "--values=1"], "--values=1: try 2 or more"),
        (["mqar", "--documents=2"], "--documents=2 --seed=1: try 3 or more documents"),
        (["mqar", "--seed=-1"], "--documents=100000 --seed=-1: try"),
        (["mqar", "--documents=40"], "no document is in val: change --val_fraction=0.01 or give more"),
        (["mqar", "--val_fraction=1.5"], "--val_fraction=1.5 is not between 0 and 1"),
        (["mqar", "--tokenizer=byte"], "--tokenizer means nothing to mqar: leave it out"),
        (["mqar", "--max_tokens=5"], "--max_tokens means nothing to mqar"),
        (["mqar", "notes.txt"], "mqar is a named set: give it alone"),
        (["stdlib", "--pairs=3"], "--pairs means nothing to stdlib: leave it out"),
    ],
)
def test_wrong_numbers_are_an_error_that_says_which_and_leave_nothing(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        prepare([*arguments, "--out", str(tmp_path / "mqar")])
    assert os.listdir(tmp_path) == []
