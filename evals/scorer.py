"""What a model answers to the questions of a task: probabilities of given texts, or what it writes."""

import math
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from tqdm import tqdm

import generate
from data import chat
from evals.judge import judge
from evals.rewards import answer_part


class Request(NamedTuple):
    args: tuple  # as in an Instance of lm_eval


class Answer(NamedTuple):
    """What is to be written: a greedy continuation of a prompt, up to one of some texts."""

    max_new_tokens: int
    until: list[str]
    prompt: list[int]
    place: int  # among the requests


class ChatOptions(NamedTuple):
    """How questions are asked as turns of a chat."""

    think: bool | None = None  # whether an answer begins with thinking; None leaves it to the model
    budget: generate.ThinkBudget | None = None


def windows(tokens: list[int], first: int, block_size: int) -> Iterator[tuple[list[int], int]]:
    """Yields windows (tokens, n), of which the last n are to be scored, so that tokens[first:] are all scored once.

    A window has at most block_size + 1 tokens, and each as much context as fits: as lm_eval's rolling windows.
    """
    for begin in range(first, len(tokens), block_size):
        end = min(begin + block_size, len(tokens))
        yield tokens[max(end - 1 - block_size, 0) : end], end - begin


class Scorer:
    """Answers the three kinds of request of lm_eval.api.model.LM, of which it can be a base: requests have .args.

    A text begins with `prefix`, as the documents that the model was trained on. Sequences of different lengths are
    padded at the right, which changes no logits before. Contexts that are too long lose their beginning: `cut` counts.
    """

    def __init__(
        self,
        model,
        tokenizer,
        prefix: list[int],
        stop: set[int],
        batch_size: int,
        chat_options: ChatOptions | None = None,
    ):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.prefix = prefix
        self.stop = stop  # ids that end what is written
        self.rows = batch_size
        self.chat_options = chat_options  # of a scorer that asks what others continue
        self.cut = 0

    @torch.no_grad()
    def score(self, sequences: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Returns (log p of tokens[first:], whether each of them is the likeliest) for every (tokens, first)."""
        # 1. what is asked of each input; choices of one token share theirs
        asked = {}
        for i, (tokens, first) in enumerate(sequences):
            for window, n in windows(tokens, first, self.model.config.block_size):
                asked.setdefault(tuple(window[:-1]), []).append((i, window[-n:]))
        inputs = sorted(asked, key=len, reverse=True)  # the longest first: if memory runs out, then at once

        # 2. forward in batches, and add up
        logprob = [0.0] * len(sequences)
        greedy = [True] * len(sequences)
        device = self.model.embed.weight.device
        for begin in tqdm(range(0, len(inputs), self.rows), "scoring", leave=False, disable=None):
            batch = inputs[begin : begin + self.rows]
            longest = len(batch[0])
            padded = [[*row, *[0] * (longest - len(row))] for row in batch]
            x = torch.tensor(padded, device=device)  # (B, T)
            for row, logits in zip(batch, self.model(x)):
                for i, targets in asked[row]:
                    logp = logits[len(row) - len(targets) : len(row)].float().log_softmax(dim=-1)  # (n, V)
                    ids = torch.tensor(targets, device=device)
                    logprob[i] += logp.gather(1, ids[:, None]).double().sum().item()
                    greedy[i] &= (logp.argmax(dim=-1) == ids).all().item()
        return list(zip(logprob, greedy))

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """Takes args (context, continuation); returns (log p(continuation | context), whether it is the greedy one)."""
        sequences = []
        for request in requests:
            context, continuation = request.args
            kept = context.rstrip()  # a space belongs to the word that follows, in most tokenizers
            tokens = self.tokenizer.encode(context + continuation)
            first = min(len(self.tokenizer.encode(kept)), len(tokens) - 1)
            prefix = self.prefix if first else [self.tokenizer.eot_id]
            sequence = prefix + tokens
            sequences.append((sequence, len(prefix) + first))
            self.cut += len(sequence) - 1 > self.model.config.block_size
        return self.score(sequences)

    def loglikelihood_rolling(self, requests) -> list[float]:
        """Takes args (text,); returns log p(text), in windows that each predict as many tokens as they can."""
        sequences = []
        for request in requests:
            tokens = self.tokenizer.encode(request.args[0])
            sequences.append(([self.tokenizer.eot_id, *tokens], 1))
        return [logprob for logprob, _ in self.score(sequences)]

    def generate_until(self, requests) -> list[str]:
        """Takes args (context, {"until": [...], "max_gen_toks": n}); returns the greedy texts before the first stop.

        An answer gets at most half of block_size, and so much of the context is left as fits beside it.
        """
        block_size = self.model.config.block_size
        work = []
        for place, request in enumerate(requests):
            context, options = request.args
            if options.get("do_sample") or options.get("temperature"):
                raise ValueError(f"this task asks for sampling ({options}), and answers are greedy here")
            until = options.get("until") or []
            if isinstance(until, str):
                until = [until]
            n = min(options.get("max_gen_toks", 256), max(block_size // 2, 1))
            prompt = self.prompt_of(context)
            room = block_size + 1 - n  # the last new token is not fed back
            self.cut += len(prompt) > room
            work.append(Answer(n, list(until), prompt[-room:], place))

        # Batches of equal limits, and of prompts of about equal lengths.
        work.sort(key=lambda answer: (answer.max_new_tokens, answer.until, len(answer.prompt)))
        batches = []
        for _, group in groupby(work, key=lambda answer: (answer.max_new_tokens, answer.until)):
            group = list(group)
            batches += [group[i : i + self.rows] for i in range(0, len(group), self.rows)]
        texts = [""] * len(work)
        for batch in tqdm(batches, "writing", leave=False, disable=None):
            prompts = [answer.prompt for answer in batch]
            for answer, text in zip(batch, self.continue_all(prompts, batch[0].max_new_tokens, batch[0].until)):
                texts[answer.place] = text
        return texts

    def prompt_of(self, context):
        """Returns the tokens that are continued."""
        if self.chat_options is not None:
            messages = [{"role": "user", "content": context}]
            return self.prefix + chat.prompt(self.tokenizer, messages, self.chat_options.think)[1:]
        prompt = self.prefix + self.tokenizer.encode(context)
        return prompt or [self.tokenizer.eot_id]

    def continue_all(self, prompts, max_new_tokens, until):
        """Returns the greedy continuations of a batch of prompts, each cut before the first of the stops in it."""
        rows = [[] for _ in prompts]
        texts = [""] * len(prompts)
        options = dict(temperature=0, stop=self.stop)
        if self.chat_options is not None:
            options["think_budget"] = self.chat_options.budget
        for tokens in generate.stream(self.model, prompts, max_new_tokens, **options):
            for row, token in zip(rows, tokens.tolist()):
                if token >= 0:
                    row.append(token)
            texts = [self.tokenizer.decode(row) for row in rows]
            stopped = [any(stop in text for stop in until) for text in texts]
            if all(token < 0 or has_stopped for token, has_stopped in zip(tokens.tolist(), stopped)):
                break
        return [text[: generate.first_stop(text, until)] for text in texts]


def written_answers(scorer, task, questions, max_new_tokens):
    """Returns what the model writes to each question; in a chat what follows its thinking."""
    options = {"until": list(task.until), "max_gen_toks": max_new_tokens or task.max_new_tokens}
    if scorer.chat_options is None:
        return scorer.generate_until([Request((q.contexts[0], options)) for q in questions])
    options["until"] = []  # a turn has an end of its own, and thinking may say what ends other texts
    texts = scorer.generate_until([Request((q.asked, options)) for q in questions])
    opening = chat.opening(scorer.chat_options.think)
    texts = [opening + text for text in texts]
    return [answer_part(text) for text in texts]


def evaluate_task(scorer: Scorer, task, questions: list, weak_sandbox: bool = False, max_new_tokens: int = 0) -> dict:
    """Returns {metric: mean, metric_stderr: its standard error, questions, cut: how many contexts were too long}.

    Of programs also {forgeable: how many could have made themselves pass, see evals/judge.py}.
    max_new_tokens: of an answer that is written; 0: as the task says.
    """
    before = scorer.cut
    results = {"questions": len(questions)}
    if questions[0].continuations:
        pairs = [Request(pair) for q in questions for pair in zip(q.contexts, q.continuations, strict=True)]
        scores = iter([score for score, _ in scorer.loglikelihood(pairs)])
        graded = [task.grade([next(scores) for _ in q.contexts], q) for q in questions]
    else:
        answers = written_answers(scorer, task, questions, max_new_tokens)
        if task.case:
            cases = [task.case(text, q) for text, q in zip(answers, questions)]
            answers = judge(cases, forgeable=True, weak=weak_sandbox)
            results["forgeable"] = sum(verdict.forgeable for verdict in answers)
        graded = [task.grade(answer, q) for answer, q in zip(answers, questions)]
    n = len(questions)
    results["cut"] = scorer.cut - before
    for metric in graded[0]:
        mean = sum(scores[metric] for scores in graded) / n
        results[metric] = mean
        results[f"{metric}_stderr"] = math.sqrt(mean * (1 - mean) / max(n - 1, 1))
    return results


def evaluate_harness(scorer: Scorer, names: list[str], task_dir: str | None, options: dict) -> dict:
    """Returns lm-evaluation-harness's own results of its tasks: {task: {"metric,filter": value}}."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class NanoLM(Scorer, LM):
        pass

    model = NanoLM(scorer.model, scorer.tokenizer, scorer.prefix, scorer.stop, scorer.rows)
    tasks = TaskManager(include_path=task_dir)
    unknown = [name for name in names if name not in tasks.all_tasks]
    if unknown:
        raise ValueError(f"lm_eval has no task {', '.join(unknown)}: `lm_eval ls tasks` lists them")
    results = lm_eval.simple_evaluate(model, tasks=names, task_manager=tasks, batch_size=scorer.rows, **options)
    return {name: values | {"cut": model.cut} for name, values in results["results"].items()}
