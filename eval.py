"""Loss, perplexity and bits per byte of a run, a checkpoint or a Hugging Face folder, and its scores at tasks.

python eval.py out/run                                        (the first tokens of the run's own data, as train.py)
python eval.py out/run/best --data data/other --split val --eval_tokens 0 --json loss.json
python eval.py out/run --tasks hellaswag=hellaswag_val.jsonl,mine=mine.jsonl --num_fewshot 5
python eval.py out/run --task_dir tasks --tasks gsm8k,humaneval --allow_code_execution
python eval.py out/sft --tasks gsm8k=gsm8k_test.jsonl --chat --think --max_new_tokens 1024
python eval.py out/run --harness lambada_openai,piqa          (where lm-evaluation-harness is installed)

evals/tasks.py says which tasks there are and how their files look. Nothing in the folders that are read is changed.
"""

import json
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from tqdm import tqdm

from configurator import shortened
from data import chat
from data.loader import eval_batches, read_mixture
from data.shards import Shards
from data.text import print_any_text
from data.tokenizers import tokenizer_from_dict
from evals import sandbox
from evals.judge import judge
from evals.scorer import ChatOptions, Scorer, evaluate_harness, evaluate_task
from evals.tasks import find, load_task
from training import output
from training.arguments import Parser, not_empty, number
from training.load import add_thinking, hide_padding, load, stop_tokens, think_budget, warn_of_template
from training.loss import bytes_of_tokens, loss_report, loss_sums


def parse_arguments(argv):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    from_0 = number("[0, inf)")
    add("path", type=Path, help="a run's folder, a checkpoint's (out/run/best), or one with a Hugging Face model")
    about_data = "a folder of token shards (default: the run's; with tasks: no loss, unless this is given)"
    add("--data", type=not_empty, help=about_data)
    add("--split", default="both", choices=["train", "val", "both"])
    add("--eval_tokens", type=from_0, default=262144, help="of each split, the first ones, as in train.py; 0: all")
    add("--block_size", type=from_0, default=0, help="tokens in a window of data; 0: the model's")
    add("--tasks", type=lambda s: s.split(","), default=[], metavar="NAME[=PATH],...", help="see evals/tasks.py")
    about_tasks = "where the files NAME.jsonl of tasks without a path lie (--harness: its .yaml files)"
    add("--task_dir", type=not_empty, help=about_tasks)
    add("--num_fewshot", type=from_0, help="solved questions before each: the first of the file, not scored")
    add("--limit", type=from_0, default=0, help="questions of each task; 0: all")
    add("--max_new_tokens", type=from_0, default=0, help="of an answer that is written; 0: as the task says")
    add("--chat", action="store_true", help="ask as a chat's user, and score what follows the thinking")
    add_thinking(parser)
    add("--allow_code_execution", action="store_true", help="run what the model writes (humaneval), within limits")
    add("--sandbox", default="full", choices=["full", "weak"], help="weak: with what this system has of it, if not all")
    add("--harness", type=lambda s: s.split(","), default=[], metavar="NAME,...", help="tasks of the package lm_eval")
    add("--batch_size", type=number("[1, inf)"), default=8, help="sequences at once: lower it if memory runs out")
    add("--device", default="auto", help="cuda, mps, cpu or auto")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="of the weights; auto: bfloat16 on CUDA, else float32")
    add("--tokenizer", type=not_empty, help="for a folder without one: gpt2, or a path (see data/tokenizers.py)")
    add("--no_average", action="store_true", help="the weights themselves, where a run has their average, too (ema)")
    add("--json", type=Path, metavar="FILE", help="write the results there, too")
    args = parser.parse_args(argv)
    if not args.chat and (args.think is not None or args.think_budget is not None):
        parser.error("--think, --no_think and --think_budget are of a chat: give --chat")
    if args.chat and (args.harness or args.num_fewshot or not args.tasks):
        parser.error("--chat asks the questions of --tasks, without examples and without --harness")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.json and args.json.is_dir():
        parser.error(f"--json {args.json} is a folder: give a file in it")
    return args


# ---- loss ------------------------------------------------------------------------------------------------------------
def data_of(args) -> list[str]:
    """Returns the folders of shards that are asked for: by default what the run was trained on."""
    if args.data:
        return [args.data]
    file = args.path / "config.json"
    saved = json.loads(file.read_text()) if file.exists() else {}
    script = saved.get("script", "train.py")
    if script != "train.py":
        raise ValueError(
            f"{args.path} is a run of {script}, which reads no token shards: give --data FOLDER, or --tasks"
        )
    data = saved.get("knobs", {}).get("data")
    if not data:
        raise ValueError(f"{args.path} does not say what it was trained on: give --data FOLDER")
    return [str(folder) for folder, _ in read_mixture(data)]


def losses(model, tokenizer, folders, args) -> dict:
    """Returns {split: loss_report} of a folder of shards, {"FOLDER SPLIT": loss_report} of several."""
    device = str(model.embed.weight.device)
    block_size = args.block_size or model.config.block_size
    if block_size > model.config.block_size:
        raise ValueError(f"--block_size {shortened(str(block_size))}: the model has {model.config.block_size} at most")
    splits = ("train", "val") if args.split == "both" else (args.split,)
    reports = {}
    for folder, split in product(folders, splits):
        shards = Shards(folder, split)
        check_tokenizer(shards, tokenizer)
        if shards.vocab_size > model.config.vocab_size:
            sizes = f"{shards.vocab_size} tokens, and the model {model.config.vocab_size}"
            raise ValueError(f"{shards.folder} has a vocabulary of {sizes}: they do not belong together")
        bytes_of = bytes_of_tokens(tokenizer, model.config.vocab_size, shards)
        batches = eval_batches(shards, block_size, args.eval_tokens, args.batch_size, device=device)
        batches = tqdm(batches, f"{split}, batches", leave=False, disable=None)
        name = split if len(folders) == 1 else f"{folder} {split}"
        reports[name] = loss_report(loss_sums(model, batches, bytes_of))
    return reports


def check_tokenizer(shards, tokenizer):
    """Raises ValueError where shards were made with another tokenizer than the model's, as far as that is known."""
    if tokenizer is None:
        if shards.meta["tokenizer"]:
            raise ValueError(f"{shards.folder} has a tokenizer, and the model's is not known: name it with --tokenizer")
        return
    same = shards.vocab_size == tokenizer.vocab_size
    if shards.meta["tokenizer"]:
        same = same and tokenizer_from_dict(shards.meta["tokenizer"]).fingerprint == tokenizer.fingerprint
    if not same:
        name = f"the model ({tokenizer.name})"
        raise ValueError(f"{shards.folder} has another tokenizer than {name}: prepare it with that")


# ---- all that is asked -----------------------------------------------------------------------------------------------
def load_tasks(args) -> dict:
    """Returns {name: (task, questions)}; ValueError says what is wrong with a file, or may not run."""
    tasks = {}
    for spec in args.tasks:
        name, path = find(spec, args.task_dir)
        if name in tasks:
            raise ValueError(f"--tasks {','.join(args.tasks)} asks {name} twice: give each a name of its own")
        task, questions = load_task(name, path, args.num_fewshot or 0, args.limit)
        if args.chat and not questions[0].asked:
            raise ValueError(f"{name} is no question of a chat: evaluate it without --chat")
        if task.case and not args.allow_code_execution:
            raise ValueError(f"{name} runs the programs that the model writes: allow it with --allow_code_execution")
        if task.case:
            judge([], weak=args.sandbox == "weak")  # raises where no program can run
            for part in sandbox.missing():
                print(f"warning: {name} runs programs without {part}", file=sys.stderr)
        tasks[name] = task, questions
    return tasks


def evaluate(args) -> dict:
    """Prints and returns {"path", "dtype", "device", "loss": {split: ...}, "tasks": {...}, "harness": {...}}."""
    # 1. what could fail before the model is there
    if args.harness and not find_spec("lm_eval"):
        raise ValueError("--harness needs lm-evaluation-harness: pip install lm-eval")
    tasks = load_tasks(args)

    # 2. loss
    needs_text = bool(tasks or args.harness)
    model, tokenizer, prefix = load(
        args.path, args.device, args.dtype, args.tokenizer, needs_text, average=not args.no_average
    )
    weight = model.embed.weight
    report = {"path": str(args.path), "device": str(weight.device), "dtype": str(weight.dtype)}
    if args.data or not needs_text:
        report["data"] = data_of(args)
        report["loss"] = losses(model, tokenizer, report["data"], args)
        print_losses(report["loss"])

    # 3. tasks
    if not needs_text:
        return report
    hide_padding(model, tokenizer)
    scorer = Scorer(
        model, tokenizer, prefix, stop_tokens(tokenizer, args.path), args.batch_size, chat_options(args, tokenizer)
    )
    for name, (task, questions) in tasks.items():
        results = evaluate_task(scorer, task, questions, args.sandbox == "weak", args.max_new_tokens)
        print_scores(name, results)
        report.setdefault("tasks", {})[name] = results
    if args.harness:
        options = dict(num_fewshot=args.num_fewshot, limit=args.limit or None)
        report["harness"] = evaluate_harness(scorer, args.harness, args.task_dir, options)
        for name, results in report["harness"].items():
            print_scores(name, results)
    return report


def chat_options(args, tokenizer):
    """Returns how questions are asked in a chat, None where they are not."""
    if not args.chat:
        return None
    chat.check(tokenizer)
    warn_of_template(args.path)
    budget = None
    if args.think_budget is not None:
        budget = think_budget(tokenizer, args.think_budget)
    return ChatOptions(args.think, budget)


def print_losses(reports):
    width = max(map(len, reports)) + 3
    print(f"{'split':{width}}{'tokens':>14}{'bytes':>14}{'loss':>10}{'perplexity':>13}{'bits per byte':>15}")
    for name, report in reports.items():
        bits = "n/a"
        if report["bits_per_byte"] is not None:
            bits = f"{report['bits_per_byte']:.4f}"
        sizes = f"{name:{width}}{report['tokens']:14,}{report['bytes']:14,}"
        print(f"{sizes}{report['loss']:10.4f}{report['perplexity']:13,.3f}{bits:>15}")


def print_scores(name, results):
    texts = []
    for key, value in results.items():
        text = f"{value:.4g}" if isinstance(value, float) else value
        texts.append(f"{key} {text}")
    print(f"{name}: {', '.join(texts)}")


def main(argv=None):
    args = parse_arguments(argv)
    print_any_text()
    with output.errors_in_one_line():
        report = evaluate(args)
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    output.outlast_readers()  # the results still go to --json
    main()
