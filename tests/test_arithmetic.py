"""Sums of three numbers: what data/arithmetic.py writes for each stage of post-training."""

import json
import re
from collections import Counter

import pytest

from data import arithmetic
from data.prepare import prepare
from data.shards import Shards
from data.tokenizers import load_tokenizer
from evals import rewards

SIZES = ["--pretrain=3000", "--sft=800", "--fusion=200", "--rl=100"]


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "arithmetic"
    arithmetic.main(["--out", str(out), *SIZES])
    return out


def sums_in(text):
    """Returns the three numbers of each sum of three in a text, in ascending order."""
    return {tuple(sorted(map(int, found))) for found in re.findall(r"(\d+)\+(\d+)\+(\d+)", text)}


def test_no_stage_sees_a_held_out_problem_nor_its_numbers_in_another_order(folder):
    held_out = sums_in((folder / "held_out.jsonl").read_text())
    assert len(held_out) == 400
    others = [path for path in folder.glob("*.jsonl") if path.stem != "held_out"]
    assert len(others) == 5
    for path in others:
        seen = sums_in(path.read_text())
        assert len(seen) > 90 and not seen & held_out, path.name


def test_problems_leave_out_what_is_held_out_in_any_order(monkeypatch):
    monkeypatch.setattr(arithmetic, "held_out_problems", lambda: [(30, 20, 10)])
    rng = FewProblems([[10, 20, 30], [20, 10, 30], [11, 12, 13]])
    assert next(arithmetic.problems(rng)) == (11, 12, 13)


class FewProblems:
    def __init__(self, problems):
        self.problems = problems

    def integers(self, *_):
        return self

    def tolist(self):
        return self.problems


@pytest.mark.parametrize("name", ["pretrain", "sft", "fusion"])
def test_every_line_of_every_text_is_a_question_or_a_right_sum(folder, name):
    for row in rows_of(folder, name):
        texts = [row.get("text", "")] + [message.get("thinking", "") for message in row.get("messages", [])]
        for line in "\n".join(texts).split():
            terms, _, result = line.partition("=")
            assert not result or sum(map(int, terms.split("+"))) == int(result), line


def test_answers_are_right_and_thinking_leads_to_them(folder):
    for name in ("sft", "fusion"):
        for row in rows_of(folder, name):
            user, assistant = row["messages"]
            numbers = list(map(int, user["content"].split()[0].split("+")))
            assert len(numbers) == 3 and all(10 <= number <= 99 for number in numbers)
            assert sum(numbers) == int(assistant["content"])
            if "thinking" in assistant:
                first, second = assistant["thinking"].split("\n")
                assert first == f"{numbers[0]}+{numbers[1]}={numbers[0] + numbers[1]}"
                assert second == f"{numbers[0] + numbers[1]}+{numbers[2]}={sum(numbers)}"
    for name in ("rl", "held_out"):
        for row in rows_of(folder, name):
            assert sum(map(int, row["question"].split("+"))) == int(row["answer"])


def test_a_quarter_of_the_first_conversations_think_and_half_of_those_with_switches_as_they_say(folder):
    share = sum("thinking" in row["messages"][1] for row in rows_of(folder, "sft")) / 800
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 800) ** 0.5
    switches = Counter()
    for row in rows_of(folder, "fusion"):
        user, assistant = row["messages"]
        _, _, switch = user["content"].partition(" ")
        assert ("thinking" in assistant) == (switch != "/no_think")
        switches[switch] += 1
    assert switches == {"/think": 50, "": 50, "/no_think": 100}


@pytest.mark.parametrize(
    "question, completion, obeyed",
    [
        ("1+2+3 /think", "<think>\n1+2=3\n3+3=6\n</think>\n\n6", True),
        ("1+2+3", "<think>\n1+2=3\n3+3=6\n</think>\n\n6", True),
        ("1+2+3 /think", "<think>\n\n</think>\n\n6", False),
        ("1+2+3 /think", "6", False),
        ("1+2+3 /no_think", "<think>\n\n</think>\n\n6", True),
        ("1+2+3 /no_think", "<think>\n1+2=3\n3+3=6\n</think>\n\n6", False),
        ("1+2+3 /no_think", "6", False),
    ],
)
def test_a_completion_obeys_the_switch_if_it_thinks_or_has_an_empty_block(question, completion, obeyed):
    assert arithmetic.obeys_switch(completion, question) == obeyed
    assert rewards.load("data.arithmetic:obedience:2")[0].function([completion], [{"question": question}]) == [obeyed]


def test_the_tokenizer_has_one_token_for_each_digit_and_each_word_of_a_chat(folder):
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    assert tokenizer.vocab_size == 24 and tokenizer.eot_id == tokenizer.special_tokens["<|endoftext|>"]
    text = "<|im_start|>user\n94+55+35 /no_think<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n184<|im_end|>"
    ids = tokenizer.encode(text, special=True)
    assert len(ids) == 26 and tokenizer.decode(ids) == text
    assert len(tokenizer.encode("user /think")) == 3 and len(tokenizer.encode("\n\n")) == 1
    for name in ("pretrain", "sft", "fusion"):
        for row in rows_of(folder, name):
            for text in [row.get("text", "")] + [message["content"] for message in row.get("messages", [])]:
                assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_seed_writes_the_same_and_another_seed_the_same_held_out_problems(folder, tmp_path):
    for seed in (1, 2):
        arithmetic.main(["--out", str(tmp_path / str(seed)), *SIZES, f"--seed={seed}"])
    for path in folder.iterdir():
        same = path.name in ("held_out.jsonl", "tokenizer.json")
        assert (tmp_path / "1" / path.name).read_bytes() == path.read_bytes()
        assert ((tmp_path / "2" / path.name).read_bytes() == path.read_bytes()) == same


def test_what_cannot_be_written_is_an_error_of_one_line(tmp_path, capsys):
    for option in ("--seed=-1", "--rl=-5"):
        with pytest.raises(SystemExit):
            arithmetic.main(["--out", str(tmp_path / "out"), *SIZES, option])
        assert f"{option.replace('=', ' ')}: give a number from 0" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="arithmetic.py: .*File exists"):
        arithmetic.main(["--out", str(tmp_path / "file"), *SIZES])


def test_prepared_for_pretraining_every_document_is_a_fact_or_a_worked_sum(folder, tmp_path):
    out = prepare(folder / "pretrain.jsonl", tokenizer=str(folder / "tokenizer.json"), out=str(tmp_path / "shards"))
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    shards = Shards(out, "train")
    text = tokenizer.decode(shards.read(0, len(shards)))
    documents = text.split("<|endoftext|>")[1:]
    worked = [document for document in documents if "\n" in document]
    assert len(documents) == shards.meta["documents"]["train"] and 0.4 < len(worked) / len(documents) < 0.6
    for document in worked:
        assert arithmetic.thinking(tuple(map(int, document.split("\n")[0].split("+")))) == document.split("\n", 1)[1]
