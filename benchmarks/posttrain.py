"""`python bench.py posttrain`: from nothing to a model that thinks when it is told to, on sums of three numbers.

Pretraining, fine-tuning on conversations, GRPO, fusion of both ways of answering, GRPO again, online DPO: each stage is
a command with a config of config/arithmetic, and goes on from the run of the one before. After each one the model
answers the held-out questions of data/arithmetic.py. What is finished is not done again, until what decides it changes.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.comparison import mean_and_error, new_figure, standard_error
from benchmarks.timing import describe, machine
from configurator import resolve
from data import arithmetic, chat
from generate import generate
from training import run_folder
from training.knobs import find_device
from training.load import hide_padding, load, stop_tokens

ROOT = Path(__file__).resolve().parent.parent
RESULT = "posttrain"
OUT = Path("out/posttrain")
DATA = Path("data/arithmetic")
MOST = 40  # tokens of an answer: one that thinks has 29 at most


class Stage(NamedTuple):
    """A stage trains by `script` and the config of its name, and begins with the weights of the stage `before`."""

    script: str
    before: str
    about: str


STAGES = {
    "pretrain": Stage("train.py", "", "pretraining on plain text"),
    "sft": Stage("train.py", "pretrain", "SFT, a quarter of it thinks"),
    "grpo": Stage("grpo.py", "sft", "GRPO, rewarded for right answers"),
    "dpo_offline": Stage("dpo.py", "grpo", "*beside it: plain DPO, pairs sampled once*"),
    "fusion": Stage("train.py", "grpo", "SFT of both ways, by a switch"),
    "grpo_mixed": Stage("grpo.py", "fusion", "GRPO with both switches"),
    "dpo_online": Stage("dpo.py", "grpo_mixed", "online DPO with nll_coef=1"),
}
LAST = "dpo_online"
CURVES = "reward length thinks entropy logprob_difference eval_reward accuracy margin logp_chosen".split()
# How a question is put: the switch behind it, how the prompt begins the answer (chat.prompt), the temperature.
ASKED = {
    "greedy": (None, None, 0.0),
    "sampled": (None, None, 1.0),
    "forced to think": (None, True, 0.0),
    "forced not to think": (None, False, 0.0),
    "/think": (True, None, 0.0),
    "/no_think": (False, None, 0.0),
}
WAYS = {  # of answering: how it is asked for before the fusion, and from there on
    "thinking": ("forced to think", "/think"),
    "not thinking": ("forced not to think", "/no_think"),
    "as it likes": ("greedy", "greedy"),
}


# ---- the stages ------------------------------------------------------------------------------------------------------
def measure(args: Namespace) -> Iterator[dict]:
    """Yields one result: of each seed what came of every stage, and the curves of those that learn by trying."""
    seeds = " ".join(map(str, args.seeds))
    result = {"command": f"python bench.py posttrain --seeds {seeds}", "machine": machine(find_device(args.device))}
    result |= {"seeds": args.seeds, "questions": arithmetic.HELD_OUT, "stages": {name: [] for name in STAGES}}
    result["data_seconds"] = prepare_data()
    for seed in args.seeds:
        for name in STAGES:
            record = run_stage(name, seed, args.device)
            result["stages"][name].append(record)
            print(f"seed {seed}: {name}: {one_line(record)}", file=sys.stderr)
    yield result


def prepare_data() -> float:
    """Makes what all stages read; returns the CPU seconds that took."""
    begin = cpu_seconds()
    prepare = ["data/prepare.py", "--tokenizer", f"{DATA}/tokenizer.json"]
    run(["data/arithmetic.py", "--out", str(DATA)], OUT / "data.log")
    run([*prepare, f"{DATA}/pretrain.jsonl", "--out", f"{DATA}/pretrain"], OUT / "data.log")
    for name in ("sft", "fusion"):
        run([*prepare, f"{DATA}/{name}.jsonl", "--out", f"{DATA}/{name}", "--chat"], OUT / "data.log")
    return cpu_seconds() - begin


def folder_of(name: str, seed: int) -> Path:
    """Returns where the run of a stage is. All seeds share the pretraining."""
    if name == "pretrain":
        return OUT / name
    return OUT / f"seed{seed}" / name


def command_of(name: str, seed: int, device: str) -> list[str]:
    """Returns the words that train a stage."""
    stage = STAGES[name]
    words = [stage.script, f"config/arithmetic/{name}.py", f"--out_dir={folder_of(name, seed)}", f"--device={device}"]
    if stage.before:
        words += [f"--seed={seed}", f"--init_from={folder_of(stage.before, seed)}"]
    return words


def key_of(name: str, seed: int, device: str) -> str:
    """Returns a hash of what decides a stage: its command and knobs, and the stage before it, or else the data."""
    command = command_of(name, seed, device)
    stage = STAGES[name]
    script, config, *_ = command
    knobs = resolve(ROOT / script, [str(ROOT / config)])
    parts = [*command, knobs]
    if stage.before:
        parts.append(key_of(stage.before, seed, device))
    else:
        parts += [file.read_text() for file in sorted((ROOT / DATA).glob("*.json*"))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def run_stage(name: str, seed: int, device: str) -> dict:
    """Returns the record of a stage: what it cost, and how its model answers. Trains it, or goes on, where needed."""
    folder = ROOT / folder_of(name, seed)
    file = folder.with_suffix(".json")
    record = {"key": key_of(name, seed, device), "cpu_seconds": 0.0, "seconds": 0.0}
    how = "--overwrite"
    if file.exists():
        found = json.loads(file.read_text())
        if found["key"] == record["key"]:
            record = found
            how = "--resume=auto"
    if "curve" in record:  # which is written last
        return record

    folder.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))
    cpu = cpu_seconds()
    clock = time.perf_counter()
    try:
        run([*command_of(name, seed, device), how], folder.with_suffix(".log"))
        state = json.loads((folder / "state.json").read_text())["state"]
        if state != "finished":  # a signal stops a run, which is no error of its command
            sys.exit(f"{folder} is {state}: the same command goes on from there")
    finally:
        record["cpu_seconds"] += cpu_seconds() - cpu
        record["seconds"] += time.perf_counter() - clock
        file.write_text(json.dumps(record))
    record |= examine(name, folder, device)
    record["curve"] = curve_of(folder)
    file.write_text(json.dumps(record))
    return record


def curve_of(folder):
    """Returns of every row of a run's metrics what is drawn, or worth a look; nothing of a run of train.py."""
    curve = []
    for row in run_folder.read_metrics(folder):
        kept = {key: float(f"{row[key]:.4g}") for key in CURVES if key in row}
        if kept:
            curve.append({"step": row["step"], **kept})
    return curve


def run(words: list[str], log: Path) -> None:
    """Runs one of our commands; what it prints goes to a file. Where it fails or is stopped this process ends, too."""
    log = ROOT / log
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=file)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it has got the signal as well, and saves what it has learned
            sys.exit("stopped: the same command goes on from here")
    if code:
        last = (log.read_text().strip().splitlines() or [""])[-1]
        sys.exit(f"{' '.join(words)} ended with code {code}; in {log}: {last}")


def cpu_seconds():
    """Returns the CPU seconds of the processes that ended under this one."""
    used = os.times()
    return used.children_user + used.children_system


# ---- how a model answers ---------------------------------------------------------------------------------------------
def examine(name: str, folder: Path, device: str) -> dict:
    """Returns {"answers": {how it was asked: scores}} of a model, or {"worked": share} of one that knows no chats."""
    model, tokenizer, prefix = load(folder, device, "float32")
    hide_padding(model, tokenizer)
    rows = list(arithmetic.held_out_rows())
    if name == "pretrain":
        prompts = [prefix + tokenizer.encode(row["question"] + "\n") for row in rows]
        texts, _ = write(model, tokenizer, prompts, 0.0)
        right = [text.split("=")[-1] == row["answer"] for text, row in zip(texts, rows)]
        return {"worked": statistics.mean(right)}
    return {"answers": {how: ask(model, tokenizer, rows, *ASKED[how]) for how in ASKED}}


def ask(model, tokenizer, rows, switch, think, temperature):
    """Returns the share of right answers, of those that think, and of those that obey the switch; and their tokens."""
    prompts = []
    asked = []
    for row in rows:
        messages = [{"role": "user", "content": row["question"]}]
        if switch is not None:
            messages = chat.switched(messages, switch)
        asked.append(messages[0]["content"])
        prompts.append(chat.prompt(tokenizer, messages, think))
    texts, tokens = write(model, tokenizer, prompts, temperature)

    right = []
    thinks = []
    obeys = []
    for text, row, question in zip(texts, rows, asked):
        text = chat.opening(think) + text
        thinking, answer = chat.split_thinking(text)
        right.append(answer.strip() == row["answer"])
        thinks.append(bool(thinking))
        obeys.append(arithmetic.obeys_switch(text, question))
    return {
        "accuracy": statistics.mean(right),
        "thinks": statistics.mean(thinks),
        "obeys": statistics.mean(obeys),
        "tokens": statistics.mean(tokens),
        "examples": texts[:2],
    }


def write(model, tokenizer, prompts, temperature):
    """Returns what the model writes behind each prompt, and how many tokens that is, with the one that ends it.

    What is drawn depends on the model alone.
    """
    draws = torch.Generator(next(model.parameters()).device).manual_seed(0)
    rows = generate(model, prompts, MOST, temperature=temperature, stop=stop_tokens(tokenizer), generator=draws)
    return [tokenizer.decode(row) for row in rows], [min(len(row) + 1, MOST) for row in rows]


def one_line(record):
    if "worked" in record:
        return f"{record['worked']:.1%} of the sums worked out, {record['cpu_seconds']:.0f} CPU-s"
    return ", ".join(f"{how} {found['accuracy']:.1%}" for how, found in record["answers"].items())


def column(rows, name):
    """Returns (steps, values) of the rows of a curve that have a number of that name."""
    found = [row for row in rows if name in row]
    return [row["step"] for row in found], [row[name] for row in found]


# ---- the tables ------------------------------------------------------------------------------------------------------
COLUMNS = {  # of the table: how it was asked, and which share is shown
    "right, greedy": ("greedy", "accuracy"),
    "sampled, T 1": ("sampled", "accuracy"),
    "thinks": ("greedy", "thinks"),
    "tokens": ("greedy", "tokens"),
    "forced to think": ("forced to think", "accuracy"),
    "forced not to": ("forced not to think", "accuracy"),
    "after /think": ("/think", "accuracy"),
    "after /no_think": ("/no_think", "accuracy"),
    "obeys": ("switch", "obeys"),
}


def values_of(records: list[dict], how: str, what: str) -> list[float]:
    """Returns a number of each seed; "switch" is the mean over both switches."""
    if how == "switch":
        pairs = zip(values_of(records, "/think", what), values_of(records, "/no_think", what))
        return [statistics.mean(pair) for pair in pairs]
    return [record["answers"][how][what] for record in records]


def mean_of(result, name, how, what="accuracy"):
    return statistics.mean(values_of(result["stages"][name], how, what))


def cell(values, what):
    if what == "tokens":
        return mean_and_error(values, 1)
    return mean_and_error([100 * value for value in values], 1) + " %"


def markdown(result: dict) -> str:
    """Returns the report of a result."""
    seeds = len(result["seeds"])
    stages = result["stages"]
    lines = ["# From nothing to a model that thinks when it is told to\n", describe(result)]
    seconds = result["data_seconds"] + sum(records[0]["cpu_seconds"] for records in stages.values())
    lines.append(
        f"Sums of three numbers (`data/arithmetic.py`) and a model of 338,736 parameters; {seconds / 60:.1f} CPU "
        f"minutes of training for a seed, with data and pretraining. Each row is of {result['questions']} questions "
        "that no stage has seen: a share of 10 % or 90 % has a standard error of 1.5 points. "
        f"{about_seeds(seeds)} Each stage goes on from the one above it; the row beside leads nowhere.\n"
    )
    lines.append(f"| stage | {' | '.join(COLUMNS)} | CPU-s |")
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for name, records in stages.items():
        cells = [f"`{name}` {STAGES[name].about}"]
        for how, what in COLUMNS.values():
            cells.append("" if name == "pretrain" else cell(values_of(records, how, what), what))
        cells.append(f"{statistics.mean(record['cpu_seconds'] for record in records):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "![curves](posttrain_cpu.png)", "", *interpretation(result)]
    return "\n".join(lines) + "\n"


def about_seeds(seeds):
    if seeds == 1:
        return "One seed."
    return f"Mean ± standard error over {seeds} seeds of all that follows pretraining, which they share."


def interpretation(result) -> list[str]:
    """Returns what the numbers say, and what they do not."""

    def percent(name, how, what="accuracy"):
        return f"{100 * mean_of(result, name, how, what):.1f} %"

    worked = result["stages"]["pretrain"][0]["worked"]
    gain = mean_of(result, "grpo", "greedy") - mean_of(result, "sft", "greedy")
    mode = mean_of(result, "sft", "forced to think") - mean_of(result, "sft", "greedy")
    at_once = "forced not to think"
    return [
        f"- Pretraining taught the sums: as plain text, {100 * worked:.1f} % of the held-out ones are worked out "
        "right. The rest adds little to that: it is about when the model makes use of it.",
        f"- GRPO lifts greedy answers from {percent('sft', 'greedy')} to {percent('grpo', 'greedy')}, and of these "
        f"{100 * gain:.1f} points {100 * mode:.1f} are the choice to think: forced to, the model of SFT was right in "
        f"{percent('sft', 'forced to think')}.",
        f"- Made to answer at once, which nothing rewards, the model is right in {percent('sft', at_once)} before "
        f"GRPO and in {percent('grpo', at_once)} after it; a switch is obeyed in "
        f"{percent('grpo', 'switch', 'obeys')}. After the fusion of both ways {percent('fusion', '/think')} are right "
        f"after /think, {percent('fusion', '/no_think')} after /no_think, and "
        f"{percent('fusion', 'switch', 'obeys')} obey.",
        f"- The last model is right in {percent(LAST, '/think')} after /think, in {percent(LAST, '/no_think')} after "
        f"/no_think, and obeys in {percent(LAST, 'switch', 'obeys')}.",
        warning_line(result),
        "- The check of all that GRPO stands on: the log-probability of a sampled token by the sampler and by the "
        f"trainer never differed by more than {largest_difference(result):.1e}, in float32.",
        "- No stage trains on these questions, but the settings were chosen by looking at them. With Muon at a "
        "learning rate of 3e-3 instead of AdamW the model of SFT answered 59 % of them rightly at once, which leaves "
        "GRPO less to find.",
    ]


def largest_difference(result):
    """Returns the largest |log p by the sampler - log p by the trainer| of a token, over all steps of all seeds."""
    records = result["stages"]["grpo"] + result["stages"]["grpo_mixed"]
    return max(max(column(record["curve"], "logprob_difference")[1]) for record in records)


def warning_line(result):
    """Returns what plain DPO does to a good model: the margin is not quality."""
    curves = [record["curve"] for record in result["stages"]["dpo_offline"]]
    accuracy = statistics.mean(column(curve, "accuracy")[1][-1] for curve in curves)
    before = 100 * mean_of(result, "grpo", "greedy")
    after = 100 * mean_of(result, "dpo_offline", "greedy")
    return (
        f"- Plain DPO on pairs sampled once is the warning: at the end it prefers the better answer of "
        f"{100 * accuracy:.0f} % of its pairs, and its own answers fall from {before:.1f} % right to {after:.1f} %. "
        "A margin is not quality. The last stage differs in three ways, which were not tried apart: nll_coef=1, pairs "
        "that are sampled anew, smaller steps."
    )


# ---- the picture -----------------------------------------------------------------------------------------------------
def plot(result: dict, path: Path) -> None:
    """Draws the first seed's curves, GRPO's reward and lengths and plain DPO's margin, and the stages of all seeds."""
    figure, axes = new_figure("From nothing to a model that thinks when it is told to", 4, 20)
    stages = result["stages"]
    grpo = stages["grpo"][0]["curve"]
    dpo = stages["dpo_offline"][0]["curve"]

    axes[0].set(xlabel="step of GRPO", ylim=(0, 1.02))
    axes[0].plot(*column(grpo, "reward"), label="reward of the samples")
    axes[0].plot(*column(grpo, "eval_reward"), marker="o", label="held-out questions right")
    axes[0].plot(*column(grpo, "thinks"), linestyle="--", label="share that thinks")
    legend_below(axes[0])

    axes[1].set(xlabel="step of GRPO", ylabel="tokens", ylim=(0, 32))
    axes[1].plot(*column(grpo, "length"), label="mean length of an answer")
    entropy = axes[1].twinx()
    entropy.plot(*column(grpo, "entropy"), color="C3", linestyle=":", label="entropy of a token")
    entropy.set(ylabel="nats", ylim=(0, None))
    legend_below(axes[1], entropy)

    axes[2].set(xlabel="step of plain DPO", ylim=(0, 1.02))
    axes[2].plot(*column(dpo, "accuracy"), label="pairs preferred rightly")
    axes[2].plot(*column(dpo, "eval_reward"), marker="o", label="held-out questions right")
    margin = axes[2].twinx()
    margin.plot(*column(dpo, "margin"), color="C2", linestyle="--", label="margin")
    margin.set(ylabel="margin", ylim=(0, None))
    legend_below(axes[2], margin)

    names = [name for name in STAGES if name not in ("pretrain", "dpo_offline")]
    axes[3].set(ylabel="% of the held-out questions right", ylim=(0, 102))
    for label in WAYS:
        values = [[100 * x for x in values_of(stages[name], way(name, label), "accuracy")] for name in names]
        errors = [standard_error(x) or 0.0 for x in values]
        axes[3].errorbar(names, [statistics.mean(x) for x in values], errors, marker="o", capsize=3, label=label)
    legend_below(axes[3])
    figure.savefig(path, dpi=100)


def way(name, label):
    """Returns how the models of a stage are asked for a way of answering."""
    by_prompt, by_switch = WAYS[label]
    before_fusion = list(STAGES).index(name) < list(STAGES).index("fusion")
    return by_prompt if before_fusion else by_switch


def legend_below(axis, other=None):
    lines = axis.get_legend_handles_labels()
    if other is not None:
        lines = [x + y for x, y in zip(lines, other.get_legend_handles_labels())]
    axis.legend(*lines, loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8)
