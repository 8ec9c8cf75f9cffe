"""Text to token shards: python data/prepare.py NAME | FILES...   (--help lists the names and the options)

Writes data/NAME/{train_000000.bin, ..., val_000000.bin, ..., meta.json}, which data/shards.py reads. Every document
begins with the tokenizer's eot token, and goes to train or validation by a hash of its content, so that more files or
another order never move it across; a text that is one document is cut, and its last part validates. mqar is no text:
its documents are drawn (data/synthetic.py). All is written in a folder beside and takes the place of an earlier one
when it is whole; where nothing has changed nothing is done.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path

if __name__ == "__main__":  # this folder on the path would shadow the installed package `tokenizers`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from tqdm import tqdm

from data.shards import Shards, write_shard
from data.sources import KINDS, NAMED, Named, find_text
from data.synthetic import MQAR
from data.tokenizers import CHAT_TOKENS, load_tokenizer, tokenizer_from_dict, train_bpe

CHUNK = 1 << 20  # characters that a worker gets at a time
TEXT_OPTIONS = "tokenizer", "add_tokens", "max_doc_tokens", "max_tokens", "input", "workers"
MQAR_OPTIONS = *MQAR._fields, "documents", "seed"
worker = {}  # a worker process's settings


# ---- documents to train and validation ------------------------------------------------------------------------------


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
            if len(first) > 1:
                yield "val" if content_hash(text) < limit else "train", text
                continue
            cut = int(len(text) * (1 - val_fraction))
            for split, part in (("train", text[:cut]), ("val", text[cut:])):
                if part:
                    yield split, part

    return documents


# ---- text to tokens, in worker processes ----------------------------------------------------------------------------


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


def encode_all(all_chunks, workers, tokenizer, max_doc_tokens):
    """Encoded chunks in order. Only a few are under way at a time, so memory stays bounded whatever comes."""
    settings = tokenizer.to_dict(), max_doc_tokens
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


# ---- tokens to a folder of shards -----------------------------------------------------------------------------------


class Writer:
    """One split's tokens into shards of shard_tokens; counts documents and bytes of text on the way."""

    def __init__(self, folder, split, vocab, token_bytes, shard_tokens):
        self.folder, self.split, self.vocab, self.token_bytes = folder, split, vocab, token_bytes
        dtype = np.uint16 if vocab.vocab_size <= 1 << 16 else np.uint32
        self.buffer, self.held = np.empty(shard_tokens, dtype), 0
        self.tokens = self.documents = self.bytes = self.shards = 0
        self.digest = hashlib.sha256()

    def add(self, tokens):
        self.tokens += len(tokens)
        self.documents += int((tokens == self.vocab.eot_id).sum())  # plain text never becomes eot
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
            write_shard(path, self.buffer[: self.held], self.vocab.vocab_size)
            tqdm.write(f"wrote {path.name}: {self.held:,} tokens")
            self.shards, self.held = self.shards + 1, 0


def read_meta(out: Path) -> dict | None:
    """meta.json of a folder that was written here; None where there is nothing. Refuses a folder of something else."""
    names = sorted(os.listdir(out)) if out.exists() else []
    if not names:
        return None
    foreign = [name for name in names if not re.fullmatch(r"(train|val)_\d{6}\.bin|meta\.json", name)]
    try:
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        ours = not foreign and "request" in meta
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise ValueError(
            f"{out} holds {', '.join((foreign or names)[:3])}, not only what prepare.py wrote, and all of it would be "
            f"replaced: move it away or choose another folder with --out"
        )
    return meta


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
        alphabet = set(chain.from_iterable(set(text) for _, text in documents()))
        return load_tokenizer(spec, add_tokens, "".join(alphabet))
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
    """All shards of a text into the folder, meta.json last."""
    documents = split_documents(read_all, args.val_fraction)
    workers = args.workers or min(os.cpu_count(), 1 + (size or 1 << 40) // (4 * CHUNK))
    tokenizer = make_tokenizer(args.tokenizer, args.add_tokens, documents, folder, workers)
    token_bytes = tokenizer.token_bytes()
    splits = {split: Writer(folder, split, tokenizer, token_bytes, args.shard_tokens) for split in ("train", "val")}
    longest = max(1, int(token_bytes.max()))  # N tokens are never more than N * longest characters
    work = chunks(documents(), args.max_doc_tokens and args.max_doc_tokens * longest)
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        for encoded, text_bytes in encode_all(work, workers, tokenizer, args.max_doc_tokens):
            for split, tokens in encoded.items():
                if args.max_tokens and split == "train":
                    tokens = tokens[: args.max_tokens - splits["train"].tokens]
                splits[split].add(tokens)
            bar.update(text_bytes)
            if splits["train"].tokens == args.max_tokens:
                break
    finish(args, folder, splits, tokenizer, tokenizer.fingerprint, {"tokenizer": tokenizer.to_dict()})


def write_mqar(args, folder, task):
    """The same of drawn documents."""
    validating = round(args.documents * args.val_fraction)
    splits, no_text = {}, np.zeros(task.vocab_size, np.int64)
    for split, n in (("train", args.documents - validating), ("val", validating)):
        splits[split] = Writer(folder, split, task, no_text, args.shard_tokens)
        for documents in task.documents(args.seed, split, n):
            splits[split].add(documents.ravel())
    layout = {"targets": task.targets, "document_tokens": task.document_tokens}
    finish(args, folder, splits, task, json.dumps(layout), {"tokenizer": None, **layout})


def finish(args, folder, splits, vocab, fingerprint, more):
    """The last shard of each split, then meta.json. fingerprint: of what gives the ids their meaning."""
    for split, writer in splits.items():
        writer.flush()
        if not writer.tokens:
            raise ValueError(f"no document is in {split}: change --val_fraction={args.val_fraction} or give more")
    digests = [fingerprint, *(writer.digest.hexdigest() for writer in splits.values())]
    meta = {"source": args.source, "vocab_size": vocab.vocab_size, "eot_id": vocab.eot_id}
    for what in ("documents", "bytes", "tokens"):
        meta[what] = {split: getattr(writer, what) for split, writer in splits.items()}
    meta["fingerprint"] = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    meta |= {"request": args.request, **more}
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
    name = Path(args.source[0]).resolve().name.split(".")[0]
    out = Path(args.out or Path(__file__).with_name(name)).resolve()
    drawn = args.source == ["mqar"]
    if drawn:
        queries = max(1, args.pairs - 1) if args.queries is None else args.queries
        task = MQAR(args.pairs, queries, args.keys, args.values)
        task.check(args.documents, args.seed)
        identity = ["mqar", *task, args.documents, args.seed]
    else:
        identity, size, read_all = find_text(args.source, args.input)
    # All that decides the result; the tokenizer's file, like the text's, is known by size and time.
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
            if drawn:
                write_mqar(args, folder, task)
            else:
                write(args, folder, size, read_all)
        print(f"took {time.time() - start:.1f} s")
    meta = read_meta(out)
    for split in ("train", "val"):
        counts = (f"{meta[what][split]:,} {what}" for what in ("documents", "bytes", "tokens"))
        print(f"{out} {split}: {', '.join(counts)}, vocabulary {meta['vocab_size']:,}")
    if "document_tokens" in meta:
        print(f"every document has {meta['document_tokens']} tokens: train with that block_size")


def main(argv: list[str] | None = None) -> None:
    names = "\n".join(f"  {name:12} {named.about} [{named.tokenizer}]" for name, named in NAMED.items())
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.epilog = f"names, and their tokenizers:\n{names}"
    add = parser.add_argument
    text, mqar = parser.add_argument_group("of text alone"), parser.add_argument_group("of mqar alone")
    kinds = ", ".join(KINDS)
    add("source", nargs="+", metavar="NAME|FILES", help=f"a name below; {kinds}, also .gz; folders; - is stdin")
    add("--out", help="folder to write (default: data/NAME)")
    add("--val_fraction", type=float, help="share of the documents that validates")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a file")
    add = text.add_argument
    add("--tokenizer", help="byte, char, gpt2, cl100k_base, o200k_base, a file, bpe:FILE, or bpe:8192 to train one")
    add("--add_tokens", type=lambda s: CHAT_TOKENS if s == "chat" else s.split(","), default=[], help="A,B,... or chat")
    add("--max_doc_tokens", type=int, help="cut documents to this many tokens, eot included")
    add("--max_tokens", type=int, help="stop when train has this many, for sets without end")
    add("--input", help="a local copy (file or folder) of a named set")
    add("--workers", type=int, help="processes (default: by the size of the text and the cores)")
    add = mqar.add_argument
    add("--pairs", type=int, default=8, help="keys with a value in a document (default: 8)")
    add("--queries", type=int, help="of these keys that are asked for (default: all but one: 4 * pairs - 1 tokens)")
    add("--keys", type=int, default=16, help="different keys (default: 16)")
    add("--values", type=int, default=8, help="different values: guessing has a loss of ln of it (default: 8)")
    add("--documents", type=int, default=100_000, help="of train and validation (default: 100,000)")
    add("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        for key in TEXT_OPTIONS if args.source == ["mqar"] else MQAR_OPTIONS:
            if getattr(args, key) != parser.get_default(key):
                raise ValueError(f"--{key} means nothing to {' '.join(args.source)}: leave it out")
        prepare(args)
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted: nothing was changed")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"prepare.py: {error}")


if __name__ == "__main__":
    main()
