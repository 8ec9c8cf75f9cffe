"""Where text comes from: named sets (the table NAMED at the end), files and folders, standard input.

find_text gives what the user named as documents, which are strings. A file is one document, but a .jsonl has one in
the field "text" of each line; any file may be gzipped. Text is UTF-8, or UTF-16 that begins with a byte order mark.
"""

import codecs
import difflib
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
import sysconfig
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from data.tokenizers import EOT

KINDS = (".txt", ".md", ".rst", ".jsonl", ".py")
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


class Unreadable(ValueError):
    """Raised for a file, a document or a line that is not the text it should be; says which, and why."""


class Skipped:
    """What was left out of one pass over the text because it is Unreadable: how much, and why the first few were."""

    def __init__(self):
        self.clear()

    def clear(self):
        self.count = 0
        self.first = []

    def add(self, error):
        self.count += 1
        if self.count <= 5:
            self.first.append(str(error))

    def __str__(self):
        lines = [f"left out {self.count:,} files, documents or lines that cannot be read:", *self.first]
        if self.count > len(self.first):
            lines.append(f"and {self.count - len(self.first):,} more")
        return "\n  ".join(lines)


class Text(NamedTuple):
    identity: object  # what decides the documents: names, sizes and times of files, or a hash
    size: int | None  # in bytes, where it is known
    documents: Callable[[], Iterator[str]]  # gives the documents, each time from the first


def find_text(sources: list[str], copy: str | None, skipped: Skipped | None) -> Text:
    """Returns what the user named. What cannot be read is added to `skipped`, or is an error where that is None."""
    name = sources[0]
    named = NAMED.get(name)
    if named and len(sources) > 1:
        raise ValueError(f"{name} is a named set: give it alone, not with {' '.join(sources[1:])}")
    if copy and not named:
        raise ValueError(f"--input is a local copy of a named set, and {name} is none: leave --input out")

    is_streamed = named and not named.files and not copy
    if skipped is not None and (is_streamed or sources == ["-"]):
        raise ValueError("--skip_bad leaves out files, and lines of files, and there are none here: leave it out")
    if is_streamed:
        return Text(name, None, named.documents)
    if sources == ["-"]:
        data = sys.stdin.buffer.read()
        return Text(hashlib.sha256(data).hexdigest(), len(data), lambda: iter([read_bytes(data, "standard input")]))

    separator = None
    if copy:
        paths = find_files([copy])
        separator = named.separator
    elif named:
        paths = named.files()
    else:
        paths = find_files(sources)

    # Files are known by path, size and time, so that a second run has nothing to read.
    stats = [path.stat() for path in paths]
    identity = [[os.path.abspath(path), stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats)]
    size = sum(stat.st_size for stat in stats)

    def documents():
        if skipped is not None:
            skipped.clear()
        for path in paths:
            yield from read(path, separator, skipped)

    return Text(identity, size, documents)


# ---- which files ----------------------------------------------------------------------------------------------------


def find_files(names: Iterable[str]) -> list[Path]:
    """Returns the files of that name, and all text files in the folders of that name."""
    paths = []
    for name in names:
        if Path(name).is_dir():
            found, left_out = walk(name)
            paths += found
            if left_out:
                readable = f"read are {', '.join(KINDS)} and .gz of them"
                print(f"left out of {name}: {counts(left_out)} ({readable})", file=sys.stderr)
        elif not Path(name).exists():
            near = difflib.get_close_matches(name, NAMED, 1)
            hint = f"did you mean {near[0]}?" if near else f"the named sets are {', '.join(NAMED)}"
            raise ValueError(f"{name}: there is no such file, and no set of this name: {hint}")
        elif not name.removesuffix(".gz").endswith(KINDS):
            raise ValueError(f"{name}: can read {', '.join(KINDS)} and .gz of them: call it .txt if it is plain text")
        else:
            paths.append(Path(name))
    return paths


def walk(root: str, kinds: tuple | str = KINDS, without: Iterable[str] = ()) -> tuple[list[Path], Counter]:
    """Returns the text files below a folder, in sorted order, and how many of what else is there."""
    paths = []
    left_out = Counter()

    def count_unreadable(error):
        left_out["unreadable folder"] += 1

    for folder, folders, names in os.walk(root, onerror=count_unreadable):
        entered = []
        for name in sorted(folders):
            if name.startswith("."):
                left_out["hidden folder"] += 1
            elif Path(folder, name).is_symlink():  # it might lead back here, and os.walk does not follow it
                left_out["linked folder"] += 1
            elif name not in without:
                entered.append(name)
        folders[:] = entered

        for name in sorted(names):
            path = Path(folder, name)
            if not path.is_file():  # a pipe would be read for ever
                left_out["broken link or pipe"] += 1
            elif name.removesuffix(".gz").endswith(kinds):
                paths.append(path)
            else:
                left_out[path.suffix or "without an ending"] += 1
    return paths, left_out


def counts(left_out, most=10):
    """Returns the counts as text, the largest first: 40 .png, 2 hidden folders, 1 without an ending."""
    found = []
    for what, n in left_out.most_common(most):
        if n > 1 and what.endswith("folder"):
            what += "s"
        found.append(f"{n:,} {what}")
    others = left_out.total() - sum(n for _, n in left_out.most_common(most))
    if others:
        found.append(f"{others:,} others")
    return ", ".join(found)


# ---- how a file is read ---------------------------------------------------------------------------------------------


def read(path: Path, separator: str | None = None, skipped: Skipped | None = None) -> Iterator[str]:
    """Yields the documents of a file: one, or many with separators between them, or those of a .jsonl's lines."""
    try:
        if skipped is not None and path.suffix == ".gz":
            unpack(path)
        with open_utf8(path) as file:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                yield from read_lines(file, path, skipped)
            elif separator:
                yield from read_separated(file, path, separator, skipped)
            else:
                yield decode(file.read(), path)
    except Unreadable as error:
        leave_out(error, skipped)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        leave_out(f"{path}: a damaged gzip file: {error}", skipped)
    except OSError as error:
        leave_out(f"{path}: cannot be read: {error}", skipped)


def leave_out(error, skipped):
    """Counts what cannot be read where that is to be left out, else ends with an error that says how to do that."""
    if skipped is None:
        raise ValueError(f"{error}; or leave out what cannot be read with --skip_bad") from None
    skipped.add(error)


def unpack(path):
    """Reads a gzipped file to its end, where damage shows, so that none of a damaged file's documents are used."""
    with gzip.open(path) as file:
        while file.read(1 << 20):
            pass


@contextmanager
def open_utf8(path):
    """Opens a file, or what is gzipped in it, as bytes that are UTF-8 if they are text."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        yield as_utf8(file, path)


def as_utf8(file, where):
    """Returns an open file as one of UTF-8 without a byte order mark: the same, or a converted copy in memory."""
    start = file.peek(4096)[:4096]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return io.BytesIO(file.read().decode("utf-16").encode())
        except UnicodeDecodeError as error:
            raise Unreadable(f"{where}: not whole UTF-16 text: {error.reason} at offset {error.start}") from None
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
        return file

    # Latin letters in UTF-16 are valid UTF-8, but each comes with a zero, before it (big-endian) or behind it; other
    # alphabets have that at least in their spaces. In UTF-8 there are no zeros, or they are anywhere.
    zeros_before = start[0::2].count(0)
    zeros_behind = start[1::2].count(0)
    if (zeros_before == 0) != (zeros_behind == 0) and zeros_before + zeros_behind > len(start) / 100:
        encoding = "UTF-16BE" if zeros_before else "UTF-16LE"
        raise Unreadable(
            f"{where}: looks like {encoding} without a byte order mark: "
            f"convert it, for example with  iconv -f {encoding} -t utf-8"
        )
    return file


def read_bytes(data, where):
    return decode(as_utf8(io.BufferedReader(io.BytesIO(data)), where).read(), where)


def read_lines(file, path, skipped):
    """Yields the texts of a .jsonl file."""
    offset = file.tell()
    for number, line in enumerate(file, 1):
        try:
            row = decode(line, path, offset)
            text = text_field(row, f"{path}:{number}") if row.strip() else ""
        except Unreadable as error:
            leave_out(error, skipped)
        else:
            yield text
        offset += len(line)


def read_separated(file, path, separator, skipped):
    """Yields the texts between separators."""
    for offset, document in split_bytes(file, separator.encode()):
        try:
            text = decode(document, path, offset)
        except Unreadable as error:
            leave_out(error, skipped)
        else:
            yield text.strip()


def split_bytes(file, separator):
    """Yields what is between separators as (where it begins in the file, bytes), with one document in memory."""
    offset = file.tell()
    document = []  # the lines of it that were read
    for line in file:
        *ends, rest = line.split(separator)
        for end in ends:
            whole = b"".join([*document, end])
            yield offset, whole
            offset += len(whole) + len(separator)
            document = []
        document.append(rest)
    yield offset, b"".join(document)


def decode(data, where, offset=0):
    """Returns UTF-8 as text. offset: where it begins in the file, for the error."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"{where}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {offset + error.start}: "
            f"convert it, for example with  iconv -f latin1 -t utf-8"
        ) from None


def text_field(line, where):
    """Returns the field "text" of a line of JSON."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise Unreadable(f"{where}: not a line of JSON: {error}") from None
    if not isinstance(row, dict):
        raise Unreadable(f'{where}: needs a field "text" that is a string, found {type(row).__name__}')
    if not isinstance(row.get("text"), str):
        raise Unreadable(f'{where}: needs a field "text" that is a string, found {sorted(row)}')
    # JSON can spell half of a surrogate pair, which is no text and which no tokenizer can take.
    return row["text"].encode("utf-8", "replace").decode()


# ---- the named sets -------------------------------------------------------------------------------------------------


def stdlib():
    without = "test tests encodings site-packages dist-packages idlelib lib2to3 turtledemo pydoc_data".split()
    files, _ = walk(sysconfig.get_path("stdlib"), ".py", without)
    # What these two hold describes the machine that Python was built on.
    return [path for path in files if not re.search("/(_sysconfigdata|config-)", path.as_posix())]


def pysource():
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise ValueError("pysource is the source of Python and of torch, and torch is not installed: try stdlib")
    files, _ = walk(spec.submodule_search_locations[0], ".py")
    return stdlib() + files


@cache  # prepare.py reads the documents more than once
def shakespeare():
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=60) as response:
            return [decode(response.read(), SHAKESPEARE)]
    except OSError as error:
        raise ValueError(f"cannot download {SHAKESPEARE} ({error}): give a local copy with --input") from None


def hub(path, **arguments):
    """Returns a function that streams a dataset of the Hugging Face hub: a document is the "text" of a row."""

    def read_rows():
        try:
            import datasets
        except ModuleNotFoundError:
            raise ValueError(
                f"{path} is streamed from the hub: pip install datasets zstandard  (or give a local copy with --input)"
            ) from None
        for row in datasets.load_dataset(path, split="train", streaming=True, **arguments):
            yield row["text"]

    return read_rows


class Named(NamedTuple):
    about: str
    tokenizer: str = "gpt2"
    val_fraction: float = 0.01
    files: Callable | None = None  # where it comes from: a function that lists files here,
    documents: Callable | None = None  # or one that gives the documents
    separator: str | None = None  # what stands between two documents in a plain text copy of it (--input)


PROOF_PILE = "arxiv", "open-web-math", "algebraic-stack"
PROOF_PILE = [f"hf://datasets/EleutherAI/proof-pile-2/{part}/train/*" for part in PROOF_PILE]
NAMED = {
    "stdlib": Named("the running Python's own library without tests, 9 MB: a document is a file", "byte", 0.05, stdlib),
    "pysource": Named("stdlib and the Python source of the installed torch, 55 MB", "byte", 0.05, pysource),
    "shakespeare": Named("1 MB, one document: its last tenth validates, as in nanoGPT", "char", 0.1, None, shakespeare),
    "tinystories": Named("2 GB of stories", documents=hub("roneneldan/TinyStories"), separator=EOT),
    "openwebtext": Named("40 GB of web pages", documents=hub("Skylion007/openwebtext"), separator=EOT),
    "fineweb": Named("10B tokens of web pages", documents=hub("HuggingFaceFW/fineweb", name="sample-10BT")),
    "fineweb-edu": Named("10B tokens, educational", documents=hub("HuggingFaceFW/fineweb-edu", name="sample-10BT")),
    "slimpajama": Named("627B tokens of web, books and code", documents=hub("cerebras/SlimPajama-627B")),
    "openwebmath": Named("15B tokens of mathematics", documents=hub("open-web-math/open-web-math")),
    "proof-pile": Named("55B tokens: papers, mathematics, code", documents=hub("json", data_files=PROOF_PILE)),
    "pg19": Named("11 GB of books", documents=hub("emozilla/pg19")),
    "mqar": Named("recall of many keys' values, made from a seed", "none"),  # no text: data/synthetic.py
}
