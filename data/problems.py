"""What post-training learns from beside conversations: problems with their answers, and pairs of which one is better.

    for messages, row in problems("gsm8k"): ...  # messages to answer; row["gold"] is the result, the rest as it was
    for prompt, chosen, rejected in pairs("ultrafeedback"): ...  # lists of messages, as data/chat.py has them

A source is a named set of data/sources.py, or a file of rows.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.chat import check_messages, exchange, instruction_of, listed
from data.sources import find_rows
from data.text import Unreadable, boxed, stop, text_field


def problems(source: str | Path, bad: Callable = stop) -> Iterator[tuple[list[dict], dict]]:
    """Yields (messages, row) of each row: what is to be answered, and all its fields and "gold", None where unknown.

    bad: is called with what is Unreadable; by itself that is an error.
    """
    for where, row in find_rows([str(source)], None, None).read():
        try:
            yield question_of(row, where), row | {"gold": gold_of(row, where)}
        except Unreadable as error:
            bad(error)


def question_of(row: Any, where: str) -> list[dict]:
    """Returns the messages of a row up to its last question, of which the answer may be absent."""
    if not isinstance(row, dict):
        raise Unreadable(f"{where}: a problem is an object with fields, and this is {type(row).__name__}")
    if isinstance(row.get("prompt"), list):
        messages = listed({"messages": row["prompt"]}, where)
    elif row.get("messages") is not None or row.get("conversations") is not None:
        messages = listed(row, where)
    elif row.get("instruction") is not None:
        messages = exchange(instruction_of(row, where), "")
    else:
        fields = [field for field in ("question", "problem", "prompt") if row.get(field) is not None]
        if not fields:
            known = "question, problem, prompt, instruction or messages"
            raise Unreadable(f"{where}: no problem: its fields are {', '.join(row) or 'none'}, and it needs {known}")
        messages = exchange(text_field(row, where, fields[0]), "")
    check_messages(messages, where)
    return up_to_question(messages, where)


def up_to_question(messages, where):
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not questions:
        raise Unreadable(f"{where}: there is no message of the user to answer")
    return messages[: questions[-1] + 1]


def gold_of(row: dict, where: str = "a row") -> str | None:
    r"""Returns the result of a row's problem: what it names so, what is behind ####, or what is in \boxed{...}."""
    for field in ("gold", "expected_answer", "answer"):
        value = row.get(field)
        if isinstance(value, bool | list | dict):
            raise Unreadable(f"{where}: {field} is {value!r:.40}, and neither a text nor a number")
        if value is not None:
            return str(value).rpartition("####")[2].strip()
    if isinstance(row.get("solution"), str):
        return boxed(row["solution"])
    return None


def pairs(source: str | Path, bad: Callable = stop) -> Iterator[tuple[list[dict], list[dict], list[dict]]]:
    """Yields (prompt, chosen, rejected) of each row, as messages. Where two answers are as good as each other is none.

    A row has a prompt, a chosen and a rejected answer, each a text or messages; or, as UltraFeedback, an instruction
    and several completions with scores, of which the best and the worst are taken.
    """
    for where, row in find_rows([str(source)], None, None).read():
        try:
            pair = pair_of(row, where)
        except Unreadable as error:
            bad(error)
            continue
        if pair:
            yield pair


def pair_of(row: Any, where: str) -> tuple[list[dict], list[dict], list[dict]] | None:
    """Returns (prompt, chosen, rejected) of a row, None where none is better."""
    if isinstance(row, dict) and row.get("completions") is not None:
        row = best_and_worst(row, where)
        if row is None:
            return None
    if not isinstance(row, dict) or row.get("chosen") is None or row.get("rejected") is None:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise Unreadable(f"{where}: no pair: needs chosen and rejected, or completions, and found {found}")
    chosen = answer_of(row, where, "chosen")
    rejected = answer_of(row, where, "rejected")
    if chosen == rejected:
        return None
    if isinstance(row["chosen"], list) and len(row["chosen"]) > len(chosen):  # it has the prompt's messages before it
        prompt = up_to_question(listed({"messages": row["chosen"]}, where), where)
    else:
        prompt = question_of(row, where)
    return prompt, chosen, rejected


def answer_of(row, where, field):
    """Returns the messages of an answer, those of the prompt before them left out."""
    if isinstance(row[field], str):
        return exchange("", row[field])[1:]
    messages = listed({"messages": row[field]}, where)
    check_messages(messages, where)
    if messages[-1]["role"] != "assistant":
        raise Unreadable(f"{where}: {field} does not end with an answer of the assistant")
    return messages[-1:]


def best_and_worst(row, where):
    """Returns a row of completions with scores as one with chosen and rejected; None where all have the same score."""
    if not isinstance(row["completions"], list):
        raise Unreadable(f"{where}: completions is {row['completions']!r:.40}, not a list")
    scored = []
    for completion in row["completions"]:
        try:
            score = float(completion["overall_score"])
            if math.isnan(score):
                raise ValueError
            scored.append((score, completion["response"]))
        except (TypeError, KeyError, ValueError, OverflowError):
            raise Unreadable(
                f"{where}: a completion has no response with an overall_score: {completion!r:.60}"
            ) from None
    scored.sort(key=lambda item: item[0])
    if not scored or scored[0][0] == scored[-1][0]:
        return None
    return row | {"chosen": scored[-1][1], "rejected": scored[0][1]}
