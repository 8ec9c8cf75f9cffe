"""Training byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909): files to counted words, and these to merges.

data/tokenizers.py makes a tokenizer of the merges, and has the command.
"""

import base64
import gzip
import heapq
import json
import os
import signal
import threading
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import regex
from tqdm import tqdm

EOT = "<|endoftext|>"

# How text is cut into words, which no merge crosses. "newer" is GPT-4's and Llama 3's: a word takes the character
# before it, numbers go by three digits (in "qwen" by one), line breaks stay together.
NEWER = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
NEWER += r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
PATTERNS = {"gpt2": GPT2, "newer": NEWER, "qwen": NEWER.replace("{1,3}", "")}


def alternatives(tokens: Iterable[str]) -> str:
    """A regex for any of them, the longest first."""
    return "|".join(regex.escape(token) for token in sorted(tokens, key=len, reverse=True))


def format_ranks(ranks: dict[bytes, int]) -> str:
    """Returns lines "base64 id", as in a .tiktoken file."""
    return "\n".join(f"{base64.b64encode(token).decode()} {i}" for i, token in sorted((i, t) for t, i in ranks.items()))


def parse_ranks(text: str, name: str | Path) -> dict[bytes, int]:
    """Returns the ranks of such lines, of the file or tokenizer `name`."""
    try:
        ranks = {base64.b64decode(token): int(i) for token, i in map(str.split, text.splitlines())}
    except ValueError as e:
        raise ValueError(f"{name} does not hold lines 'base64 id' ({e}): was it cut short?") from None
    if len(set(ranks.values())) < len(ranks):
        raise ValueError(f"{name}: {len(ranks)} tokens share {len(set(ranks.values()))} ids: give each its own")
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise ValueError(f"{name} has no token for {len(missing)} of the 256 bytes, like {missing[0]}")
    return ranks


def end_with_parent() -> None:
    """Makes this worker end when its parent does, in whatever way: it would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent ends this one
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def count_words(files: list, pattern: str, special_tokens: Iterable[str] = (), workers: int = 1) -> Counter[str]:
    """How often each word occurs in the files. Special tokens (<|endoftext|> always) end words and are not counted."""
    if bad := [token for token in special_tokens if not token or regex.search(r"\s", token)]:
        raise ValueError(f"special tokens to train around must not be empty or have spaces inside: {bad}")
    shares = [(files, pattern, (EOT, *special_tokens), share, workers) for share in range(workers)]
    if workers == 1:
        return _count_share(*shares[0])
    with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent) as pool:
        return sum(pool.map(_count_share, *zip(*shares)), Counter())


def _count_share(files, pattern, special_tokens, share, n_shares):
    # Each worker reads all files and counts every n-th chunk: reading is cheap beside the regex, and no text travels.
    words, special, counts = regex.compile(PATTERNS[pattern]), regex.compile(alternatives(special_tokens)), Counter()
    bar = tqdm(files, "count words", unit="file", disable=None if share == 0 else True)
    chunks = (chunk for path in bar for chunk in _chunks(Path(path)))
    for chunk in islice(chunks, share, None, n_shares):
        for text in special.split(chunk):
            counts.update(words.findall(text))
    return counts


def _chunks(path, size=1 << 20):
    # Between a letter or digit and a space every pattern ends a word, and looks neither back nor ahead over that place.
    safe = regex.compile(r"(?<=[\p{L}\p{N}])\s")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            if ".jsonl" in path.suffixes:
                yield from (json.loads(line)["text"] for line in file)
                return
            text = ""
            while block := file.read(size):
                start, text = len(text), text + block
                if cut := safe.search(text, start):
                    yield text[: cut.start()]
                    text = text[cut.start() :]
            yield text
    except (ValueError, KeyError, TypeError, EOFError, zlib.error) as e:
        raise ValueError(f"{path} is no whole UTF-8 text, or no JSON lines with a field text: {e}") from None


def merge_words(words: dict[str, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Merge the most frequent pair n_merges times (or till nothing is left); of equals, the one with the lowest ids."""
    # 1. A word is a string with chr(id) for each token: a pair is a string of two, and str.replace merges it.
    texts, weights = [word.encode().decode("latin-1") for word in words], list(words.values())
    counts, where = defaultdict(int), defaultdict(set)  # pair -> its count, and the words that hold it, or once did
    for i, text in enumerate(texts):
        for pair in map(str.__add__, text, text[1:]):
            counts[pair] += weights[i]
            where[pair].add(i)

    # 2. Counts of known pairs only fall, so what the heap says of a pair is a bound: if stale, it goes back corrected.
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    tokens, merges = [bytes([b]) for b in range(256)], []
    for new in tqdm(map(chr, range(256, 256 + n_merges)), "merge", n_merges, disable=None):
        while heap and counts[heap[0][1]] != -heap[0][0]:
            _, pair = heapq.heappop(heap)
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
        if not heap:
            break
        _, pair = heapq.heappop(heap)
        merges.append((tokens[ord(pair[0])], tokens[ord(pair[1])]))
        tokens.append(b"".join(merges[-1]))

        # 3. Merge the pair in the words that hold it, and recount those.
        made = set()
        for i in where.pop(pair):
            old, texts[i] = texts[i], texts[i].replace(pair, new)
            for p in map(str.__add__, old, old[1:]):
                counts[p] -= weights[i]
            for p in map(str.__add__, texts[i], texts[i][1:]):
                counts[p] += weights[i]
                if new in p:
                    made.add(p)
                    where[p].add(i)
        for p in made:
            heapq.heappush(heap, (-counts[p], p))
    return merges
