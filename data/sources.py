"""Where text comes from: named sets (the table NAMED at the end), files and folders, standard input.

find_text gives what the user named as documents, which are strings. A .txt or .py file is one document, each line of a
.jsonl has one in its field "text", and any of them may be gzipped.
"""

import difflib
import gzip
import hashlib
import importlib.util
import json
import os
import re
import sys
import sysconfig
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data.tokenizers import EOT

KINDS = (".txt", ".jsonl", ".py")
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def find_text(sources: list[str], copy: str | None) -> tuple[object, int | None, Callable[[], Iterator[str]]]:
    """What the user named: (what identifies it, its bytes if known, a function that gives its documents anew)."""
    named = NAMED.get(sources[0])
    if named and len(sources) > 1:
        raise ValueError(f"{sources[0]} is a named set: give it alone, not with {' '.join(sources[1:])}")
    if copy and not named:
        raise ValueError(f"--input is a local copy of a named set, and {sources[0]} is none: leave --input out")
    if sources == ["-"]:
        data = sys.stdin.buffer.read()
        return hashlib.sha256(data).hexdigest(), len(data), lambda: iter([decode(data, "standard input")])
    if copy:
        paths = find_files([copy])
    elif not named:
        paths = find_files(sources)
    elif named.files:
        paths = named.files()
    else:
        return sources[0], None, named.documents
    # Files are known by path, size and time, so that a second run has nothing to read.
    stats = [path.stat() for path in paths]
    identity = [[os.path.abspath(path), stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats)]
    separator = named.separator if named else None
    return identity, sum(s.st_size for s in stats), lambda: chain.from_iterable(read(p, separator) for p in paths)


def find_files(names: Iterable[str]) -> list[Path]:
    """The files of that name, and all text files in the folders of that name."""
    paths = []
    for name in names:
        if Path(name).is_dir():
            paths += walk(name)
        elif not Path(name).exists():
            near = difflib.get_close_matches(name, NAMED, 1)
            hint = f"did you mean {near[0]}?" if near else f"the named sets are {', '.join(NAMED)}"
            raise ValueError(f"{name}: there is no such file, and no set of this name: {hint}")
        elif not name.removesuffix(".gz").endswith(KINDS):
            raise ValueError(f"{name}: can read {', '.join(KINDS)} and .gz of them: call it .txt if it is plain text")
        else:
            paths.append(Path(name))
    return paths


def walk(root, kinds=KINDS, without=()):
    """The text files below a folder, in sorted order; hidden folders are left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in without and not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if name.removesuffix(".gz").endswith(kinds))


# ---- how a document is read -----------------------------------------------------------------------------------------


def read(path: Path, separator: str | None = None) -> Iterator[str]:
    """The documents of a file. A .txt or .py is one, or many with separators between them."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                for number, line in enumerate(read_lines(file, path), 1):
                    if line.strip():
                        yield text_field(line, f"{path}:{number}")
            elif separator:
                held = []
                for line in read_lines(file, path):
                    *ended, rest = line.split(separator)
                    for text in ended:
                        yield "".join([*held, text]).strip()
                        held = []
                    held.append(rest)
                yield "".join(held).strip()
            else:
                yield decode(file.read(), path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: a damaged gzip file: {error}") from None


def read_lines(file, path):
    offset = 0
    for line in file:
        yield decode(line, path, offset)
        offset += len(line)


def decode(data, path, offset=0):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {offset + error.start}: "
            f"convert it, for example with  iconv -f latin1 -t utf-8"
        ) from None


def text_field(line, where):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not a line of JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f'{where}: needs a field "text" that is a string, found {found}')
    # JSON can spell half of a surrogate pair, which is no text and which no tokenizer can take.
    return row["text"].encode("utf-8", "replace").decode()


# ---- the named sets -------------------------------------------------------------------------------------------------


def stdlib():
    without = "test tests encodings site-packages dist-packages idlelib lib2to3 turtledemo pydoc_data".split()
    files = walk(sysconfig.get_path("stdlib"), ".py", without)
    # What these two hold describes the machine that Python was built on.
    return [path for path in files if not re.search("/(_sysconfigdata|config-)", path.as_posix())]


def pysource():
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise ValueError("pysource is the source of Python and of torch, and torch is not installed: try stdlib")
    return stdlib() + list(walk(spec.submodule_search_locations[0], ".py"))


@cache  # prepare.py reads the documents more than once
def shakespeare():
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=60) as response:
            return [decode(response.read(), SHAKESPEARE)]
    except OSError as error:
        raise ValueError(f"cannot download {SHAKESPEARE} ({error}): give a local copy with --input") from None


def hub(path, **arguments):
    """A function that streams a dataset of the Hugging Face hub: a document is the "text" of a row."""

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
