"""Problems, and the answers that a model samples to them: what it is scored on, and learns from."""

import hashlib
import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import generate
from data import chat
from data.loader import draw
from data.problems import problems
from data.tokenizers import Tokenizer
from distributed import processes
from evals import rewards
from training import load
from training.machine import Machine

ORDER = 7  # the kind of draws by which problems are ordered (data/loader.draw)


class Problem(NamedTuple):
    number: int  # by which its answers are drawn: its place in a step, or in an evaluation
    prompt: list[int]
    opening: str  # what of the answer's text stands in the prompt: <think>, or nothing
    row: dict  # with what its answers are scored by


class Answer(NamedTuple):
    problem: Problem
    ids: list[int]  # with the token that ended it
    logprobs: list[float]  # of each, as it was sampled
    entropies: list[float]  # of the distribution that each was sampled from
    is_target: list[bool]  # for each, False where think_budget forced it: the two before are 0 there
    is_truncated: bool  # at max_new_tokens
    text: str  # with the opening that stands in the prompt

    @property
    def thinks(self) -> bool:
        """Returns whether it has thoughts that are not empty."""
        thoughts, _ = chat.split_thinking(self.text)
        return bool(thoughts and thoughts.strip())

    def without_targets(self) -> "Answer":
        """Returns the answer as one that nothing is learned from."""
        return self._replace(is_target=[False] * len(self.ids))

    @property
    def n_inputs(self) -> int:
        """Returns how many tokens of it and its prompt a model reads: all but the last, which is only predicted."""
        return len(self.problem.prompt) + len(self.ids) - 1


def nothing_to_learn(eot_id: int) -> Answer:
    """Returns what fills up a batch, which no loss is made of, and of which experts count no token."""
    return Answer(Problem(-1, [eot_id], "", {}), [eot_id], [0.0], [0.0], [False], False, "")


class Problems:
    """The problems of a file or a named set that leave room for an answer. ValueError where there are none."""

    def __init__(self, source: str, tokenizer: Tokenizer, think: bool | None, room: int, here: Machine):
        """room: tokens that a prompt may have. think: as chat.prompt has it."""
        if not source:
            raise ValueError("data is empty: give problems, a .jsonl file or a named set such as gsm8k")
        self.here = here
        self.all = []
        lengths = []  # of the prompts, in tokens
        digest = hashlib.sha256()
        for messages, row in problems(source):
            prompt = chat.prompt(tokenizer, messages, think)
            lengths.append(len(prompt))
            if len(prompt) <= room:
                self.all.append(Problem(len(self.all), prompt, chat.opening(think), row))
                digest.update(json.dumps([prompt, row], sort_keys=True, default=str).encode())
        self.fingerprint = digest.hexdigest()
        if not lengths:
            raise ValueError(f"{source} has no problems")
        if not self.all:
            raise ValueError(
                f"{source}: no problem leaves room for an answer, of {len(lengths)}: lower max_new_tokens, or take a "
                f"model with a larger block_size; the shortest prompt has {min(lengths)} tokens, and block_size less "
                f"max_new_tokens is {room}"
            )
        too_long = len(lengths) - len(self.all)
        left_out = f", and {too_long:,} more leave no room for an answer" if too_long else ""
        here.say(f"{source}: {len(self.all):,} problems{left_out}")

    def of_step(self, step: int, n: int, seed: int) -> list[Problem]:
        """Returns this process's share of the n problems of a step: all of them once before any comes again."""
        drawn, _ = draw(step * n + np.arange(n), len(self.all), seed, ORDER)
        of_step = [self.all[i]._replace(number=place) for place, i in enumerate(drawn)]
        return self.here.share(of_step)


class Sampler:
    """Samples answers of a model. Each is a function of the weights, the problem and (seed, step, number, sample)."""

    def __init__(
        self, model: torch.nn.Module, tokenizer: Tokenizer, stop: set[int], max_new_tokens: int, seed: int,
        autocast, think_budget: int = 0, rows: int = 512,
    ):  # fmt: skip
        self.model = model
        self.tokenizer = tokenizer
        self.stop = stop
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.autocast = autocast
        self.budget = load.think_budget(tokenizer, think_budget) if think_budget else None
        self.rows = rows  # at once

    @torch.no_grad()
    def sample(self, some: list[Problem], step: int, n: int, temperature: float = 1.0) -> list[Answer]:
        """Returns n answers to each problem, side by side. temperature=0: the likeliest token each time."""
        was_training = self.model.training
        self.model.eval()
        answers = []
        at_once = max(self.rows // n, 1)
        for begin in range(0, len(some), at_once):
            part = some[begin : begin + at_once]
            prompts = [problem.prompt for problem in part]
            uniforms = generate.draws(self.seed, step, [problem.number for problem in part], n, self.max_new_tokens)
            with self.autocast:
                found = generate.rollout(
                    self.model, prompts, self.max_new_tokens, num_samples=n, uniforms=uniforms, stop=self.stop,
                    temperature=temperature, think_budget=self.budget,
                )  # fmt: skip
            for i, row in enumerate(zip(found.tokens, found.logprobs, found.entropies, found.forced, found.cut)):
                ids, logprobs, entropies, forced, is_truncated = row
                problem = part[i // n]
                text = problem.opening + self.tokenizer.decode([token for token in ids if token not in self.stop])
                is_target = [not was_forced for was_forced in forced]
                answers.append(Answer(problem, ids, logprobs, entropies, is_target, is_truncated, text))
        self.model.train(was_training)
        return answers


# ---- what they are worth ------------------------------------------------------------------------------------------
class Scores(NamedTuple):
    totals: list[float]  # of each answer
    parts: dict[str, list[float]]  # by the name of a reward, without its weight
    failures: dict[str, list[str]]  # of each reward a message for each answer that it could not judge


def score(graders: list, answers: list[Answer], fail: Callable = processes.fail) -> Scores:
    """Returns what answers are worth. graders: of rewards.load. A row has the text's "tokens", with its prompt, too.

    fail: ends the run. It is called on all processes where a reward could judge no answer of any of them.
    """
    rows = [answer.problem.row | {"tokens": answer.problem.prompt + answer.ids} for answer in answers]
    scores = Scores(*rewards.score(graders, [answer.text for answer in answers], rows))
    for name, messages in scores.failures.items():
        everywhere = sum(processes.gather(messages), [])
        n_answers = sum(processes.gather(len(answers)))
        if everywhere and len(everywhere) == n_answers:
            fail(f"the reward {name} failed for all {n_answers} answers: {everywhere[0]}")
        for message in messages:
            print(f"WARNING: the reward {name} counts as 0 of {message}", file=sys.stderr)
    return scores


def summary(answers: list[Answer], scores: Scores) -> dict:
    """Returns means, and extremes of the lengths, over the answers of all processes."""
    columns = {
        "reward": scores.totals,
        **{f"reward_{name}": values for name, values in scores.parts.items()},
        "length": [len(answer.ids) for answer in answers],
        "truncated": [answer.is_truncated for answer in answers],
        "thinks": [answer.thinks for answer in answers],
        "entropy": [sum(answer.entropies) / len(answer.ids) for answer in answers],
    }
    found = {}
    for name, own in columns.items():
        values = np.array(sum(processes.gather(list(own)), []), float)
        found[name] = float(values.mean())
        if name == "reward":
            found["reward_std"] = float(values.std())
        if name == "length":
            found["length_min"], found["length_max"] = float(values.min()), float(values.max())
    found["failures"] = sum(processes.gather(sum(map(len, scores.failures.values()))))
    return found


def evaluate(
    sampler: Sampler, some: list[Problem], graders: list, samples: int, here: Machine, fail: Callable = processes.fail
) -> dict:
    """Returns what greedy answers to problems are worth: their summary, each name with eval_ before it.

    samples: above 0, so many answers are sampled to each problem, too: pass_at_1 is the share of those that the first
    of the rewards gives 1 or more, pass_at_<samples> the share of the problems with one or more of these.
    fail: as for score.
    """
    own = here.share(some)
    answers = sampler.sample(own, step=0, n=1, temperature=0.0)
    report = {f"eval_{name}": value for name, value in summary(answers, score(graders, answers, fail)).items()}
    if samples:
        answers = sampler.sample(own, step=0, n=samples)
        first, *_ = score(graders, answers, fail).parts.values()
        passed = np.array(sum(processes.gather(first), [])).reshape(-1, samples) >= 1
        report["pass_at_1"] = float(passed.mean())
        report[f"pass_at_{samples}"] = float(passed.any(axis=1).mean())
    return report


def samples_of(answers: list[Answer], scores: Scores, tokenizer: Tokenizer) -> list[dict]:
    """Returns rows for samples.jsonl."""
    rows = []
    for i, answer in enumerate(answers):
        parts = {name: values[i] for name, values in scores.parts.items()}
        prompt = tokenizer.decode(answer.problem.prompt)
        rows.append({"prompt": prompt, "answer": answer.text, "reward": scores.totals[i], **parts})
    return rows
