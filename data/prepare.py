"""Text to token shards: python data/prepare.py NAME | FILES...   (--help lists the names and the options)

Writes data/NAME/{train_000000.bin, ..., val_000000.bin, ..., meta.json}, which data/shards.py reads. Every document
begins with the tokenizer's eot token, and goes to train or validation by a hash of its content, so that more files or
another order never move it across; a text that is one document is cut, and its last part validates. All is written in
a folder beside and takes the place of an earlier one when it is whole; where nothing has changed nothing is done.
"""

import argparse
import difflib
import fcntl
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):  # run as a script: data/tokenizers.py must not shadow the installed package tokenizers
    sys.path[0] = str(HERE.parent)

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.shards import Shards, write_shard  # noqa: E402
from data.tokenizers import CHAT_TOKENS, load_tokenizer, tokenizer_from_dict, train_bpe  # noqa: E402

KINDS = (".txt", ".jsonl", ".py")
EOT = "<|endoftext|>"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CHUNK = 1 << 20  # characters that a worker gets at a time
worker = {}  # a worker process's settings


def walk(root, kinds=KINDS, without=()):
    """The text files below a folder, in sorted order; hidden folders are left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in without and not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if name.removesuffix(".gz").endswith(kinds))


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


def shakespeare():
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=60) as response:
            yield decode(response.read(), SHAKESPEARE)
    except OSError as error:
        raise ValueError(f"cannot download {SHAKESPEARE} ({error}): give a local copy with --input") from None


def hub(path, **arguments):
    """A function that streams a dataset of the Hugging Face hub: a document is the "text" of a row."""

    def read():
        try:
            import datasets
        except ModuleNotFoundError:
            raise ValueError(
                f"{path} is streamed from the hub: pip install datasets zstandard  (or give a local copy with --input)"
            ) from None
        for row in datasets.load_dataset(path, split="train", streaming=True, **arguments):
            yield row["text"]

    return read


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
}


def decode(data, path, offset=0):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {offset + error.start}: "
            f"convert it, for example with  iconv -f latin1 -t utf-8"
        ) from None


def read_lines(file, path):
    offset = 0
    for line in file:
        yield decode(line, path, offset)
        offset += len(line)


def read(path: Path, separator: str | None = None) -> Iterator[str]:
    """The documents of a file: each line of a .jsonl has one; a .txt or .py is one, or many between separators."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                for number, line in enumerate(read_lines(file, path), 1):
                    if line.strip():
                        yield text_field(line, f"{path}:{number}")
            elif separator:
                held = []
                for line in read_lines(file, path):
                    for text in line.split(separator)[:-1]:
                        yield "".join([*held, text]).strip()
                        held = []
                    held.append(line.rpartition(separator)[2])
                yield "".join(held).strip()
            else:
                yield decode(file.read(), path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: a damaged gzip file: {error}") from None


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
    if named and named.documents and not copy:
        return sources[0], None, named.documents
    paths = named.files() if named and not copy else []
    for path in () if paths else [copy] if copy else sources:
        if Path(path).is_dir():
            paths += walk(path)
        elif not Path(path).exists():
            near = difflib.get_close_matches(path, NAMED, 1)
            hint = f"did you mean {near[0]}?" if near else f"the named sets are {', '.join(NAMED)}"
            raise ValueError(f"{path}: there is no such file, and no set of this name: {hint}")
        elif not path.removesuffix(".gz").endswith(KINDS):
            raise ValueError(f"{path}: can read {', '.join(KINDS)} and .gz of them: call it .txt if it is plain text")
        else:
            paths.append(Path(path))
    stats = [path.stat() for path in paths]
    identity = [[os.path.abspath(path), stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats)]
    separator = named.separator if named else None
    return identity, sum(n for _, n, _ in identity), lambda: chain.from_iterable(read(p, separator) for p in paths)


def content_hash(text):
    """A number in [0, 2**64) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_documents(read_all: Callable, val_fraction: float) -> Callable[[], Iterator[tuple[str, str]]]:
    """A function that gives every document as (split, text).

    Where there are few, none might fall into one of the splits: those with the smallest and the largest hash then make
    sure that validation and train have one. A single one is cut at val_fraction from its end.
    """
    first = [content_hash(text) for text in islice(filter(None, read_all()), 1000)]
    if not first:
        raise ValueError("found no documents, so there is nothing to write")
    limit = val_fraction * 2**64
    if 1 < len(first) < 1000:
        limit = min(max(limit, min(first) + 1), max(first))

    def documents():
        for text in filter(None, read_all()):
            if len(first) == 1:
                cut = int(len(text) * (1 - val_fraction))
                yield from ((split, part) for split, part in (("train", text[:cut]), ("val", text[cut:])) if part)
            else:
                yield "val" if content_hash(text) < limit else "train", text

    return documents


def pieces(text):
    """A long document in parts that tokenize alike: cut where a word begins, which every split pattern does, too."""
    start = 0
    while len(text) - start > 2 * CHUNK:
        word = re.compile(r"(?<=\S) (?=[^\W\d_])").search(text, start + CHUNK, start + 2 * CHUNK)
        end = word.start() if word else start + CHUNK
        yield text[start:end]
        start = end
    yield text[start:]


def chunks(documents, max_characters):
    """Lists of (split, whether a document begins, text) with about CHUNK characters in each."""
    held, size = [], 0
    for split, text in documents:
        for i, piece in enumerate(pieces(text) if max_characters is None else [text[:max_characters]]):
            held.append((split, i == 0, piece))
            size += len(piece)
            if size >= CHUNK:
                yield held
                held, size = [], 0
    if held:
        yield held


def start_worker(tokenizer, max_doc_tokens):
    worker.update(tokenizer=tokenizer_from_dict(tokenizer), max_doc_tokens=max_doc_tokens)
    if parent := parent_process():  # a worker whose parent was killed would wait for work for ever
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent ends this one
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode(chunk):
    """A chunk's tokens: ({split: (n,) uint32}, bytes of its text)."""
    tokens = {"train": [], "val": []}
    for split, begins, text in chunk:
        ids = [worker["tokenizer"].eot_id] * begins + worker["tokenizer"].encode(text)
        tokens[split].append(np.array(ids[: worker["max_doc_tokens"]], np.uint32))
    size = sum(len(text.encode()) for _, _, text in chunk)
    return {split: np.concatenate(parts) for split, parts in tokens.items() if parts}, size


def encode_all(all_chunks, workers, *settings):
    """Encoded chunks in order. Only a few are under way at a time, so memory stays bounded whatever comes."""
    if workers == 1:
        start_worker(*settings)
        yield from map(encode, all_chunks)
        return
    context = get_context("spawn")  # a fork would inherit the lock on the output
    with ProcessPoolExecutor(workers, context, start_worker, settings) as pool:
        waiting = deque()
        for chunk in all_chunks:
            waiting.append(pool.submit(encode, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Writer:
    """One split's tokens into shards of shard_tokens; counts documents and bytes of text on the way."""

    def __init__(self, folder, split, tokenizer, shard_tokens):
        self.folder, self.split, self.tokenizer = folder, split, tokenizer
        self.token_bytes = tokenizer.token_bytes()
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self.buffer, self.held = np.empty(shard_tokens, dtype), 0
        self.tokens = self.documents = self.bytes = self.shards = 0
        self.digest = hashlib.sha256()

    def add(self, tokens):
        self.tokens += len(tokens)
        self.documents += int((tokens == self.tokenizer.eot_id).sum())  # plain text never becomes eot
        self.bytes += int(self.token_bytes[tokens].sum(dtype=np.int64))
        self.digest.update(tokens.astype("<u4").data)
        while len(tokens):
            part, tokens = np.split(tokens, [len(self.buffer) - self.held])
            self.buffer[self.held : self.held + len(part)] = part
            self.held += len(part)
            if self.held == len(self.buffer):
                self.flush()

    def flush(self):
        if self.held:
            path = self.folder / f"{self.split}_{self.shards:06d}.bin"
            write_shard(path, self.buffer[: self.held], self.tokenizer.vocab_size)
            tqdm.write(f"wrote {path.name}: {self.held:,} tokens")
            self.shards, self.held = self.shards + 1, 0


def read_meta(out: Path) -> dict | None:
    """meta.json of a folder that was written here; None where there is nothing. Refuses a folder of something else."""
    names = sorted(os.listdir(out)) if out.exists() else []
    foreign = [name for name in names if not re.fullmatch(r"(train|val)_\d{6}\.bin|meta\.json", name)]
    try:
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8")) if names else None
        if not foreign and (meta is None or meta["request"]):
            return meta
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{out} holds {', '.join((foreign or names)[:3])}, not only what prepare.py wrote, and all of it would be "
        f"replaced: move it away or choose another folder with --out"
    )


def is_whole(out, meta):
    try:
        return all(len(Shards(out, split)) == n for split, n in meta["tokens"].items())
    except (OSError, ValueError):
        return False


@contextmanager
def successor(out: Path):
    """A locked folder beside `out`, which takes its place when the block ends without an error."""
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another prepare.py is writing {out}: wait for it or choose another --out") from None
    try:
        for path in partial.iterdir():  # of a run that was killed
            path.unlink()
        if old.exists():  # a run was killed between the renames below
            shutil.rmtree(old) if out.exists() else os.rename(old, out)
        yield partial
        os.fsync(lock)
        if out.exists():
            os.rename(out, old)
        os.rename(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def make_tokenizer(spec, add_tokens, documents, folder, workers):
    """Loads a tokenizer, or makes the ones that come from the text itself: char, and bpe:SIZE."""
    if spec == "char":
        return load_tokenizer(spec, add_tokens, "".join(set(chain.from_iterable(set(text) for _, text in documents()))))
    if not re.fullmatch(r"bpe:\d+", spec):
        return load_tokenizer(spec, add_tokens)
    sample, room = folder / "sample.jsonl", 100_000_000
    with open(sample, "w", encoding="utf-8") as file:
        for text in (text for split, text in documents() if split == "train"):
            file.write(json.dumps({"text": text[:room]}) + "\n")
            room -= len(text)
            if room <= 0:
                break
    tokenizer = train_bpe([sample], int(spec[4:]), special_tokens=add_tokens, workers=workers)
    sample.unlink()
    return tokenizer


def write(args, folder, size, read_all):
    """All shards into the folder, meta.json last."""
    documents = split_documents(read_all, args.val_fraction)
    workers = args.workers or min(os.cpu_count(), 1 + (size or 1 << 40) // (4 * CHUNK))
    tokenizer = make_tokenizer(args.tokenizer, args.add_tokens, documents, folder, workers)
    splits = {split: Writer(folder, split, tokenizer, args.shard_tokens) for split in ("train", "val")}
    longest = max(1, int(tokenizer.token_bytes().max()))  # N tokens are never more than N * longest characters
    work = chunks(documents(), args.max_doc_tokens and args.max_doc_tokens * longest)
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        for encoded, text_bytes in encode_all(work, workers, tokenizer.to_dict(), args.max_doc_tokens):
            for split, tokens in encoded.items():
                room = args.max_tokens and split == "train" and args.max_tokens - splits["train"].tokens
                splits[split].add(tokens[: room or None])
            bar.update(text_bytes)
            if splits["train"].tokens == args.max_tokens:
                break
    for split, writer in splits.items():
        writer.flush()
        if not writer.tokens:
            raise ValueError(f"no document is in {split}: change --val_fraction={args.val_fraction} or give more text")
    digests = [tokenizer.fingerprint, *(writer.digest.hexdigest() for writer in splits.values())]
    meta = {"source": args.source, "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id}
    for what in ("documents", "bytes", "tokens"):
        meta[what] = {split: getattr(writer, what) for split, writer in splits.items()}
    meta["fingerprint"] = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    meta |= {"request": args.request, "tokenizer": tokenizer.to_dict()}
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file)
        file.flush()
        os.fsync(file.fileno())


def prepare(args) -> None:
    named = NAMED.get(args.source[0], Named("", val_fraction=0.05))
    args.tokenizer = args.tokenizer or named.tokenizer
    args.val_fraction = named.val_fraction if args.val_fraction is None else args.val_fraction
    if not 0 < args.val_fraction < 1:
        raise ValueError(f"--val_fraction={args.val_fraction} is not between 0 and 1")
    if args.out is None and args.source[0] not in NAMED and (len(args.source) > 1 or args.source == ["-"]):
        raise ValueError("say where to write it: --out data/mytext")
    out = Path(args.out or HERE / Path(args.source[0]).resolve().name.split(".")[0]).resolve()
    identity, size, read_all = find_text(args.source, args.input)
    # What decides the result; files are known by path, size and time, so that a second run has nothing to read.
    file = Path(re.sub(r"^bpe:|(?<=\.tiktoken):\w+$", "", args.tokenizer))
    stat = [file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else None
    options = args.val_fraction, args.max_doc_tokens, args.max_tokens, args.shard_tokens, args.add_tokens
    request = json.dumps([1, identity, args.tokenizer, stat, options])
    args.request = hashlib.sha256(request.encode()).hexdigest()
    start, meta = time.time(), read_meta(out)
    if meta and meta["request"] == args.request and is_whole(out, meta):
        print("nothing has changed, so the data is reused")
    else:
        with successor(out) as folder:
            write(args, folder, size, read_all)
        print(f"took {time.time() - start:.1f} s")
    meta = read_meta(out)
    for split in ("train", "val"):
        counts = (f"{meta[what][split]:,} {what}" for what in ("documents", "bytes", "tokens"))
        print(f"{out} {split}: {', '.join(counts)}, vocabulary {meta['vocab_size']:,}")


def main(argv: list[str] | None = None) -> None:
    names = "\n".join(f"  {name:12} {named.about} [{named.tokenizer}]" for name, named in NAMED.items())
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.epilog = f"names, and their tokenizers:\n{names}"
    add = parser.add_argument
    add(
        "source", nargs="+", metavar="NAME|FILES", help=f"name below; {', '.join(KINDS)}, also .gz; folders; - is stdin"
    )
    add("--out", help="folder to write (default: data/NAME)")
    add("--tokenizer", help="byte, char, gpt2, cl100k_base, o200k_base, a file, bpe:FILE, or bpe:8192 to train one")
    add("--add_tokens", type=lambda s: CHAT_TOKENS if s == "chat" else s.split(","), default=[], help="A,B,... or chat")
    add("--val_fraction", type=float, help="share of the documents that validates")
    add("--max_doc_tokens", type=int, help="cut documents to this many tokens, eot included")
    add("--max_tokens", type=int, help="stop when train has this many, for sets without end")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a file")
    add("--input", help="a local copy (file or folder) of a named set")
    add("--workers", type=int, help="processes (default: by the size of the text and the cores)")
    try:
        prepare(parser.parse_args(argv))
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted: nothing was changed")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"prepare.py: {error}")


if __name__ == "__main__":
    main()
