"""Text to token shards: python data/prepare.py NAME | FILES...   (--help lists the names and the options)

Writes data/NAME/{train_000000.bin, ..., val_000000.bin, ..., meta.json}, which data/shards.py reads. Every document
begins with the tokenizer's eot token, and goes to train or validation by a hash of its content, so that more files or
another order never move it across; a text that is one document is cut, and its last part validates. mqar is no text:
its documents are drawn (data/synthetic.py). With --chat a document is a conversation of data/chat.py, and shards of
masks say which of its tokens are learned. All is written in a folder beside and takes the place of an earlier one
when it is whole; where nothing has changed nothing is done, and what was interrupted goes on behind its last whole
shard. A folder of another tool's token files, nanoGPT's or build-nanogpt's, becomes shards of the same tokens
(data/token_files.py).
"""

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # this folder on the path would shadow the installed package `tokenizers`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from tqdm import tqdm

from data import chat, sources, token_files
from data.bpe import CHAT_TOKENS, EOT, TURN_ENDS
from data.bpe_training import end_with_parent, write_sample
from data.progress import NOTE, Progress, find_note, shard_path, write_note
from data.shards import HEADER_BYTES, PUBLISHED, Shards, mask_of, read_meta, write_shard
from data.sources import KINDS, NAMED, Named, Skipped, find_text, identity_of
from data.successor import successor
from data.synthetic import MQAR
from data.text import name_inside, print_any_text
from data.tokenizers import load_tokenizer, tokenizer_from_dict, train_bpe

CHUNK = 1 << 20  # characters that a worker gets at a time
TEXT_OPTIONS = "tokenizer add_tokens eot field max_doc_tokens max_documents max_tokens split_at_eot".split()
TEXT_OPTIONS += ["skip_bad", "input", "workers"]
CHAT_OPTIONS = "think", "switches", "turns"
MQAR_OPTIONS = *MQAR._fields, "documents", "seed"
MOST = 10**13  # tokens, of which no data has more
LARGEST = {  # of the numbers that begin at 1
    "shard_tokens": 2**31 - 1,  # which the header of a shard can count
    "max_documents": MOST,
    "max_doc_tokens": MOST,
    "max_tokens": MOST,
    "workers": 1000,
}
worker = {}  # a worker process's settings


# ---- documents to train and validation ------------------------------------------------------------------------------


def measure(document):
    """Returns a number in [0, 2**64) that depends on the text alone, and how many characters it has."""
    digest = hashlib.sha256()
    length = 0
    for part in document:
        digest.update(part.encode())
        length += len(part)
    return int.from_bytes(digest.digest()[:8], "big"), length


def stretch(parts, begin, end):
    """Yields of a text that comes in parts what lies from one character to another."""
    place = 0
    for part in parts:
        wanted = part[max(begin - place, 0) : end - place]
        if wanted:
            yield wanted
        place += len(part)
        if place >= end:
            return


def split_documents(read_all: Callable, val_fraction: float) -> Callable[[], Iterator[tuple[str, Iterable[str]]]]:
    """Returns a function that gives every document as (split, the parts of its text).

    Where there are few, none might fall into one of the splits: those with the smallest and the largest hash then make
    sure that validation and train have one. A single one is cut at val_fraction from its end.
    """
    hashes = (number for number, length in map(measure, read_all()) if length)
    first = list(islice(hashes, 1000))
    if not first:
        raise ValueError("found no documents, so there is nothing to write")
    limit = val_fraction * 2**64
    if 1 < len(first) < 1000:
        limit = max(limit, min(first) + 1)
        limit = min(limit, max(first))

    def documents():
        for document in read_all():
            number, length = measure(document)
            if not length:
                continue
            if len(first) == 1:
                cut = int(length * (1 - val_fraction))
                if cut > 0:
                    yield "train", stretch(document, 0, cut)
                if cut < length:
                    yield "val", stretch(document, cut, length)
            elif number < limit:
                yield "val", document
            else:
                yield "train", document

    return documents


def find_chats(args, skipped: Skipped | None) -> sources.Text:
    """Returns conversations as documents, each the JSON of its messages."""
    rows = sources.find_rows(args.source, args.input, skipped)
    name = " ".join(args.source)

    def documents():
        if skipped is not None:
            skipped.clear()
        found = chat.conversations(
            rows.read(), lambda error: sources.leave_out(error, skipped), args.think, args.switches
        )
        n = 0
        for messages in islice(found, args.max_documents):
            n += 1
            yield [json.dumps(messages)]
        if n < 2:
            count = "one conversation" if n else "no conversation"
            raise ValueError(f"{name}: {count} in it, and it takes two: one to train on, and one that validates")

    return sources.Text(rows.identity, None, documents)


# ---- text to tokens, in worker processes ----------------------------------------------------------------------------


def pieces(parts):
    """Yields a document in pieces that tokenize alike: cut where a word begins, as every split pattern does."""
    word = re.compile(r"(?<=\S) (?=[^\W\d_])")
    text = ""
    for part in parts:
        text += part
        while len(text) > 2 * CHUNK:
            found = word.search(text, CHUNK, 2 * CHUNK)
            end = found.start() if found else CHUNK
            yield text[:end]
            text = text[end:]
    yield text


def chunks(documents, max_characters):
    """Yields lists of (split, whether a document begins, text) with about CHUNK characters in each."""
    chunk = []
    size = 0
    for split, parts in documents:
        if max_characters is None:
            cut = pieces(parts)
        else:
            cut = ["".join(stretch(parts, 0, max_characters))]  # in one: a worker cuts what it gets to max_doc_tokens
        for i, piece in enumerate(cut):
            chunk.append((split, i == 0, piece))
            size += len(piece)
            if size >= CHUNK:
                yield chunk
                chunk = []
                size = 0
    if chunk:
        yield chunk


class Encoded(NamedTuple):
    """What comes of a chunk of text."""

    tokens: dict[str, np.ndarray]  # of each split
    bytes: dict[str, np.ndarray]  # of each split: of the text, and of what its tokens stand for before they are cut
    changed: list[tuple[str, str]]  # where a text and what its tokens give back differ, if they do
    text_hash: str  # of the chunk
    masks: dict[str, np.ndarray] = {}  # of each split, where not all tokens are targets
    chats: Counter = Counter()  # what there is to be said of conversations


def start_worker(tokenizer, max_doc_tokens, turns):
    """Makes this process ready for `encode` or `encode_chats`; it may be the only one."""
    worker["tokenizer"] = tokenizer_from_dict(tokenizer)
    worker["token_bytes"] = worker["tokenizer"].token_bytes()
    worker["is_lossy"] = tokenizer["kind"] in ("sentencepiece", "huggingface") or tokenizer.get("nfc", False)
    worker["max_doc_tokens"] = max_doc_tokens
    worker["turns"] = turns
    if parent_process():
        end_with_parent()


def encode(chunk):
    """Returns a chunk's tokens, and what was lost on the way to them."""
    tokenizer = worker["tokenizer"]
    tokens = {"train": [], "val": []}
    sizes = {"train": np.zeros(2, np.int64), "val": np.zeros(2, np.int64)}
    changed = []
    for split, begins, text in chunk:
        ids = tokenizer.encode(text)
        if worker["is_lossy"]:
            back = tokenizer.decode(ids)
            if back != text:
                changed.append(difference(text, back))
        if begins:
            ids = [tokenizer.eot_id, *ids]
        array = np.array(ids, np.uint32)
        sizes[split] += len(text.encode()), worker["token_bytes"][array].sum()
        tokens[split].append(array[: worker["max_doc_tokens"]])
    whole = {split: np.concatenate(arrays) for split, arrays in tokens.items() if arrays}
    return Encoded(whole, sizes, changed, hash_of(chunk))


def encode_chats(chunk):
    """Returns a chunk's conversations as tokens and masks."""
    tokenizer = worker["tokenizer"]
    tokens = {"train": [], "val": []}
    masks = {"train": [], "val": []}
    sizes = {"train": np.zeros(2, np.int64), "val": np.zeros(2, np.int64)}
    counts = Counter()
    for split, _, text in chunk:
        ids, is_target = chat.encode(tokenizer, json.loads(text), worker["turns"])
        array = np.array(ids, np.uint32)[: worker["max_doc_tokens"]]
        mask = np.array(is_target)[: worker["max_doc_tokens"]]
        counts["learned"] += int(mask.sum())
        counts["empty"] += not mask.any()
        counts["cut"] += len(array) < len(ids)
        sizes[split] += worker["token_bytes"][array].sum()
        tokens[split].append(array)
        masks[split].append(mask)
    tokens = {split: np.concatenate(arrays) for split, arrays in tokens.items() if arrays}
    masks = {split: np.concatenate(arrays) for split, arrays in masks.items() if arrays}
    return Encoded(tokens, sizes, [], hash_of(chunk), masks, counts)


def hash_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def difference(text, back):
    """Returns the first place where two texts differ, as it looks in each."""
    same = len(os.path.commonprefix([text, back]))
    around = slice(max(same - 10, 0), same + 10)
    return text[around], back[around]


def encode_all(all_chunks, workers, tokenizer, max_doc_tokens, turns):
    """Yields encoded chunks in order. Only a few are under way at a time, so memory stays bounded whatever comes.

    turns: which answers of conversations are learned, None for text.
    """
    settings = tokenizer.to_dict(), max_doc_tokens, turns
    work = encode_chats if turns else encode
    if workers == 1:
        start_worker(*settings)
        yield from map(work, all_chunks)
        return
    context = get_context("spawn")  # a fork would inherit the lock on the output
    with ProcessPoolExecutor(workers, context, start_worker, settings) as pool:
        waiting = deque()
        for chunk in all_chunks:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ---- tokens to a folder of shards -----------------------------------------------------------------------------------


class Writer:
    """One split's tokens on their way into shards of shard_tokens; counts documents, and the bytes they stand for."""

    def __init__(self, folder, split, vocab, token_bytes, shard_tokens):
        self.folder = folder
        self.split = split
        self.vocab = vocab
        self.token_bytes = token_bytes
        dtype = np.uint16 if vocab.vocab_size <= 1 << 16 else np.uint32
        self.buffer = np.empty(shard_tokens, dtype)
        self.mask = None  # of what is in the buffer, where not all of it are targets
        self.filled = 0
        self.tokens = 0
        self.documents = 0
        self.bytes = 0
        self.shards = 0
        self.digest = hashlib.sha256()
        self.mask_digest = hashlib.sha256()

    def add(self, tokens, mask=None):
        self.tokens += len(tokens)
        self.documents += int((tokens == self.vocab.eot_id).sum())  # plain text never becomes eot
        self.bytes += int(self.token_bytes[tokens].sum(dtype=np.int64))
        self.digest.update(tokens.astype("<u4").data)
        if mask is not None:
            self.mask_digest.update(mask.data)
            if self.mask is None:
                self.mask = np.empty(len(self.buffer), bool)
        while len(tokens):
            part = tokens[: len(self.buffer) - self.filled]
            tokens = tokens[len(part) :]
            self.buffer[self.filled : self.filled + len(part)] = part
            if mask is not None:
                self.mask[self.filled : self.filled + len(part)] = mask[: len(part)]
                mask = mask[len(part) :]
            self.filled += len(part)
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self):
        if self.filled:
            path = shard_path(self.folder, self.split, self.shards)
            mask = None if self.mask is None else self.mask[: self.filled]
            write_shard(path, self.buffer[: self.filled], self.vocab.vocab_size, mask)
            tqdm.write(f"wrote {path.name}: {self.filled:,} tokens")
            self.shards += 1
            self.filled = 0

    def counts(self):
        return {name: getattr(self, name) for name in ("tokens", "documents", "bytes", "shards")}

    def rests(self):
        """Returns the tokens that fill no shard yet, and their mask if there is one."""
        found = {self.split: self.buffer[: self.filled]}
        if self.mask is not None:
            found[f"{self.split}_mask"] = self.mask[: self.filled]
        return found

    def go_on(self, counts, rests):
        """Goes on where another writer ended that had these counts and rests; its whole shards are in the folder."""
        vars(self).update(counts)
        rest = rests[self.split]
        mask = rests.get(f"{self.split}_mask")
        self.filled = len(rest)
        self.buffer[: self.filled] = rest
        if mask is not None:
            self.mask = np.empty(len(self.buffer), bool)
            self.mask[: self.filled] = mask
        for i in range(self.shards):
            path = shard_path(self.folder, self.split, i)
            self.digest.update(np.fromfile(path, self.buffer.dtype, offset=HEADER_BYTES).astype("<u4").data)
            if mask is not None:
                self.mask_digest.update(np.fromfile(mask_of(path), np.uint8, offset=HEADER_BYTES).data)
        self.digest.update(rest.astype("<u4").data)
        if mask is not None:
            self.mask_digest.update(mask.data)


def earlier_meta(out: Path) -> dict | None:
    """Returns meta.json of a folder that was written here, None where there is nothing; refuses any other folder."""
    names = sorted(os.listdir(out)) if out.exists() else []
    if not names:
        return None
    foreign = [name for name in names if not re.fullmatch(r"(train|val)_\d{6}(\.mask)?\.bin|meta\.json", name)]
    advice = "move it away or choose another folder with --out"
    meta = {}
    if not foreign and "meta.json" in names:
        meta = read_meta(out / "meta.json", advice)
    if "request" not in meta:
        held = ", ".join((foreign or names)[:3])
        raise ValueError(
            f"{out} holds {held}, not only what prepare.py wrote, and all of it would be replaced: {advice}"
        )
    return meta


def is_whole(out, meta):
    try:
        return all(len(Shards(out, split)) == n for split, n in meta["tokens"].items())
    except (OSError, ValueError):
        return False


# ---- from what the user asked for to the folder ---------------------------------------------------------------------


def make_tokenizer(spec, add_tokens, eot, documents, folder, workers):
    """Loads a tokenizer, or makes the ones that come from the text itself: char, and bpe:SIZE."""
    if spec == "char":
        alphabet = set()
        for _, parts in documents():
            for text in parts:
                alphabet.update(text)
        return load_tokenizer(spec, add_tokens, "".join(alphabet), eot)
    if not re.fullmatch(r"bpe:\d+", spec):
        return load_tokenizer(spec, add_tokens, eot=eot)
    sample = folder / "sample.jsonl"
    write_sample(sample, chain.from_iterable(pieces(parts) for split, parts in documents() if split == "train"))
    tokenizer = train_bpe([sample], int(spec[4:]), special_tokens=add_tokens, workers=workers)
    sample.unlink()
    if eot:
        return tokenizer_from_dict(tokenizer.to_dict() | {"eot": eot})
    return tokenizer


class TextWriter:
    """A text on its way into shards of both splits: what was written of it, and what is to be said of it."""

    def __init__(self, folder, tokenizer, shard_tokens):
        self.folder = folder
        self.tokenizer = tokenizer
        token_bytes = tokenizer.token_bytes()
        self.writers = {
            split: Writer(folder, split, tokenizer, token_bytes, shard_tokens) for split in ("train", "val")
        }
        self.sizes = {
            split: np.zeros(2, np.int64) for split in self.writers
        }  # of text, and of what its tokens stand for
        self.chats = Counter()
        self.n_changed = 0
        self.examples = []  # the first of what was changed
        self.n_chunks = 0
        self.text_hash = ""  # of all these chunks

    def add(self, encoded, max_tokens):
        """Adds what came of a chunk, but to train no more than max_tokens if that is not None."""
        for split, tokens in encoded.tokens.items():
            writer = self.writers[split]
            mask = encoded.masks.get(split)
            if max_tokens and split == "train":
                tokens = tokens[: max_tokens - writer.tokens]
                mask = None if mask is None else mask[: len(tokens)]
            writer.add(tokens, mask)
            self.sizes[split] += encoded.bytes[split]
        self.chats.update(encoded.chats)
        self.n_changed += len(encoded.changed)
        self.examples = self.examples or encoded.changed[:1]
        self.n_chunks += 1
        self.text_hash = hash_of([self.text_hash, encoded.text_hash])

    def n_shards(self):
        return sum(writer.shards for writer in self.writers.values())

    def progress(self):
        fields = {name: getattr(self, name) for name in ("chats", "n_changed", "examples", "n_chunks", "text_hash")}
        fields["tokenizer"] = self.tokenizer.to_dict()
        fields["counts"] = {split: writer.counts() for split, writer in self.writers.items()}
        fields["sizes"] = {split: sizes.tolist() for split, sizes in self.sizes.items()}
        return Progress(fields, self.writers["train"].rests() | self.writers["val"].rests())

    def go_on(self, progress, chunks):
        """Takes up the progress of an interrupted run; the chunks that it wrote are read again, and not tokenized."""
        fields = progress.fields
        for split, writer in self.writers.items():
            writer.go_on(fields["counts"][split], progress.rests)
            self.sizes[split] += fields["sizes"][split]
        for name in ("n_changed", "examples", "n_chunks", "text_hash"):
            setattr(self, name, fields[name])
        self.chats.update(fields["chats"])
        tokens = sum(writer.tokens for writer in self.writers.values())
        print(f"goes on behind {tokens:,} tokens, which an interrupted run left in {self.folder}")

        text_hash = ""
        for chunk in tqdm(islice(chunks, self.n_chunks), "read again", self.n_chunks, unit="chunk", disable=None):
            text_hash = hash_of([text_hash, hash_of(chunk)])
        if text_hash != self.text_hash:
            (self.folder / NOTE).unlink()
            why = f"the text is not the one that an interrupted run read into {self.folder}, which is deleted"
            raise ValueError(f"{why}: the same command begins anew")


def write_text(args, folder, text):
    """Writes all shards of a text into the folder, meta.json last; goes on where an interrupted run ended."""
    documents = split_documents(text.documents, args.val_fraction)
    workers = args.workers
    if not workers:
        workers = min(os.cpu_count(), 61)  # Windows cannot wait for more
        if text.size is not None:
            workers = min(workers, 1 + text.size // (4 * CHUNK))
    if args.progress:
        tokenizer = tokenizer_from_dict(args.progress.fields["tokenizer"])
    else:
        tokenizer = make_tokenizer(args.tokenizer, args.add_tokens, args.eot, documents, folder, workers)
    print_marker(tokenizer)
    if args.chat:
        chat.check(tokenizer)
    written = TextWriter(folder, tokenizer, args.shard_tokens)
    train = written.writers["train"]

    max_characters = None
    if args.chat:
        max_characters = sys.maxsize  # no part of a conversation's JSON stands alone
    elif args.max_doc_tokens:
        longest = max(1, int(train.token_bytes.max()))  # bytes, so a token never has more characters
        max_characters = args.max_doc_tokens * longest
    work = chunks(documents(), max_characters)
    if args.progress:
        written.go_on(args.progress, work)
    noted = written.n_shards()
    read = sum(of_text for of_text, _ in written.sizes.values())
    turns = args.turns if args.chat else None
    with tqdm(total=text.size, initial=read, unit="B", unit_scale=True, disable=None) as bar:
        for encoded in encode_all(work, workers, tokenizer, args.max_doc_tokens, turns):
            written.add(encoded, args.max_tokens)
            bar.update(sum(of_text for of_text, _ in encoded.bytes.values()))
            if train.tokens == args.max_tokens:
                break
            if written.n_shards() > noted:
                write_note(folder, args.request, written.progress())
                noted = written.n_shards()

    # What was cut off a document or the end has no part in the tokens, so the text behind them is a share of it.
    text_bytes = {}
    for split, (of_text, of_tokens) in written.sizes.items():
        text_bytes[split] = round(written.writers[split].bytes * of_text / max(of_tokens, 1))
    more = {"tokenizer": tokenizer.to_dict(), "text_bytes": text_bytes}
    if args.chat:
        if not written.chats["learned"]:
            raise ValueError(
                f"{' '.join(args.source)}: in no conversation is there an answer of the assistant to learn"
            )
        more |= {"masks": True, "chats": written.chats}
    write_meta(args, folder, written.writers, tokenizer, tokenizer.fingerprint, more)
    if written.examples:
        of_both = written.sizes["train"] + written.sizes["val"]
        warn_of_loss(tokenizer, written.n_changed, written.examples[0], of_both)
    if text.with_marker:
        names = sorted(map(str, text.with_marker))
        print(f"{names[0]} spells out {EOT}, which stays text: --split_at_eot begins a document there", file=sys.stderr)


def print_marker(tokenizer):
    """Says which token begins a document, and which end a turn of a chat: a foreign file names them in many ways."""
    line = f"every document begins with {tokenizer.eot} (token {tokenizer.eot_id}; --eot takes another)"
    turn_ends = [token for token in TURN_ENDS if token in tokenizer.special_tokens | tokenizer.added_tokens]
    if turn_ends:
        line += f"; a turn of a chat ends with {', '.join(turn_ends)}"
    tqdm.write(line)


def warn_of_loss(tokenizer, n_changed, example, sizes):
    """Says that a tokenizer does not give all text back, with an example, and what can be done."""
    text, back = example
    of_text, of_tokens = sizes
    advice = "it is NFC that it normalises to: give it text in NFC"
    if tokenizer.kind == "sentencepiece":
        advice = "train it with  python data/tokenizers.py train --kind sentencepiece"
    if tokenizer.kind == "huggingface":
        advice = "take another tokenizer: this one's file changes text on purpose"
    print(
        f"WARNING: {tokenizer.name} loses text: {n_changed:,} pieces of it come back changed, {of_text:,} bytes as "
        f"{of_tokens:,}; the first has {text!r}, and gives back {back!r}. Bits per byte will count the bytes of the "
        f"text; to lose none, {advice}",
        file=sys.stderr,
    )


class Vocabulary(NamedTuple):
    """What there is to know of ids whose tokenizer is not here."""

    vocab_size: int
    eot_id: int


def write_tokens(args, folder):
    """Writes the same of other tools' token files: those of the tokenizer that is named, else GPT-2's."""
    if args.tokenizer:
        vocab = load_tokenizer(args.tokenizer, eot=args.eot)
        print_marker(vocab)
        meaning = vocab.fingerprint
        more = {"tokenizer": vocab.to_dict()}
        token_bytes = vocab.token_bytes()
    else:
        vocab = Vocabulary(*PUBLISHED[2])
        meaning = "GPT-2"
        more = {"tokenizer": None}
        token_bytes = np.zeros(vocab.vocab_size, np.int64)
    writers = {}
    for split, paths in args.token_files.items():
        writers[split] = Writer(folder, split, vocab, token_bytes, args.shard_tokens)
        for path in tqdm(paths, split, unit="file", disable=None):
            for tokens in token_files.read(path, vocab.vocab_size):
                writers[split].add(tokens)
    write_meta(args, folder, writers, vocab, meaning, more)


def write_mqar(args, folder, task):
    """Writes the same of drawn documents."""
    n_val = round(args.documents * args.val_fraction)
    sizes = {"train": args.documents - n_val, "val": n_val}
    no_text = np.zeros(task.vocab_size, np.int64)
    writers = {}
    for split, n in sizes.items():
        writers[split] = Writer(folder, split, task, no_text, args.shard_tokens)
        for documents in task.documents(args.seed, split, n):
            writers[split].add(documents.ravel())
    layout = {"targets": task.targets, "document_tokens": task.document_tokens}
    write_meta(args, folder, writers, task, json.dumps(layout), {"tokenizer": None, **layout})


def write_meta(args, folder, writers, vocab, fingerprint, more):
    """Writes the last shard of each split, then meta.json. fingerprint: of what gives the ids their meaning."""
    for split, writer in writers.items():
        writer.flush()
        if not writer.tokens:
            raise ValueError(f"no document is in {split}: change --val_fraction={args.val_fraction} or give more")
    digests = [fingerprint, *(writer.digest.hexdigest() for writer in writers.values())]
    digests += [writer.mask_digest.hexdigest() for writer in writers.values() if writer.mask is not None]
    meta = {"source": args.source, "origin": args.origin, "vocab_size": vocab.vocab_size, "eot_id": vocab.eot_id}
    for what in ("documents", "bytes", "tokens"):
        meta[what] = {split: getattr(writer, what) for split, writer in writers.items()}
    meta["fingerprint"] = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    meta["request"] = args.request
    meta.update(more)
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file)
        file.flush()
        os.fsync(file.fileno())


def request_hash(args, identity):
    """Returns a hash of all that decides the result; a tokenizer's file, like the text's, is known by size and time."""
    file = Path(re.sub(r"^bpe:|(?<=\.tiktoken):\w+$", "", args.tokenizer or ""))
    stamp = None
    if file.is_file():
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
    options = [
        args.val_fraction,
        args.max_doc_tokens,
        args.max_tokens,
        args.shard_tokens,
        args.add_tokens,
        args.skip_bad,
        args.split_at_eot,
        args.eot,
        args.field,
        args.max_documents,
    ]
    if args.chat:
        options += [args.think, args.switches, args.turns]
    version = 4  # one more, when the same request comes to give other tokens
    request = json.dumps([version, identity, args.tokenizer, stamp, options])
    return hashlib.sha256(request.encode()).hexdigest()


def mqar_task(args):
    """Returns the task of these sizes; raises ValueError where there is none."""
    queries = args.queries
    if queries is None:
        queries = max(1, args.pairs - 1)
    task = MQAR(args.pairs, queries, args.keys, args.values)
    task.check(args.documents, args.seed)
    return task


def folder_name(source: str) -> str:
    """Returns what the folder of a source is called: notes of notes.txt.gz, wiki.de of wiki.de.txt."""
    name = name_inside(Path(source).resolve())
    for ending in KINDS:
        name = name.removesuffix(ending)
    return name


def make_folder(args) -> Path:
    """Makes the folder that the arguments ask for, unless it is there, prints what is in it, and returns it."""
    # 1. Check what was asked for, and fill in what a named set decides.
    source = args.source[0]
    named = NAMED.get(source, Named("", val_fraction=0.05))
    if not args.tokenizer and not args.token_files:
        args.tokenizer = named.tokenizer
    if args.val_fraction is None:
        args.val_fraction = named.val_fraction
    if not 0 < args.val_fraction < 1:
        raise ValueError(f"--val_fraction={args.val_fraction} is not between 0 and 1")
    if args.out is None and source not in NAMED and (len(args.source) > 1 or source == "-"):
        raise ValueError("say where to write it: --out data/mytext")
    args.origin = [os.path.abspath(name) if os.path.exists(name) else name for name in args.source]
    chosen = bool(args.out)
    if not chosen:
        args.out = Path(__file__).with_name(folder_name(source))
    out = Path(args.out).resolve()

    # 2. Find what is to be written.
    skipped = Skipped() if args.skip_bad else None
    if args.source == ["mqar"]:
        task = mqar_task(args)
        identity = ["mqar", *task, args.documents, args.seed]
        write = partial(write_mqar, args, task=task)
    elif args.token_files:
        identity = identity_of(chain(*args.token_files.values()))
        write = partial(write_tokens, args)
    elif args.chat:
        text = find_chats(args, skipped)
        identity = ["chat", text.identity]
        write = partial(write_text, args, text=text)
    else:
        text = find_text(args.source, args.input, skipped, args.split_at_eot, args.field, args.max_documents)
        identity = text.identity
        write = partial(write_text, args, text=text)

    # 3. Write it, unless what is there was made of the same.
    args.request = request_hash(args, identity)
    start = time.time()
    meta = earlier_meta(out)
    if meta and not chosen and meta.get("origin", args.origin) != args.origin:
        made_of = " ".join(meta["origin"])
        raise ValueError(f"{out} was made of {made_of}: choose another folder with --out, or this one to replace it")
    if meta and meta["request"] == args.request and is_whole(out, meta):
        print("nothing has changed, so the data is reused")
    else:
        try:
            with successor(out) as folder:
                args.progress = find_note(folder, args.request)
                write(folder)
        finally:
            if skipped is not None and skipped.count:
                print(skipped, file=sys.stderr)
        print(f"took {time.time() - start:.1f} s")

    # 4. Say what is there.
    meta = earlier_meta(out)
    for split in ("train", "val"):
        sizes = ", ".join(f"{meta[what][split]:,} {what}" for what in ("documents", "bytes", "tokens"))
        print(f"{out} {split}: {sizes}, vocabulary {meta['vocab_size']:,}")
    if "chats" in meta:
        print(about_chats(meta["chats"], sum(meta["documents"].values()), sum(meta["tokens"].values())))
    if "document_tokens" in meta:
        print(f"every document has {meta['document_tokens']} tokens: train with that block_size")
    return out


def about_chats(counts, documents, tokens):
    line = f"{documents:,} conversations: {counts['learned']:,} of {tokens:,} tokens are learned"
    if counts["empty"]:
        line += f", nothing of {counts['empty']:,} conversations"
    if counts["cut"]:
        line += f"; {counts['cut']:,} were cut to --max_doc_tokens"
    return f"{line}; train with --pack=documents --document_mask"


def prepare(*sources: str | Path, **options) -> Path:
    """Does what the command does, with its options as arguments; returns the folder: Shards(folder, "train").

    prepare("a.txt", out="data/a", tokenizer="gpt2") is  python data/prepare.py a.txt --out data/a --tokenizer gpt2
    What cannot be done is a ValueError, OSError or ImportError. Text is tokenized in this process, unless `workers`
    says in how many: each begins by importing the caller's own file, which then needs  if __name__ == "__main__".
    """
    parser = make_parser()
    args = parser.parse_args([str(source) for source in sources])
    unknown = sorted(options.keys() - vars(args).keys())
    if unknown:
        raise TypeError(f"prepare has no option {', '.join(unknown)}: see  python data/prepare.py --help")
    vars(args).update(options)
    check_options(args, parser)
    args.workers = args.workers or 1
    return make_folder(args)


# ---- the command ----------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:12} {named.about} [{named.tokenizer}]" for name, named in NAMED.items())
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    row_sets = "\n".join(f"  {name:20} {row_set.about}" for name, row_set in sources.ROW_SETS.items())
    parser.epilog = f"names, and their tokenizers:\n{names}\nnames with --chat:\n{row_sets}"
    add = parser.add_argument
    text = parser.add_argument_group("of text alone")
    chats = parser.add_argument_group("of conversations alone")
    mqar = parser.add_argument_group("of mqar alone")
    kinds = ", ".join(KINDS)
    add(
        "source",
        nargs="+",
        metavar="NAME|FILES",
        help=f"a name below; {kinds}, also .gz and .zst; folders; - for stdin",
    )
    add("--out", help="folder to write (default: data/NAME)")
    add("--val_fraction", type=float, help="share of the documents that validates")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a file")
    add = text.add_argument
    add("--tokenizer", help="byte, char, gpt2, cl100k_base, o200k_base, a file, bpe:FILE, or bpe:8192 to train one")
    add("--add_tokens", default=[], help="A,B,... or chat")
    add("--eot", metavar="TOKEN", help="begins every document, where that is not to be the token that the file names")
    add("--field", default="text", help="of a .jsonl, or column of a .csv, .tsv or .parquet, that has the text")
    add("--max_documents", type=int, help="take no more than this many, of train and validation together")
    add("--max_doc_tokens", type=int, help="cut documents to this many tokens, eot included")
    add("--max_tokens", type=int, help="stop when train has this many, for sets without end")
    add("--split_at_eot", action="store_true", help=f"a document ends where a .txt spells out {EOT}")
    add("--skip_bad", action="store_true", help="leave out files and lines that cannot be read, and count them")
    add("--input", help="a local copy (file or folder) of a named set")
    add("--workers", type=int, help="processes (default: by the size of the text and the cores)")
    add = chats.add_argument
    add(
        "--chat",
        action="store_true",
        help=f"rows are conversations: of {', '.join(sources.ROW_KINDS)}, or a name below",
    )
    add(
        "--think", action="store_true", default=None, help="thinking is made of worked solutions, and each row has some"
    )
    add(
        "--no_think",
        action="store_false",
        dest="think",
        default=None,
        help="no thinking: an empty block is before the last answer",
    )
    add("--switches", action="store_true", help="the last question ends with /think or /no_think, as it is answered")
    add(
        "--turns", choices=["all", "last"], default="all", help="which answers are learned (last: for those that think)"
    )
    add = mqar.add_argument
    add("--pairs", type=int, default=8, help="keys with a value in a document (default: 8)")
    add("--queries", type=int, help="of these keys that are asked for (default: all but one: 4 * pairs - 1 tokens)")
    add("--keys", type=int, default=16, help="different keys (default: 16)")
    add("--values", type=int, default=8, help="different values: guessing has a loss of ln of it (default: 8)")
    add("--documents", type=int, default=100_000, help="of train and validation (default: 100,000)")
    add("--seed", type=int, default=1)
    return parser


def check_options(args, parser) -> None:
    """Finds out if it is text, conversations, another tool's token files, or mqar; refuses options of the others."""
    for key, largest in LARGEST.items():
        number = getattr(args, key)
        if number is not None and not 1 <= number <= largest:
            raise ValueError(f"--{key}={number} is not from 1 to {largest:,}")
    if isinstance(args.add_tokens, str):
        args.add_tokens = CHAT_TOKENS if args.add_tokens == "chat" else args.add_tokens.split(",")
    args.token_files = None
    meaningless = [*MQAR_OPTIONS, *CHAT_OPTIONS]
    if args.chat:
        check_chat_options(args)
        meaningless = [*MQAR_OPTIONS, "field", "split_at_eot"]
    elif args.source[0] in sources.ROW_SETS:
        raise ValueError(f"{args.source[0]} is a set of conversations: add --chat")
    elif args.source == ["mqar"]:
        meaningless = [*TEXT_OPTIONS, *CHAT_OPTIONS]
    elif len(args.source) == 1 and args.source[0] not in NAMED and os.path.isdir(args.source[0]):
        args.token_files = token_files.find(Path(args.source[0]))
    if args.token_files:
        meaningless = {*TEXT_OPTIONS, *CHAT_OPTIONS, *MQAR_OPTIONS, "val_fraction"} - {"tokenizer", "eot"}
        if not args.tokenizer:
            meaningless.add("eot")
    for key in sorted(meaningless):
        if getattr(args, key) != parser.get_default(key):
            raise ValueError(f"--{key} means nothing to {' '.join(args.source)}: leave it out")


def check_chat_options(args):
    if not args.tokenizer:
        raise ValueError(
            "--chat needs the tokenizer of the model: --tokenizer data/NAME/meta.json, of its earlier data"
        )
    if re.fullmatch(r"char|bpe:\d+", args.tokenizer or ""):
        raise ValueError(f"--tokenizer={args.tokenizer} is made of text: name that of the model that learns to chat")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    print_any_text()
    try:
        check_options(args, parser)
        make_folder(args)
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted: nothing was changed")
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError, OverflowError) as error:
        sys.exit(f"prepare.py: {error}")


if __name__ == "__main__":
    main()
