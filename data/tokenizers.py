"""Tokenizers: text to ids and back. They are loaded by name or from a file, or trained here.

    tok = load_tokenizer("gpt2")  # or "byte", "char", PATH/tokenizer.json, PATH/x.tiktoken, PATH/x.model, "bpe:FILE"
    ids = tok.encode("Hello<|endoftext|>")  # plain text stays plain text, whatever it spells
    ids = tok.encode("Hello<|endoftext|>", special=True)  # a special token becomes its one id
    tok.eot_id  # begins each document: that of <|endoftext|>, or of a foreign tokenizer's token for it, like <s>
    python data/tokenizers.py train FILES... --vocab_size 8192 --out bpe.json  # then load_tokenizer("bpe:bpe.json")
    python data/tokenizers.py train FILES... --kind sentencepiece --out x.model  # data/sentencepiece_model.py
    python data/tokenizers.py train tinystories fineweb --out bpe.json  # named sets, of which the beginning is read

BPE, as in GPT-2: a regex cuts text into words, a word begins as its bytes, and the adjacent pair that makes the token
of lowest rank is merged, again and again. A token's id is its rank, and tiktoken's core does the work;
data/bpe_training.py is the training. decode(encode(text)) == text, except for tokenizers that normalise by design:
Qwen's (Unicode NFC) and most sentencepiece models. A foreign tokenizer.json of another kind is run by its own package.
"""

import argparse
import base64
import codecs
import hashlib
import json
import os
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

if __name__ == "__main__":  # this folder on the path would shadow the installed package `tokenizers`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import regex

from data import sentencepiece_model, sources, tokenizer_json, tokenizer_package
from data.bpe import END_OF_TEXT, EOT, PATTERNS, TURN_ENDS, alternatives, format_ranks, parse_ranks
from data.bpe_training import chunks, chunks_of_text, count_words, merge_words, write_sample
from data.text import print_any_text, read_text

MAX_PATTERN = 4096  # characters; those that are known have up to 600


class Tokenizer:
    """Attributes: name, vocab_size (largest id + 1), special_tokens and added_tokens (spelling to id), eot and eot_id
    (the token that begins a document), stop_ids (it, and those that end a text, like </s>, or a turn, like <|im_end|>).

    A special token is one only where it is asked for; an added one, like the runs of spaces of GPT-NeoX and <think> of
    Qwen3, is found in every text.
    """

    # kind and its data: "byte"; "char": chars; "sentencepiece": model (base64); "huggingface": file (a tokenizer.json);
    # "bpe": ranks (lines "base64 id", as in a .tiktoken file), pattern, nfc (normalise first)
    # and in all: added and added_normalized (spelling to id; the latter found behind nfc), eot (begins a document)
    def __init__(self, kind: str, name: str, special_tokens: dict[str, int], add_tokens: Iterable[str] = (), **data):
        self.kind = kind
        self.name = name
        self.special_tokens = dict(special_tokens)
        normalized = data.get("added_normalized", {})
        self.added_tokens = data.get("added", {}) | normalized
        self._normalized_tokens = normalized  # as they look in normalized text
        if data.get("nfc"):
            self._normalized_tokens = {unicodedata.normalize("NFC", token): i for token, i in normalized.items()}
        self._data = data
        self._adds_space = False
        if kind == "byte":
            pieces = {i: bytes([i]) for i in range(256)}
        elif kind == "char":
            pieces = {i: c.encode() for i, c in enumerate(data["chars"])}
            self._char_ids = {c: i for i, c in enumerate(data["chars"])}
        elif kind == "bpe":
            ranks = parse_ranks(data["ranks"], name)
            pieces = {i: token for token, i in ranks.items()}
            self._core = _tiktoken_core(name, data["pattern"], ranks)
        elif kind == "huggingface":
            self._core = tokenizer_package.load(data["file"], name)
            pieces = tokenizer_package.pieces(self._core, data["file"], self.added_tokens, name)
            first = tokenizer_package.encode(self._core, "a", False, name)[:1]
            self._adds_space = any(pieces.get(i, b"").startswith(b" ") for i in first)
        else:
            self._core = sentencepiece_model.load(base64.b64decode(data["model"]))
            pieces = sentencepiece_model.pieces(self._core)
            self._adds_space = self._core.encode("a", out_type=str)[0].startswith("\u2581")

        # The ids of added tokens; a new one takes the next that is free.
        tokens = self.special_tokens | self.added_tokens
        for token in add_tokens:
            if token not in tokens:
                tokens[token] = max([*pieces, *tokens.values()]) + 1
                self.special_tokens[token] = tokens[token]
        if kind == "huggingface":  # its tokens stand in its vocabulary, too
            tokenizer_package.add(self._core, tokens, name)
            pieces = {i: pieces[i] for i in pieces.keys() - self.special_tokens.values()}
        self._bytes = dict(pieces)
        for token, i in tokens.items():
            if token in self.added_tokens and (kind == "huggingface" or pieces.get(i) == token.encode()):
                continue  # it is in the vocabulary, too
            if not token:
                raise ValueError(f"{name}: special token '' can't be had: it is empty")
            if i in self._bytes:
                raise ValueError(
                    f"{name}: special token {token!r} can't be had: its id {i} is that of {self._bytes[i]!r}"
                )
            self._bytes[i] = token.encode()
        self._special_ids = set(self.special_tokens.values())
        self._regex = _regex_of(tokens.keys() - normalized.keys())
        self._normalized_regex = _regex_of(self._normalized_tokens)
        self.vocab_size = max(self._bytes) + 1
        eot = data.get("eot", EOT)
        if eot not in tokens:
            raise ValueError(f"{name} has no token {eot!r}, which is to begin its documents")
        self.eot = eot
        self.eot_id = tokens[eot]
        self.stop_ids = {tokens[token] for token in (eot, *END_OF_TEXT, *TURN_ENDS) if token in tokens}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text. With special=True the spelling of a special token becomes its id, the longest one first."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            why = f"the lone surrogate {text[e.start]!r} at character {e.start} is no valid Unicode"
            raise ValueError(f"{why}: it is of bytes that are not UTF-8, or half of a pair: leave it out") from None
        if self.kind == "huggingface":
            return tokenizer_package.encode(self._core, text, special, self.name)
        tokens = dict(self.added_tokens)
        if special:
            tokens |= self.special_tokens
        return _encode_around(self._regex, tokens, text, self._encode)

    def _encode(self, text):
        if self.kind == "byte":
            return list(text.encode())
        if self.kind == "char":
            if unknown := set(text) - self._char_ids.keys():
                why = f"{min(unknown)!r} is not among the {len(self._char_ids)} characters of this tokenizer"
                raise ValueError(f"{why}: build it from a text that has it, or take another tokenizer")
            return [self._char_ids[c] for c in text]
        if self.kind == "bpe":
            if self._data["nfc"]:
                text = unicodedata.normalize("NFC", text)
            return _encode_around(self._normalized_regex, self._normalized_tokens, text, self._encode_words)
        return self._core.encode(text)

    def _encode_words(self, text):
        try:
            return [i for part in _cut_long_spaces(text) for i in self._core.encode_ordinary(part)]
        except BaseException as e:  # tiktoken's engine panics with what is no Exception
            if type(e).__name__ != "PanicException":
                raise
            start = text[:40]
            raise ValueError(
                f"{self.name}: tiktoken's engine gave up at {start!r} ({e}): take another tokenizer"
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._spell(ids))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_batch(self, texts: Iterable[str], special: bool = False) -> list[list[int]]:
        return [self.encode(text, special) for text in texts]

    def decode_batch(self, batch: Iterable[Iterable[int]]) -> list[str]:
        return [self.decode(ids) for ids in batch]

    def _spell(self, ids):
        start = True
        for i in map(int, ids):
            if i not in self._bytes:
                raise ValueError(f"id {i} stands for nothing in {self.name}, whose vocab_size is {self.vocab_size}")
            piece = self._bytes[i]
            # sentencepiece puts a space before each plain text; it was not there
            yield piece.removeprefix(b" ") if self._adds_space and start else piece
            start = i in self._special_ids

    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): bytes of text that each id stands for, 0 for special tokens and unused ids.

        Above 0 for one such as [UNK], although it is special: text stands behind it, if not that of its spelling.
        """
        plain = self._bytes.keys() - self._special_ids
        if self.kind == "huggingface":
            plain |= tokenizer_package.unknown_ids(self._core, self._data["file"]) - {self.eot_id}
        return np.array([len(self._bytes[i]) if i in plain else 0 for i in range(self.vocab_size)], dtype=np.int32)

    def to_dict(self) -> dict:
        """Plain JSON with everything that tokenizer_from_dict needs, ranks included."""
        return {"kind": self.kind, "name": self.name, "special_tokens": dict(self.special_tokens), **self._data}

    def to_hf(self, begin: Sequence[int] = ()) -> dict[str, dict]:
        """Returns {file name: contents}, for hf.save to write: transformers.AutoTokenizer then gives the same ids.

        begin: special tokens that it puts before every text, for example [eot_id], which begins our documents. The
        spelling of a special token in a text is always that token there, as in encode(text, special=True).
        """
        return tokenizer_json.files(self.to_dict(), begin)

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides ids; not of the name, so a file that moved is still the same tokenizer."""
        return hashlib.sha256(json.dumps(self.to_dict() | {"name": ""}, sort_keys=True).encode()).hexdigest()


def tokenizer_from_dict(d: dict, where: str | Path = "tokenizer") -> Tokenizer:
    """Returns the tokenizer of a to_dict(), that of the file `where`."""
    tokenizer_json.check_ours(d, where)
    return Tokenizer(**d)


def _regex_of(tokens):
    if not tokens:
        return None
    return regex.compile(alternatives(tokens))


def _encode_around(pattern, tokens, text, encode):
    """Returns the ids of a text: those of the tokens in it, and encode() of what is between them.

    A match of the pattern that is none of the tokens is text, and so is what is inside it.
    """
    if pattern is None or not tokens:
        return encode(text)
    ids = []
    start = 0
    for match in pattern.finditer(text):
        if match[0] in tokens:
            ids += encode(text[start : match.start()])
            ids.append(tokens[match[0]])
            start = match.end()
    return ids + encode(text[start:])


def _tiktoken_core(name, pattern, ranks):
    import tiktoken

    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"{name}: its regex has {len(pattern)} characters: no more than {MAX_PATTERN} are read")
    try:
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as e:
        raise ValueError(f"{name}: its regex {pattern[:40]!r} is none ({e})") from None


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield text as ids arrive, a character only when all its bytes are there; invalid bytes become U+FFFD."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in tokenizer._spell(ids):
        if text := utf8.decode(piece):
            yield text
    if text := utf8.decode(b"", final=True):
        yield text


def load_tokenizer(
    spec: str, add_tokens: Iterable[str] = (), chars: str | None = None, eot: str | None = None
) -> Tokenizer:
    """spec: "byte", "char" (chars is any text with the whole alphabet), a tiktoken name, PATH/tokenizer.json of Hugging
    Face, PATH/x.tiktoken of Qwen (others: x.tiktoken:newer or :gpt2), PATH/x.model of sentencepiece, "bpe:FILE",
    PATH/meta.json of prepared data, which has its tokenizer.
    add_tokens become special tokens with the next free ids where they are not there yet. eot: the token that begins a
    document, where it is not to be the file's own or <|endoftext|>, which is added where a file has none."""
    path = Path(spec.removeprefix("bpe:"))
    if spec == "byte":
        fields = {"kind": spec, "name": spec, "special_tokens": {}}
    elif spec == "char":
        if not chars:
            raise ValueError("char needs its alphabet: load_tokenizer('char', chars=text)")
        fields = {"kind": spec, "name": spec, "special_tokens": {}, "chars": "".join(sorted(set(chars)))}
    elif spec.startswith("bpe:") or path.suffix == ".json":
        fields = tokenizer_json.read_object(path)
        if path.name == "meta.json":
            fields = fields.get("tokenizer")
            if not isinstance(fields, dict):
                raise ValueError(f"{path} is of data without a tokenizer: name one")
        if "kind" in fields:
            tokenizer_json.check_ours(fields, path)
        else:
            fields = tokenizer_json.read(fields, path)
    elif path.suffix == ".model":
        fields = sentencepiece_model.read(path)
    elif ".tiktoken" in path.suffix:
        fields = _read_ranks(spec)
    else:
        fields = _named_encoding(spec)

    add_tokens = list(add_tokens)
    if eot:
        fields["eot"] = eot
    elif "eot" not in fields:
        add_tokens.insert(0, EOT)
    tokenizer = Tokenizer(**fields, add_tokens=add_tokens)
    if path.suffix == ".json" and tokenizer.kind in ("bpe", "huggingface"):
        _try_regex(tokenizer, path)
    return tokenizer


def _read_ranks(spec):
    file, _, pattern = spec.partition(".tiktoken:")
    path = Path(file + ".tiktoken") if pattern else Path(spec)
    ranks = parse_ranks(read_text(path), path)
    pattern = pattern or ("qwen" if len(ranks) == 151_643 else None)
    if pattern not in PATTERNS:
        why = f"{path} has {len(ranks)} ranks (Qwen's 151643) and does not say how text is cut into words"
        raise ValueError(f"{why}: append one of {', '.join(PATTERNS)}, as in {path.name}:newer")
    data = {"ranks": format_ranks(ranks), "pattern": PATTERNS[pattern], "nfc": pattern == "qwen"}
    return {"kind": "bpe", "name": path.name, "special_tokens": {}, **data}


def _named_encoding(spec):
    import tiktoken

    if spec not in tiktoken.list_encoding_names():
        names = ", ".join(["byte", "char", *tiktoken.list_encoding_names()])
        raise ValueError(f"no tokenizer {spec!r}: take {names}, bpe:FILE, or a .json, .tiktoken or .model file")
    try:
        encoding = tiktoken.get_encoding(spec)
    except (OSError, ValueError) as e:  # no network, or something else than the file came
        raise OSError(
            f"tiktoken could not download the ranks of {spec}: {e}\nWithout a network, set TIKTOKEN_CACHE_DIR to a "
            "folder that it filled on another machine, or take byte, char, a tokenizer.json, or bpe:FILE trained here"
        ) from e
    data = {"ranks": format_ranks(encoding._mergeable_ranks), "pattern": encoding._pat_str, "nfc": False}
    return {"kind": "bpe", "name": spec, "special_tokens": encoding._special_tokens, **data}


def _try_regex(tokenizer, path, limit=0.1):
    """Raises ValueError if a foreign regex takes more than `limit` seconds for texts that regexes take long for.

    A backtracking engine can take time that grows exponentially, or with a high power of the length: the texts grow by
    a half at a time, so that the first that is too slow ends it. GPT-2's pattern takes a thousandth of a second.
    """
    n = 8
    while n < 1000:
        for unit in ("a", " ", "1", "!", "\n", "a ", "aB", "1,", "'s", "\u4e00"):
            start = time.thread_time()  # which other programs do not make longer
            tokenizer.encode(unit * n + "?")
            seconds = time.thread_time() - start
            if seconds > limit:
                raise ValueError(f"{path}: its regex takes {seconds:.1f} s for {unit!r} {n} times: it is not read")
        n += n // 2


def _cut_long_spaces(text, limit=100_000):
    # tiktoken's regex engine keeps a state for each space of a run, and panics somewhere below a million. Without the
    # lookbehind the search would be quadratic in runs just below the limit.
    start = 0
    for run in regex.finditer(rf"(?<!\s)\s{{{limit},}}", text) if len(text) > limit else ():
        for cut in range(run.start() + limit, run.end(), limit):
            yield text[start:cut]
            start = cut
    yield text[start:]


def train_bpe(
    files, vocab_size: int, pattern="newer", special_tokens=(), workers=1, name="bpe", field="text"
) -> Tokenizer:
    """Ids: 0..255 the bytes, then the merges in order, then <|endoftext|> and special_tokens; vocab_size in all."""
    n_special = len({EOT, *special_tokens})
    n_merges = vocab_size - 256 - n_special
    if n_merges < 1:
        raise ValueError(f"vocab_size={vocab_size} must be more than 256 bytes + {n_special} special tokens")
    merges = merge_words(count_words(files, pattern, special_tokens, workers, field), n_merges)
    if len(merges) < n_merges:
        largest = vocab_size - n_merges + len(merges)
        raise ValueError(f"{len(merges)} merges are all this text has: take a vocabulary of {largest}, or more text")
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    data = {"ranks": format_ranks({t: i for i, t in enumerate(tokens)}), "pattern": PATTERNS[pattern], "nfc": False}
    return Tokenizer("bpe", name, {}, (EOT, *special_tokens), **data)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE or a sentencepiece tokenizer.")
    train = parser.add_subparsers(dest="command", required=True).add_parser("train", help="train one on text files")
    add = train.add_argument
    kinds = ", ".join(sources.KINDS)
    add("files", nargs="+", metavar="NAME|FILES", help=f"{kinds}, also .gz and .zst; folders; a set of prepare.py")
    add("--field", default="text", help="of a .jsonl, or column of a .csv, .tsv or .parquet, that has the text")
    add("--kind", choices=["bpe", "sentencepiece"], default="bpe", help="bpe: of bytes, as GPT-2's; written as .json")
    add("--vocab_size", type=int, default=8192, help="bytes and special tokens included")
    add("--special_tokens", nargs="*", default=[], metavar="TOKEN", help=f"beside {EOT} (sentencepiece: <s> and </s>)")
    add("--out", type=Path, help="where it goes (default: bpe.json or sentencepiece.model)")
    add("--workers", type=int, default=min(8, os.cpu_count()))
    add = train.add_argument_group("of bpe alone").add_argument
    add("--pattern", choices=["gpt2", "newer"], help="how text is cut into words (default: newer)")
    add = train.add_argument_group("of sentencepiece alone").add_argument
    add("--model_type", choices=["bpe", "unigram", "char", "word"], help="(default: bpe)")
    add("--user_symbols", nargs="+", metavar="TOKEN", help="found in every text, such as + - or <sep>")
    args = parser.parse_args()
    meaningless = ["pattern"] if args.kind == "sentencepiece" else ["model_type", "user_symbols"]
    for key in meaningless:
        if getattr(args, key) is not None:
            parser.error(f"--{key} means nothing to --kind {args.kind}: leave it out")
    for key in ("vocab_size", "workers"):
        if getattr(args, key) < 1:
            parser.error(f"--{key} {getattr(args, key)}: give a number from 1")
    print_any_text()
    train_one = command_bpe if args.kind == "bpe" else command_sentencepiece
    try:
        with tempfile.TemporaryDirectory() as folder:
            train_one(args, training_files(args.files, Path(folder)))
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"error: {e}")


def training_files(names: list[str], folder: Path) -> list[Path]:
    """Returns the files to train on: those that are named, and in `folder` the beginning of each named set."""
    files = []
    for name in names:
        if name in sources.NAMED:
            text = sources.find_text([name], None, None, split_at_eot=False)
            if text.documents is None:
                raise ValueError(f"{name} is no text: name another set, or files")
            files.append(folder / f"{name}.jsonl")
            write_sample(files[-1], chain.from_iterable(map(chunks_of_text, text.documents())))
        else:
            files += sources.find_files([name], sources.KINDS, sources.NAMED)
    return files


def command_bpe(args, files):
    out = args.out or Path("bpe.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    pattern = args.pattern or "newer"
    tok = train_bpe(files, args.vocab_size, pattern, args.special_tokens, args.workers, out.stem, args.field)
    out.write_text(json.dumps(tok.to_dict()), encoding="utf-8")
    print(f"{tok.vocab_size} tokens in {out}: use it as bpe:{out}")


def command_sentencepiece(args, files):
    out = args.out or Path("sentencepiece.model")
    if out.suffix != ".model":
        raise ValueError(f"--out={out}: a sentencepiece tokenizer is known by its ending: try {out.stem}.model")
    out.parent.mkdir(parents=True, exist_ok=True)
    texts = chain.from_iterable(chunks(path, args.field) for path in files)
    symbols = args.user_symbols or []
    model = sentencepiece_model.train(
        texts, args.vocab_size, args.model_type or "bpe", symbols, args.special_tokens, args.workers
    )
    out.write_bytes(model)
    out.with_suffix(".vocab").write_text(sentencepiece_model.vocabulary(model), encoding="utf-8")
    print(f"{args.vocab_size} tokens in {out}: use it as {out}; {out.stem}.vocab lists them")


if __name__ == "__main__":
    main()
