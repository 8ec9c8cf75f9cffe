"""Sums of three numbers, made from a seed: a task that a tiny model does well if it thinks, and badly at once.

    user        94+55+35
    thinking    94+55=149
                149+35=184
    answer      184

    python data/arithmetic.py --out data/arithmetic        writes what each stage of post-training reads:

pretrain.jsonl   documents of plain text: facts such as 94+55=149, and worked sums, in which a sum's own steps follow it
sft.jsonl        conversations, of which a quarter think and the others answer at once
fusion.jsonl     half think, after /think or without a switch, and half answer at once, after /no_think
rl.jsonl         questions with their answers, to learn from by trying
rl_mixed.jsonl   the same with these switches
held_out.jsonl   400 questions for evaluation: no other file has one of them, nor one with its numbers in another order
tokenizer.json   24 tokens: digits one by one, and one token for each word of the chat format
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # this folder on the path would shadow the installed package `tokenizers`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from data.text import print_any_text

HELD_OUT = 400
THINKING_SHARE = 0.25  # of the first conversations
SWITCHES = (" /think", " /no_think", "", " /no_think")  # they take turns; without one a model is to think
CHARACTERS = "\n +0123456789="
# In characters the chat format would be longer than a sum. The empty line is a token of its own, as in Qwen's
# tokenizers: a prompt that ends with "<think>" and one line break can only go on with a thought.
WORDS = ("\n\n", "user", "assistant", "/think", "/no_think")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

Problem = tuple[int, int, int]


def tokenizer_fields() -> dict:
    """Returns the tokenizer as Tokenizer.to_dict() does: load_tokenizer reads it from a .json file."""
    n = len(CHARACTERS)
    words = {word: n + i for i, word in enumerate(WORDS)}
    special = {token: n + len(WORDS) + i for i, token in enumerate(SPECIAL)}
    return {"kind": "char", "name": "arithmetic", "special_tokens": special, "chars": CHARACTERS, "added": words}


# ---- problems --------------------------------------------------------------------------------------------------------
def held_out_problems() -> list[Problem]:
    """Returns the problems that are for evaluation alone: always the same, whatever the seed of the rest."""
    rng = np.random.default_rng(0)
    found = {}
    while len(found) < HELD_OUT:
        problem = tuple(rng.integers(10, 100, 3).tolist())
        found.setdefault(tuple(sorted(problem)), problem)
    return list(found.values())


def problems(rng: np.random.Generator) -> Iterator[Problem]:
    """Yields problems without end, none of which has the three numbers of one that is held out."""
    excluded = {tuple(sorted(problem)) for problem in held_out_problems()}
    while True:
        for problem in rng.integers(10, 100, (4096, 3)).tolist():
            if tuple(sorted(problem)) not in excluded:
                yield tuple(problem)


def question(problem: Problem) -> str:
    return "+".join(map(str, problem))


def thinking(problem: Problem) -> str:
    """Returns the two additions that lead to the answer, one a line."""
    a, b, c = problem
    return f"{a}+{b}={a + b}\n{a + b}+{c}={a + b + c}"


def answer(problem: Problem) -> str:
    return str(sum(problem))


# ---- what each stage reads -------------------------------------------------------------------------------------------
def pretraining_rows(rng: np.random.Generator, n: int) -> Iterator[dict]:
    """Yields n documents: half are facts, of the first step or the second, and half are worked sums."""
    source = problems(rng)
    for _ in range(n):
        problem = next(source)
        steps = thinking(problem)
        text = f"{question(problem)}\n{steps}"
        if rng.random() < 0.5:
            text = steps.split("\n")[rng.integers(2)]
        yield {"text": text}


def conversation(problem: Problem, think: bool, switch: str = "") -> dict:
    """Returns a conversation of one question and its answer; switch is written behind the question."""
    reply = {"role": "assistant", "content": answer(problem)}
    if think:
        reply["thinking"] = thinking(problem)
    return {"messages": [{"role": "user", "content": question(problem) + switch}, reply]}


def sft_rows(rng: np.random.Generator, n: int) -> Iterator[dict]:
    source = problems(rng)
    for _ in range(n):
        yield conversation(next(source), rng.random() < THINKING_SHARE)


def fusion_rows(rng: np.random.Generator, n: int) -> Iterator[dict]:
    source = problems(rng)
    for i in range(n):
        switch = SWITCHES[i % len(SWITCHES)]
        yield conversation(next(source), switch != " /no_think", switch)


def rl_rows(rng: np.random.Generator, n: int, switches: tuple = ("",)) -> Iterator[dict]:
    """Yields questions with their answers; the switches take turns."""
    source = problems(rng)
    for i in range(n):
        problem = next(source)
        yield {"question": question(problem) + switches[i % len(switches)], "answer": answer(problem)}


def held_out_rows() -> Iterator[dict]:
    for problem in held_out_problems():
        yield {"question": question(problem), "answer": answer(problem)}


def obeys_switch(completion: str, asked: str) -> bool:
    """Returns whether a completion thinks, or has an empty block, as it was asked to; without a switch it thinks."""
    if "</think>" not in completion:
        return False
    thought = completion.split("</think>")[0].removeprefix("<think>").strip()
    return bool(thought) != asked.endswith("/no_think")


def obedience(completions: list[str], rows: list[dict]) -> list[float]:
    """Returns 1.0 for each completion that obeys the switch of its row, else 0.0: a reward for grpo.py."""
    return [float(obeys_switch(text, row["question"])) for text, row in zip(completions, rows)]


def write_all(out: Path, seed: int, sizes: dict) -> None:
    """Writes the files of all stages. sizes: how many rows {"pretrain", "sft", "fusion", "rl"} have."""

    def rng(stage):
        return np.random.default_rng((seed, stage))

    out.mkdir(parents=True, exist_ok=True)
    files = {
        "pretrain": pretraining_rows(rng(1), sizes["pretrain"]),
        "sft": sft_rows(rng(2), sizes["sft"]),
        "fusion": fusion_rows(rng(3), sizes["fusion"]),
        "rl": rl_rows(rng(4), sizes["rl"]),
        "rl_mixed": rl_rows(rng(5), sizes["rl"], SWITCHES),
        "held_out": held_out_rows(),
    }
    for name, rows in files.items():
        with open(out / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
    (out / "tokenizer.json").write_text(json.dumps(tokenizer_fields()) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""), help="(default: data/arithmetic)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pretrain", type=int, default=150_000, help="documents: 20 tokens each (default: 150,000)")
    parser.add_argument("--sft", type=int, default=2_000, help="conversations (default: 2,000)")
    parser.add_argument("--fusion", type=int, default=20_000, help="conversations (default: 20,000)")
    parser.add_argument("--rl", type=int, default=4_000, help="questions (default: 4,000)")
    args = parser.parse_args(argv)
    sizes = {"pretrain": args.pretrain, "sft": args.sft, "fusion": args.fusion, "rl": args.rl}
    for name, number in (sizes | {"seed": args.seed}).items():
        if number < 0:
            parser.error(f"--{name} {number}: give a number from 0")
    print_any_text()
    try:
        write_all(args.out, args.seed, sizes)
    except OSError as error:
        sys.exit(f"arithmetic.py: {error}")
    print(f"wrote {', '.join(sorted(path.name for path in args.out.glob('*.json*')))} in {args.out}")


if __name__ == "__main__":
    main()
