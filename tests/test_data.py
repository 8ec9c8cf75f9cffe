"""Token shards, and data/prepare.py from text to shards."""

import base64
import gzip
import io
import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data.prepare as prepare_module
import data.sources as sources_module
import data.successor as successor_module
import data.text as text_module
from data import bpe_training, token_files
from data.bpe_training import count_words
from data.html_text import text_of_html
from data.prepare import main as prepare
from data.prepare import pieces
from data.progress import NOTE
from data.shards import Shards, write_shard
from data.tokenizers import load_tokenizer, tokenizer_from_dict, train_bpe
from evals.tasks import load_task
from training.load import find_tokenizer

EOT = 50256
PREPARE = Path(prepare_module.__file__)


def make_shards(folder, tokens, cuts=(), split="train"):
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(np.split(np.asarray(tokens), cuts)):
        write_shard(folder / f"{split}_{i:06d}.bin", part, 50257)
    return Shards(folder, split)


@pytest.fixture
def numbered(tmp_path):
    """1,000 tokens in three shards, each its own position, so that a window tells where it came from."""
    return make_shards(tmp_path / "numbered", np.arange(1000), [300, 301])


def rows(batches):
    return np.concatenate([x.numpy() for x, _ in batches])


def write_documents(path, n, start=0):
    path.write_text("".join(json.dumps({"text": f"document {i} " * 5}) + "\n" for i in range(start, start + n)))
    return str(path)


def texts_of(out, split):
    shards = Shards(out, split)
    tokenizer = tokenizer_from_dict(shards.meta["tokenizer"])
    ids = shards.read(0, len(shards))
    assert ids[0] == shards.eot_id
    return [tokenizer.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == shards.eot_id)[1:])]


# the format


def test_published_gpt2_and_llama3_shards_load_as_they_are(tmp_path):
    for name, magic, version, code, tokens in (
        ("fineweb_val_000000.bin", 20240520, 1, "H", [50256, 7, 50255]),
        ("edu_train_000001.bin", 20240801, 7, "I", [128000, 7, 128255]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        header = struct.pack("<256i", magic, version, 3, *[0] * 253)
        (folder / name).write_bytes(header + struct.pack(f"<3{code}", *tokens))
        shards = Shards(folder, "val" if "val" in name else "train")
        assert shards.read(0, 3).tolist() == tokens and shards.eot_id == tokens[0]
        assert shards.vocab_size == tokens[2] + (2 if code == "H" else 1)
        write_shard(tmp_path / "ours.bin", np.array(tokens), shards.vocab_size)
        assert (tmp_path / "ours.bin").read_bytes() == (folder / name).read_bytes()


def test_tokens_need_four_bytes_only_above_a_vocabulary_of_65536(tmp_path):
    for vocab_size, size in ((65_536, 2), (65_537, 4)):
        write_shard(tmp_path / "train.bin", np.array([0, vocab_size - 1]), vocab_size)
        assert (tmp_path / "train.bin").stat().st_size == 1024 + 2 * size
    with pytest.raises(ValueError, match="tokens are 0 to 300, but vocab_size is 257"):
        write_shard(tmp_path / "train.bin", np.array([0, 300]), 257)


def test_reads_run_across_shards_in_the_order_of_their_names(numbered):
    assert len(numbered) == 1000 and len(numbered.paths) == 3
    for start, n in ((0, 1000), (299, 3), (300, 1), (999, 1), (301, 5)):
        assert numbered.read(start, n).tolist() == list(range(start, start + n))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: struct.pack("<i", 7) + b[4:], "bad magic 7 .expected 20240520"),
        (lambda b: b[:4] + struct.pack("<i", 9) + b[8:], "version 9, but shards with magic 20240520 have version 1"),
        (lambda b: b[:-200], "header says 1000 tokens, file holds 900 .truncated"),
        (lambda b: b + b"xx", "header says 1000 tokens, file holds 1001"),
        (lambda b: b[:-1], "1999 bytes of tokens do not divide"),
        (lambda b: b"", "0 bytes, less than the header's 1024"),
        (lambda b: struct.pack("<256i", 20240520, 1, 0, *[0] * 253), "no tokens in it"),
    ],
)
def test_a_damaged_shard_is_refused_by_name_and_number(tmp_path, change, message):
    path = make_shards(tmp_path, np.arange(1000)).paths[0]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"train_000000.bin: {message}"):
        Shards(tmp_path, "train")


def test_missing_data_says_which_command_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="stdlib not found: make it with  python data/prepare.py TEXT --out "):
        Shards(tmp_path / "stdlib", "train")
    with pytest.raises(FileNotFoundError, match="holds no .bin with val as a word"):
        make_shards(tmp_path, [1, 2])
        Shards(tmp_path, "val")


def test_a_text_in_the_place_of_its_shards_is_told_how_to_become_some(tmp_path):
    (tmp_path / "notes.txt").write_text("a text")
    with pytest.raises(FileNotFoundError, match="notes.txt is a file, .*data/prepare.py .*notes.txt --out data/notes$"):
        Shards(tmp_path / "notes.txt", "train")


def test_a_token_outside_of_the_vocabulary_is_an_error_that_names_file_and_token(tmp_path):
    tokens = np.zeros(100, int)
    tokens[70] = 60_000
    write_shard(tmp_path / "train_000000.bin", tokens[:50], 65_536)
    write_shard(tmp_path / "train_000001.bin", tokens[50:], 65_536)
    with pytest.raises(ValueError, match="train_000001.bin: token 60000 >= vocab_size 50257"):
        Shards(tmp_path, "train").read(40, 40)


def test_shards_that_are_replaced_while_in_use_keep_their_tokens(tmp_path, numbered):
    os.rename(numbered.folder, tmp_path / "old")
    make_shards(numbered.folder, np.arange(10))
    for path in (tmp_path / "old").iterdir():
        path.unlink()
    assert numbered.read(0, 1000).tolist() == list(range(1000))


def test_memory_does_not_grow_with_what_was_read(tmp_path):
    code = f"""
import numpy as np
from data.shards import Shards, write_shard
write_shard({str(tmp_path / "train.bin")!r}, np.ones(40_000_000, np.uint16), 50257)
shards = Shards({str(tmp_path)!r}, "train")
def mapped_kb():
    return int(open("/proc/self/status").read().split("RssFile:")[1].split()[0])
shards.read(0, 1000)
before = mapped_kb()
for start in range(0, 40_000_000, 100_000):
    shards.read(start, 100_000)
print(mapped_kb() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    grown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PREPARE.parents[1]
    )
    assert int(grown.stdout) < 8_000  # of 80,000 kB


# prepare.py


def test_every_document_begins_with_eot_and_arrives_unchanged(tmp_path):
    (tmp_path / "text").mkdir()
    contents = ["plain <|endoftext|> text\r\n", "ünï→🙂", "def f():\n    pass\n", *(f"filler {i}" for i in range(20))]
    (tmp_path / "text" / "a.txt").write_bytes(contents[0].encode())
    (tmp_path / "text" / "b.txt.gz").write_bytes(gzip.compress(contents[1].encode()))
    (tmp_path / "text" / "c.py").write_text(contents[2])
    (tmp_path / "text" / "d.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "id": 1}) for t in contents[3:]) + "\n\n"
    )
    (tmp_path / "text" / "ignored.png").write_bytes(b"\xff")
    (tmp_path / "text" / "empty.txt").write_text("")
    out = tmp_path / "out"
    prepare(
        [str(tmp_path / "text"), "--out", str(out), "--tokenizer", "byte", "--val_fraction", "0.3", "--workers", "1"]
    )
    train, val = texts_of(out, "train"), texts_of(out, "val")
    assert sorted(train + val) == sorted(contents) and train and val
    meta = json.loads((out / "meta.json").read_text())
    assert meta["documents"] == {"train": len(train), "val": len(val)}
    assert meta["bytes"] == {"train": len("".join(train).encode()), "val": len("".join(val).encode())}
    assert meta["tokens"] == {"train": len(Shards(out, "train")), "val": len(Shards(out, "val"))}
    assert (meta["vocab_size"], meta["eot_id"]) == (257, 256)


def test_a_document_stays_in_its_split_when_others_come_or_the_order_changes(tmp_path):
    options = ["--tokenizer", "byte", "--val_fraction", "0.3", "--workers", "1", "--out"]
    first, second = write_documents(tmp_path / "1.jsonl", 60), write_documents(tmp_path / "2.jsonl", 60, 60)
    prepare([first, *options, str(tmp_path / "few")])
    prepare([second, first, *options, str(tmp_path / "many")])
    for split, other in (("train", "val"), ("val", "train")):
        few, many = set(texts_of(tmp_path / "few", split)), set(texts_of(tmp_path / "many", split))
        assert few < many and not many & set(texts_of(tmp_path / "many", other))
    n_val = len(texts_of(tmp_path / "many", "val"))
    assert 20 < n_val < 52  # 36 expected, standard deviation 5


def test_few_documents_give_both_splits_one_and_a_single_one_is_cut(tmp_path):
    for n in (2, 3):
        source = write_documents(tmp_path / f"{n}.jsonl", n)
        for fraction in ("0.0001", "0.9999"):
            out = tmp_path / f"{n}{fraction}"
            prepare([source, "--out", str(out), "--tokenizer", "byte", "--val_fraction", fraction])
            assert len(texts_of(out, "val")) == (1 if fraction == "0.0001" else n - 1)
    (tmp_path / "one.txt").write_text("0123456789" * 10)
    prepare([str(tmp_path / "one.txt"), "--out", str(tmp_path / "one"), "--tokenizer", "byte"])
    assert texts_of(tmp_path / "one", "train") == ["0123456789" * 9 + "01234"]
    assert texts_of(tmp_path / "one", "val") == ["56789"]


def test_shakespeare_is_split_as_in_nanogpt_by_characters(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1234)) + "Z"
    (tmp_path / "input.txt").write_text(text)
    prepare(["shakespeare", "--input", str(tmp_path / "input.txt"), "--out", str(tmp_path / "out")])
    cut = int(len(text) * 0.9)
    assert texts_of(tmp_path / "out", "train") == [text[:cut]] and texts_of(tmp_path / "out", "val") == [text[cut:]]
    assert Shards(tmp_path / "out", "val").vocab_size == 26 + 1 + 1


def test_a_second_run_reuses_and_any_change_rebuilds(tmp_path, capsys):
    source, out = write_documents(tmp_path / "a.jsonl", 30), tmp_path / "out"
    run = [source, "--out", str(out), "--tokenizer", "byte", "--workers", "1"]

    def rebuilt(arguments):
        before = (out / "train_000000.bin").stat() if out.exists() else None
        fingerprint = json.loads((out / "meta.json").read_text())["fingerprint"] if before else None
        prepare(arguments)
        after = (out / "train_000000.bin").stat()
        same = before and (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
        assert ("nothing has changed" in capsys.readouterr().out) == bool(same)
        return not same, Shards(out, "train").fingerprint != fingerprint

    assert rebuilt(run) == (True, True)
    assert rebuilt(run) == (False, False)
    os.utime(source, ns=(1, 1))
    assert rebuilt(run) == (True, False)  # the same text is the same data, whenever it was written
    write_documents(tmp_path / "a.jsonl", 31)
    assert rebuilt(run) == (True, True)
    assert rebuilt([*run, "--max_doc_tokens", "9"]) == (True, True)
    assert rebuilt([*run, "--max_doc_tokens", "9"]) == (False, False)
    assert rebuilt([*run[:-4], "--tokenizer", "char", "--workers", "1"]) == (True, True)
    assert rebuilt([*run, "--skip_bad"]) == (True, True)
    assert rebuilt([*run, "--skip_bad"]) == (False, False)
    assert rebuilt(run) == (True, False)
    assert rebuilt([*run[:-4], "--tokenizer", "char", "--workers", "1"]) == (True, True)
    with open(out / "train_000000.bin", "ab") as file:
        file.write(b"xx")
    assert rebuilt([*run[:-4], "--tokenizer", "char", "--workers", "1"])[0]  # damaged
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


def test_many_workers_small_chunks_and_small_shards_change_nothing(tmp_path, monkeypatch):
    source = write_documents(tmp_path / "a.jsonl", 200)
    run = [source, "--tokenizer", "byte", "--out"]
    prepare([*run, str(tmp_path / "one"), "--workers", "1"])
    monkeypatch.setattr(prepare_module, "CHUNK", 500)
    prepare([*run, str(tmp_path / "two"), "--workers", "2", "--shard_tokens", "1000"])
    one, two = Shards(tmp_path / "one", "train"), Shards(tmp_path / "two", "train")
    assert len(two.paths) > 5 and {len(tokens) for tokens in two._tokens[:-1]} == {1000}
    assert np.array_equal(one.read(0, len(one)), two.read(0, len(two))) and one.fingerprint == two.fingerprint


def test_a_long_document_is_cut_only_where_tokens_do_not_notice(monkeypatch):
    from data.tokenizers import PATTERNS, regex

    monkeypatch.setattr(prepare_module, "CHUNK", 200)
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(["word", " ", "  ", "\n", "\n\n", "'s", "é", "12", "!", " Wort", "\t", "?!"], 3000))
    parts = list(pieces([text[:900], text[900:]]))
    assert parts == list(pieces([text]))
    assert "".join(parts) == text and len(parts) > 20
    for pattern in PATTERNS.values():
        assert [word for part in parts for word in regex.findall(pattern, part)] == regex.findall(pattern, text)
    assert [len(part) for part in pieces(["x" * 750])] == [200, 200, 350]


def test_documents_are_cut_to_max_doc_tokens_and_the_whole_to_max_tokens(tmp_path):
    source = write_documents(tmp_path / "a.jsonl", 50)
    prepare(
        [
            source,
            "--out",
            str(tmp_path / "out"),
            "--tokenizer",
            "byte",
            "--max_doc_tokens",
            "12",
            "--val_fraction",
            "0.5",
        ]
    )
    texts = texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")
    assert sorted(texts) == sorted(f"document {i} "[:11] for i in range(50))  # eot and eleven bytes
    prepare(
        [source, "--out", str(tmp_path / "out"), "--tokenizer", "byte", "--max_tokens", "2000", "--val_fraction", "0.2"]
    )
    assert len(Shards(tmp_path / "out", "train")) == 2000


def test_a_document_that_is_longer_than_a_chunk_is_cut_once(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "CHUNK", 7)
    source, out = write_documents(tmp_path / "a.jsonl", 20), tmp_path / "out"
    prepare([source, "--out", str(out), "--tokenizer", "byte", "--max_doc_tokens", "30", "--workers", "1"])
    texts = texts_of(out, "train") + texts_of(out, "val")
    assert sorted(texts) == sorted((f"document {i} " * 5)[:29] for i in range(20))


def test_no_more_workers_are_started_than_windows_can_wait_for(tmp_path, monkeypatch):
    started = []

    def encode_all(chunks, workers, *settings):
        started.append(workers)
        return one_process(chunks, 1, *settings)

    one_process = prepare_module.encode_all
    monkeypatch.setattr(prepare_module, "encode_all", encode_all)
    monkeypatch.setattr(prepare_module, "CHUNK", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    prepare([write_documents(tmp_path / "a.jsonl", 30), "--out", str(tmp_path / "out"), "--tokenizer", "byte"])
    assert started == [61]


def test_a_number_after_bpe_trains_that_tokenizer_on_the_training_text(tmp_path):
    source, out = write_documents(tmp_path / "a.jsonl", 300), tmp_path / "out"
    prepare([source, "--out", str(out), "--tokenizer", "bpe:300", "--add_tokens", "chat", "--val_fraction", "0.1"])
    shards = Shards(out, "train")
    assert shards.vocab_size == 300 and "<|im_start|>" in shards.meta["tokenizer"]["special_tokens"]
    assert len(shards) < shards.meta["bytes"]["train"] / 2
    assert sum(len(text.encode()) for text in texts_of(out, "train")) == shards.meta["bytes"]["train"]


def test_standard_input_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("hällo wörld".encode())))
    prepare(["-", "--out", str(tmp_path / "out"), "--tokenizer", "byte", "--val_fraction", "0.5"])
    assert texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val") == ["hällo", " wörld"]
    with pytest.raises(SystemExit, match="--out data/mytext"):
        prepare(["-"])


def test_standard_input_is_not_held_in_memory_and_leaves_no_file(tmp_path):
    (tmp_path / "temporary").mkdir()
    (tmp_path / "a.txt").write_text("word of a text " * 400_000)  # 6 MB
    code = """import tracemalloc; from data.sources import find_text; tracemalloc.start()
text = find_text(["-"], None, None, split_at_eot=False)
print(sum(len(part) for document in text.documents() for part in document), tracemalloc.get_traced_memory()[1])"""
    with open(tmp_path / "a.txt") as stream:
        run = subprocess.run(
            [sys.executable, "-c", code], stdin=stream, capture_output=True, text=True, cwd=PREPARE.parents[1],
            env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
        )  # fmt: skip
    length, peak = map(int, run.stdout.split())
    assert length == 6_000_000 and peak < 5_500_000, run.stderr
    assert os.listdir(tmp_path / "temporary") == []


def test_plain_text_copies_of_tinystories_are_cut_at_their_separator(tmp_path):
    stories = [f"Story {i}.\n\nThe end." for i in range(20)]
    (tmp_path / "t.txt").write_text(
        "\n<|endoftext|>\n".join(stories[:10]) + "<|endoftext|>" + "<|endoftext|>".join(stories[10:])
    )
    prepare(["tinystories", "--input", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "byte"])
    assert sorted(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == sorted(stories)


@pytest.mark.parametrize(
    "name", [n for n, named in sources_module.NAMED.items() if named.documents and n != "shakespeare"]
)
def test_hub_sets_are_streamed_with_datasets_which_is_asked_for_where_missing(tmp_path, monkeypatch, name):
    out, calls, given = tmp_path / "out", [], []

    def load_dataset(path, **arguments):
        calls.append((path, arguments))
        for i in range(3000):
            given.append(i)
            yield {"text": f"document {i} " * 1000, "id": i}

    run = [name, "--out", str(out), "--tokenizer", "byte", "--max_tokens", "100_000", "--val_fraction", "0.2"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="pip install datasets"):
        prepare(run)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    prepare([*run, "--workers", "1"])
    assert all(arguments["streaming"] and arguments["split"] == "train" for _, arguments in calls)
    assert len(given) < 1500  # 1,000 to see whether there are few, and as many as are needed: never the whole stream
    assert len(Shards(out, "train")) == 100_000 and len(Shards(out, "val")) > 1000


def test_a_tokenizer_is_trained_on_the_beginning_of_a_set_that_never_ends(tmp_path, monkeypatch):
    given = []

    def load_dataset(*_, **__):
        for i in itertools.count():
            given.append(i)
            yield {"text": f"document {i} " * 100}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(bpe_training, "SAMPLE", 100_000)
    out = tmp_path / "out"
    prepare(["pg19", "--out", str(out), "--tokenizer", "bpe:280", "--max_tokens", "20_000", "--workers", "1"])
    assert len(Shards(out, "train")) == 20_000 and Shards(out, "train").vocab_size == 280
    assert len(given) < 4000
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_the_standard_library_is_found_without_tests():
    files = sources_module.stdlib()
    assert 300 < len(files) < 600 and sum(path.stat().st_size for path in files) > 5e6
    names = {path.as_posix() for path in files}
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any("/test/" in name or "/site-packages/" in name or "/encodings/" in name for name in names)
    both = sources_module.pysource()
    assert len(both) > 3 * len(files) and set(files) < set(both)
    assert {path.suffix for path in both} == {".py"}


def test_pysource_without_torch_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sources_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="torch is not installed"):
        prepare(["pysource", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"fine\xe4 not", r"a.txt: not UTF-8 text: byte 0xe4 at offset 4"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a.jsonl line 2: not UTF-8 text: byte 0xff at offset 24"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a.jsonl line 2: needs a field \"text\", found \['txt'\]"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text"', r"a.jsonl line 3: not JSON: Expecting ':' delimiter at character 8"),
        ("a.jsonl", b"[1]\n", r"a.jsonl line 1: needs a field \"text\", found list"),
        ("a.txt", b"", "found no documents"),
        ("a.txt", b"x", "no document is in train: change --val_fraction=0.05"),
        ("a.txt.gz", gzip.compress(b"hello" * 1000, mtime=0)[:-9], "a.txt.gz: a damaged gzip file"),
        ("a.png", b"PNG", r"a.png: can read .txt, .md, .*, .parquet and .gz or .zst of them: call it .txt"),
        ("a.csv", b"id,body\n1,x\n", r"a.csv line 2: needs a field \"text\", found \['body', 'id'\]"),
        ("a.csv", b"id,text\n1,x\n2\n", r"a.csv line 3: the first row has 2 columns, and this one 1"),
        ("a.csv", b'text\n"a"b\n', r"a.csv, after line 1: no CSV"),
        ("a.csv", b"text\nfine\xe4", r"a.csv: not UTF-8 text: byte 0xe4 at offset 9"),
        ("a.html", b"<![foo]>", r"a.html: no HTML: unknown status keyword 'foo'"),
    ],
)
def test_bad_input_is_an_error_that_says_where_and_leaves_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        prepare([str(tmp_path / name), "--out", str(tmp_path / "out"), "--tokenizer", "byte", "--workers", "1"])
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", b"fine\xe4 not"),
        ("a.jsonl", b'{"text": "a"}\n{"text"'),
        ("a.txt.gz", gzip.compress(b"hello" * 1000, mtime=0)[:-9]),
    ],
)
def test_an_error_about_what_cannot_be_read_says_how_to_leave_it_out(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"{name}.*; or leave out what cannot be read with --skip_bad$"):
        prepare([str(tmp_path / name), "--out", str(tmp_path / "out"), "--tokenizer", "byte"])


def test_skip_bad_leaves_out_and_counts_what_cannot_be_read(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "fine.txt").write_text("a fine text")
    (source / "latin.txt").write_bytes(b"fine\xe4 not")
    # Damage at the end of a file is found after most of its lines are read.
    (source / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "of a damaged file"}\n' * 9000, mtime=0)[:-9])
    (source / "l.jsonl").write_bytes(b'{"text": "one"}\n{"txt": 1}\n[\n{"text": "\xff"}\n7\n\n{"text": "two"}\n')
    (source / "wide.md").write_bytes("no byte order mark".encode("utf-16-le"))
    run = [str(source), "--out", str(out), "--tokenizer", "char", "--val_fraction", "0.5"]
    with pytest.raises(SystemExit, match="--skip_bad"):
        prepare(run)
    prepare([*run, "--skip_bad"])
    assert sorted(texts_of(out, "train") + texts_of(out, "val")) == ["a fine text", "one", "two"]
    lines = capsys.readouterr().err.splitlines()
    first = lines.index("left out 7 files, documents or lines that cannot be read:")  # the text is read three times
    named = (
        "cut.jsonl.gz: a damaged",
        "l.jsonl line 2: needs",
        "l.jsonl line 3: not JSON",
        "l.jsonl line 4: not UTF-8",
        "l.jsonl line 5: needs",
    )
    for line, start in zip(lines[first + 1 :], (*named, "and 2 more"), strict=True):
        assert line.strip().removeprefix(f"{source}{os.sep}").startswith(start)


def test_skip_bad_where_nothing_can_be_read_names_what_was_left_out(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"fine\xe4 not")
    with pytest.raises(SystemExit, match="found no documents"):
        prepare([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "byte", "--skip_bad"])
    assert "left out 1 files" in capsys.readouterr().err


def test_skip_bad_leaves_out_one_of_the_documents_between_separators(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"one<|endoftext|>t\xffo\nlines<|endoftext|>three\nlines<|endoftext|>four")
    run = ["tinystories", "--input", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "byte"]
    with pytest.raises(SystemExit, match="byte 0xff at offset 17"):
        prepare(run)
    prepare([*run, "--skip_bad"])
    texts = texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")
    assert sorted(texts) == ["four", "one", "three\nlines"]


def test_skip_bad_leaves_out_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("closed")
    source = write_documents(tmp_path / "b.jsonl", 30)

    def open_or_not(path, mode):
        if Path(path).name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode)

    monkeypatch.setattr(text_module, "open", open_or_not, raising=False)
    run = [str(tmp_path / "a.txt"), source, "--out", str(tmp_path / "out"), "--tokenizer", "byte", "--workers", "1"]
    with pytest.raises(SystemExit, match="a.txt: cannot be read: .*Permission denied.*--skip_bad"):
        prepare(run)
    prepare([*run, "--skip_bad"])
    assert len(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == 30


@pytest.mark.parametrize("source", ["-", "shakespeare", "fineweb", "mqar"])
def test_skip_bad_is_refused_where_no_files_are_read(tmp_path, source):
    with pytest.raises(SystemExit, match="leave it out"):
        prepare([source, "--out", str(tmp_path / "out"), "--skip_bad"])


def test_markdown_is_read_and_what_is_left_out_of_a_folder_is_counted(tmp_path, capsys):
    source, out = tmp_path / "docs", tmp_path / "out"
    for folder in (source, source / ".git", source / ".cache", source / "deep"):
        folder.mkdir()
    for name in ("a.md", "b.rst", "d.txt"):
        (source / name).write_text(f"text of {name}")
    (source / "deep/c.md.gz").write_bytes(gzip.compress(b"text of c.md.gz"))
    for name in ("1.png", "2.png", "deep/3.png", "Makefile", ".git/in.txt"):
        (source / name).write_bytes(b"\0")
    (source / "gone.txt").symlink_to("nowhere")
    (source / "again").symlink_to(source)
    prepare([str(source), "--out", str(out), "--tokenizer", "byte", "--val_fraction", "0.5"])
    texts = texts_of(out, "train") + texts_of(out, "val")
    assert sorted(texts) == [f"text of {name}" for name in ("a.md", "b.rst", "c.md.gz", "d.txt")]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out of")]
    left_out, readable = line.removesuffix(")").split(" (")
    assert readable.startswith("read are .txt, .md, ") and readable.endswith(" and .gz or .zst of them")
    found = left_out.removeprefix(f"left out of {source}: ").split(", ")
    assert found[:2] == ["3 .png", "2 hidden folders"]
    assert sorted(found[2:]) == ["1 broken link or pipe", "1 linked folder", "1 without an ending"]


def test_many_endings_stay_one_line_and_an_unreadable_folder_is_in_it(tmp_path, monkeypatch, capsys):
    source = tmp_path / "docs"
    (source / "closed").mkdir(parents=True)
    write_documents(source / "a.jsonl", 30)
    for i in range(11):
        for j in range(2):
            (source / f"{j}.kind{i:02d}").touch()
    scandir = os.scandir

    def refuse_one(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_one)
    prepare([str(source), "--out", str(tmp_path / "out"), "--tokenizer", "byte"])
    counted = ", ".join(f"2 .kind{i:02d}" for i in range(11))
    assert sources_module.counts(sources_module.walk(source)[1], 99) == f"{counted}, 1 unreadable folder"
    shown, _, others = capsys.readouterr().err.splitlines()[0].partition(" (read are")[0].rpartition(", ")
    assert others == "3 others" and shown.count(" .kind") == 10


def test_a_folder_that_is_read_whole_is_not_spoken_of(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    write_documents(tmp_path / "docs" / "a.jsonl", 30)
    prepare([str(tmp_path / "docs"), "--out", str(tmp_path / "out"), "--tokenizer", "byte"])
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "-"])
def test_a_byte_order_mark_says_how_text_is_read(tmp_path, monkeypatch, name, encoding):
    documents = [f"größer {i}, 語, \u2028 and 😀" for i in range(20)] if "jsonl" in name else ["größer, 語 and 😀"]
    text = documents[0]
    if "jsonl" in name:
        text = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    mark = "" if encoding == "utf-8-sig" else "\ufeff"
    data = (mark + text).encode(encoding)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    source = "-"
    if name != "-":
        source = str(tmp_path / name)
        Path(source).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    prepare([source, "--out", str(tmp_path / "out"), "--tokenizer", "byte", "--val_fraction", "0.5"])
    texts = texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")
    if "jsonl" in name:
        assert sorted(texts) == sorted(documents)
    else:
        assert "".join(texts) == text


@pytest.mark.parametrize(
    "data, message",
    [
        ("English\n".encode("utf-16-le"), "looks like UTF-16LE without a byte order mark.* iconv -f UTF-16LE"),
        ("English\n".encode("utf-16-be"), "looks like UTF-16BE without a byte order mark.* iconv -f UTF-16BE"),
        ("и по-русски тоже\n".encode("utf-16-le"), "looks like UTF-16LE without"),  # it is valid UTF-8, too
        ("English".encode("utf-16")[:-1], "not whole UTF-16 text: truncated data at offset 14"),
        ("English".encode("utf-32"), "is UTF-32: convert it"),
    ],
)
def test_utf16_without_its_mark_or_its_end_is_refused_as_what_it_looks_like(tmp_path, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(SystemExit, match=f"a.txt: {message}"):
        prepare([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "byte"])


@pytest.mark.parametrize("text", ["\0 one, \0two, and", "one \0 of many" + ", and more" * 40])  # on both sides; few
def test_zeros_alone_do_not_make_a_text_utf16(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    run = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "byte", "--val_fraction", "0.5"]
    prepare(run)
    assert "".join(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == text


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "bad \\ud800 half"}\n{"text": "fine"}\n')
    prepare([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--tokenizer", "byte"])
    texts = texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")
    assert sorted(texts) == ["bad ? half", "fine"]


# as a library


def test_the_ten_lines_of_the_page_do_what_the_command_does(tmp_path):
    page = (PREPARE.parents[1] / "docs" / "data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len([line for line in code.splitlines() if line]) <= 10
    (tmp_path / "notes.txt").write_text("It stands here that they do. " * 400)
    environment = os.environ | {"PYTHONPATH": str(PREPARE.parents[1])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("torch.Size([8, 64]) torch.Size([8, 64])\n" * 3)
    prepare([str(tmp_path / "notes.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "byte"])
    for name in ("train_000000.bin", "val_000000.bin"):
        assert (tmp_path / "data" / "notes" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_as_a_library_prepare_returns_its_folder_and_raises_where_the_command_ends(tmp_path):
    source = write_documents(tmp_path / "a.jsonl", 30)
    folder = prepare_module.prepare(
        source, out=tmp_path / "out", tokenizer="byte", add_tokens=["<x>"], val_fraction=0.3
    )
    assert folder == tmp_path / "out" and Shards(folder, "train").vocab_size == 258
    prepare_module.prepare(source, out=tmp_path / "out", tokenizer="byte", add_tokens="<x>,<y>", val_fraction=0.3)
    assert Shards(folder, "train").vocab_size == 259
    assert prepare_module.prepare("mqar", out=tmp_path / "mqar", documents=100) == tmp_path / "mqar"
    with pytest.raises(TypeError, match="prepare has no option tokeniser: see  python data/prepare.py --help"):
        prepare_module.prepare(source, tokeniser="byte")
    with pytest.raises(ValueError, match="--pairs means nothing to"):
        prepare_module.prepare(source, pairs=3)
    with pytest.raises(ImportError, match="cannot import name 'Shard'"):
        from data import Shard  # noqa: F401


# pages, tables and compressed files


def documents_of(tmp_path, source, *options):
    """Returns the documents that prepare makes of a file, in the order of the alphabet."""
    out = tmp_path / "out"
    prepare([str(source), "--out", str(out), "--tokenizer", "byte", "--val_fraction", "0.5", *options])
    return sorted(texts_of(out, "train") + texts_of(out, "val"))


@pytest.mark.parametrize(
    "page, expected",
    [
        ("<p>One <b>and</b>\n two.</p><pre>a  b\n  c</pre>", "One and two.\n\na  b\n  c"),
        ("<title>T</title><style>p{}</style><script>a<b</script><h1>caf&eacute;</h1>&#x1F600;", "T\n\ncafé\n\n😀"),
        ("<ul><li>x <li>y</ul><table><tr><td>1</td> <td>2</td></tr></table>a<br/>b", "x\ny\n\n1 2\n\na\nb"),
        ("<svg><text>no</text><g>no</svg>yes</p></x>", "yes"),
        ("<!-- no --> 1 < 2 &amp; <i>3", "1 < 2 & 3"),
        ("<script>all of it", ""),
    ],
)
def test_of_a_page_of_html_its_text_is_read(page, expected):
    assert text_of_html(page, "page.html") == expected


def test_pages_and_tables_in_a_folder_are_documents(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.html").write_text("<p>a page</p>")
    (source / "b.htm.gz").write_bytes(gzip.compress(b"<p>another</p>"))
    (source / "c.csv").write_text('id,text\n1,"one, and\n""two"""\n\n2,three\n')
    (source / "d.tsv").write_text("text\tid\nfour, five\t4\n")
    (source / "e.csv").write_text("\n;\nid;text\n6;six\n;\n\n", encoding="utf-8-sig")  # as Excel saves empty rows
    assert documents_of(tmp_path, source) == ["a page", "another", "four, five", 'one, and\n"two"', "six", "three"]


def test_a_field_of_json_lines_and_a_column_of_a_table_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "one"}\n{"body": "two"}\n')
    (tmp_path / "b.csv").write_text("text,body\nno,three\nno,four\n")
    for name, expected in (("a.jsonl", ["one", "two"]), ("b.csv", ["four", "three"])):
        assert documents_of(tmp_path, tmp_path / name, "--field", "body") == expected
    with pytest.raises(SystemExit, match='a.jsonl line 1: needs a field "title", found'):
        documents_of(tmp_path, tmp_path / "a.jsonl", "--field", "title")


def test_a_column_has_texts_of_any_length_and_bad_rows_are_left_out_on_request(tmp_path, capsys):
    (tmp_path / "a.csv").write_text(f"id,text\n1,{'x' * 200_000}\n2\n3,y\n")
    assert documents_of(tmp_path, tmp_path / "a.csv", "--skip_bad") == ["x" * 200_000, "y"]
    assert "left out 1 files, documents or lines" in capsys.readouterr().err


def test_a_column_of_a_parquet_file_is_read(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["one", None, "two"], "id": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SystemExit, match='a.parquet row 2: the field "text" is None'):
        documents_of(tmp_path, tmp_path / "a.parquet")
    assert documents_of(tmp_path, tmp_path / "a.parquet", "--skip_bad") == ["one", "two"]
    with pytest.raises(SystemExit, match=r'a.parquet row 1: needs a field "body", found \[.id., .text.\]'):
        documents_of(tmp_path, tmp_path / "a.parquet", "--field", "body")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(SystemExit, match="b.parquet, after row 0: no parquet file"):
        documents_of(tmp_path, tmp_path / "b.parquet")


def test_zst_files_are_read_frame_by_frame_and_one_that_is_cut_short_is_refused(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    texts = [f"document {i}" for i in range(9000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    first = zstandard.ZstdCompressor().compress(lines[:200_000])
    second = zstandard.ZstdCompressor().compress(lines[200_000:])
    (tmp_path / "a.jsonl.zst").write_bytes(first + second)
    assert documents_of(tmp_path, tmp_path / "a.jsonl.zst") == sorted(texts)
    for damaged in (first + second[:-3], first[:20] + b"damage" + first[26:]):
        (tmp_path / "a.jsonl.zst").write_bytes(damaged)
        with pytest.raises(SystemExit, match="a.jsonl.zst: a damaged zst file"):
            documents_of(tmp_path, tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("name, package", [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_a_file_that_needs_a_package_says_what_to_install(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    for options in ([], ["--skip_bad"]):
        with pytest.raises(SystemExit, match=f"{name} needs {package}: pip install {package}$"):
            documents_of(tmp_path, tmp_path / name, *options)


def test_no_more_documents_are_taken_than_asked_for_and_no_more_are_read(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n' + "damage\n" * 3)
    assert documents_of(tmp_path, tmp_path / "a.jsonl", "--max_documents", "3") == ["one", "three", "two"]


def test_the_token_that_begins_documents_is_said_and_can_be_named(tmp_path, capsys):
    run = [write_documents(tmp_path / "a.jsonl", 9), "--out", str(tmp_path / "out"), "--tokenizer", "byte"]
    run += ["--val_fraction", "0.3", "--add_tokens", "chat"]
    prepare(run)
    said = capsys.readouterr().out
    assert "every document begins with <|endoftext|> (token 256; --eot takes another)" in said
    assert "a turn of a chat ends with <|im_end|>" in said
    prepare([*run, "--eot", "<think>"])
    shards = Shards(tmp_path / "out", "train")
    assert (shards.eot_id, shards.read(0, 1)[0]) == (258, 258)
    assert "every document begins with <think> (token 258" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="byte has no token '<end>', which is to begin its documents"):
        prepare([*run, "--eot", "<end>"])


def test_a_mistyped_name_gets_a_suggestion(tmp_path):
    for name, hint in (("shakespear", "did you mean shakespeare?"), ("qqq", "the named sets are stdlib, pysource")):
        with pytest.raises(SystemExit, match=hint.replace("?", "[?]")):
            prepare([name, "--out", str(tmp_path / "out")])


def test_a_folder_or_file_of_the_user_is_never_replaced(tmp_path):
    source, out = write_documents(tmp_path / "a.jsonl", 30), tmp_path / "out"
    run = [source, "--out", str(out), "--tokenizer", "byte"]
    out.write_text("mine")
    with pytest.raises(SystemExit, match="Not a directory"):
        prepare(run)
    out.unlink()
    out.mkdir()
    for mine in ("thesis.txt", "train_000000.bin"):
        (out / mine).write_text("{}")
        with pytest.raises(SystemExit, match=f"out holds {mine}, not only what prepare.py wrote"):
            prepare(run)
        (out / mine).unlink()
    (out / "meta.json").write_text("{}")
    with pytest.raises(SystemExit, match="meta.json has no field 'tokenizer': move it away"):
        prepare(run)
    (out / "meta.json").unlink()
    prepare(run)  # an empty folder is fine
    (out / "notes.txt").write_text("mine")
    write_documents(tmp_path / "a.jsonl", 31)
    with pytest.raises(SystemExit, match="out holds notes.txt"):
        prepare(run)
    with pytest.raises(SystemExit, match="prepare.py: .*File exists: .*a.jsonl"):
        prepare([source, "--out", str(tmp_path / "a.jsonl" / "below"), "--tokenizer", "byte"])


def test_a_failing_rebuild_leaves_the_earlier_data_as_it_was(tmp_path, monkeypatch):
    source, out = write_documents(tmp_path / "a.jsonl", 30), tmp_path / "out"
    run = [source, "--out", str(out), "--tokenizer", "byte", "--workers", "1"]
    prepare(run)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write_documents(tmp_path / "a.jsonl", 40)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit, match="No space left"):
            prepare(run)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


def test_a_run_killed_between_its_two_renames_loses_nothing(tmp_path, monkeypatch):
    source, out = write_documents(tmp_path / "a.jsonl", 30), tmp_path / "out"
    run = [source, "--out", str(out), "--tokenizer", "byte", "--workers", "1"]
    prepare(run)
    os.rename(out, tmp_path / ".out.old")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_text", lambda *_, **__: sys.exit("stop before anything is written"))
        with pytest.raises(SystemExit):
            prepare(run)
    assert len(texts_of(out, "train")) > 20 and sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


def test_a_killed_run_leaves_nothing_that_looks_finished_and_the_next_one_is_whole(tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    with open(source, "w") as file:
        for i in range(40_000):
            file.write(json.dumps({"text": f"document {i} " * 100}) + "\n")
    run = [str(source), "--out", str(out), "--tokenizer", "byte", "--shard_tokens", "1_000_000", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, str(PREPARE), *run], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    partial = tmp_path / ".out.partial"
    deadline = time.time() + 50
    while not list(partial.glob("train_*.bin")) and time.time() < deadline:
        time.sleep(0.01)
    with pytest.raises(SystemExit, match="another prepare.py is writing"):
        prepare(run)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(partial.glob("train_*.bin")) and not out.exists() and not (partial / "meta.json").exists()
    with pytest.raises(FileNotFoundError, match="out not found: make it with"):
        Shards(out, "train")
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.time() < deadline, "the workers outlive the run"
        time.sleep(0.05)
    write_documents(source, 30)
    prepare(run)
    assert len(texts_of(out, "train")) + len(texts_of(out, "val")) == 30
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


# to go on where a run was interrupted


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(run, partial, n_shards):
    """Runs the command, and kills it where so many shards of train are whole and a note is there."""
    null = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, str(PREPARE), *run], stdout=null, stderr=null)
    deadline = time.time() + 50
    while time.time() < deadline:
        if (partial / NOTE).exists() and len(list(partial.glob("train_*.bin"))) >= n_shards:
            break
        time.sleep(0.002)
    process.kill()
    process.wait()


def test_a_killed_run_goes_on_and_writes_what_an_uninterrupted_one_writes(tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"document {i} " * 60}) + "\n" for i in range(9000)))
    run = [str(source), "--tokenizer", "byte", "--shard_tokens", "300_000", "--workers", "1"]
    prepare([*run, "--out", str(tmp_path / "whole")])
    want = contents(tmp_path / "whole")

    again = [*run, "--out", str(tmp_path / "out")]
    partial = tmp_path / ".out.partial"
    for n_shards in (3, 6):
        killed(again, partial, n_shards)
        assert not (tmp_path / "out").exists() and (partial / NOTE).exists()
    (partial / ".train_000009.bin.tmp").write_text("a shard that was being written")
    capsys.readouterr()
    prepare([*again[:-3], "2", *again[-2:]])  # with other workers
    output = capsys.readouterr().out
    assert "goes on behind" in output and "wrote train_000002.bin" not in output
    assert contents(tmp_path / "out") == want
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out", "whole"]


@pytest.fixture
def interrupt(monkeypatch):
    """Returns a function that runs prepare with small chunks, and ends it as Ctrl-C does behind n shards."""
    monkeypatch.setattr(prepare_module, "CHUNK", 5000)

    def run(arguments, n_shards):
        with monkeypatch.context() as patch:
            written = []

            def write_or_end(path, *rest):
                if len(written) == n_shards:
                    raise KeyboardInterrupt
                written.append(path)
                write_shard(path, *rest)

            patch.setattr(prepare_module, "write_shard", write_or_end)
            with pytest.raises(SystemExit, match="interrupted"):
                prepare(arguments)

    return run


@pytest.mark.parametrize(
    "options",
    [
        ["--tokenizer", "bpe:270"],
        ["--tokenizer", "byte", "--max_tokens", "60_000", "--val_fraction", "0.4"],
        ["--tokenizer", "byte", "--chat", "--add_tokens", "chat"],
    ],
    ids=["trained", "of a number of tokens", "chat"],
)
def test_wherever_a_run_is_interrupted_the_same_command_ends_with_the_same_bytes(tmp_path, capsys, interrupt, options):
    source = tmp_path / "a.jsonl"
    key = "prompt" if "--chat" in options else "text"
    rows = [{key: f"document {i} " * 20, "response": f"it is {i}"} for i in range(600)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = [str(source), *options, "--shard_tokens", "9000", "--workers", "1"]
    prepare([*run, "--out", str(tmp_path / "whole")])
    want = contents(tmp_path / "whole")
    n_shards = len([name for name in want if re.fullmatch(r"\w+_\d+\.bin", name)])
    assert n_shards > 7

    for n in (1, 4, n_shards - 1):
        again = [*run, "--out", str(tmp_path / f"out{n}")]
        interrupt(again, n)
        interrupt(again, 1)
        capsys.readouterr()
        prepare(again)
        assert "goes on behind" in capsys.readouterr().out
        assert contents(tmp_path / f"out{n}") == want


def test_another_request_or_another_text_never_goes_on_with_what_is_there(tmp_path, capsys, monkeypatch, interrupt):
    def rows(word):
        return lambda *_, **__: iter([{"text": f"{word} {i} " * 20} for i in range(600)])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=rows("document")))
    run = ["fineweb", "--tokenizer", "byte", "--shard_tokens", "9000", "--workers", "1", "--val_fraction", "0.1"]
    out = ["--out", str(tmp_path / "out")]
    interrupt([*run, *out], 4)
    assert "the same command goes on there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    sys.modules["datasets"].load_dataset = rows("others")
    with pytest.raises(SystemExit, match="the text is not the one .*out.partial, which is deleted: .* begins anew"):
        prepare([*run, *out])
    assert os.listdir(tmp_path) == []

    interrupt([*run, *out], 4)
    capsys.readouterr()
    prepare([*run, "--max_doc_tokens", "50", *out])
    output = capsys.readouterr()
    assert "asked for something else: begun anew" in output.err and "goes on" not in output.out
    prepare([*run, "--max_doc_tokens", "50", "--out", str(tmp_path / "whole")])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damaged", [NOTE, "train_000001.bin"])
def test_an_interrupted_run_of_which_a_disk_lost_something_begins_anew(tmp_path, capsys, interrupt, damaged):
    source, out = write_documents(tmp_path / "a.jsonl", 600), tmp_path / "out"
    run = [source, "--tokenizer", "byte", "--shard_tokens", "9000", "--workers", "1", "--out", str(out)]
    interrupt(run, 4)
    os.truncate(tmp_path / ".out.partial" / damaged, 1100)
    capsys.readouterr()
    prepare(run)
    assert "goes on" not in capsys.readouterr().out
    prepare([*run[:-1], str(tmp_path / "whole")])
    assert contents(out) == contents(tmp_path / "whole")


@pytest.fixture
def like_windows(monkeypatch):
    """Hides what Windows lacks: fcntl, links without special rights, and folders that can be opened."""
    really_open = os.open

    def open_no_folder(path, *arguments, **more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, *arguments, **more)

    def symlink(*_, **more):
        raise OSError(1314, "A required privilege is not held by the client")

    with monkeypatch.context() as patch:  # which ends before tmp_path is cleaned up
        patch.setattr(successor_module, "fcntl", None)
        patch.setattr(os, "open", open_no_folder)
        patch.setattr(shutil, "_use_fd_functions", False)  # or rmtree would open folders
        patch.setattr(os, "symlink", symlink)
        yield patch


def test_without_fcntl_data_is_prepared_and_prepared_again(tmp_path, like_windows):
    out = tmp_path / "out"
    for n in (30, 40):
        source = write_documents(tmp_path / "a.jsonl", n)
        prepare([source, "--out", str(out), "--tokenizer", "byte", "--workers", "1"])
        assert len(texts_of(out, "train")) + len(texts_of(out, "val")) == n
        assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


def test_without_fcntl_a_second_process_is_refused_and_what_a_killed_one_left_is_named(tmp_path, like_windows):
    source, out = write_documents(tmp_path / "a.jsonl", 30), tmp_path / "out"
    run = [source, "--out", str(out), "--tokenizer", "byte", "--workers", "1"]
    with successor_module.successor(out) as folder:
        (folder / "train_000000.bin").write_text("of the first")
        with pytest.raises(SystemExit, match="another prepare.py is writing .*; if none is running, delete .*out.lock"):
            prepare(run)
        assert (folder / "train_000000.bin").read_text() == "of the first"
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]
    shutil.rmtree(out)
    (tmp_path / ".out.lock").touch()
    with pytest.raises(SystemExit, match="if none is running, delete .*out.lock"):
        prepare(run)
    (tmp_path / ".out.lock").unlink()
    like_windows.setattr(prepare_module, "write_text", lambda *_, **__: sys.exit("an end by an error"))
    for _ in range(2):  # an error gives the lock back
        with pytest.raises(SystemExit, match="an end by an error"):
            prepare(run)


def test_prepare_is_imported_where_there_is_no_fcntl():
    code = "import sys; sys.modules['fcntl'] = None; import data.prepare, data.successor; print(data.successor.fcntl)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PREPARE.parents[1])
    assert result.stdout.strip() == "None", result.stderr


def running(pids):
    """Returns those of the processes that run; one that has ended and was not waited for has no command line."""
    paths = {pid: Path(f"/proc/{pid}/cmdline") for pid in pids}
    return [pid for pid, path in paths.items() if path.exists() and path.read_bytes()]


@pytest.mark.xdist_group("processes")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
@pytest.mark.parametrize(
    "number, tokenizer, command",
    [
        (signal.SIGTERM, "byte", [str(PREPARE)]),
        (signal.SIGTERM, "byte", ["-c", "from data.prepare import main; main()"]),
        (signal.SIGTERM, "bpe:300", [str(PREPARE)]),  # ended while the workers count words
        (signal.SIGKILL, "bpe:300", [str(PREPARE)]),
    ],
)
def test_no_worker_outlives_a_run_that_is_ended_by_a_signal(tmp_path, number, tokenizer, command):
    source = tmp_path / "a.jsonl"
    with open(source, "w") as file:  # 4 MB: a worker gets one of them at a time
        for i in range(200):
            file.write(json.dumps({"text": f"document {i} " * 2000}) + "\n")
    run = [*command, str(source), "--out", str(tmp_path / "out"), "--tokenizer", tokenizer, "--workers", "2"]
    null = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, *run], stdout=null, stderr=null, cwd=PREPARE.parents[1])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = []
    while len(workers) < 3 and process.poll() is None:  # two, and multiprocessing's own
        workers = children.read_text().split()
        time.sleep(0.01)
    process.send_signal(number)
    process.wait()
    assert len(workers) == 3, "the run ended before its workers came"
    deadline = time.time() + 20
    try:
        while running(workers):
            assert time.time() < deadline, "workers outlive the run"
            time.sleep(0.05)
    finally:
        for pid in running(workers):
            os.kill(int(pid), signal.SIGKILL)


def test_data_that_other_text_made_is_never_replaced_without_being_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "__file__", str(tmp_path / "data" / "prepare.py"))
    for folder, name in (("a", "wiki.en.txt"), ("a", "wiki.de.txt"), ("b", "wiki.en.txt")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(f"{folder} {name} " * 99)
    prepare_module.main([str(tmp_path / "a" / "wiki.en.txt"), "--tokenizer", "byte"])
    prepare_module.main([str(tmp_path / "a" / "wiki.de.txt"), "--tokenizer", "byte"])
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"wiki.en", "wiki.de"}
    other = [str(tmp_path / "b" / "wiki.en.txt"), "--tokenizer", "byte"]
    with pytest.raises(SystemExit, match="wiki.en was made of .*/a/wiki.en.txt: choose another folder with --out"):
        prepare_module.main(other)
    prepare_module.main([*other, "--out", str(tmp_path / "data" / "wiki.en")])  # which names it
    (tmp_path / "a" / "mqar.txt").write_text("called like a named set " * 99)
    prepare_module.main([str(tmp_path / "a" / "mqar.txt"), "--tokenizer", "byte"])
    with pytest.raises(SystemExit, match="mqar was made of .*/a/mqar.txt: choose another folder with --out"):
        prepare_module.main(["mqar"])


@pytest.mark.parametrize("option", ["max_doc_tokens", "max_tokens", "max_documents", "shard_tokens", "workers"])
@pytest.mark.parametrize("number", [0, -1, 10**30])
def test_a_number_that_cannot_be_meant_is_refused_by_the_command_and_by_the_function(tmp_path, option, number):
    source = write_documents(tmp_path / "a.jsonl", 30)
    message = f"--{option}={number} is not from 1 to [0-9,]+$"
    with pytest.raises(ValueError, match=message):
        prepare_module.prepare(source, out=str(tmp_path / "out"), tokenizer="byte", **{option: number})
    with pytest.raises(SystemExit, match=message):
        prepare([source, "--out", str(tmp_path / "out"), "--tokenizer", "byte", f"--{option}={number}"])


def test_a_shard_has_no_more_tokens_than_its_header_can_count(tmp_path):
    with pytest.raises(ValueError, match="--shard_tokens=2147483648 is not from 1 to 2,147,483,647"):
        prepare_module.prepare("mqar", out=str(tmp_path / "out"), shard_tokens=2**31)


def test_what_does_not_fit_the_memory_is_an_error_of_one_line(tmp_path, monkeypatch):
    def allocate(*_, **__):
        raise MemoryError("Unable to allocate 2.98 TiB for an array")

    monkeypatch.setattr(prepare_module, "write_mqar", allocate)
    with pytest.raises(SystemExit, match="prepare.py: Unable to allocate 2.98 TiB"):
        prepare(["mqar", "--keys", "100_000_000", "--out", str(tmp_path / "out")])


def test_a_file_is_of_the_split_whose_name_is_a_word_of_its_own(tmp_path):
    """A validation shard of pretraining data is none of train's, whatever letters its name has."""
    for n, name in enumerate(("pretrain_val_000000", "pretrain_train_000000", "retrieval_train", "fineweb-val-1"), 1):
        write_shard(tmp_path / f"{name}.bin", np.full(10 * n, 5), 300)
    assert [len(Shards(tmp_path, split)) for split in ("train", "val")] == [20 + 30, 10 + 40]
    write_shard(tmp_path / "train_and_val.bin", np.full(10, 5), 300)
    with pytest.raises(ValueError, match="of train or of val"):
        Shards(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"with test as a word .*fineweb-val-1.bin"):
        (tmp_path / "train_and_val.bin").unlink()
        Shards(tmp_path, "test")


def test_prepare_starts_without_torch():
    code = "import sys, data.prepare; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PREPARE.parents[1])
    assert result.stdout.strip() == "False", result.stderr


# one reader


JSON_LINES = {  # what a line holds, and what every reader makes of it
    '{"text": "one two", "context": "one two", "answer": "3"}': "one two",
    '\ufeff{"text": "one two", "context": "one two", "answer": "3"}': "one two",
    '\n  \n{"text": "one two", "context": "one two", "answer": "3"}\n\n': "one two",
    '{"text": "one \\ud83d two", "context": "one \\ud83d two", "answer": "3"}': "one ? two",
    '{"text": null, "context": null, "answer": "3"}': "line 1.* is None",
    '{"text": 7, "context": 7, "answer": "3"}': "line 1.* is 7",
    '{"text": ["a"], "context": ["a"], "answer": "3"}': r"line 1.* is \['a'\]",
    '\n["one"]': "line 2",
    '\n"one"': "line 2",
    "\n7": "line 2",
    '{"text"': "line 1: not JSON",
    "[" * 100_000: "line 1: not JSON",
}


def read_by_all(path):
    """Returns what each of the three that read JSON lines does with a file: the text of its line, or the error."""

    def prepared():
        prepare([str(path), "--out", str(path.parent / "out"), "--tokenizer", "byte", "--val_fraction", "0.5"])
        return "".join(texts_of(path.parent / "out", "train") + texts_of(path.parent / "out", "val"))

    def trained_on():
        return "".join(count_words([path], "newer"))

    def asked():
        return load_task("mine", path)[1][0].contexts[0]

    found = []
    for reader in (prepared, trained_on, asked):
        try:
            found.append(reader())
        except (ValueError, SystemExit) as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("line", JSON_LINES, ids=lambda line: ascii(line[:30]))
def test_json_lines_are_read_alike_by_prepare_tokenizer_training_and_tasks(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line, encoding="utf-8")
    expected = JSON_LINES[line]
    for found in read_by_all(tmp_path / "a.jsonl"):
        if expected.startswith("line"):
            assert re.search(f"a.jsonl {expected}", found), found
        else:
            assert found == expected


def test_a_text_is_prepared_in_less_memory_than_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "CHUNK", 1 << 17)
    text = "A line of thirty-two characters\n" * (1 << 19)  # 16 MB
    (tmp_path / "a.txt").write_text(text)
    tracemalloc.start()
    prepare([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "byte", "--workers", "1",
             "--shard_tokens", "500_000"])  # fmt: skip
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.75 * len(text)
    ids = Shards(tmp_path / "out", "train").read(1, 15_000_000)
    assert bytes(ids.astype(np.uint8)).decode() == text[:15_000_000]


def test_a_text_in_parts_is_one_text_wherever_its_characters_are_cut(tmp_path):
    text = "größer, 語 and 😀" * 20
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a.txt").write_text(text, encoding=encoding)
        for size in (1, 2, 3, 7):
            parts = list(text_module.parts(tmp_path / "a.txt", size=size))
            assert "".join(parts) == text and len(parts) > 50
    (tmp_path / "a.txt").write_bytes(text.encode() + b"fine \xe4 not")
    for size in (1, 2, 3, 7):
        with pytest.raises(text_module.Unreadable, match=f"byte 0xe4 at offset {len(text.encode()) + 5}:"):
            list(text_module.parts(tmp_path / "a.txt", size=size))


def test_an_end_of_text_that_is_spelled_out_splits_documents_on_request_and_is_spoken_of(tmp_path, monkeypatch, capsys):
    documents = [f"story {i}" for i in range(20)]
    text = "\n<|endoftext|>\n".join(documents)
    run = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "byte", "--val_fraction", "0.5"]
    (tmp_path / "a.txt").write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(text_module, "parts", partial(text_module.parts, size=10))  # none of them has a whole marker
        prepare(run)
    assert "a.txt spells out <|endoftext|>, which stays text: --split_at_eot begins" in capsys.readouterr().err
    assert "".join(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == text
    for source in (run[0], "-"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        prepare([source, *run[1:], "--split_at_eot"])
        assert "spells out" not in capsys.readouterr().err
        texts = texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")
        assert sorted(texts) == sorted(documents)
    (tmp_path / "a.txt").write_text("no marker " * 9)
    (tmp_path / "b.md").write_text(text)  # which is a document whatever is in it
    prepare([str(tmp_path / "b.md"), *run])
    assert "spells out" not in capsys.readouterr().err


def test_a_word_as_long_as_a_file_is_trained_on_and_encoded_in_seconds(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "dna.txt").write_text("".join(rng.choice(list("ACGT"), 300_000)))
    (tmp_path / "base64.txt").write_text("".join(rng.choice(list("abcdefghijklmnopqrstuvwxyzABCDEFGH+/01"), 300_000)))
    start = time.time()
    tokenizer = train_bpe([tmp_path / "dna.txt", tmp_path / "base64.txt"], 600)
    for name in ("dna.txt", "base64.txt"):
        text = (tmp_path / name).read_text() * 4
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.time() - start < 20  # 2 where nothing else runs, and 40 if each merge cost the length of the text
    said = "1 words of more than 1000 characters, the longest of 300,000: trained on in pieces of 1000"
    assert said in capsys.readouterr().err


# the bytes of the text


@pytest.fixture
def nfc(tmp_path):
    """A tokenizer that composes letters, as Qwen's does: e and its accent, 3 bytes, become one letter of 2."""
    fields = load_tokenizer("byte").to_dict()
    ranks = "\n".join(f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256))
    fields |= {"kind": "bpe", "ranks": ranks, "pattern": r"[\s\S]", "nfc": True}
    (tmp_path / "nfc.json").write_text(json.dumps(fields))
    return f"bpe:{tmp_path}/nfc.json"


def test_the_bytes_of_the_text_are_stored_and_a_tokenizer_that_loses_some_is_named(tmp_path, nfc, capsys):
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text("e\u0301x" * 1000)
    prepare([str(tmp_path / "a.txt"), "--out", str(out), "--tokenizer", nfc, "--val_fraction", "0.25"])
    meta = Shards(out, "val").meta
    assert meta["text_bytes"] == {"train": 3000, "val": 1000} and meta["bytes"] == {"train": 2250, "val": 750}
    said = capsys.readouterr().err
    assert (
        "WARNING: byte loses text: 2 pieces of it come back changed, 4,000 bytes as 3,000; the first has 'e\u0301x"
        in said
    )
    prepare([str(tmp_path / "a.txt"), "--out", str(out), "--tokenizer", "byte", "--val_fraction", "0.25"])
    meta = Shards(out, "val").meta
    assert meta["text_bytes"] == meta["bytes"] == {"train": 3000, "val": 1000}
    assert "WARNING" not in capsys.readouterr().err


def test_of_documents_that_are_cut_the_bytes_of_the_text_are_those_that_stay(tmp_path, nfc):
    lines = [json.dumps({"text": f"{i:02}" + "e\u0301x" * 50}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    run = [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--tokenizer", nfc, "--val_fraction", "0.5"]
    prepare([*run, "--max_doc_tokens", "63"])
    meta = Shards(tmp_path / "out", "val").meta
    for split in ("train", "val"):  # of 63 characters' 83 bytes come 63 of tokens, and 62 stay behind eot
        assert meta["bytes"][split] == 62 * meta["documents"][split]
        assert meta["text_bytes"][split] == round(meta["bytes"][split] * 83 / 63)


def test_sentencepiece_by_its_defaults_is_said_to_lose_text(tmp_path, capsys):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = Path(prepare_module.__file__).read_text() + "漢"
    (tmp_path / "a.txt").write_text(text)
    lossless = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True)
    for options, loses in (({}, True), (lossless, False)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text[:-1].splitlines()), model_prefix=str(tmp_path / "m"), vocab_size=700,
            model_type="bpe", minloglevel=2, **options,
        )  # fmt: skip
        prepare([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "m.model")])
        meta = Shards(tmp_path / "out", "train").meta
        assert sum(meta["text_bytes"].values()) == pytest.approx(len(text.encode()), abs=10)
        assert ("m.model loses text" in capsys.readouterr().err) == loses
        assert (meta["text_bytes"]["train"] > 1.1 * meta["bytes"]["train"]) == loses


# other tools' token files


def test_token_files_of_nanogpt_and_build_nanogpt_become_shards_by_one_command(tmp_path):
    tokens = np.arange(5000) * 7919 % 50257
    tokens[::100] = EOT
    (tmp_path / "nano").mkdir()
    tokens[:4000].astype(np.uint16).tofile(tmp_path / "nano" / "train.bin")
    tokens[4000:].astype(np.uint16).tofile(tmp_path / "nano" / "val.bin")
    (tmp_path / "nano" / "prepare.py").write_text("# the script that made them")
    (tmp_path / "build").mkdir()
    np.save(tmp_path / "build" / "edufineweb_train_000001.npy", tokens[:3000].astype(np.uint16))
    np.save(tmp_path / "build" / "edufineweb_train_000002.npy", tokens[3000:4000].astype(np.int32))
    np.save(tmp_path / "build" / "edufineweb_val_000000.npy", tokens[4000:])
    for name in ("nano", "build"):
        with pytest.raises((ValueError, FileNotFoundError), match=f"python data/prepare.py {tmp_path}/{name} --out"):
            Shards(tmp_path / name, "train")
        prepare([str(tmp_path / name), "--out", str(tmp_path / "out")])
        train, val = Shards(tmp_path / "out", "train"), Shards(tmp_path / "out", "val")
        assert np.array_equal(train.read(0, 4000), tokens[:4000]) and np.array_equal(val.read(0, 1000), tokens[4000:])
        assert (train.vocab_size, train.eot_id, train.meta["tokenizer"]) == (50257, EOT, None)
        assert train.meta["documents"] == {"train": 40, "val": 10}
    for path in (tmp_path / "nano").glob("*.bin"):  # as of a larger vocabulary, which does not fit into 16 bits
        np.fromfile(path, np.uint16).astype(np.uint32).tofile(path)
    prepare([str(tmp_path / "nano"), "--out", str(tmp_path / "out")])
    assert np.array_equal(Shards(tmp_path / "out", "train").read(0, 4000), tokens[:4000])
    larger = [i for i in range(3, 300, 7)] + [70_000, 128_000]
    np.array(larger, np.uint32).tofile(tmp_path / "nano" / "train.bin")
    assert np.concatenate(list(token_files.read(tmp_path / "nano" / "train.bin", 128_256))).tolist() == larger
    with pytest.raises(
        SystemExit, match=r"train.bin: tokens from \d+ to \d+, and a vocabulary of 257: name its tokenizer"
    ):
        prepare([str(tmp_path / "nano"), "--out", str(tmp_path / "out"), "--tokenizer", "byte"])
    with pytest.raises(SystemExit, match="--val_fraction means nothing to"):
        prepare([str(tmp_path / "nano"), "--out", str(tmp_path / "out"), "--val_fraction", "0.5"])
    (tmp_path / "half").mkdir()
    tokens[:99].astype(np.uint16).tofile(tmp_path / "half" / "train.bin")
    with pytest.raises(SystemExit, match="half has token files, but none with val as a word of its name"):
        prepare([str(tmp_path / "half"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="is a shard as it is: train with --data="):
        prepare([str(tmp_path / "out"), "--out", str(tmp_path / "again")])
    (tmp_path / "nano" / "meta.pkl").write_bytes(b"")
    with pytest.raises(SystemExit, match="a pickle, which could run any code and is never read: .*--tokenizer char"):
        prepare([str(tmp_path / "nano"), "--out", str(tmp_path / "out")])


# meta.json


BAD_FIELDS = {
    "tokenizer": "gpt2",
    "vocab_size": "50257",
    "eot_id": -1,
    "targets": [1],
    "document_tokens": 0,
    "documents": {"train": 1},
    "bytes": {"train": 1, "val": "2"},
    "text_bytes": None,
    "tokens": [1, 2],
    "fingerprint": 7,
    "request": None,
    "origin": "a.txt",
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_a_malformed_meta_json_is_an_error_that_names_file_and_field(tmp_path, field):
    source, out = write_documents(tmp_path / "a.jsonl", 30), tmp_path / "out"
    prepare([source, "--out", str(out), "--tokenizer", "byte"])
    meta = json.loads((out / "meta.json").read_text()) | {field: BAD_FIELDS[field]}
    (out / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=f"out/meta.json: '{field}' is .*, and not .*: prepare the data again"):
        Shards(out, "train")
    with pytest.raises(SystemExit, match=f"out/meta.json: '{field}' is .*: move it away"):
        prepare([source, "--out", str(out), "--tokenizer", "byte"])
    (tmp_path / "data.json").write_text(json.dumps(meta))  # the same file, in a run's folder
    with pytest.raises(ValueError, match=f"data.json: '{field}' is .*: copy meta.json of its data"):
        find_tokenizer(tmp_path, None)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"tokenizer": null, "vocab_size": 9, "eot_id": 9}', "\0"])
def test_a_meta_json_that_holds_something_else_is_one_error(tmp_path, text):
    make_shards(tmp_path, [1, 2])
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match="meta.json"):
        Shards(tmp_path, "train")


# two at once, and small ones


def test_a_run_that_begins_as_another_ends_is_as_good_as_one_after_it(tmp_path, monkeypatch):
    """Between opening the lock and taking it another run does all of its work; a third one is kept out."""
    if successor_module.fcntl is None:
        pytest.skip("there is no fcntl here")
    source, out = write_documents(tmp_path / "a.jsonl", 30), tmp_path / "out"
    run = [source, "--out", str(out), "--tokenizer", "byte", "--workers", "1"]
    flock, make_tokenizer = successor_module.fcntl.flock, prepare_module.make_tokenizer
    with monkeypatch.context() as patch:

        def run_another_first(*arguments):
            patch.setattr(successor_module.fcntl, "flock", flock)
            prepare(run)
            patch.setattr(prepare_module, "make_tokenizer", make_it_while_a_third_begins)
            flock(*arguments)

        def make_it_while_a_third_begins(*arguments):
            patch.setattr(prepare_module, "make_tokenizer", make_tokenizer)
            with pytest.raises(SystemExit, match="another prepare.py is writing"):
                prepare([*run, "--val_fraction", "0.5"])
            return make_tokenizer(*arguments)

        patch.setattr(successor_module.fcntl, "flock", run_another_first)
        prepare(run)
    assert len(texts_of(out, "train")) + len(texts_of(out, "val")) == 30
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


def test_a_text_of_one_character_again_and_again_has_a_vocabulary_of_two(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 500)
    prepare([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "char"])
    shards = Shards(tmp_path / "out", "train")
    assert (shards.vocab_size, shards.eot_id) == (2, 1) and shards.read(0, 4).tolist() == [1, 0, 0, 0]


def run_script(folder, name, *arguments, **environment):
    command = [sys.executable, str(PREPARE.parents[1] / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | environment)


TINY = ["--n_layer=1", "--n_head=2", "--n_kv_head=1", "--head_dim=8", "--n_embd=16", "--n_inner=16", "--block_size=16",
        "--batch_tokens=64", "--micro_batch=4", "--eval_tokens=16", "--max_steps=100", "--vocab_size=320"]  # fmt: skip


def test_training_on_data_that_cannot_be_meant_ends_with_one_line(tmp_path):
    tokens = np.arange(4000) % 300
    meta = json.dumps({"tokenizer": None, "vocab_size": 300, "eot_id": 0})
    for name, n_val, odd, message in (
        ("small", 1, 7, "error: small: the val split has 1 token, and to predict one takes 2"),
        ("odd", 40, 301, "error: odd/train_0.bin: token 301 >= vocab_size 300"),
    ):
        (tmp_path / name).mkdir()
        tokens[500::50] = odd
        write_shard(tmp_path / name / "train_0.bin", tokens, 302)
        write_shard(tmp_path / name / "val_0.bin", tokens[:n_val], 302)
        (tmp_path / name / "meta.json").write_text(meta)
        done = run_script(tmp_path, "train.py", f"--data={name}", f"--out_dir=run {name}", *TINY)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith(message)
    assert not (tmp_path / "run small").exists()


def test_what_the_output_has_no_letters_for_is_printed_as_escapes(tmp_path):
    (tmp_path / "ü.txt").write_text("text " * 50)
    run = ["data/prepare.py", "ü.txt", "--out", "dü", "--tokenizer", "byte"]
    done = run_script(tmp_path, *run, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and r"d\xfc train: 1 documents" in done.stdout, done.stderr
