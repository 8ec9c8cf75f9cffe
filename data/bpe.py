"""What a byte-level BPE tokenizer is made of: a pattern that cuts text into words, and the rank of each token."""

import base64
from collections.abc import Iterable
from pathlib import Path

import regex

EOT = "<|endoftext|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
END_OF_TEXT = (EOT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>")  # as it is known by name
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|return|>")  # of chats: text stops there, none begins there
MAX_ID = 2**24  # no vocabulary is so large, and arrays as long as the largest id are made

# How text is cut into words, which no merge crosses. "newer" is GPT-4's and Llama 3's: a word takes the character
# before it, numbers go by three digits (in "qwen" by one), line breaks stay together.
NEWER = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
NEWER += r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
PATTERNS = {"gpt2": GPT2, "newer": NEWER, "qwen": NEWER.replace("{1,3}", "")}

# GPT-2 spells each byte as a character: a printable one as itself, the others in order as U+0100, U+0101, ...
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
SPELLING = {byte: chr(byte) for byte in PRINTABLE}
SPELLING |= {byte: chr(256 + n) for n, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
BYTE_OF = {character: byte for byte, character in SPELLING.items()}


def alternatives(tokens: Iterable[str]) -> str:
    """Returns a regex for any of them, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return "|".join(map(regex.escape, longest_first))


def format_ranks(ranks: dict[bytes, int]) -> str:
    """Returns lines "base64 id", as in a .tiktoken file."""
    in_order = sorted(ranks, key=ranks.get)
    return "\n".join(f"{base64.b64encode(token).decode()} {ranks[token]}" for token in in_order)


def parse_ranks(text: str, name: str | Path) -> dict[bytes, int]:
    """Returns the ranks of such lines, of the file or tokenizer `name`."""
    ranks = {}
    try:
        for line in text.splitlines():
            token, i = line.split()
            ranks[base64.b64decode(token)] = int(i)
    except ValueError as e:
        raise ValueError(f"{name} does not hold lines 'base64 id' ({e}): was it cut short?") from None
    n_ids = len(set(ranks.values()))
    if n_ids < len(ranks):
        raise ValueError(f"{name}: {len(ranks)} tokens share {n_ids} ids: give each its own")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise ValueError(f"{name} has no token for {len(missing)} of the 256 bytes, like {missing[0]}")
    return ranks
