"""Where text and conversations come from: named sets (tables at the end), files and folders, standard input.

find_text gives what the user named as documents. A document is an iterable of the parts of its text, and gives them
again each time: [text], or a File that is read in parts. A file is one document, but a .jsonl, a .csv and a .parquet
have one in a field of each row, and a .txt may have many with <|endoftext|> between them; all but a .parquet may be
compressed. Of a page of HTML the text is read. find_rows gives rows whole, which data/chat.py makes conversations of.
"""

import atexit
import difflib
import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from data import text
from data.bpe import EOT
from data.html_text import text_of_html
from data.text import Unreadable

KINDS = (".txt", ".md", ".rst", ".py", ".html", ".htm", ".jsonl", ".csv", ".tsv", ".parquet")
ROW_KINDS = (".jsonl", ".json", ".parquet")  # of which every row is wanted whole
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


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
    documents: Callable[[], Iterator[Iterable[str]]]  # gives the documents, each time from the first
    with_marker: Iterable = ()  # the names of texts that were read whole, and in which EOT is spelled out


class Rows(NamedTuple):
    identity: object  # what decides the rows, as of Text
    read: Callable[[], Iterator[tuple[str, Any]]]  # gives ("FILE line N", row) of each, each time from the first


def find_text(
    sources: list[str],
    copy: str | None,
    skipped: Skipped | None,
    split_at_eot: bool,
    field: str = "text",
    max_documents: int | None = None,
) -> Text:
    """Returns what the user named, up to max_documents of it.

    What cannot be read is added to `skipped`, or is an error where that is None. field: the one of a row that is text.
    """
    found = find_all_text(sources, copy, skipped, split_at_eot, field)
    if max_documents is None:
        return found
    return found._replace(documents=lambda: islice(found.documents(), max_documents))


def find_all_text(sources, copy, skipped, split_at_eot, field):
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
        if split_at_eot:
            raise ValueError(f"--split_at_eot is for .txt files, and {name} comes as documents: leave it out")
        if field != "text":
            raise ValueError(f"--field is for files of rows, and {name} comes as documents: leave it out")
        return Text(name, None, named.documents)

    separator = EOT if split_at_eot else None
    with_marker = set()
    if sources == ["-"]:
        return standard_input(separator, with_marker)
    if copy:
        paths = find_files([copy], KINDS, NAMED)
        separator = named.separator or separator
    elif named:
        paths = named.files()
    else:
        paths = find_files(sources, KINDS, NAMED)

    size = sum(path.stat().st_size for path in paths)

    def documents():
        if skipped is not None:
            skipped.clear()
        for path in paths:
            yield from read(path, separator, field, skipped, with_marker)

    return Text(identity_of(paths), size, documents, with_marker)


def find_rows(sources: list[str], copy: str | None, skipped: Skipped | None) -> Rows:
    """Returns the rows of what the user named: of conversations, problems or pairs.

    Lines that cannot be read are added to `skipped`, or are an error where that is None.
    """
    name = sources[0]
    if name in ROW_SETS and len(sources) > 1:
        raise ValueError(f"{name} is a named set: give it alone, not with {' '.join(sources[1:])}")
    if copy and name not in ROW_SETS:
        raise ValueError(f"--input is a local copy of a named set, and {name} is none: leave --input out")
    if name in ROW_SETS and not copy:
        return Rows(name, ROW_SETS[name].read)

    paths = find_files([copy] if copy else sources, ROW_KINDS, ROW_SETS)

    def bad(error):
        leave_out(error, skipped)

    def read_rows():
        for path in paths:
            try:
                yield from text.rows(path, bad=bad)
            except Unreadable as error:
                bad(error)

    return Rows(identity_of(paths), read_rows)


def identity_of(paths: Iterable[Path]) -> list:
    """Returns what files are known by, so that a second run has nothing to read: path, size and time."""
    identity = []
    for path in paths:
        stat = path.stat()
        identity.append([os.path.abspath(path), stat.st_size, stat.st_mtime_ns])
    return identity


def standard_input(separator, with_marker):
    """Returns standard input as a Text, through a file: it is read more than once, and may not fit the memory."""
    name = "standard input"
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = Path(folder.name, "input.txt")
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        while part := sys.stdin.buffer.read(text.PART):
            file.write(part)
            digest.update(part)

    def documents():
        if separator:
            for document in text.separated(path, separator, name):
                yield [document]
        else:
            yield File(path, name, with_marker)

    return Text(digest.hexdigest(), path.stat().st_size, documents, with_marker)


# ---- which files ----------------------------------------------------------------------------------------------------


def find_files(names: Iterable[str], kinds: tuple[str, ...], named: dict) -> list[Path]:
    """Returns the files of that name, and all in the folders of that name that are of these kinds.

    named: the sets that could have been meant.
    """
    paths = []
    for name in names:
        if Path(name).is_dir():
            found, left_out = walk(name, kinds)
            paths += found
            if left_out:
                readable = f"read are {', '.join(kinds)} and .gz or .zst of them"
                print(f"left out of {name}: {counts(left_out)} ({readable})", file=sys.stderr)
        elif not Path(name).exists():
            near = difflib.get_close_matches(name, named, 1)
            hint = f"did you mean {near[0]}?" if near else f"the named sets are {', '.join(named)}"
            raise ValueError(f"{name}: there is no such file, and no set of this name: {hint}")
        elif not text.name_inside(name).endswith(kinds):
            readable = f"{', '.join(kinds)} and .gz or .zst of them"
            hint = ": call it .txt if it is plain text" if ".txt" in kinds else ""
            raise ValueError(f"{name}: can read {readable}{hint}")
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
            elif text.name_inside(name).endswith(kinds):
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


class File:
    """A document that is a whole file: read in parts, each time anew, as it may be larger than the memory."""

    def __init__(self, source: Path, name: str | Path, with_marker: set):
        self.source = source
        self.name = name
        self.with_marker = with_marker  # the names of texts in which EOT was seen spelled out

    def __iter__(self):
        end = ""
        try:
            for part in text.parts(self.source, self.name):
                if EOT in end + part:
                    self.with_marker.add(self.name)
                end = part[-len(EOT) :]
                yield part
        except Unreadable as error:
            leave_out(error, None)


def read(
    path: Path, separator: str | None, field: str, skipped: Skipped | None, with_marker: set
) -> Iterator[Iterable[str]]:
    """Yields the documents of a file: those of its rows, of a .txt between separators, or one."""

    def bad(error):
        leave_out(error, skipped)

    name = text.name_inside(path)
    try:
        if name.endswith((".jsonl", ".csv", ".tsv", ".parquet")):
            if skipped is not None:
                check_whole(path)
            for place, row in text.rows(path, field, bad):
                try:
                    document = text.text_field(row, place, field)
                except Unreadable as error:
                    bad(error)
                else:
                    yield [document]
        elif name.endswith((".html", ".htm")):
            yield [text_of_page(path)]
        elif separator and name.endswith(".txt"):
            if skipped is not None:
                check_whole(path)
            for document in text.separated(path, separator, bad=bad):
                yield [document]
        else:
            if skipped is not None:
                for _ in text.parts(path):  # an error in the middle would come too late to leave it out
                    pass
            yield File(path, path, with_marker if name.endswith(".txt") else set())  # only a .txt can be split there
    except Unreadable as error:
        bad(error)


def text_of_page(path):
    try:
        return text_of_html(text.read_text(path), path)
    except ValueError as error:
        raise Unreadable(str(error)) from None


def check_whole(path):
    """Raises Unreadable where a compressed file has damage, which shows at its end, before its documents are used."""
    if path.suffix in text.COMPRESSED:
        with text.open_utf8(path) as file:
            while file.read(text.PART):
                pass


def leave_out(error, skipped):
    """Counts what cannot be read where that is to be left out, else ends with an error that says how to do that."""
    if skipped is None:
        raise ValueError(f"{error}; or leave out what cannot be read with --skip_bad") from None
    skipped.add(error)


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
            return [[text.read_text(response.read(), SHAKESPEARE)]]
    except OSError as error:
        raise ValueError(f"cannot download {SHAKESPEARE} ({error}): give a local copy with --input") from None


def hub(path, **arguments):
    """Returns a function that streams a dataset of the Hugging Face hub: a document is the "text" of a row."""
    read_rows = hub_rows(path, **arguments)

    def documents():
        for place, row in read_rows():
            yield [text.text_field(row, place)]

    return documents


def hub_rows(path, split="train", **arguments):
    """Returns a function that streams a dataset of the Hugging Face hub as ("PATH row N", row)."""

    def read_rows():
        try:
            import datasets
        except ModuleNotFoundError:
            raise ValueError(
                f"{path} is streamed from the hub: pip install datasets zstandard  (or give a local copy with --input)"
            ) from None
        rows = datasets.load_dataset(path, split=split, streaming=True, **arguments)
        for number, row in enumerate(rows, 1):
            yield f"{path} row {number}", row

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


class RowSet(NamedTuple):
    about: str
    read: Callable  # gives ("PATH row N", row) of each row


ROW_SETS = {  # conversations, and what has problems with their answers (data/problems.py reads them as such, too)
    "openmathinstruct": RowSet("14M problems with solutions of a model", hub_rows("nvidia/OpenMathInstruct-2")),
    "numinamath": RowSet("860,000 problems of competitions, solved in steps", hub_rows("AI-MO/NuminaMath-CoT")),
    "ultrachat": RowSet("200,000 chats", hub_rows("HuggingFaceH4/ultrachat_200k", "train_sft")),
    "openhermes": RowSet("1M instructions and chats", hub_rows("teknium/OpenHermes-2.5")),
    "natural-instructions": RowSet("2M tasks", hub_rows("andersonbcdefg/supernatural-instructions-2m")),
    "gsm8k": RowSet("7,473 problems of grade school, with working", hub_rows("openai/gsm8k", name="main")),
    "gsm8k_test": RowSet("the 1,319 that models are tested on", hub_rows("openai/gsm8k", "test", name="main")),
    "math": RowSet("7,500 problems of competitions", hub_rows("lighteval/MATH")),
    "math_test": RowSet("the 5,000 that models are tested on", hub_rows("lighteval/MATH", "test")),
    "ultrafeedback": RowSet("64,000 prompts, four scored answers each: for pairs", hub_rows("openbmb/UltraFeedback")),
}
