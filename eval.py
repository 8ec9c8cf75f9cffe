"""Loss, perplexity and bits per byte of a run, a checkpoint or a Hugging Face folder, and its scores at tasks.

python eval.py out/run                                        (the first tokens of the run's own data, as train.py)
python eval.py out/run/best --data data/other --split val --eval_tokens 0 --json loss.json
python eval.py out/run --tasks hellaswag=hellaswag_val.jsonl,mine=mine.jsonl --num_fewshot 5
python eval.py out/run --task_dir tasks --tasks gsm8k,humaneval --allow_code_execution
python eval.py out/run --harness lambada_openai,piqa          (where lm-evaluation-harness is installed)

data/tasks.py says which tasks there are and how their files look. Nothing in the folders that are read is changed.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import generate
import sample
from data import sandbox
from data.shards import Shards, eval_batches
from data.tasks import find, load_task
from data.tokenizers import tokenizer_from_dict


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("path", type=Path, help="a run's folder, a checkpoint's (out/run/best), or one with a Hugging Face model")
    add("--data", help="a folder of token shards (default: the run's; with tasks: no loss, unless this is given)")
    add("--split", default="both", choices=["train", "val", "both"])
    add("--eval_tokens", type=int, default=262144, help="of each split, the first ones, as in train.py; 0: all")
    add("--block_size", type=int, default=0, help="tokens in a window of data; 0: the model's")
    add("--tasks", type=lambda s: s.split(","), default=[], metavar="NAME[=PATH],...", help="see data/tasks.py")
    add("--task_dir", help="where the files NAME.jsonl of tasks without a path lie (--harness: its .yaml files)")
    add("--num_fewshot", type=int, default=0, help="solved questions before each: the first of the file, not scored")
    add("--limit", type=int, default=0, help="questions of each task; 0: all")
    add("--allow_code_execution", action="store_true", help="run what the model writes (humaneval), within limits")
    add("--harness", type=lambda s: s.split(","), default=[], metavar="NAME,...", help="tasks of the package lm_eval")
    add("--batch_size", type=int, default=8, help="sequences at once: lower it if memory runs out")
    add("--device", default="auto", help="cuda, mps, cpu or auto")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="of the weights; auto: bfloat16 on CUDA, else float32")
    add("--tokenizer", help="for a folder without one: gpt2, or a path (see data/tokenizers.py)")
    add("--json", type=Path, metavar="FILE", help="write the results there, too")
    args = parser.parse_args(argv)
    for name, low in (("eval_tokens", 0), ("block_size", 0), ("num_fewshot", 0), ("limit", 0), ("batch_size", 1)):
        if getattr(args, name) < low:
            parser.error(f"--{name} {getattr(args, name)}: give a number from {low}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    return args


# ---- loss -----------------------------------------------------------------------------------------------------------


def bytes_of_tokens(tokenizer, vocab_size: int) -> torch.Tensor:
    """(vocab_size,): the bytes of text that each token stands for, 0 for special ones and without a tokenizer."""
    sizes = torch.zeros(vocab_size, dtype=torch.long)
    if tokenizer:
        sizes[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.token_bytes())
    return sizes


@torch.no_grad()
def loss_sums(model, batches: Iterable[tuple], bytes_of: torch.Tensor, autocast=None) -> torch.Tensor:
    """float64 (4,): nats and number of all targets that are not -1; nats and bytes of those that stand for text.

    model(x) gives logits, so there is no auxiliary loss in it. The caller sets eval mode.
    """
    total = torch.zeros(4, dtype=torch.float64)
    for x, y in batches:
        with autocast or nullcontext():
            logits = model(x)
        y = y.flatten()
        nats = F.cross_entropy(logits.flatten(0, 1).float(), y, ignore_index=-1, reduction="none").cpu().double()
        y = y.cpu()
        size = bytes_of[y.clamp(min=0)] * (y >= 0)
        total += torch.stack((nats.sum(), (y >= 0).sum(), nats[size > 0].sum(), size.sum())).double()
    return total


def loss_report(sums: Iterable[float]) -> dict:
    """loss (nats a token), perplexity = exp(loss), bits_per_byte = nats / (ln 2 * bytes) or None, tokens and bytes.

    Bits per byte leave out the tokens that no text stands behind, such as the one that begins a document.
    """
    nats, tokens, text_nats, size = map(float, sums)
    loss, bits = nats / tokens, text_nats / math.log(2) / size if size else None
    perplexity = math.inf if loss > 700 else math.exp(loss)  # the largest float is exp(709.8)
    return dict(loss=loss, perplexity=perplexity, bits_per_byte=bits, tokens=int(tokens), bytes=int(size))


def losses(model, tokenizer, folder, args):
    """{split: loss_report} of the folder of shards."""
    reports, device, block_size = {}, str(model.embed.weight.device), args.block_size or model.config.block_size
    bytes_of = bytes_of_tokens(tokenizer, model.config.vocab_size)
    for split in ("train", "val") if args.split == "both" else (args.split,):
        shards = Shards(folder, split)
        theirs = shards.meta["tokenizer"] and tokenizer_from_dict(shards.meta["tokenizer"])
        if theirs and theirs.fingerprint != tokenizer.fingerprint or shards.vocab_size != tokenizer.vocab_size:
            raise ValueError(f"{folder} has another tokenizer than the model ({tokenizer.name}): prepare it with that")
        batches = eval_batches(shards, block_size, args.eval_tokens, args.batch_size, device=device)
        batches = tqdm(batches, f"{split}, batches", leave=False, disable=None)
        reports[split] = loss_report(loss_sums(model, batches, bytes_of))
    return reports


# ---- questions to the model -----------------------------------------------------------------------------------------


class Request(NamedTuple):
    args: tuple  # as in an Instance of lm_eval


def windows(tokens: list[int], first: int, block_size: int) -> Iterator[tuple[list[int], int]]:
    """Windows (tokens, n), of which the last n are to be scored, so that tokens[first:] are all scored once.

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

    def __init__(self, model, tokenizer, prefix: list[int], batch_size: int):
        super().__init__()
        self.model, self.tokenizer, self.prefix, self.rows, self.cut = model, tokenizer, prefix, batch_size, 0
        special = tokenizer.special_tokens
        self.stop = {tokenizer.eot_id, *(special[name] for name in ("<|im_end|>",) if name in special)}

    @torch.no_grad()
    def score(self, sequences: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """(log p of tokens[first:], whether each of them is the likeliest) for every (tokens, first)."""
        # 1. what is asked of each input; choices of one token share theirs
        asked = {}
        for i, (tokens, first) in enumerate(sequences):
            for window, n in windows(tokens, first, self.model.config.block_size):
                asked.setdefault(tuple(window[:-1]), []).append((i, window[-n:]))
        inputs = sorted(asked, key=len, reverse=True)  # the longest first: if memory runs out, then at once
        # 2. forward in batches, and add up
        logprob, greedy = [0.0] * len(sequences), [True] * len(sequences)
        device = self.model.embed.weight.device
        for begin in tqdm(range(0, len(inputs), self.rows), "scoring", leave=False, disable=None):
            batch = inputs[begin : begin + self.rows]
            x = torch.tensor([[*row, *[0] * (len(batch[0]) - len(row))] for row in batch], device=device)  # (B, T)
            for row, logits in zip(batch, self.model(x)):
                for i, targets in asked[row]:
                    logp = logits[len(row) - len(targets) : len(row)].float().log_softmax(dim=-1)  # (n, V)
                    ids = torch.tensor(targets, device=device)
                    logprob[i] += logp.gather(1, ids[:, None]).double().sum().item()
                    greedy[i] &= (logp.argmax(dim=-1) == ids).all().item()
        return list(zip(logprob, greedy))

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """args (context, continuation) -> (log p(continuation | context), whether it is the greedy one)."""
        sequences = []
        for context, continuation in (request.args for request in requests):
            kept = context.rstrip()  # a space belongs to the word that follows, in most tokenizers
            tokens = self.tokenizer.encode(context + continuation)
            first = min(len(self.tokenizer.encode(kept)), len(tokens) - 1)
            prefix = self.prefix if first else [self.tokenizer.eot_id]
            sequences.append((prefix + tokens, len(prefix) + first))
            self.cut += len(sequences[-1][0]) - 1 > self.model.config.block_size
        return self.score(sequences)

    def loglikelihood_rolling(self, requests) -> list[float]:
        """args (text,) -> log p(text), in windows that each predict as many tokens as they can."""
        texts = [self.tokenizer.encode(request.args[0]) for request in requests]
        return [logprob for logprob, _ in self.score([([self.tokenizer.eot_id, *tokens], 1) for tokens in texts])]

    def generate_until(self, requests) -> list[str]:
        """args (context, {"until": [...], "max_gen_toks": n}) -> the greedy continuation before the first stop.

        An answer gets at most half of block_size, and so much of the context is left as fits beside it.
        """
        block_size, answers, work = self.model.config.block_size, [""] * len(requests), []
        for i, (context, options) in enumerate(request.args for request in requests):
            if options.get("do_sample") or options.get("temperature"):
                raise ValueError(f"this task asks for sampling ({options}), and answers are greedy here")
            until = options.get("until") or []
            n = min(options.get("max_gen_toks", 256), max(block_size // 2, 1))
            prompt = self.prefix + self.tokenizer.encode(context) or [self.tokenizer.eot_id]
            room = block_size + 1 - n  # the last new token is not fed back
            self.cut += len(prompt) > room
            work.append((n, [until] if isinstance(until, str) else list(until), prompt[-room:], i))
        work.sort(key=lambda job: (job[:2], len(job[2])))
        groups = [list(group) for _, group in groupby(work, key=lambda job: job[:2])]
        batches = [group[i : i + self.rows] for group in groups for i in range(0, len(group), self.rows)]
        for batch in tqdm(batches, "writing", leave=False, disable=None):
            n, until = batch[0][:2]
            for (*_, i), text in zip(batch, self.write([job[2] for job in batch], n, until)):
                answers[i] = text
        return answers

    def write(self, prompts, max_new_tokens, until):
        """The greedy continuations of a batch of prompts, each cut before the first of the stops in it."""
        rows, texts = [[] for _ in prompts], [""] * len(prompts)
        for tokens in generate.stream(self.model, prompts, max_new_tokens, temperature=0, stop=self.stop):
            for row, token in zip(rows, tokens.tolist()):
                row.extend([token] if token >= 0 else [])
            texts = [self.tokenizer.decode(row) for row in rows]
            if all(token < 0 or any(stop in text for stop in until) for token, text in zip(tokens.tolist(), texts)):
                break
        return [text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=None)] for text in texts]


# ---- tasks ----------------------------------------------------------------------------------------------------------


def evaluate_task(scorer: Scorer, task, questions: list) -> dict:
    """{metric: mean, metric_stderr: its standard error, questions, cut: how many contexts were too long}."""
    before = scorer.cut
    if questions[0].continuations:
        pairs = [Request(pair) for q in questions for pair in zip(q.contexts, q.continuations)]
        scores = (score for score, _ in scorer.loglikelihood(pairs))
        graded = [task.grade([next(scores) for _ in q.contexts], q) for q in questions]
    else:
        options = {"until": list(task.until), "max_gen_toks": task.max_new_tokens}
        texts = scorer.generate_until([Request((q.contexts[0], options)) for q in questions])
        graded = [task.grade(text, q) for text, q in zip(texts, questions)]
    results, n = {"questions": len(questions), "cut": scorer.cut - before}, len(questions)
    for metric in graded[0]:
        mean = sum(scores[metric] for scores in graded) / n
        results |= {metric: mean, f"{metric}_stderr": math.sqrt(mean * (1 - mean) / max(n - 1, 1))}
    return results


def evaluate_harness(scorer: Scorer, args) -> dict:
    """lm-evaluation-harness's own results of its tasks: {task: {"metric,filter": value}}."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class NanoLM(Scorer, LM):
        pass

    model = NanoLM(scorer.model, scorer.tokenizer, scorer.prefix, scorer.rows)
    tasks = TaskManager(include_path=args.task_dir)
    if unknown := [name for name in args.harness if name not in tasks.all_tasks]:
        raise ValueError(f"lm_eval has no task {', '.join(unknown)}: `lm_eval ls tasks` lists them")
    options = dict(num_fewshot=args.num_fewshot or None, limit=args.limit or None, batch_size=args.batch_size)
    results = lm_eval.simple_evaluate(model, tasks=args.harness, task_manager=tasks, **options)["results"]
    return {name: values | {"cut": model.cut} for name, values in results.items()}


def evaluate(args) -> dict:
    """Prints and returns {"path", "dtype", "device", "loss": {split: ...}, "tasks": {...}, "harness": {...}}."""
    # 1. what could fail before the model is there
    if args.harness and not find_spec("lm_eval"):
        raise ValueError("--harness needs lm-evaluation-harness: pip install lm-eval")
    tasks = {}
    for name, path in (find(spec, args.task_dir) for spec in args.tasks):
        tasks[name] = load_task(name, path, args.num_fewshot, args.limit)
        if tasks[name][0].runs_code and not args.allow_code_execution:
            raise ValueError(f"{name} runs the programs that the model writes: allow it with --allow_code_execution")
        if tasks[name][0].runs_code and not sandbox.passes("pass"):
            raise ValueError(f"{name}: no program can run here within its limits (see data/sandbox.py)")
    # 2. loss
    model, tokenizer, prefix = sample.load(args)
    report = {"path": str(args.path), "device": str(model.embed.weight.device), "dtype": str(model.embed.weight.dtype)}
    if args.data or not (tasks or args.harness):
        file = args.path / "config.json"
        folder = args.data or (json.loads(file.read_text()) if file.exists() else {}).get("knobs", {}).get("data")
        if not folder:
            raise ValueError(f"{args.path} does not say what it was trained on: give --data FOLDER")
        report |= {"data": folder, "loss": losses(model, tokenizer, folder, args)}
        print(f"{'split':8}{'tokens':>14}{'bytes':>14}{'loss':>10}{'perplexity':>13}{'bits per byte':>15}")
        for split, r in report["loss"].items():
            bits = "n/a" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.4f}"
            print(f"{split:8}{r['tokens']:14,}{r['bytes']:14,}{r['loss']:10.4f}{r['perplexity']:13,.3f}{bits:>15}")
    # 3. tasks
    sample.hide_padding(model, tokenizer)
    scorer = Scorer(model, tokenizer, prefix, args.batch_size)
    for name, (task, questions) in tasks.items():
        results = {name: evaluate_task(scorer, task, questions)}
        show(results)
        report["tasks"] = report.get("tasks", {}) | results
    if args.harness:
        report["harness"] = evaluate_harness(scorer, args)
        show(report["harness"])
    return report


def show(results):
    for name, values in results.items():
        texts = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        print(f"{name}: {', '.join(texts)}")


def main(argv=None):
    args = parse_arguments(argv)
    try:
        report = evaluate(args)
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")
    except (OSError, ValueError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
