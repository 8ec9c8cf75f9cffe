"""Training byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909): files to counted words, and these to merges.

data/tokenizers.py makes a tokenizer of the merges, and has the command.
"""

import heapq
import json
import os
import signal
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import regex
from tqdm import tqdm

from data.bpe import EOT, PATTERNS, alternatives
from data.html_text import text_of_html
from data.text import PART, name_inside, parts, read_text, rows, text_field

SAMPLE = 100_000_000  # characters of a text that may have no end: more change few merges
LONGEST_WORD = 1000  # characters: each merge costs the length of the words that it is made in
MOST_WAITING = 16 << 20  # characters without a place where every pattern ends a word: then one is cut anywhere


def end_with_parent() -> None:
    """Makes this worker end when its parent does, in whatever way: it would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent ends this one
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---- words -----------------------------------------------------------------------------------------------------------


def count_words(
    files: list, pattern: str, special_tokens: Iterable[str] = (), workers: int = 1, field: str = "text"
) -> Counter[str]:
    """Returns how often each word occurs in the files. field: of a row, the one that is text.

    Special tokens (<|endoftext|> always) end words and are not counted. A word that is longer than LONGEST_WORD, such
    as a gene or an image in base64, counts as several.
    """
    if bad := [token for token in special_tokens if not token or regex.search(r"\s", token)]:
        raise ValueError(f"special tokens to train around must not be empty or have spaces inside: {bad}")
    shares = [(files, pattern, (EOT, *special_tokens), field, share, workers) for share in range(workers)]
    if workers == 1:
        counts = count_share(*shares[0])
    else:
        with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent) as pool:
            counts = sum(pool.map(count_share, *zip(*shares)), Counter())
    return with_long_words_cut(counts)


def count_share(files, pattern, special_tokens, field, share, n_shares):
    """Returns the counts of every n-th chunk: reading is cheap beside the regex, and no text goes between processes."""
    words = regex.compile(PATTERNS[pattern])
    special = regex.compile(alternatives(special_tokens))
    bar = tqdm(files, "count words", unit="file", disable=None if share == 0 else True)
    all_chunks = (chunk for path in bar for chunk in chunks(Path(path), field))
    counts = Counter()
    for chunk in islice(all_chunks, share, None, n_shares):
        for text in special.split(chunk):
            counts.update(words.findall(text))
    return counts


def chunks(path: Path, field: str = "text", size: int = PART) -> Iterator[str]:
    """Yields the text of each row of a file, or that of any other file in chunks (those of chunks_of_text)."""
    name = name_inside(path)
    if name.endswith((".jsonl", ".csv", ".tsv", ".parquet")):
        for place, row in rows(path, field):
            yield text_field(row, place, field)
    elif name.endswith((".html", ".htm")):
        yield text_of_html(read_text(path), path)
    else:
        yield from chunks_of_text(parts(path, size=size))


def chunks_of_text(text_parts: Iterable[str]) -> Iterator[str]:
    """Yields a text that comes in parts in chunks of about their size, which end where a word does."""
    # Between a letter or digit and a space every pattern ends a word, and looks neither back nor ahead over that place.
    safe = regex.compile(r"(?<=[\p{L}\p{N}])\s")
    text = ""
    for part in text_parts:
        before = len(text)
        text += part
        cut = safe.search(text, before)
        end = cut.start() if cut else 0
        if not cut and len(text) > MOST_WAITING:
            end = len(text)
        if end:
            yield text[:end]
            text = text[end:]
    yield text


def write_sample(path: Path, texts: Iterable[str]) -> None:
    """Writes the first texts into a .jsonl file, SAMPLE characters in all."""
    room = SAMPLE
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text[:room]}) + "\n")
            room -= len(text)
            if room <= 0:
                return


def with_long_words_cut(counts):
    """Returns the counts with each word that is longer than LONGEST_WORD in pieces, and says so."""
    long_words = [word for word in counts if len(word) > LONGEST_WORD]
    if not long_words:
        return counts
    for word in long_words:
        n = counts.pop(word)
        for begin in range(0, len(word), LONGEST_WORD):
            counts[word[begin : begin + LONGEST_WORD]] += n
    longest = max(len(word) for word in long_words)
    found = f"{len(long_words):,} words of more than {LONGEST_WORD} characters, the longest of {longest:,}"
    print(f"{found}: trained on in pieces of {LONGEST_WORD}", file=sys.stderr)
    return counts


# ---- merges ----------------------------------------------------------------------------------------------------------


def merge_words(words: dict[str, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Merges the most frequent pair n_merges times, or till nothing is left; of equals that with the lowest ids."""
    # 1. A word is a string with chr(id) for each token: a pair is a string of two, and str.replace merges it.
    texts = [word.encode().decode("latin-1") for word in words]
    weights = list(words.values())
    counts = defaultdict(int)
    where = defaultdict(set)  # pair -> the words that hold it, or once did
    for i, text in enumerate(texts):
        for pair in map(str.__add__, text, text[1:]):
            counts[pair] += weights[i]
            where[pair].add(i)

    # 2. Counts of known pairs only fall, so what the heap says of a pair is a bound: if stale, it goes back corrected.
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]
    merges = []
    for new in tqdm(map(chr, range(256, 256 + n_merges)), "merge", n_merges, disable=None):
        while heap and counts[heap[0][1]] != -heap[0][0]:
            _, pair = heapq.heappop(heap)
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
        if not heap:
            break
        _, pair = heapq.heappop(heap)
        left, right = pair
        merges.append((tokens[ord(left)], tokens[ord(right)]))
        tokens.append(b"".join(merges[-1]))

        # 3. Merge the pair in the words that hold it. What stands between two of its places loses and gains a pair at
        #    each of its ends: of ab x ab ab y, for example, bx xa ba by, for new ones with N = ab: Nx xN NN Ny.
        made = set()
        for i in where.pop(pair):
            between = texts[i].split(pair)
            texts[i] = new.join(between)
            last = len(between) - 1
            changed = []
            for k, text in enumerate(between):
                if text and k > 0:
                    changed.append((right + text[0], new + text[0]))
                if text and k < last:
                    changed.append((text[-1] + left, text[-1] + new))
                if not text and 0 < k < last:
                    changed.append((right + left, new + new))
            weight = weights[i]
            counts[pair] -= weight * last
            for lost, gained in changed:
                counts[lost] -= weight
                counts[gained] += weight
                made.add(gained)
                where[gained].add(i)
        for p in made:
            heapq.heappush(heap, (-counts[p], p))
    return merges
