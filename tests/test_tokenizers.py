"""data/tokenizers.py against naive references written here, tiktoken, Hugging Face's tokenizers and sentencepiece."""

import base64
import gzip
import io
import itertools
import json
import pickle
import random
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import regex
import tiktoken

from data import bpe_training as trainer
from data import sentencepiece_model as sp_model
from data import tokenizer_json
from data import tokenizers as ours
from data.bpe import CHAT_TOKENS
from data.tokenizers import (
    EOT,
    PATTERNS,
    Tokenizer,
    count_words,
    load_tokenizer,
    merge_words,
    stream_text,
    tokenizer_from_dict,
    train_bpe,
)

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "data/tokenizers.py").read_text(encoding="utf-8")
MIXED = (
    "It's  12345 naïve\r\n\r\n\tÉTÉ, don't!?\n   x = [1,  2]\n 漢字かな 👩‍👩‍👧‍👦🇩🇪 e\u0301\u3000\x85\x1c\x00"
    + EOT
    + "<think>\n \n"
)


def random_text(seed, n=3000):
    rng = random.Random(seed)
    ranges = [(32, 127), (9, 14), (0xA0, 0x600), (0x3000, 0x3100), (0x4E00, 0x5000), (0x1F300, 0x1FA00), (0, 0xD800)]
    ranges += [(32, 33)] * 3 + [(97, 123)] * 5
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(n))


def repr_start(text):
    return ascii(text[:5])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(TEXT + MIXED, encoding="utf-8", newline="")
    return folder


@pytest.fixture(scope="module")
def bpe(folder):
    return train_bpe([folder / "text.txt"], 600, special_tokens=CHAT_TOKENS)


@pytest.fixture(scope="module")
def sentencepiece_model(folder):
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=out, vocab_size=700, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "spm.model").write_bytes(out.getvalue())
    return folder / "spm.model"


@pytest.fixture(scope="module", params=["byte", "char", "bpe", "json", "sentencepiece"])
def tok(request, folder):
    if request.param == "bpe":
        return request.getfixturevalue("bpe")
    if request.param == "json":
        return load_tokenizer(str(save_hugging_face(folder, "gpt2")), CHAT_TOKENS)
    if request.param == "sentencepiece":
        return load_tokenizer(str(request.getfixturevalue("sentencepiece_model")), CHAT_TOKENS)
    return load_tokenizer(request.param, CHAT_TOKENS, chars=TEXT + MIXED + random_text(0))


def save_hugging_face(folder, pattern, added=(EOT, "<a>", "<a><b>"), edit=None, name="tokenizer.json"):
    """Train a byte-level BPE with the installed package. pattern: "gpt2" (ByteLevel's own) or a regex (Split)."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HuggingFace

    hf = HuggingFace(models.BPE())
    if pattern == "gpt2":
        hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        hf.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), last])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<first>"], initial_alphabet=alphabet, show_progress=False
    )
    hf.train_from_iterator([TEXT + MIXED], trainer)
    hf.add_special_tokens(list(added))
    d = json.loads(hf.to_str())
    if edit:
        edit(d)
    (folder / name).write_text(json.dumps(d), encoding="utf-8")
    return folder / name


# ------------------------------------------------------------------------------------------------ encode and decode


@pytest.mark.parametrize("text", [MIXED, "", " ", "  two", "a\n", random_text(0)], ids=repr_start)
def test_decoding_what_was_encoded_gives_the_text_back(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.decode_bytes(ids) == text.encode()
    assert tok.decode(tok.encode(text, special=True)) == text
    assert all(type(i) is int and 0 <= i < tok.vocab_size for i in ids)


def test_bpe_and_byte_decode_any_unicode(bpe):
    for seed in range(20):
        text = random_text(seed)
        assert bpe.decode(bpe.encode(text)) == text
        assert load_tokenizer("byte").encode(text) == list(text.encode())


def test_a_batch_is_its_texts_one_by_one(tok):
    texts = [MIXED, "", f"a{EOT}<think>"]
    for special in (False, True):
        batch = tok.encode_batch(texts, special)
        assert batch == [tok.encode(text, special) for text in texts]
        assert tok.decode_batch(batch) == texts


def test_a_lone_surrogate_is_an_error(tok):
    with pytest.raises(ValueError, match="lone surrogate '\\\\ud83d' at character 2"):
        tok.encode("ab\ud83dcd")


def test_special_tokens_are_one_id_on_request_and_plain_text_otherwise(tok):
    assert set(tok.special_tokens) >= {*CHAT_TOKENS}
    assert tok.eot_id == tok.special_tokens["<s>" if tok.kind == "sentencepiece" else EOT]
    for token, i in tok.special_tokens.items():
        if set(token) <= set(TEXT):
            assert i not in tok.encode(f"a{token}b") and tok.decode(tok.encode(f"a{token}b")) == f"a{token}b"
        assert tok.encode(token, special=True) == [i]
        assert tok.encode(f"a{token}{token} b", special=True) == [*tok.encode("a"), i, i, *tok.encode(" b")]
        assert tok.decode([i]) == token
    assert len(set(tok.special_tokens.values())) == len(tok.special_tokens)


def test_of_overlapping_special_tokens_the_longest_wins():
    for tokens in (["<a>", "<a><b>", "<b>"], ["<b>", "<a><b>", "<a>"]):
        tok = load_tokenizer("byte", tokens)
        ids = [tok.special_tokens[t] for t in ("<a><b>", "<a>", "<b>")]
        assert tok.encode("<a><b><a>x<b>", special=True) == [ids[0], ids[1], ord("x"), ids[2]]


def test_special_tokens_that_cannot_be_told_apart_are_refused(bpe):
    with pytest.raises(ValueError, match=r"special token '<x>' can't be had: its id 65 is that of b'A'"):
        Tokenizer("byte", "byte", {EOT: 256, "<x>": 65})
    with pytest.raises(ValueError, match="its id 256 is that of b'<|endoftext|>'"):
        Tokenizer("byte", "byte", {EOT: 256, "<x>": 256})
    with pytest.raises(ValueError, match="it is empty"):
        load_tokenizer("byte", [""])
    d = bpe.to_dict()
    d["ranks"] = d["ranks"].replace(" 300\n", " 301\n")
    with pytest.raises(ValueError, match="595 tokens share 594 ids"):
        tokenizer_from_dict(d)
    d["ranks"] = bpe.to_dict()["ranks"].split("\n", 1)[1]
    with pytest.raises(ValueError, match="no token for 1 of the 256 bytes, like 0"):
        tokenizer_from_dict(d)


def test_added_tokens_take_the_next_free_ids():
    tok = load_tokenizer("byte", ["<think>", EOT, "<x>"])
    assert tok.special_tokens == {EOT: 256, "<think>": 257, "<x>": 258} and tok.vocab_size == 259


def test_token_bytes_add_up_to_the_bytes_of_the_text(tok):
    n_bytes = tok.token_bytes()
    assert n_bytes.dtype == "int32" and n_bytes.shape == (tok.vocab_size,)
    assert all(n_bytes[i] == 0 for i in tok.special_tokens.values())
    extra = tok.kind == "sentencepiece"  # its space before the text
    assert n_bytes[tok.encode(MIXED)].sum() == len(MIXED.encode()) + extra


def test_the_token_of_what_is_unknown_stands_for_text_although_it_is_special(tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[BOS]": 1, "cat": 2}, unk_token="[UNK]"))
    words.add_special_tokens(["[UNK]", "[BOS]"])
    words.save(str(tmp_path / "tokenizer.json"))
    tok = load_tokenizer(str(tmp_path / "tokenizer.json"), eot="[BOS]")
    assert tok.encode("dog") == [0] and tok.token_bytes().tolist() == [5, 0, 3]


def test_ids_that_stand_for_nothing_are_an_error(tok):
    with pytest.raises(ValueError, match=f"id {tok.vocab_size} stands for nothing"):
        tok.decode([tok.vocab_size])


def test_char_takes_its_alphabet_and_nothing_else():
    tok = load_tokenizer("char", chars="hello")
    assert tok.encode("hole") == [1, 3, 2, 0] and tok.eot_id == 4 and tok.vocab_size == 5
    with pytest.raises(ValueError, match="'a' is not among the 4 characters"):
        tok.encode("halo")
    with pytest.raises(ValueError, match="needs its alphabet"):
        load_tokenizer("char")


@pytest.mark.parametrize(
    "run", [" " * 1_200_000 + "x", "a" * 1_000_000, "\t\u3000" * 600_000, "!" * 1_000_000], ids=repr_start
)
@pytest.mark.parametrize("pattern", ["gpt2", "newer"])
def test_a_megabyte_of_one_letter_or_of_spaces_is_encoded_exactly(bpe, run, pattern):
    tok = tokenizer_from_dict(bpe.to_dict() | {"pattern": PATTERNS[pattern]})
    text = "def f():\n" + run + "\nend"
    assert tok.decode(tok.encode(text)) == text


def test_long_spaces_are_cut_only_where_they_are_too_long():
    text = "a" + " " * 9 + "b" + " " * 10 + "c" + "\n" * 25 + "d"
    parts = list(ours._cut_long_spaces(text, limit=10))
    assert parts == ["a" + " " * 9 + "b" + " " * 10 + "c" + "\n" * 10, "\n" * 10, "\n" * 5 + "d"]


# ------------------------------------------------------------------------------------------------ saving and streaming


def test_a_tokenizer_is_rebuilt_from_its_json_alone(tok):
    again = tokenizer_from_dict(json.loads(json.dumps(tok.to_dict())))
    text = MIXED + TEXT
    assert again.encode(text) == tok.encode(text) and again.encode(text, special=True) == tok.encode(text, special=True)
    assert again.decode(tok.encode(text)) == text
    assert pickle.loads(pickle.dumps(tok)).encode(text) == tok.encode(text)  # so worker processes can have one
    assert (again.name, again.vocab_size, again.eot_id) == (tok.name, tok.vocab_size, tok.eot_id)
    assert again.special_tokens == tok.special_tokens and again.fingerprint == tok.fingerprint
    assert (again.token_bytes() == tok.token_bytes()).all()


def test_the_fingerprint_changes_with_all_that_decides_ids_and_with_nothing_else(bpe):
    d = bpe.to_dict()
    assert tokenizer_from_dict(d | {"name": "moved"}).fingerprint == bpe.fingerprint
    lines = d["ranks"].splitlines()
    a, b = lines[400].split()[0], lines[401].split()[0]
    changed = [
        d | {"ranks": "\n".join([*lines[:400], f"{b} 400", f"{a} 401", *lines[402:]])},
        d | {"ranks": "\n".join(lines[:-1])},
        d | {"special_tokens": d["special_tokens"] | {"<new>": 700}},
        d | {"special_tokens": d["special_tokens"] | {EOT: 700}},
        d | {"pattern": PATTERNS["gpt2"]},
        d | {"nfc": True},
    ]
    prints = {tokenizer_from_dict(c).fingerprint for c in changed} | {bpe.fingerprint}
    assert len(prints) == len(changed) + 1
    assert load_tokenizer("char", chars="ab").fingerprint != load_tokenizer("char", chars="ac").fingerprint


def test_a_stream_never_shows_half_a_character(tok):
    text = "Aï漢👩‍👩‍👧‍👦🇩🇪x É"
    for ids in (tok.encode(text), tok.encode(MIXED), tok.encode(text + EOT + text, special=True)):
        shown = []
        for n in range(len(ids) + 1):
            pieces = list(stream_text(tok, ids[:n]))
            assert "".join(pieces) == tok.decode(ids[:n]) and "" not in pieces
        for piece in stream_text(tok, iter(ids)):
            shown.append(piece)
            assert "\ufffd" not in piece
        assert "".join(shown) == tok.decode(ids)


def test_a_stream_shows_a_character_as_soon_as_it_is_whole():
    tok, taken = load_tokenizer("byte"), []
    stream = stream_text(tok, (taken.append(i) or i for i in "a漢b".encode()))
    assert [(next(stream), len(taken)) for _ in range(3)] == [("a", 1), ("漢", 4), ("b", 5)]


def test_a_stream_of_any_bytes_equals_decoding_them_at_once():
    tok, rng = load_tokenizer("byte"), random.Random(0)
    for _ in range(300):
        ids = [rng.choice([0x41, 0x80, 0xA2, 0xBF, 0xC3, 0xE6, 0xED, 0xF0, 0xFF, rng.randrange(256)]) for _ in range(8)]
        assert "".join(stream_text(tok, ids)) == bytes(ids).decode("utf-8", errors="replace")
    assert list(stream_text(tok, "漢".encode()[:2])) == ["\ufffd"]


# ------------------------------------------------------------------------------------------------ files and names


def write_ranks(path, ranks):
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for t, i in ranks.items()))
    return ranks


@pytest.mark.parametrize("pattern", ["gpt2", "newer"])
def test_a_rank_file_gives_the_ids_of_tiktoken(tmp_path, pattern):
    tokens = [bytes([b]) for b in range(255, -1, -1)]  # ids of bytes in an order of their own, as GPT-2 has
    tokens += [b"th", b"he", b"the", b" the", b"in", b" t", b"  ", b"    ", b"\n\n", b"er", b"12", b"123", b"\xe6\xbc"]
    ranks = write_ranks(tmp_path / "x.tiktoken", {t: i for i, t in enumerate(tokens)})
    # the pattern as tiktoken writes it, not as we do
    import tiktoken_ext.openai_public as public

    theirs = {"gpt2": public.r50k_pat_str, "newer": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""}
    theirs["newer"] += r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
    reference = tiktoken.Encoding("x", pat_str=theirs[pattern], mergeable_ranks=ranks, special_tokens={})
    tok = load_tokenizer(f"{tmp_path}/x.tiktoken:{pattern}")
    for text in (TEXT, MIXED, "the in 12345 there  \n\n  er", *map(random_text, range(10))):
        assert tok.encode(text) == reference.encode_ordinary(text)
    assert tok.eot_id == len(tokens)
    write_ranks(tmp_path / "shuffled.tiktoken", dict(sorted(ranks.items())))
    assert load_tokenizer(f"{tmp_path}/shuffled.tiktoken:{pattern}").fingerprint == tok.fingerprint


def test_a_rank_file_of_qwens_size_is_read_as_qwens_and_others_must_name_a_pattern(tmp_path):
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b"\xff" + n.to_bytes(3, "big"): 256 + n for n in range(151_643 - 256 - 1)} | {b"12": 151_642}
    write_ranks(tmp_path / "qwen.tiktoken", ranks)
    tok = load_tokenizer(str(tmp_path / "qwen.tiktoken"), CHAT_TOKENS)
    assert [tok.special_tokens[t] for t in (EOT, "<|im_start|>", "<|im_end|>")] == [151_643, 151_644, 151_645]
    assert tok.encode("12") == [ord("1"), ord("2")]  # digits are words of their own
    assert tok.decode(tok.encode("e\u0301")) == "\u00e9"  # and text is normalised
    write_ranks(tmp_path / "small.tiktoken", {bytes([b]): b for b in range(256)})
    for spec in ("small.tiktoken", "small.tiktoken:gtp2"):
        with pytest.raises(ValueError, match="has 256 ranks .* append one of gpt2, newer, qwen, as in small.tiktoken:"):
            load_tokenizer(f"{tmp_path}/{spec}")
    (tmp_path / "bad.tiktoken").write_text("AA== 0\nAQ==")
    with pytest.raises(ValueError, match="bad.tiktoken does not hold lines 'base64 id'"):
        load_tokenizer(f"{tmp_path}/bad.tiktoken:gpt2")


def test_a_tiktoken_name_keeps_its_ids_and_its_special_tokens(monkeypatch, bpe):
    ranks = ours.parse_ranks(bpe.to_dict()["ranks"], "x")
    special = {EOT: 1000, "<|fim|>": 1003}
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.get)
    tok = load_tokenizer("gpt2", CHAT_TOKENS)
    assert tok.encode(TEXT) == encoding.encode_ordinary(TEXT)
    assert tok.encode(MIXED + "<|fim|>x", special=True)[-2:] == [1003, *tok.encode("x")]
    assert tok.special_tokens == special | {t: 1004 + i for i, t in enumerate(CHAT_TOKENS)}
    assert tok.vocab_size == 1008 and tok.eot_id == 1000


def test_without_a_network_a_tiktoken_name_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="could not download the ranks of p50k_edit(.|\n)*set TIKTOKEN_CACHE_DIR"):
        load_tokenizer("p50k_edit")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="no tokenizer 'gtp2': take byte, char, gpt2, .*o200k_base.*bpe:FILE"):
        load_tokenizer("gtp2")


QWEN = PATTERNS["qwen"]
REGEX = ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex")  # where it stands in a tokenizer.json


@pytest.mark.parametrize("pattern", ["gpt2", PATTERNS["newer"], QWEN, r"\w+", r"\p{N}{1,2}|[a-z]+ "])
def test_a_tokenizer_json_gives_the_ids_of_its_own_package(tmp_path, pattern):
    def edit(d):
        if pattern == QWEN:  # as in Qwen's file: normalised, and special=false for some added tokens
            d["normalizer"] = {"type": "NFC"}
            d["added_tokens"][-1]["special"] = False

    import tokenizers

    path = save_hugging_face(tmp_path, pattern, edit=edit)
    tok, hf = load_tokenizer(str(path)), tokenizers.Tokenizer.from_file(str(path))
    for text in (TEXT, MIXED, "<a><b><a>x <b><first>", *map(random_text, range(10))):
        ids = tok.encode(text, special=True)
        assert ids == hf.encode(text, add_special_tokens=False).ids
        assert tok.decode(ids) == (unicodedata.normalize("NFC", text) if pattern == QWEN else text)
    hf.encode_special_tokens = True  # of transformers' split_special_tokens: those that are special are text
    for text in (MIXED, "<a><b><a>x <b><first>"):
        assert tok.encode(text) == hf.encode(text, add_special_tokens=False).ids
    added = {"<a><b>": 602} if pattern == QWEN else {}
    assert tok.added_tokens == added and tok.vocab_size == 603
    assert tok.special_tokens | added == {"<first>": 0, EOT: 600, "<a>": 601, "<a><b>": 602}
    assert 601 not in tok.encode("<a>") and tok.decode(tok.encode("<a>")) == "<a>"


def set_in(*keys, value):
    def edit(d):
        for key in keys[:-1]:
            d = d[key]
        d[keys[-1]] = value

    return edit


def of_wordpiece(d):
    """As in BERT's file: what goes on with a word is spelled with ## before it."""
    vocab = {token["content"]: i for i, token in enumerate(d["added_tokens"])}
    for token in d["added_tokens"]:
        token["id"] = vocab[token["content"]]
    for token in ("[UNK]", "a", "##b", "##a", "x"):
        vocab[token] = len(vocab)
    sizes = dict(unk_token="[UNK]", continuing_subword_prefix="##", max_input_chars_per_word=9)
    d["model"] = {"type": "WordPiece", **sizes, "vocab": vocab}
    d["pre_tokenizer"] = {"type": "Whitespace"}
    d["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": False}


# What tiktoken's core cannot express, as edits of a byte-level BPE.
OTHER_KINDS = {
    "words of WordPiece": of_wordpiece,
    "an end of words": set_in("model", "end_of_word_suffix", value="</w>"),
    "lower case": set_in("normalizer", value={"type": "Lowercase"}),
    "no words": set_in("pre_tokenizer", value=None),
    "a space before the text": set_in("pre_tokenizer", "add_prefix_space", value=True),
    "no regex": set_in("pre_tokenizer", "use_regex", value=False),
    "a token that no merge makes": lambda d: d["model"]["merges"].pop(),
    "a token that takes spaces": set_in("added_tokens", 0, "lstrip", value=True),
    "ids in another order": lambda d: d["model"]["merges"].reverse(),
    "what no pattern matches left out": set_in("pre_tokenizer", value={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": PATTERNS["newer"]}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_tokenizer_json_of_another_kind_gives_the_ids_of_its_package_too(kind, tmp_path):
    import tokenizers

    path = save_hugging_face(tmp_path, "gpt2", edit=OTHER_KINDS[kind])
    tok = load_tokenizer(str(path))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert tok.kind == "huggingface" and tok.eot == EOT
    for special in (True, False):
        theirs.encode_special_tokens = not special
        for text in (MIXED, "  <first> <a><b><a>x zzz", TEXT[:3000], random_text(0)):
            assert tok.encode(text, special) == theirs.encode(text, add_special_tokens=False).ids
    if kind == "words of WordPiece":
        assert tok.decode(tok.encode("a abba x")) == "a abba x"


def of_llama2(d):
    """As in the file of Llama 2: a space stands before every text, and what has no token becomes bytes."""
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    d["normalizer"] = {"type": "Sequence", "normalizers": steps}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    d["decoder"] = {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}


def of_gemma(d):
    """As in Gemma's: no space is added, and runs of spaces are tokens of their own, found before all else."""
    d["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    d["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    d["decoder"] = {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    d["model"]["vocab"]["▁▁"] = len(d["model"]["vocab"])
    run = {"id": d["model"]["vocab"]["▁▁"], "content": "▁▁", "special": False, "normalized": False}
    d["added_tokens"].append(run | dict(single_word=False, lstrip=False, rstrip=False))
    d["model"]["merges"].insert(0, ["▁", "▁"])


def of_mistral(d):
    """As in later ones of Mistral: words begin with the sign for a space, which the first word of a text has, too."""
    d["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    decoders = [{"type": "ByteFallback"}, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}]
    d["decoder"] = {"type": "Sequence", "decoders": decoders}


@pytest.mark.parametrize("shape", [of_llama2, of_gemma, of_mistral])
def test_tokenizers_that_fall_back_to_bytes_give_the_ids_of_their_package_and_all_text_back(shape, tmp_path):
    import tokenizers

    # 1. a BPE of characters, the sign for a space among them, whose other tokens are bytes
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trained.train_from_iterator([TEXT], trainer)
    d = json.loads(trained.to_str())
    vocab = d["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    d["pre_tokenizer"] = None
    d["post_processor"] = tokenizer_json.before_text({"<s>": 1})
    d["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    shape(d)
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))

    # 2. ours, theirs, and ours again by way of a run's files and of a Hugging Face folder
    tok = load_tokenizer(str(tmp_path / "tokenizer.json"), CHAT_TOKENS)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.no_truncation()
    again = tokenizer_from_dict(json.loads(json.dumps(tok.to_dict())))
    written = tokenizers.Tokenizer.from_str(json.dumps(tok.to_hf([tok.eot_id])["tokenizer.json"]))
    assert tok.eot == "<s>" and tok.special_tokens["<|im_start|>"] == len(vocab)
    ends = [tok.special_tokens[token] for token in ("<s>", "</s>", "<|im_end|>")]
    assert tok.to_hf()["generation_config.json"]["eos_token_id"] == ends and tok.stop_ids == set(ends)
    for text in (TEXT, MIXED.strip(), "a  b", "x\n\n   y <unk>", random_text(1).strip()):
        theirs.encode_special_tokens = True
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert tok.encode(text) == again.encode(text) == ids
        assert tok.decode(ids) == "".join(stream_text(tok, ids)) == text
        adds_space = shape is not of_gemma
        assert tok.token_bytes()[ids].sum() == len(text.encode()) + adds_space
    theirs.encode_special_tokens = False
    for text in ("a</s> b</s></s>\nc", "<s>"):
        assert tok.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids
    chat = "<|im_start|>user\nHi  there<|im_end|>\n<think>"
    assert written.encode(chat).ids == [1, *tok.encode(chat, special=True)]
    assert again.fingerprint == tok.fingerprint


def test_without_its_package_only_what_tiktoken_cannot_express_is_refused_and_says_what_to_install(
    tmp_path, monkeypatch
):
    other = save_hugging_face(tmp_path, "gpt2", edit=OTHER_KINDS["lower case"], name="other.json")
    path = save_hugging_face(tmp_path, "gpt2")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer(str(path)).kind == "bpe"
    with pytest.raises(ValueError, match="^other.json is more than tiktoken's core .*: pip install tokenizers$"):
        load_tokenizer(str(other))


def test_what_the_package_cannot_read_is_one_error(tmp_path):
    path = save_hugging_face(tmp_path, "gpt2", edit=set_in("normalizer", value={"type": "Upside"}))
    with pytest.raises(ValueError, match="tokenizer.json: the package tokenizers cannot read it: data did not match"):
        load_tokenizer(str(path))
    path = save_hugging_face(tmp_path, "gpt2", edit=set_in("model", "dropout", value=0.1))
    with pytest.raises(ValueError, match="leaves out merges at random"):
        load_tokenizer(str(path))
    path = save_hugging_face(tmp_path, "gpt2", edit=OTHER_KINDS["lower case"])
    d = load_tokenizer(str(path)).to_dict()
    d["file"] = d["file"].replace('"Z":', '"Z":4000000000,"ZZ":')
    with pytest.raises(ValueError, match="its largest id is 4000000000, and no more than 16777216 is read"):
        tokenizer_from_dict(d)


# What others add to byte-level BPE: (spelling, whether it is special, whether it is looked for in normalised text).
ADDED = {
    "runs of spaces of GPT-NeoX, Pythia and OLMo": [(" " * n, False, True) for n in range(24, 1, -1)],
    "words of a fine-tuned GPT-2": [("<gene>", False, True), ("COVID-19", False, True), ("\u00e9t\u00e9", False, True)],
    "thoughts of Qwen3": [("<think>", False, False), ("<|im_end|>", True, False), ("<|im_end|> ", False, False)],
    "a word that merges make": [("self", False, False)],
    "letters, which are bytes too": [("b", False, False), ("x", False, True)],
    "letters that NFC composes": [("e\u0301te\u0301", False, True)],
}


@pytest.mark.parametrize("nfc", [False, True])
@pytest.mark.parametrize("what", ADDED)
def test_added_tokens_that_are_not_special_are_found_in_every_text_as_by_their_own_package(what, nfc, tmp_path):
    import tokenizers

    def edit(d):
        if nfc:
            d["normalizer"] = {"type": "NFC"}

    path = save_hugging_face(tmp_path, "gpt2", added=[EOT], edit=edit)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    for content, special, normalized in ADDED[what]:
        theirs.add_tokens([tokenizers.AddedToken(content, special=special, normalized=normalized)])
    theirs.save(str(path))
    tok = load_tokenizer(str(path))
    again = tokenizers.Tokenizer.from_str(json.dumps(tok.to_hf()["tokenizer.json"]))
    theirs.encode_special_tokens = True
    again.encode_special_tokens = True
    samples = [
        "if x:\n        return 1",
        "a  b",
        "a   COVID-19 <gene>A",
        "e\u0301te\u0301  \u00e9t\u00e9",
        "<think>\nhm",
    ]
    for text in (*samples, "x<|im_end|> <|im_end|>y", f"a{EOT} b", TEXT, MIXED):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert tok.encode(text) == again.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer_from_dict(json.loads(json.dumps(tok.to_dict()))).encode(text) == ids
        if not nfc:
            assert tok.decode(ids) == text and tok.token_bytes()[ids].sum() == len(text.encode())


def test_digits_that_are_words_of_their_own_are_cut_as_by_the_package(tmp_path):
    import tokenizers

    def edit(d):
        steps = [{"type": "Digits", "individual_digits": True}, d["pre_tokenizer"]]
        d["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}

    path = save_hugging_face(tmp_path, "gpt2", edit=edit)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    tok = load_tokenizer(str(path))
    for text in (TEXT, MIXED, "a  12   b3 \u00bd\u0663 '5s it's 1 \n 2\n\n3", *map(random_text, range(10))):
        assert tok.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "tokens, config, begin, prefix",
    [
        ([EOT, "<s>"], dict(bos_token="<s>"), EOT, []),
        (["<s>", "</s>"], dict(bos_token="<s>", eos_token="</s>"), "</s>", []),
        (["<s>", "</s>"], dict(bos_token="<s>", eos_token="</s>", add_bos_token=True), "<s>", []),
        (["<eos>", "<start>", "<|im_end|>"], dict(bos_token="<start>", eos_token="<|im_end|>"), "<eos>", []),
        (["<start>", "<|im_end|>"], dict(bos_token="<start>", eos_token="<|im_end|>"), "<start>", []),
        (["<done>", "<start>"], dict(bos_token="<start>", eos_token="<done>"), "<done>", []),
        (["<s>", "</s>"], dict(eos_token={"content": "</s>", "__type": "AddedToken"}), "</s>", []),
        (["<s>", "</s>"], dict(bos_token="<s>", add_bos_token=True), "<s>", []),
        (["<s>", "</s>"], dict(bos_token="</s>", add_bos_token=False), "<s>", [600]),
    ],
)
def test_a_document_begins_with_a_token_of_the_folder_and_a_prompt_with_what_transformers_puts_there(
    tokens, config, begin, prefix, tmp_path
):
    from transformers import AutoTokenizer

    def edit(d):
        if prefix:
            d["post_processor"] = tokenizer_json.before_text({"<s>": 600})

    path = save_hugging_face(tmp_path, "gpt2", added=tokens, edit=edit)
    config = dict(tokenizer_class="PreTrainedTokenizerFast") | config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = load_tokenizer(str(path))
    assert tok.eot_id == tok.special_tokens[begin] and tok.vocab_size == 600 + len(tokens)  # none was added
    assert tokenizer_json.begin_ids(path, tok) == prefix
    assert AutoTokenizer.from_pretrained(tmp_path)("a").input_ids == prefix + tok.encode("a")
    files = tok.to_hf(prefix)
    assert files["generation_config.json"]["bos_token_id"] == tok.eot_id
    assert files["tokenizer_config.json"]["eos_token"] == begin


@pytest.mark.parametrize(
    "name, config, begin",
    [
        ("config.json", dict(bos_token_id=600, eos_token_id=601), "<end>"),
        ("generation_config.json", dict(eos_token_id=[9, 602, 601]), "<end>"),  # no token, the end of a turn, the end
        ("config.json", dict(bos_token_id=600, eos_token_id=None), "<begin>"),
        ("config.json", dict(eos_token_id=602), EOT),  # which is added
        ("config.json", dict(eos_token_id={"a": 1}), EOT),
    ],
)
def test_a_document_begins_with_the_end_token_of_the_model_where_the_tokenizer_names_none(
    name, config, begin, tmp_path
):
    path = save_hugging_face(tmp_path, "gpt2", added=["<begin>", "<end>", "<|im_end|>"])
    (tmp_path / name).write_text(json.dumps(config))
    tok = load_tokenizer(str(path))
    assert tok.eot == begin and tok.vocab_size == (604 if begin == EOT else 603)


def test_documents_of_qwen3_begin_with_endoftext_and_a_second_turn_sees_the_first(tmp_path):
    import torch

    import model_baseline

    # Qwen3's file and its tokenizer_config.json in small: a turn's end is what that calls eos_token.
    tokens = [EOT, "<|im_start|>", "<|im_end|>"]
    path = save_hugging_face(tmp_path, QWEN, added=tokens, edit=set_in("normalizer", value={"type": "NFC"}))
    config = dict(bos_token=None, eos_token="<|im_end|>", pad_token=EOT, add_bos_token=False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = load_tokenizer(str(path))
    assert tok.eot == EOT and tok.stop_ids == {600, 602}
    assert tok.to_hf()["generation_config.json"]["eos_token_id"] == [600, 602]

    torch.manual_seed(0)
    sizes = model_baseline.TINY | dict(vocab_size=tok.vocab_size, block_size=128, eot_id=tok.eot_id)
    model = model_baseline.GPT(model_baseline.GPTConfig(**sizes)).eval()
    turns = [tok.encode(f"<|im_start|>{word}<|im_end|>\n<|im_start|>x", special=True) for word in ("a", "b")]
    a, b = model(torch.tensor([[tok.eot_id, *ids] for ids in turns]), last_only=True).flatten(1)
    assert not torch.equal(a, b)


def test_the_token_that_begins_a_document_can_be_named(tmp_path):
    path = save_hugging_face(tmp_path, "gpt2", added=[EOT, "<s>"])
    assert load_tokenizer(str(path), eot="<s>").eot_id == 601
    assert load_tokenizer("byte", ["<s>"], eot="<s>").special_tokens == {"<s>": 256}
    with pytest.raises(ValueError, match="has no token '<end>', which is to begin its documents"):
        load_tokenizer(str(path), eot="<end>")


def test_without_a_token_to_begin_documents_with_one_is_added(tmp_path):
    path = save_hugging_face(tmp_path, "gpt2", added=["<a>"])
    assert load_tokenizer(str(path)).special_tokens == {"<first>": 0, "<a>": 600, EOT: 601}


MALFORMED = {  # where a tokenizer.json is wrong, what stands there, and what is said
    ("added_tokens",): ({}, "added_tokens is '{}' and must be a list"),
    ("added_tokens", 1): ("x", r"added_tokens\[1\] is 'x' and must be an object"),
    ("added_tokens", 1, "content"): (None, r"added_tokens\[1\] has no content"),
    ("added_tokens", 1, "id"): (10**9, r"added_tokens\[1\]: id is '1000000000' and must be a whole number from 0 to"),
    ("added_tokens", 1, "special"): ("no", r"added_tokens\[1\]: special is 'no' and must be true or false"),
    ("model",): (None, "has no model"),
    ("model", "type"): (5, "model: type is '5' and must be a text"),
    ("model", "vocab"): ([], r"model: vocab is '\[\]' and must be an object"),
    ("model", "vocab", "a"): (-1, "model: vocab: a is '-1' and must be a whole number"),
    ("model", "merges"): ({}, "model: merges is '{}' and must be a list"),
    ("model", "merges", 3): (["a", 5], r"model: merges\[3\]\[1\] is '5' and must be a text"),
    ("normalizer",): ("NFC", "normalizer is 'NFC' and must be an object"),
    ("pre_tokenizer", "use_regex"): (1, "pre_tokenizer: use_regex is '1' and must be true or false"),
    ("pre_tokenizer", "pretokenizers"): ([5], r"pre_tokenizer: pretokenizers\[0\] is '5' and must be an object"),
    ("post_processor",): ({"single": [{"SpecialToken": {"id": "<s>"}}]}, "post_processor: special_tokens has no '<s>'"),
}


@pytest.mark.parametrize("keys", MALFORMED)
def test_a_malformed_tokenizer_json_is_refused_with_its_file_and_its_key(keys, tmp_path):
    value, words = MALFORMED[keys]
    path = save_hugging_face(tmp_path, "gpt2", edit=set_in(*keys, value=value))
    with pytest.raises(ValueError, match=f"tokenizer.json:? {words}"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("text", ["[1]", "5", "null", '"kind"', "[" * 100_000])
def test_a_tokenizers_file_that_holds_no_object_is_refused_by_its_name(text, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}( is |: not JSON)"):
            load_tokenizer(str(tmp_path / "tokenizer.json"))
        save_hugging_face(tmp_path, "gpt2")


def test_a_byte_order_mark_before_a_tokenizers_files_is_no_part_of_them(tmp_path):
    path = save_hugging_face(tmp_path, "gpt2", added=["<s>", "<a>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    expected = load_tokenizer(str(path)).to_dict()
    for file in tmp_path.iterdir():
        file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert load_tokenizer(str(path)).to_dict() == expected and expected["eot"] == "<s>"


def test_a_malformed_tokenizer_of_ours_is_refused_by_what_is_wrong(bpe):
    d = bpe.to_dict()
    for change, words in (
        (dict(kind="unigram"), "kind is 'unigram', and must be byte or char"),
        (dict(kind=["bpe"]), r"kind is \"\['bpe'\]\" and must be a text"),
        (dict(ranks=5), "ranks is '5' and must be a text"),
        (dict(nfc="no"), "nfc is 'no' and must be true or false"),
        (dict(special_tokens={EOT: "1"}), "special_tokens: .* is '1' and must be a whole number"),
        (dict(eot="<s>"), "bpe has no token '<s>', which is to begin its documents"),
        (dict(chars="ab"), "has chars, which no bpe tokenizer has"),
    ):
        with pytest.raises(ValueError, match=words):
            tokenizer_from_dict(d | change)
    del d["pattern"]
    with pytest.raises(ValueError, match="x.json has no pattern"):
        tokenizer_from_dict(d, "x.json")


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("(", "its regex .* is none .Parsing error"),
        ("a{9}" * 600, "its regex has 4816 characters: no more than 4096"),
        (r"(?:a{1000}){1000}", "its regex .* is none"),
        (r"(?:(?=a)a|(?=a)a)*b|[\s\S]", "tiktoken's engine gave up at 'aaa.*BacktrackLimitExceeded"),
        (r"(?:(?=a)a)*(?:(?=a)a)*b|[\s\S]", "its regex takes .* s for 'a' [0-9]{3} times: it is not read"),
        (r"(?=a)|\w", "tiktoken's engine gave up at"),
    ],
)
def test_a_foreign_regex_that_is_none_or_takes_for_ever_or_panics_is_one_error(pattern, words, tmp_path):
    path = save_hugging_face(tmp_path, PATTERNS["newer"], edit=set_in(*REGEX, value=pattern))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=words):
        load_tokenizer(str(path))
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("name", ["gpt2", "newer", "qwen", "r50k_base", "cl100k_base", "o200k_base"])
def test_a_written_tokenizer_json_gives_the_ids_of_tiktoken_for_any_ranks(name, monkeypatch):
    import tiktoken_ext.openai_public as public
    import tokenizers

    # 1. ranks of all texts of up to 3 signs that words begin or end with, in random order: not those of any training.
    #    No merges make bSbS, which is a token where it is a whole word.
    signs = " \n\r1a'"
    texts = ["".join(text) for n in (2, 3) for text in itertools.product(signs, repeat=n)] + ["1111", "aaaa", "bSbS"]
    random.Random(0).shuffle(texts)
    ranks = {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + [text.encode() for text in texts])}

    # 2. the pattern as tiktoken writes it
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: ranks)
    pattern = PATTERNS[name] if name in PATTERNS else getattr(public, name)()["pat_str"]

    tok = Tokenizer("bpe", name, {}, [EOT], ranks=ours.format_ranks(ranks), pattern=pattern, nfc=False)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tok.to_hf()["tokenizer.json"]))
    for seed in range(300):
        text = "bSbS " + "".join(random.Random(seed).choices(signs + " bS\té", k=30))
        assert theirs.encode(text, add_special_tokens=False).ids == tok.encode(text)


def test_a_sentencepiece_model_gives_its_own_ids(sentencepiece_model):
    from sentencepiece import SentencePieceProcessor

    tok, sp = load_tokenizer(str(sentencepiece_model), ["<think>"]), SentencePieceProcessor(str(sentencepiece_model))
    for text in (TEXT, MIXED, "</s> is text", *map(random_text, range(5))):
        assert tok.encode(text) == sp.encode(text)
        assert tok.decode(sp.encode(text)) == text
    assert tok.special_tokens == {"<s>": 1, "</s>": 2, "<think>": 700} and tok.eot_id == 1
    assert tok.encode("a</s>b", special=True) == [*sp.encode("a"), 2, *sp.encode("b")]


def test_a_model_file_that_sentencepiece_cannot_read_is_an_error_that_says_so(tmp_path):
    write_ranks(tmp_path / "tokenizer.model", {bytes([b]): b for b in range(256)})
    with pytest.raises(ValueError, match="not a sentencepiece model .* must be named x.tiktoken"):
        load_tokenizer(str(tmp_path / "tokenizer.model"))


# ------------------------------------------------------------------------------------------------ training


def naive_words(text, pattern, special):
    for token in sorted(special, key=len, reverse=True):
        text = text.replace(token, "\ue000")  # a private character, which no text here holds, stands for any of them
    return [list(word.encode()) for part in text.split("\ue000") for word in regex.findall(PATTERNS[pattern], part)]


def merge(word, pair, new):
    out = []
    for i in word:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out


def naive_merges(words, n):
    """Recount every pair of the whole text before each merge."""
    words, tokens, merges = list(words), [bytes([b]) for b in range(256)], []
    for new in range(256, 256 + n):
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [merge(word, pair, new) for word in words]
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return merges


CORPORA = {
    "text": TEXT[:4000],
    "repeats": "aaaaaaaaaaa aaaa aaabaaa abababab\n" * 3 + "aaaaaaa",
    "ties": "zy xw vu ts rq po nm lk ji hg fe dc ba ab cd",
    "special": f"low<s>er{EOT}lower{EOT}{EOT}est<s><s>x lower\n{EOT} new lowest<s>>est" * 3,
    "mixed": MIXED * 2 + random_text(7, 400),
}


@pytest.mark.parametrize("pattern", ["gpt2", "newer"])
@pytest.mark.parametrize("corpus", CORPORA)
def test_the_trainer_finds_exactly_the_merges_of_a_naive_one(tmp_path, corpus, pattern):
    special = (EOT, "<s>", "<s>>")
    (tmp_path / "x.txt").write_text(CORPORA[corpus], encoding="utf-8", newline="")
    expected = naive_merges(naive_words(CORPORA[corpus], pattern, special), 250)
    words = count_words([tmp_path / "x.txt"], pattern, special)
    assert merge_words(words, 250) == expected and len(expected) > 10
    assert merge_words(dict(sorted(words.items())), 250) == expected  # whatever the order of the words
    tok = train_bpe([tmp_path / "x.txt"], 256 + len(expected) + 3, pattern, special)
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in expected]
    assert [tok.decode_bytes([i]) for i in range(len(tokens))] == tokens
    assert tok.special_tokens == {t: len(tokens) + i for i, t in enumerate(special)}


@pytest.mark.parametrize("pattern", ["gpt2", "newer"])
def test_a_trained_tokenizer_encodes_as_its_merges_say(folder, pattern):
    words = count_words([folder / "text.txt"], pattern)
    merges, tok = merge_words(words, 343), train_bpe([folder / "text.txt"], 600, pattern)
    ids = {bytes([b]): b for b in range(256)} | {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    for text in (MIXED, TEXT[:5000], random_text(3), "aaaaaaa abababa    \n\n   x"):
        expected = []
        for word in naive_words(text, pattern, []):
            for a, b in merges:
                word = merge(word, (ids[a], ids[b]), ids[a + b])
            expected += word
        assert tok.encode(text) == expected


def test_where_a_file_is_cut_into_chunks_changes_no_count(tmp_path):
    text = (TEXT[:6000] + MIXED + "It's 12.\r\n \n12 3\n  x don't\n\n\n 'll  " + random_text(5)) * 3
    (tmp_path / "x.txt").write_text(text, encoding="utf-8", newline="")
    for pattern, rule in PATTERNS.items():
        expected = Counter(regex.findall(rule, text))
        for size in (1, 7, 100, 10_000):
            chunks = list(trainer.chunks(tmp_path / "x.txt", size=size))
            assert "".join(chunks) == text and len(chunks) > 1
            assert Counter(word for chunk in chunks for word in regex.findall(rule, chunk)) == expected, pattern


def test_text_jsonl_and_gzip_files_give_the_same_words(tmp_path):
    documents = [TEXT[:300], "zwei\nnaïve Dokumente ", " drei" + EOT + "vier"]
    expected = Counter()
    for i, text in enumerate(documents):
        (tmp_path / f"{i}.py").write_text(text, encoding="utf-8")
        expected += Counter(bytes(word).decode() for word in naive_words(text, "newer", [EOT]))
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents)
    (tmp_path / "x.jsonl").write_text(lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for files in ([tmp_path / f"{i}.py" for i in range(3)], [tmp_path / "x.jsonl"], [tmp_path / "x.jsonl.gz"]):
        assert count_words(files, "newer") == expected
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    assert count_words([tmp_path / "x.txt.gz"], "gpt2") == Counter(
        bytes(word).decode() for word in naive_words(TEXT, "gpt2", [EOT])
    )


def test_of_pages_and_tables_the_text_is_trained_on(tmp_path):
    (tmp_path / "a.html").write_text("<p>one &amp; two</p><script>no()</script>")
    (tmp_path / "b.csv").write_text('id,body\n1,"one, two"\n2,three\n')
    (tmp_path / "c.tsv").write_text("body\tid\nfour\t1\n")
    expected = Counter(["one", " &", " two", "one", ",", " two", "three", "four"])
    files = [tmp_path / name for name in ("a.html", "b.csv", "c.tsv")]
    assert count_words(files, "newer", field="body") == expected
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["five six", "seven"]}), tmp_path / "d.parquet")
    assert count_words([tmp_path / "d.parquet"], "gpt2", field="body") == Counter(["five", " six", "seven"])


def train_here(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["tokenizers.py", "train", *map(str, args), "--workers", "1"])
    ours.main()


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_the_beginning_of_a_named_set_that_never_ends_is_trained_on(tmp_path, monkeypatch, kind):
    given = []

    def load_dataset(path, **arguments):
        assert path == "roneneldan/TinyStories" and arguments["streaming"]
        for i in itertools.count():
            given.append({"text": f"{TEXT[i % 1000 : i % 1000 + 1000]} story {i}"})
            yield given[-1]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(trainer, "SAMPLE", 100_000)
    named = tmp_path / ("named.json" if kind == "bpe" else "named.model")
    train_here(monkeypatch, "tinystories", "--kind", kind, "--vocab_size", 400, "--out", named)
    assert 90 < len(given) < 110  # 100,000 characters of 1,000 each
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given[:-2]))
    same = tmp_path / ("same" + named.suffix)
    train_here(monkeypatch, tmp_path / "x.jsonl", "--kind", kind, "--vocab_size", 400, "--out", same)
    spec = "bpe:{}" if kind == "bpe" else "{}"
    a, b = (load_tokenizer(spec.format(path)) for path in (named, same))
    assert a.decode(a.encode(TEXT)) == TEXT
    assert len(a.encode(TEXT)) == pytest.approx(len(b.encode(TEXT)), rel=0.05)


def test_a_folder_is_trained_on_and_a_set_that_is_no_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "a.md").write_text("one two " * 50)
    (tmp_path / "texts" / "more" / "b.jsonl").write_text(json.dumps({"text": "three four " * 50}) + "\n")
    (tmp_path / "texts" / "c.png").write_bytes(b"\x89PNG")
    train_here(monkeypatch, tmp_path / "texts", "--vocab_size", 270, "--out", tmp_path / "x.json")
    tok = load_tokenizer(f"bpe:{tmp_path / 'x.json'}")
    assert len(tok.encode("one two three four")) < 8
    with pytest.raises(SystemExit, match="mqar is no text"):
        train_here(monkeypatch, "mqar", "--out", tmp_path / "y.json")
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "one"}]))  # its keys and brackets would be trained on
    with pytest.raises(SystemExit, match="rows.json: can read .txt, .*: call it .txt if it is plain text"):
        train_here(monkeypatch, tmp_path / "rows.json", "--out", tmp_path / "y.json")


def test_sentencepiece_is_not_trained_on_the_marks_between_documents():
    assert list(sp_model.lines([f"one\n{EOT}\ntwo{EOT}three"])) == ["one", "two", "three"]


def run_train(*args):
    command = [sys.executable, str(ROOT / "data/tokenizers.py"), "train", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_command_writes_the_same_file_again_whatever_the_workers(tmp_path, folder):
    written = []
    for i, workers in enumerate((1, 2)):
        out = tmp_path / str(i) / "bpe.json"
        files = [folder / "text.txt", ROOT / "tests/test_tokenizers.py", folder / "text.txt"]
        done = run_train(*files, "--vocab_size", 500, "--special_tokens", "<s>", "--workers", workers, "--out", out)
        assert done.returncode == 0, done.stderr
        assert f"500 tokens in {out}: use it as bpe:{out}" in done.stdout
        written.append(out.read_bytes())
    assert written[0] == written[1]
    tok = load_tokenizer(f"bpe:{out}", CHAT_TOKENS)
    assert tok.to_dict() == train_bpe(files, 500, special_tokens=["<s>"]).to_dict() | {
        "special_tokens": {EOT: 498, "<s>": 499} | {t: 500 + i for i, t in enumerate(CHAT_TOKENS)}
    }
    out.write_bytes(written[0][:-100])
    with pytest.raises(ValueError, match="bpe.json: not JSON: Unterminated string"):
        load_tokenizer(f"bpe:{out}")


@pytest.mark.parametrize("model_type, size", [("bpe", 400), ("unigram", 400), ("char", 330), ("word", 400)])
def test_sentencepiece_is_trained_to_exactly_the_vocabulary_asked_for_and_loses_no_text(
    tmp_path, folder, model_type, size
):
    out = tmp_path / "x.model"
    names = ["--user_symbols", "<sep>", "+", "--special_tokens", "<|im_end|>"]
    command = [folder / "text.txt", "--kind", "sentencepiece", "--model_type", model_type, "--vocab_size", size, *names]
    done = run_train(*command, "--workers", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    tok = load_tokenizer(str(out))
    tokens = [line.split("\t")[0] for line in (tmp_path / "x.vocab").read_text(encoding="utf-8").splitlines()]
    assert tok.vocab_size == len(tokens) == size
    assert tokens[:6] == ["<pad>", "<unk>", "<s>", "</s>", "<|im_end|>", "<sep>"]
    assert tok.eot == "<s>" and tok.stop_ids == {2, 3, 4}
    if model_type == "word":  # which loses the spaces before unknown words
        assert tok.decode(tok.encode("unknown")) == "unknown"
        return
    assert [tok.decode([i]) for i in tok.encode("x1234<sep>+")[-6:]] == [*"1234", "<sep>", "+"]
    for text in (TEXT, MIXED, "  a\n\n  b ", "", random_text(2).replace("\u2581", "")):
        assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--vocab_size", "270"], "cannot train 270 tokens of this text: Vocabulary size is smaller"),
        (["--vocab_size", "9000", "--model_type", "char"], "tokens are all this text has: take a vocabulary of"),
        (["--out", "x.json"], "--out=x.json: a sentencepiece tokenizer is known by its ending: try x.model"),
        (["--pattern", "gpt2"], "--pattern means nothing to --kind sentencepiece: leave it out"),
        (["--kind", "bpe", "--model_type", "char"], "--model_type means nothing to --kind bpe: leave it out"),
    ],
)
def test_sentencepiece_that_cannot_be_trained_so_is_an_error_that_says_why(tmp_path, folder, options, message):
    out = tmp_path / "x.model"
    done = run_train(folder / "text.txt", "--kind", "sentencepiece", "--out", out, "--workers", 1, *options)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr and not out.exists()


@pytest.mark.parametrize(
    "content, options, message",
    [
        (b"abc abc", ["--vocab_size", "400"], "3 merges are all this text has: take a vocabulary of 260, or more text"),
        (b"abc", ["--vocab_size", "256"], "vocab_size=256 must be more than 256 bytes + 1 special tokens"),
        (b"a\xff", [], "x.txt: not UTF-8 text: byte 0xff at offset 1"),
        (b"abc", ["--special_tokens", "a b"], "must not be empty or have spaces inside: ['a b']"),
        (b"abc", ["--vocab_size", "-1"], "--vocab_size -1: give a number from 1"),
        (b"abc", ["--workers", "0"], "--workers 0: give a number from 1"),
        (None, [], "x.txt: there is no such file, and no set of this name"),
    ],
)
def test_bad_input_to_training_is_an_error_that_says_what_to_do(tmp_path, content, options, message):
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    done = run_train(tmp_path / "x.txt", "--workers", 1, "--out", tmp_path / "out.json", *options)
    assert done.returncode and "Traceback" not in done.stderr and not (tmp_path / "out.json").exists()
    pattern = message if ".*" in message else regex.escape(message)
    assert regex.search(pattern, done.stderr), done.stderr


def test_prepared_data_gives_its_tokenizer_to_other_data(tmp_path):
    ours = load_tokenizer("byte", ["<|x|>"])
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": ours.to_dict(), "vocab_size": 258, "eot_id": 256}))
    assert load_tokenizer(str(tmp_path / "meta.json")).fingerprint == ours.fingerprint
    (tmp_path / "meta.json").write_text('{"tokenizer": null, "vocab_size": 258, "eot_id": 256}')
    with pytest.raises(ValueError, match="meta.json is of data without a tokenizer"):
        load_tokenizer(str(tmp_path / "meta.json"))
