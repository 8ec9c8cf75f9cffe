"""Pairs of answers to one prompt, of which one is better: what dpo.py and reward.py learn from."""

import hashlib
from typing import NamedTuple

import numpy as np

from data import chat
from data.loader import draw
from data.problems import pairs
from data.tokenizers import Tokenizer
from training.machine import Machine

ORDER = 8  # the kind of draws by which pairs are ordered (data/loader.draw)


class Pair(NamedTuple):
    prompt: list[int]
    chosen: list[int]  # with the <|im_end|> that ends it
    rejected: list[int]

    @property
    def n_inputs(self) -> int:
        """Returns how many tokens a model reads: all but the last of each answer, which is only predicted."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected) - 2


def read(source: str, tokenizer: Tokenizer, longest: int, here: Machine) -> list[Pair]:
    """Returns the pairs of a file or a named set; ValueError where there are none of up to `longest` tokens."""
    if not source:
        raise ValueError("data is empty: give pairs, a .jsonl file or a named set such as ultrafeedback")
    found = []
    too_long = 0
    for prompt, chosen, rejected in pairs(source):
        begin = chat.prompt(tokenizer, prompt)
        answers = [answer_ids(tokenizer, prompt + answer, begin) for answer in (chosen, rejected)]
        pair = Pair(begin, *answers)
        fits = len(begin) + max(map(len, answers)) <= longest
        too_long += not fits
        if fits:
            found.append(pair)
    if not found and not too_long:
        raise ValueError(f"{source} has no pairs of which one is better")
    if not found:
        raise ValueError(f"{source}: no pair is at most {longest} tokens long, of {too_long}: raise block_size")
    left_out = f", and {too_long:,} more are longer than {longest} tokens" if too_long else ""
    here.say(f"{source}: {len(found):,} pairs{left_out}")
    return found


def answer_ids(tokenizer, messages, begin):
    """Returns the tokens of a conversation behind its prompt `begin`, up to the one that ends the turn."""
    ids, is_target = chat.encode(tokenizer, messages)
    if ids[: len(begin)] != begin:
        raise ValueError("an answer does not begin where its prompt ends: give one assistant's message")
    last = max(i for i, target in enumerate(is_target) if target)
    return ids[len(begin) : last + 1]


def of_step(all_pairs: list[Pair], step: int, n: int, seed: int) -> list[Pair]:
    """Returns the n pairs of a step: all of them once before any comes again."""
    places, _ = draw(step * n + np.arange(n), len(all_pairs), seed, ORDER)
    return [all_pairs[i] for i in places]


def fingerprint(all_pairs: list[Pair]) -> str:
    """Returns a hash of pairs in their order."""
    return hashlib.sha256(repr(all_pairs).encode()).hexdigest()
