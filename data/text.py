"""The one reader of text files: plain text, JSON and JSON lines, CSV, each also as .gz or .zst; and parquet tables.

Text is UTF-8, or UTF-16 that begins with a byte order mark; the mark is no text. Plain text comes in parts, so that a
file may be larger than the memory. What cannot be read is Unreadable, an error that names the file and the place.
"""

import codecs
import csv
import gzip
import io
import json
import re
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

PART = 1 << 20  # bytes that are read at a time


COMPRESSED = (".gz", ".zst")


def name_inside(path: Path | str) -> str:
    """Returns the name of what a file holds, compressed or not: a.txt of a.txt.gz."""
    name = Path(path).name
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name


class Unreadable(ValueError):
    """Raised for a file, a document or a line that is not the text it should be; says which, and why."""


def stop(error: Unreadable) -> NoReturn:
    """Raises the error: what the readers do about a line that cannot be read, where they are told nothing else."""
    raise error


# ---- bytes -----------------------------------------------------------------------------------------------------------


@contextmanager
def open_utf8(source: Path | str | bytes, where: str | None = None) -> Iterator[io.BufferedIOBase]:
    """Opens a file, what is compressed in it, or bytes: as a file of UTF-8 without a byte order mark.

    where: the name in errors. Those of the disk, and of damage in what is compressed, become Unreadable in the block.
    """
    if where is None:
        where = "the input" if isinstance(source, bytes) else source
    try:
        if isinstance(source, bytes):
            opened = io.BufferedReader(io.BytesIO(source))
        elif str(source).endswith(".gz"):
            opened = gzip.open(source, "rb")
        elif str(source).endswith(".zst"):
            opened = io.BufferedReader(ZstdFile(source))
        else:
            opened = open(source, "rb")
        with opened as file:
            yield as_utf8(file, where)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Unreadable(f"{where}: a damaged gzip file: {error}") from None
    except OSError as error:
        raise Unreadable(f"{where}: cannot be read: {error.strerror or error}") from None


class ZstdFile(io.RawIOBase):
    """What is compressed in a .zst file. The reader of the package does not notice that a file is cut short."""

    def __init__(self, path: Path | str):
        try:
            import zstandard
        except ImportError:
            raise ImportError(f"{path} needs zstandard: pip install zstandard") from None
        self.package = zstandard
        self.file = open(path, "rb")
        self.frame = None  # that is being read; a file may have several
        self.compressed = b""  # what was read and not yet unpacked
        self.unpacked = memoryview(b"")
        self.place = 0  # in what is unpacked

    def readable(self):
        return True

    def tell(self):
        return self.place

    def close(self):
        self.file.close()
        super().close()

    def readinto(self, buffer):
        while not self.unpacked:
            self.compressed = self.compressed or self.file.read(1 << 16)
            if not self.compressed and self.frame:
                raise Unreadable(f"{self.file.name}: a damaged zst file: it is cut short")
            if not self.compressed:
                return 0
            self.unpack()
        n = min(len(buffer), len(self.unpacked))
        buffer[:n] = self.unpacked[:n]
        self.unpacked = self.unpacked[n:]
        self.place += n
        return n

    def unpack(self):
        self.frame = self.frame or self.package.ZstdDecompressor().decompressobj()
        try:
            self.unpacked = memoryview(self.frame.decompress(self.compressed))
        except self.package.ZstdError as error:
            raise Unreadable(f"{self.file.name}: a damaged zst file: {error}") from None
        self.compressed = self.frame.unused_data
        if self.frame.eof:
            self.frame = None


def as_utf8(file, where):
    """Returns a file behind its byte order mark, or a temporary one that has its UTF-16 as UTF-8."""
    start = file.peek(4096)[:4096]
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise Unreadable(f"{where}: is UTF-32: convert it, for example with  iconv -f UTF-32 -t utf-8")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        copy = tempfile.TemporaryFile()
        for part in decoded(file, "utf-16", where):
            copy.write(part.encode())
        copy.seek(0)
        return copy
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


def decoded(file, encoding, where, size=PART):
    """Yields what a file holds from here on as text, `size` bytes at a time."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset = file.tell()
    while True:
        block = file.read(size)
        waiting, _ = decoder.getstate()  # the first bytes of a character that goes on in this block
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise Unreadable(f"{where}: {why_not_text(error, offset - len(waiting))}") from None
        if text:
            yield text
        if not block:
            return
        offset += len(block)


def why_not_text(error, offset):
    """Returns what a UnicodeDecodeError means, in bytes that begin at an offset in their file."""
    place = offset + error.start
    if error.encoding == "utf-8":
        bad = error.object[error.start]
        advice = "convert it, for example with  iconv -f latin1 -t utf-8"
        return f"not UTF-8 text: byte 0x{bad:02x} at offset {place}: {advice}"
    return f"not whole UTF-16 text: {error.reason} at offset {place}"


def decode(data, where, offset):
    """Returns UTF-8 as text. offset: where it begins in its file, for the error."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"{where}: {why_not_text(error, offset)}") from None


# ---- plain text ------------------------------------------------------------------------------------------------------


def parts(source: Path | str | bytes, where: str | None = None, size: int = PART) -> Iterator[str]:
    """Yields a text in parts of about `size` bytes."""
    with open_utf8(source, where) as file:
        yield from decoded(file, "utf-8", where or source, size)


def read_text(source: Path | str | bytes, where: str | None = None) -> str:
    """Returns a text whole."""
    return "".join(parts(source, where))


def separated(source: Path | bytes, separator: str, where: str | None = None, bad: Callable = stop) -> Iterator[str]:
    """Yields the texts between separators, without the white space around them; only one is in memory at a time.

    separator: without a line break. Texts between two that follow each other are empty.
    """
    where = where or source
    with open_utf8(source, where) as file:
        for offset, document in split_bytes(file, separator.encode()):
            try:
                text = decode(document, where, offset)
            except Unreadable as error:
                bad(error)
            else:
                yield text.strip()


def split_bytes(file, separator):
    """Yields what is between separators as (where it begins in the file, bytes)."""
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


# ---- JSON and tables -------------------------------------------------------------------------------------------------


def parse_json(text: str, where: str | Path) -> Any:
    """Returns what a text of JSON stands for."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise Unreadable(f"{where}: not JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets a thousand deep
        raise Unreadable(f"{where}: not JSON: {error}") from None
    if "\\ud" in text.lower():
        # JSON can spell half of a surrogate pair, which is no text and which no tokenizer can take.
        whole = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        value = json.loads(whole)
    return value


def read_json(path: Path | str) -> Any:
    """Returns what a file of JSON stands for."""
    return parse_json(read_text(path), path)


def json_lines(path: Path | str, bad: Callable = stop) -> Iterator[tuple[str, Any]]:
    """Yields ("FILE line N", value) of every line of JSON that is not blank. bad: is called with what is Unreadable."""
    with open_utf8(path) as file:
        end = file.tell()
        for number, line in enumerate(file, 1):
            place = f"{path} line {number}"
            begin = end
            end += len(line)
            try:
                text = decode(line, place, begin)
                if not text.strip():
                    continue
                value = parse_json(text, place)
            except Unreadable as error:
                bad(error)
            else:
                yield place, value


def json_items(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields ("FILE item N", item) of what a file of JSON lists: by itself, or under "Data" as TriviaQA's does.

    An object without such a list is the one item, as a file of MATH is.
    """
    found = read_json(path)
    if isinstance(found, dict):
        found = found.get("Data", [found])
    if not isinstance(found, list):
        raise Unreadable(f"{path}: holds no rows, but {found!r:.40}")
    for number, item in enumerate(found, 1):
        yield f"{path} item {number}", item


def rows(path: Path, field: str | None = None, bad: Callable = stop) -> Iterator[tuple[str, Any]]:
    """Returns ("FILE line N", row) of every row of a file. field: where rows have their text, if they are a text."""
    name = name_inside(path)
    if name.endswith(".jsonl"):
        return json_lines(path, bad)
    if name.endswith(".json"):
        return json_items(path)
    if name.endswith(".parquet"):
        return parquet_rows(path, field)
    return table_rows(path, field, bad)


def text_field(row: Any, where: str, field: str = "text") -> str:
    """Returns the text in a field of a row."""
    if not isinstance(row, dict) or field not in row:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise Unreadable(f'{where}: needs a field "{field}", found {found}')
    if not isinstance(row[field], str):
        raise Unreadable(f'{where}: the field "{field}" is {row[field]!r:.40}, not a string')
    return row[field]


def table_rows(path: Path, field: str, bad: Callable = stop) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("FILE line N", {column: text}) of every row of a table; its first row has the columns."""
    found = csv_rows(path, lambda row: field in row, bad)
    _, columns = next(found, ("", []))
    for place, row in found:
        yield place, dict(zip(columns, row))


def csv_rows(path: Path, fits: Callable, bad: Callable = stop) -> Iterator[tuple[str, list[str]]]:
    """Yields ("FILE line N", fields) of every row of a table that is not blank, each with as many as the first has.

    The separator is the first of , ; and tab with which the first row fits: Excel takes ; where a comma is decimal.
    """
    csv.field_size_limit(2**31 - 1)  # by itself a field of more than 131,072 characters is an error
    number = 0
    try:
        fitting = [mark for mark in ",;\t" if fits(first_row(path, mark))]
        with open_utf8(path) as file:
            reader = csv.reader(decoded_lines(file, path), delimiter=(fitting or [","])[0], strict=True)
            columns = 0
            for row in reader:
                number = reader.line_num
                place = f"{path} line {number}"
                if not is_filled(row):
                    continue
                columns = columns or len(row)
                if len(row) == columns:
                    yield place, row
                else:
                    bad(Unreadable(f"{place}: the first row has {columns} columns, and this one {len(row)}"))
    except csv.Error as error:
        raise Unreadable(f"{path}, after line {number}: no CSV: {error}") from None


def first_row(path, delimiter):
    with open_utf8(path) as file:
        reader = csv.reader(decoded_lines(file, path), delimiter=delimiter)
        return next(filter(is_filled, reader), [])


def is_filled(row):
    return any(field.strip() for field in row)


def decoded_lines(file, where):
    offset = file.tell()
    for line in file:
        yield decode(line, where, offset)
        offset += len(line)


def parquet_rows(path: Path, field: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("FILE row N", {column: value}) of every row of a parquet table, of this column alone if it has it."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ImportError(f"{path} needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            columns = [field] if field in table.schema_arrow.names else None
            for batch in table.iter_batches(1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (OSError, ArrowException) as error:
        raise Unreadable(f"{path}, after row {number}: no parquet file: {error}") from None


# ---- output ----------------------------------------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} (or \fbox; braces may be nested), None where there is none."""
    found = list(re.finditer(r"\\(boxed|fbox)\s*(?=\{)|\\boxed (?P<bare>[^$]*)", text))
    if not found:
        return None
    last = found[-1]
    if last["bare"] is not None:
        return last["bare"].strip()
    begin = last.end()
    depth = 0
    for i in range(begin, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
        if depth == 0:
            return text[begin + 1 : i]
    return None


def print_any_text() -> None:
    r"""Lets print() write what the output's encoding lacks as \u escapes, where it would end with an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test's or a notebook's has not
            stream.reconfigure(errors="backslashreplace")


def end_with_reader() -> None:
    """Lets this process end without a word once nobody reads what it prints: for a command that does nothing else."""
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
