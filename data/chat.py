r"""Conversations as tokens: Qwen3's ChatML with thinking, and which of the tokens are learned.

    messages = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5", "thinking": "2 and 3 are 5"}]
    ids, mask = encode(tokenizer, messages)  # of  <|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n<think>\n...
    ids = prompt(tokenizer, messages[:1], think=False)  # what a model is given to go on with, here without thinking
    python data/chat.py FILE|NAME --tokenizer T --show 3  # prints the tokens, coloured where they are learned

A conversation is a document: it begins with eot_id, and what follows are the tokens of Qwen3's own template. The last
answer has a block of thinking, an empty one where there was none; the thinking of answers before the last question is
left out. Learned is what an assistant writes: its thinking with the marks around it, its content, and <|im_end|>. The
text of a message stays text, whatever tokens it spells out.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this folder on the path would shadow the installed package `tokenizers`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import regex

from configurator import fail
from data.bpe import CHAT_TOKENS, alternatives
from data.sources import find_rows
from data.text import Unreadable, boxed, end_with_reader, print_any_text, stop, text_field
from data.tokenizers import Tokenizer, load_tokenizer

START, END, THINK, END_THINK = CHAT_TOKENS
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
SWITCHES = {True: "/think", False: "/no_think"}  # at the end of a question: how it is to be answered


# ---- messages to tokens ----------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part of a conversation's text that is tokenized by itself."""

    text: str
    is_token: bool = False  # it is the one token of this spelling
    is_target: bool = False


def check(tokenizer: Tokenizer) -> None:
    """Raises ValueError where a tokenizer lacks the tokens of a chat."""
    known = tokenizer.special_tokens | tokenizer.added_tokens
    missing = [token for token in CHAT_TOKENS if token not in known]
    if missing:
        raise ValueError(
            f"{tokenizer.name} has no token {', '.join(missing)}, which a chat is made of: prepare the chats with this "
            "tokenizer and --add_tokens chat, and fine-tune on them: train.py --init_from gives a model the new tokens"
        )


def encode(tokenizer: Tokenizer, messages: list[dict], turns: str = "all") -> tuple[list[int], list[bool]]:
    """Returns the tokens of a conversation, and which of them are learned.

    turns: "all" answers are learned, or those behind the "last" question. An answer before it has no block of thinking,
    which at its own time it would have had, so that a model that is to think learns from the last alone.
    """
    check(tokenizer)
    return to_ids(tokenizer, rendered(messages, turns))


def prompt(tokenizer: Tokenizer, messages: list[dict], think: bool | None = None) -> list[int]:
    """Returns the tokens that a model answers: the messages, and the beginning of the assistant's turn.

    think: True begins its thinking, False says that it is over, None leaves it to the model.
    """
    check(tokenizer)
    parts = [*rendered(messages), Part(START, True), Part("assistant\n")]
    if think:
        parts += [Part(THINK, True), Part("\n")]
    elif think is False:
        parts += thinking_block("")
    ids, _ = to_ids(tokenizer, parts)
    return ids


def opening(think: bool | None) -> str:
    """Returns what of an answer's text stands in its prompt."""
    return f"{THINK}\n" if think else ""


def rendered(messages, turns="all"):
    r"""Yields the parts of a conversation.

    A part ends wherever a prompt may end, behind the role, "<think>\n" and "</think>\n\n": what is learned then has the
    same tokens as what is sampled, with every tokenizer.
    """
    check_messages(messages)
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    last_question = max(questions, default=len(messages))
    for i, message in enumerate(messages):
        role = message["role"]
        content = message["content"]
        yield Part(START, True)
        if role != "assistant":
            yield Part(f"{role}\n{content}")
            yield Part(END, True)
        else:
            yield Part("assistant\n")
            is_target = turns == "all" or i > last_question
            thinking = message.get("thinking") or ""
            parts = []
            if i > last_question and (thinking or i == len(messages) - 1):
                parts += thinking_block(thinking.strip("\n"))
                content = content.lstrip("\n")
            parts += [Part(content), Part(END, True)]
            for part in parts:
                yield part._replace(is_target=is_target)
        yield Part("\n")


def thinking_block(thinking):
    parts = [Part(THINK, True), Part("\n"), Part(thinking + "\n"), Part(END_THINK, True), Part("\n\n")]
    if not thinking:
        parts[1:3] = [Part("\n\n")]
    return parts


def to_ids(tokenizer, parts):
    tokens = tokenizer.special_tokens | tokenizer.added_tokens
    cut = markup(tokenizer)
    ids = [tokenizer.eot_id]
    mask = [False]
    for text, is_token, is_target in parts:
        if is_token:
            found = [tokens[text]]
        else:
            found = [i for piece in split_markup(text, cut) for i in tokenizer.encode(piece)]
        ids += found
        mask += [is_target] * len(found)
    return ids, mask


def markup(tokenizer):
    """Returns a regex for the tokens like <think> that a tokenizer finds in every text, None where it has none."""
    found = [token for token in tokenizer.added_tokens if re.fullmatch("<.+>", token)]
    if not found:
        return None
    return regex.compile(alternatives(found))


def split_markup(text: str, cut: regex.Pattern | None) -> list[str]:
    """Returns a text in pieces, cut so that none spells out a token of markup.

    Behind its first character: "a <think> b" becomes "a <" and "think> b", which no tokenizer takes for <think>.
    """
    if cut is None:
        return [text]
    places = [match.start() + 1 for match in cut.finditer(text, overlapped=True)]
    begins = [0, *places]
    ends = [*places, len(text)]
    return [text[begin:end] for begin, end in zip(begins, ends)]


def switched(messages: list[dict], think: bool) -> list[dict]:
    """Returns the messages with /think or /no_think at the end of the last question."""
    place = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if place is None:
        return messages
    question = messages[place]
    question = question | {"content": f"{question['content']} {SWITCHES[think]}"}
    return [*messages[:place], question, *messages[place + 1 :]]


def split_thinking(text: str) -> tuple[str | None, str]:
    """Returns the thinking of an answer (None where there is none, or an empty block), and the answer without it."""
    text = text.removesuffix("\n").removesuffix(END)
    if END_THINK in text:
        thinking = text.split(END_THINK)[0].split(THINK)[-1]
        rest = text.split(END_THINK)[-1]
    elif text.lstrip().startswith(THINK):  # it was cut off before it came to an answer
        thinking = text.split(THINK)[-1]
        rest = ""
    else:
        return None, text
    return thinking.strip("\n") or None, rest.lstrip("\n")


# ---- rows of a file to messages --------------------------------------------------------------------------------------


def check_messages(messages: list[dict], where: str = "a conversation") -> None:
    """Raises Unreadable where messages are none that can be rendered."""
    if not messages:
        raise Unreadable(f"{where}: no messages in it")
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ("system", "user", "assistant") or message.get("tool_calls"):
            what = "calls of tools" if message.get("tool_calls") else f"the role {role!r}"
            raise Unreadable(f"{where}: message {i + 1} has {what}: only text of system, user and assistant is known")
        if role == "system" and i > 0:
            raise Unreadable(f"{where}: message {i + 1} is of the system, which speaks once, and first")
        texts = {"content": message.get("content"), "thinking": message.get("thinking", "")}
        for field, text in texts.items():
            if not isinstance(text, str):
                raise Unreadable(f"{where}: the {field} of message {i + 1} is {text!r:.40}, not a text")


def messages_of(row: Any, where: str, think: bool | None = None) -> list[dict]:
    """Returns the conversation of a row, in any of the forms that data sets have.

    think: True makes thinking of a worked solution, with its result as the answer; False leaves out all thinking.
    """
    if not isinstance(row, dict):
        raise Unreadable(f"{where}: a conversation is an object with fields, and this is {type(row).__name__}")
    read = form_of(row, where)
    messages = read(row, where)
    check_messages(messages, where)
    last = messages[-1]
    if think and read is solved:
        result = row.get("expected_answer")
        if isinstance(result, bool | list | dict):
            raise Unreadable(f"{where}: expected_answer is {result!r:.40}, and neither a text nor a number")
        if result in (None, ""):
            result = boxed(last["content"])
        if result not in (None, ""):  # 0 is one
            messages[-1] = last | {"thinking": last["content"], "content": f"\\boxed{{{result}}}"}
    if think is False:
        for message in messages:
            message.pop("thinking", None)
    return messages


def conversations(rows: Iterable, bad: Callable, think: bool | None = None, switches: bool = False) -> Iterator:
    """Yields the messages of each row of ("FILE line N", row). bad: is called with what is Unreadable.

    think: as for messages_of, and with True a row without any is Unreadable, too. switches: end each last question with
    /think or /no_think, as it is answered.
    """
    for where, row in rows:
        try:
            messages = messages_of(row, where, think)
            thinks = bool(messages[-1].get("thinking"))
            if think and not thinks:
                raise Unreadable(f"{where}: its last answer has no thinking")
        except Unreadable as error:
            bad(error)
            continue
        yield switched(messages, thinks) if switches else messages


def form_of(row, where):
    """Returns the function that reads a row with such fields."""
    for fields, read in FORMS.items():
        if all(row.get(field) is not None for field in fields):
            return read
    known = "; ".join(" and ".join(fields) for fields in FORMS)
    raise Unreadable(f"{where}: no conversation: its fields are {', '.join(row) or 'none'}, and known are {known}")


def listed(row, where):
    """Reads messages with role and content, or with from and value, as ShareGPT has them."""
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unreadable(f"{where}: its messages are {turns!r:.40}, not a list of objects")
    messages = []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        if isinstance(role, str):
            role = ROLES.get(role, role)
        content = turn.get("content", turn.get("value"))
        thinking = turn.get("thinking") or turn.get("reasoning_content")
        if thinking:
            message = {"role": role, "content": content, "thinking": thinking}
        elif role == "assistant" and isinstance(content, str):
            message = answer(content)
        else:
            message = {"role": role, "content": content}
        if turn.get("tool_calls"):
            message["tool_calls"] = turn["tool_calls"]
        messages.append(message)
    return messages


def gsm8k(row, where):
    """Reads a question and its answer: the working, with a calculator's marks <<48/2=24>>, then #### and the result."""
    question = text_field(row, where, "question")
    text = text_field(row, where, "answer")
    working, mark, result = text.rpartition("####")
    if not mark:
        return exchange(question, text)
    messages = exchange(question, f"#### {result.strip()}")
    messages[-1]["thinking"] = re.sub("<<[^>]*>>", "", working).strip()
    return messages


def solved(row, where):
    """Reads a problem and its solution."""
    field = "generated_solution" if row.get("generated_solution") else "solution"
    return exchange(text_field(row, where, "problem"), text_field(row, where, field))


def instructed(row, where):
    """Reads an instruction, what it is to be followed with, and the output."""
    return exchange(instruction_of(row, where), text_field(row, where, "output"))


def instruction_of(row, where):
    question = text_field(row, where, "instruction")
    if row.get("input") not in (None, ""):
        question += "\n\n" + text_field(row, where, "input")
    return question


def answered(row, where):
    """Reads a prompt and the response."""
    return exchange(text_field(row, where, "prompt"), text_field(row, where, "response"))


def exchange(question, text):
    return [{"role": "user", "content": question}, answer(text)]


def answer(text):
    """Returns the message of an assistant, in whose text its thinking may stand."""
    if END_THINK not in text:
        return {"role": "assistant", "content": text}
    thinking, content = split_thinking(text)
    if not thinking:
        return {"role": "assistant", "content": content}
    return {"role": "assistant", "content": content, "thinking": thinking}


FORMS = {  # the fields of a row: how it is read. NuminaMath's rows have a solution and messages, UltraChat's a prompt
    ("problem", "generated_solution"): solved,
    ("problem", "solution"): solved,
    ("messages",): listed,
    ("conversations",): listed,
    ("question", "answer"): gsm8k,
    ("instruction", "output"): instructed,
    ("prompt", "response"): answered,
}


# ---- the command: what is learned, token by token --------------------------------------------------------------------


def coloured(tokenizer: Tokenizer, ids: list[int], mask: list[bool], terminal: bool) -> str:
    """Returns the tokens as text with bars between them: what is learned is green, or stands in brackets."""
    shown = []
    for i, is_target in zip(ids, mask):
        token = tokenizer.decode([i])
        if is_target and terminal:
            token = f"\033[32m{token}\033[0m"
        elif is_target:
            token = f"[{token}]"
        shown.append(token)
    return "|".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print conversations as tokens, and which of them are learned.")
    add = parser.add_argument
    add("source", nargs="+", metavar="FILE|NAME", help="as for data/prepare.py --chat")
    add("--tokenizer", required=True, help="as for data/prepare.py; the tokens of a chat are added where it has none")
    add("--show", type=int, default=3, help="how many (default: 3)")
    add("--think", action="store_true", default=None)
    add("--no_think", action="store_false", dest="think", default=None)
    add("--switches", action="store_true")
    add("--turns", choices=["all", "last"], default="all")
    args = parser.parse_args()
    if not 0 <= args.show <= 1e9:
        parser.error(f"--show {args.show}: give a number from 0 to 1e9")
    print_any_text()
    try:
        tokenizer = load_tokenizer(args.tokenizer, CHAT_TOKENS)
        rows = find_rows(args.source, None, None)
        for messages in islice(conversations(rows.read(), stop, args.think, args.switches), args.show):
            ids, mask = encode(tokenizer, messages, args.turns)
            print(coloured(tokenizer, ids, mask, sys.stdout.isatty()))
            print(f"({sum(mask)} of {len(ids)} tokens are learned)")
    except (ValueError, OSError, ImportError) as error:
        fail(error)


if __name__ == "__main__":
    end_with_reader()
    main()
