"""Direct preference optimization (https://arxiv.org/abs/2305.18290): of two answers the better one becomes likelier.

    python dpo.py --init_from=out/sft --data=pairs.jsonl --out_dir=out/dpo
    python dpo.py --init_from=out/grpo --data=problems.jsonl --online=10 --rewards=math:1 --nll_coef=1

With log p the log-probability of a whole answer, the sum over its tokens, and a reference, the policy as it began:

    margin = beta ((log p - log p_reference of the chosen) - (log p - log p_reference of the rejected))
    sigmoid    -(1 - label_smoothing) log sigmoid(margin) - label_smoothing log sigmoid(-margin)
    ipo        (margin / beta - 1 / (2 beta))^2, with means over the tokens (https://arxiv.org/abs/2310.12036)

and nll_coef times -log p of a token of the chosen answers. The first loss is ln 2 = 0.6931, and its accuracy 0.

A margin is not quality. The loss is as happy where both answers become unlikely, the rejected one sooner: watch
`logp_chosen`, and what answers to `eval_data` are worth. `online` samples the pairs from the policy itself, every so
many steps, and takes the best and the worst answer by `rewards`; together with nll_coef it keeps what was learned.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from configurator import configure
from data.text import print_any_text
from distributed import processes
from evals import rewards as rewards_of
from training import load, machine, output, pairs, start
from training.answers import Problems, Writer, evaluate, score
from training.checkpoint import CheckpointError
from training.knobs import check_run
from training.pairs import Pair
from training.pictures import Curve
from training.policy import build, frozen, logprobs, only_known_tokens, pad, reference_logprobs
from training.reward_model import learned_reward
from training.run import Run

# ---- knobs: every field of the model's GPTConfig is one too ----------------------------------------------------------
# model and data
model = "baseline"  # which model_<model>.py: that of init_from
init_from = ""  # the policy to begin with, and the reference: a run, a checkpoint or a Hugging Face folder
data = ""  # pairs of answers: a .jsonl file or a named set such as ultrafeedback; with online problems, as of grpo.py
eval_pairs = ""  # pairs that are never trained on
eval_data = ""  # problems that are never trained on: what the answers are worth
out_dir = "out/dpo"  # the run: config, metrics, checkpoints, picture
seed = 1  # of the order of pairs and of what is sampled
# loss
loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
beta = 0.1  # the smaller, the further from the reference
label_smoothing = 0.0  # so many of the pairs may be the wrong way round: below 0.5
reference_free = False  # the reference has the same log p for all: it is not even loaded
nll_coef = 0.0  # 1: keeps the chosen answers likely
# pairs that the policy samples
online = 0  # n: every n steps; 0: data has the pairs
rewards = "math:1"  # what makes an answer better, as in grpo.py; also of the answers to eval_data
reward_model = ""  # the run of reward.py whose score is the reward `learned`
allow_code_execution = False  # run the programs of answers, in the sandbox
problems_per_round = 64  # over all devices
group_size = 8  # answers to each, of which the best and the worst make a pair
max_new_tokens = 256  # of an answer
temperature = 1.0
rollout_rows = 512  # answers that a device samples at once: lower it if memory runs out
# optimizer
optimizer: Literal["muon", "adamw"] = "adamw"
max_steps = 100
pairs_per_step = 32  # over all devices
micro_batch = 16  # pairs at once on a device: lower it if memory runs out
learning_rate = 5e-7  # for billions of parameters; 1e-4 for a third of a million
min_lr = 0.0  # where the schedule ends
warmup_steps = 10  # in which the learning rate rises to its value
schedule: Literal["cosine", "wsd", "constant"] = "constant"
weight_decay = 0.0
beta1 = 0.9  # of AdamW
beta2 = 0.95
grad_clip = 1.0  # 0: off
# loop
eval_every = 50  # steps; also at the end. The step is saved first
eval_problems = 128  # of eval_data, the first ones; 0: all
save_every = 100  # steps; also before each evaluation and at the end
keep_last = 3  # checkpoints, besides the best; 0: all
log_every = 1  # steps between printed lines; metrics.jsonl gets every step
wandb: Literal["", "online", "offline"] = ""  # log to Weights & Biases too
tensorboard = False  # write out_dir/tensorboard too
# system
device = "auto"  # cuda, cuda:1, mps or cpu; auto: the first of these that is there
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: the best that the device is fast at
kernels = False  # Triton kernels in place of PyTorch's, on GPUs since the H100
deterministic = False  # the same bits each time, on a GPU as well; slower
timeout = 600  # seconds that a process waits for another: samples end at different times
resume: bool | Literal["auto"] = False  # go on from the newest whole checkpoint of the run in out_dir; auto: or begin
overwrite = False  # delete the run that is in out_dir

NUMBERS = ("loss", "accuracy", "margin", "gain_chosen", "gain_rejected", "logp_chosen", "logp_rejected")
LINE = (
    "loss {loss:.4f} | accuracy {accuracy:.0%} | margin {margin:.3f} | log p chosen {logp_chosen:.2f}, rejected "
    "{logp_rejected:.2f} | norm {grad_norm:.3f}"
)


# ---- the algorithm ---------------------------------------------------------------------------------------------------
def preference_loss(gain_chosen, gain_rejected, beta, loss_type, label_smoothing):
    """Returns the loss of each pair (pairs,), and its margin.

    gain: log p - log p_reference of an answer, the sum over its tokens, or with ipo their mean.
    """
    margin = beta * (gain_chosen - gain_rejected)
    if loss_type == "ipo":
        return (margin / beta - 1 / (2 * beta)) ** 2, margin
    right = -F.logsigmoid(margin)
    wrong = -F.logsigmoid(-margin)
    return (1 - label_smoothing) * right + label_smoothing * wrong, margin


def best_against_worst(answers, totals, group_size):
    """Returns a Pair of each group of answers; those whose rewards are all the same make none."""
    found = []
    for begin in range(0, len(answers), group_size):
        group = range(begin, begin + group_size)
        best = max(group, key=lambda i: totals[i])
        worst = min(group, key=lambda i: totals[i])
        if totals[best] > totals[worst]:
            found.append(Pair(answers[best].problem.prompt, answers[best].ids, answers[worst].ids))
    return found


def scored(net, reference, some, eot_id, here):
    """Returns of each pair's answers, the chosen ones first: log p - log p_reference and log p (2 pairs, T), the number
    of tokens (2 pairs,), and the model's auxiliary loss."""
    answers = [pair.chosen for pair in some] + [pair.rejected for pair in some]
    prompts = [pair.prompt for pair in some] * 2
    x, y = pad(prompts, answers, [[True] * len(answer) for answer in answers], eot_id, here.device)
    with here.autocast():
        logp, auxiliary = logprobs(net, x, y)
        gain = logp
        if reference is not None:
            gain = logp - reference_logprobs(reference, x, y)
    return gain, logp, (y >= 0).sum(dim=1), auxiliary


def add_gradients(net, reference, some, n_pairs, n_tokens, n_inputs, eot_id, here):
    """Adds up the gradients of a step's pairs; returns {name: sum over the pairs} of what is worth a look.

    some: this process's pairs. n_pairs, n_tokens, n_inputs: how many pairs, tokens of chosen answers, and tokens that
    fill up no row, all processes have.
    """
    sums = Counter()
    for begin in range(0, len(some), micro_batch):
        part = some[begin : begin + micro_batch]
        n = len(part)
        with processes.backward_of(net, last=begin + n == len(some)):
            gain, logp, lengths, auxiliary = scored(net, reference, part, eot_id, here)
            gains = gain.sum(dim=1)  # (2 n,)
            if loss_type == "ipo":
                gains = gains / lengths
            losses, margins = preference_loss(gains[:n], gains[n:], beta, loss_type, label_smoothing)
            loss = losses.sum() / n_pairs + auxiliary * sum(pair.n_inputs for pair in part) / n_inputs
            if nll_coef:
                loss = loss - nll_coef * logp[:n].sum() / n_tokens
            (loss * here.world_size).backward()  # processes are averaged: this makes it a sum
        logp = logp.detach().sum(dim=1)
        gains = gains.detach()
        sums["loss"] += losses.sum().item()
        sums["accuracy"] += (margins > 0).sum().item()
        sums["margin"] += margins.sum().item()
        sums["gain_chosen"] += gains[:n].sum().item()
        sums["gain_rejected"] += gains[n:].sum().item()
        sums["logp_chosen"] += logp[:n].sum().item()
        sums["logp_rejected"] += logp[n:].sum().item()
    return sums


@torch.no_grad()
def evaluate_pairs(policy, reference, some, eot_id, here):
    """Returns the accuracy and the mean margin of pairs."""
    own = here.share(some)
    right, margin = 0, 0.0
    policy.eval()
    for begin in range(0, len(own), micro_batch):
        part = own[begin : begin + micro_batch]
        gain, _, lengths, _ = scored(policy, reference, part, eot_id, here)
        gains = gain.sum(dim=1) / (lengths if loss_type == "ipo" else 1)
        margins = beta * (gains[: len(part)] - gains[len(part) :])
        right += (margins > 0).sum().item()
        margin += margins.sum().item()
    policy.train()
    right, margin = processes.all_sum([right, margin], here.device)
    return {"eval_accuracy": right / len(some), "eval_margin": margin / len(some)}


class Watch:
    """Says once what has gone wrong: a loss that does not move, or chosen answers that become unlikely."""

    def __init__(self, say):
        self.say = say
        self.stood_still = 0  # steps in a row
        self.said = set()

    def look(self, row):
        self.stood_still = self.stood_still + 1 if abs(row["loss"] - math.log(2)) < 1e-3 else 0
        if loss_type == "sigmoid" and self.stood_still == 50:
            self.warn(f"the loss is still ln 2 after 50 steps: learning_rate={learning_rate} may be too small")
        if row["gain_chosen"] < -10:
            self.warn("the chosen answers are 10 nats less likely than to the reference: try nll_coef=1, or more beta")

    def warn(self, text):
        if text not in self.said:
            self.say(f"WARNING: {text}")
        self.said.add(text)


# ---- the run ---------------------------------------------------------------------------------------------------------
def main():
    output.outlast_readers()
    print_any_text()
    try:
        config = configure(globals(), starting_from=start.knobs_of)
        check_run(config)
        if pairs_per_step < processes.launched()[1]:
            raise ValueError(f"pairs_per_step={pairs_per_step} gives some processes none: raise it")
        if online and group_size < 2:
            raise ValueError("group_size=1: the best and the worst of one answer are the same, so give 2 or more")
        if beta == 0:
            raise ValueError("beta=0 makes all answers alike to the loss: give more, such as 0.1")
        here = machine.join(device, dtype, timeout, deterministic=deterministic)
        policy, tokenizer = build(config, here)
        reference = None if reference_free else frozen(policy)
        for each in (policy, reference):
            if each is not None:
                only_known_tokens(each, tokenizer, temperature)
        net = processes.averaging_gradients(policy, here.device) if here.parallel == "ddp" else policy

        longest = policy.config.block_size
        room = longest - max_new_tokens
        source = Problems(data, tokenizer, None, room, here) if online else None
        offline = [] if online else pairs.read(data, tokenizer, longest, here)
        held_out = pairs.read(eval_pairs, tokenizer, longest, here) if eval_pairs else None
        problems = Problems(eval_data, tokenizer, None, room, here) if eval_data else None
        learned = learned_reward(reward_model, tokenizer, here) if reward_model else None
        judges = rewards_of.load(rewards, allow_code_execution, learned) if online or eval_data else None
        identity = {"data": data, "tokenizer": tokenizer.fingerprint,
                    "data_fingerprint": source.fingerprint if online else pairs.fingerprint(offline)}  # fmt: skip
        curve = Curve("accuracy", "eval_accuracy", "preference accuracy")
        run = Run(config, here, policy, tokenizer, identity, curve, evaluates=bool(held_out or problems))
    except (OSError, ValueError, CheckpointError) as error:
        processes.fail(error)
    stop = load.stop_tokens(tokenizer, Path(init_from))
    writer = Writer(policy, tokenizer, stop, max_new_tokens, seed, here.autocast(), rows=rollout_rows)
    watch = Watch(here.say)
    policy.train()

    while True:
        run.save_if_due()
        if run.evaluation_is_due:
            report = evaluate_pairs(policy, reference, held_out, tokenizer.eot_id, here) if held_out else {}
            if problems:
                report |= evaluate(writer, problems.all[: eval_problems or None], judges, 0, here)
            run.note_evaluation(report, error=-report.get("eval_reward", report.get("eval_accuracy")))
        if run.is_done or run.asked_to_stop():
            run.save_if_due(now=True)
            break

        # 1. pairs: those of the data, or of a round in which the policy answered problems
        some = offline
        if online:
            if run.step % online == 0:
                answers = writer.write(
                    source.of_step(run.step // online, problems_per_round, seed), run.step, group_size
                )
                own = best_against_worst(answers, score(judges, answers, run.fail).totals, group_size)
                run.state["pairs"] = sum(processes.gather(own), [])
            some = [Pair(*pair) for pair in run.state["pairs"]]
        if some:
            some = pairs.of_step(some, run.step, pairs_per_step, seed)

        # 2. learn
        lr, norm = 0.0, 0.0
        sums = Counter()
        if some:
            own = here.share(some)
            n_tokens = sum(len(pair.chosen) for pair in some)
            n_inputs = sum(pair.n_inputs for pair in some)
            sums = add_gradients(net, reference, own, len(some), n_tokens, n_inputs, tokenizer.eot_id, here)
            lr, norm = run.update()

        # 3. log
        totals = processes.all_sum([sums[name] for name in NUMBERS], here.device)
        row = {name: total / max(len(some), 1) for name, total in zip(NUMBERS, totals)}
        row |= {"lr": lr, "grad_norm": norm, "pairs": len(some)}
        watch.look(row)
        run.end_step(row, LINE.format_map(row) if some else "no pairs: the answers to each problem are worth the same")
    run.finish(f"python sample.py {out_dir} --interactive")


if __name__ == "__main__":
    main()
