"""Direct preference optimization (https://arxiv.org/abs/2305.18290): of two answers the better one becomes likelier.

    python dpo.py --init_from=out/sft --data=pairs.jsonl --out_dir=out/dpo
    python dpo.py --init_from=out/grpo --data=problems.jsonl --online=10 --rewards=math:1 --nll_coef=1

With log p the log-probability of a whole answer, the sum over its tokens, and a reference, the policy as it began:

    gain       log p - log p_reference, of either answer
    margin     beta (gain of the chosen - gain of the rejected)
    sigmoid    -(1 - label_smoothing) log sigmoid(margin) - label_smoothing log sigmoid(-margin)
    ipo        (gain of the chosen - gain of the rejected - 1 / (2 beta))^2 (https://arxiv.org/abs/2310.12036), where a
               gain is the mean over the tokens, so that long answers do not count more

and nll_coef times -log p of a token of the chosen answers, which the loss that is logged leaves out. With a reference
the first sigmoid loss is ln 2 = 0.6931, and its accuracy 0.

A margin is not quality. The loss also falls where both answers become less likely, the rejected one faster: watch
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
from training.answers import Problems, Sampler, evaluate, score
from training.knobs import check_run
from training.pairs import Pair
from training.pictures import Curve
from training.policy import build, fingerprint, frozen, logprobs, pad, reference_logprobs
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
label_smoothing = 0.0  # the share of pairs that may be the wrong way round; with sigmoid
reference_free = False  # no reference: its log p counts as 0
nll_coef = 0.0  # 1: keeps the chosen answers likely
# pairs that the policy samples
online = 0  # n: every n steps; 0: data has the pairs
rewards = "math:1"  # what makes an answer better, as in grpo.py; also of the answers to eval_data
reward_model = ""  # the run of reward.py whose score is the reward `learned`
allow_code_execution = False  # run the programs of answers, in the sandbox
problems_per_round = 64  # over all devices
group_size = 8  # answers to each, of which the best and the worst make a pair
max_new_tokens = 256  # of an answer
temperature = 1.0  # of sampling; the trainer's logits are divided by it, too
rollout_rows = 512  # answers that a device samples at once, in whole groups: lower it if memory runs out
# optimizer
optimizer: Literal["muon", "adamw"] = "adamw"
max_steps = 100
pairs_per_step = 32  # over all devices
micro_batch = 16  # pairs at once on a device: lower it if memory runs out
learning_rate = 5e-7  # for billions of parameters; 1e-4 for a third of a million
min_lr = 0.0  # where the schedule ends
warmup_steps = 10  # steps in which the learning rate rises to its value
schedule: Literal["cosine", "wsd", "constant"] = "constant"
weight_decay = 0.0
beta1 = 0.9  # of AdamW
beta2 = 0.95
grad_clip = 1.0  # 0: off
# loop
eval_every = 50  # steps between evaluations, which are also at step 0 and at the end
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
    """Returns the loss of each pair (pairs,), and its margin."""
    margin = beta * (gain_chosen - gain_rejected)
    if loss_type == "ipo":
        return (gain_chosen - gain_rejected - 1 / (2 * beta)) ** 2, margin
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


def gains_and_logprobs(net, reference, some, eot_id, here):
    """Returns gains and log p (2 n,) of n pairs, the chosen answers first, and the model's auxiliary loss."""
    answers = [pair.chosen for pair in some] + [pair.rejected for pair in some]
    prompts = [pair.prompt for pair in some] * 2
    x, y = pad(prompts, answers, [[True] * len(answer) for answer in answers], eot_id, here.device)
    with here.autocast():
        logp, auxiliary = logprobs(net, x, y)  # (2 n, T)
        gain = logp
        if reference is not None:
            gain = logp - reference_logprobs(reference, x, y)
    gains = gain.sum(dim=1)
    if loss_type == "ipo":
        gains = gains / (y >= 0).sum(dim=1)
    return gains, logp.sum(dim=1), auxiliary


def add_gradients(net, reference, some, n_pairs, n_tokens, n_inputs, eot_id, here):
    """Adds up the gradients of a step's pairs; returns {name: sum over the pairs} of what is worth a look.

    some: this process's pairs. n_pairs, n_tokens, n_inputs: how many pairs, tokens of chosen answers, and tokens in all
    rows, without what fills them up, all processes have together.
    """
    sums = Counter()
    for begin in range(0, len(some), micro_batch):
        part = some[begin : begin + micro_batch]
        n = len(part)
        with processes.backward_of(net, last=begin + n == len(some)):
            gains, logp, auxiliary = gains_and_logprobs(net, reference, part, eot_id, here)
            losses, margins = preference_loss(gains[:n], gains[n:], beta, loss_type, label_smoothing)
            loss = losses.sum() / n_pairs + auxiliary * sum(pair.n_inputs for pair in part) / n_inputs
            if nll_coef:
                loss = loss - nll_coef * logp[:n].sum() / n_tokens
            # Gradients are averaged over processes; times their number they add up.
            (loss * here.world_size).backward()
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
    right = 0
    total = 0.0
    policy.eval()
    for begin in range(0, len(own), micro_batch):
        part = own[begin : begin + micro_batch]
        gains, _, _ = gains_and_logprobs(policy, reference, part, eot_id, here)
        _, margins = preference_loss(*gains.chunk(2), beta, loss_type, label_smoothing)
        right += (margins > 0).sum().item()
        total += margins.sum().item()
    policy.train()
    right, total = processes.all_sum([right, total], here.device)
    return {"eval_accuracy": right / len(some), "eval_margin": total / len(some)}


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
        if reference_free or loss_type == "ipo":  # whose gains are no differences, or means
            return
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
    with output.errors_in_one_line():
        config = configure(globals(), starting_from=start.config_of)
        check_run(config)
        if beta == 0:
            raise ValueError("beta=0 makes all answers alike to the loss: give more, such as 0.1")
        here = machine.join(device, dtype, timeout, deterministic=deterministic)

        # 1. models
        policy, tokenizer = build(config, here)
        reference = None if reference_free else frozen(policy)
        for each in (policy, reference):
            if each is not None:
                load.hide_padding(each, tokenizer, temperature if online else 1.0)
        net = processes.averaging_gradients(policy, here.device) if here.parallel == "ddp" else policy

        # 2. pairs, or problems from whose answers pairs are made; problems and pairs to evaluate
        longest = policy.config.block_size
        room = longest - max_new_tokens
        train_problems = Problems(data, tokenizer, None, room, here) if online else None
        train_pairs = [] if online else pairs.read(data, tokenizer, longest, here)
        held_out = Problems(eval_data, tokenizer, None, room, here) if eval_data else None
        held_out_pairs = pairs.read(eval_pairs, tokenizer, longest, here) if eval_pairs else None
        learned = learned_reward(reward_model, tokenizer, here) if reward_model else None
        graders = rewards_of.load(rewards, allow_code_execution, learned) if online or eval_data else None

        # 3. the run's folder
        identity = {"data": data, "tokenizer": tokenizer.fingerprint}
        identity["data_fingerprint"] = train_problems.fingerprint if online else pairs.fingerprint(train_pairs)
        if reference is not None:
            identity["reference"] = fingerprint(reference)
        curve = Curve("accuracy", "eval_accuracy", "preference accuracy")
        run = Run(config, here, policy, tokenizer, identity, curve, evaluates=bool(held_out_pairs or held_out))
    sampler = Sampler(
        policy, tokenizer, load.stop_tokens(tokenizer, Path(init_from)), max_new_tokens=max_new_tokens, seed=seed,
        autocast=here.autocast(), rows=rollout_rows,
    )  # fmt: skip
    watch = Watch(here.say)
    policy.train()

    while True:
        run.save_if_due()
        if run.evaluation_is_due:
            report = {}
            if held_out_pairs:
                report = evaluate_pairs(policy, reference, held_out_pairs, tokenizer.eot_id, here)
                error = -report["eval_accuracy"]
            if held_out:
                report |= evaluate(sampler, held_out.all[: eval_problems or None], graders, 0, here, run.fail)
                error = -report["eval_reward"]
            run.note_evaluation(report, error)
        if run.is_done or run.asked_to_stop():
            run.save_if_due(now=True)
            break

        # 1. the pairs of the data, or of a round in which the policy answered problems
        run.begin_step()
        if online and run.step % online == 0:
            of_round = train_problems.of_step(run.step // online, problems_per_round, seed)
            answers = sampler.sample(of_round, run.step, group_size)
            own = best_against_worst(answers, score(graders, answers, run.fail).totals, group_size)
            run.state["pairs"] = sum(processes.gather(own), [])
        if online:
            train_pairs = [Pair(*pair) for pair in run.state["pairs"]]
        of_step = pairs.of_step(train_pairs, run.step, pairs_per_step, seed) if train_pairs else []

        # 2. learn
        lr = norm = 0.0
        sums = Counter()
        if of_step:
            n_tokens = sum(len(pair.chosen) for pair in of_step)
            n_inputs = sum(pair.n_inputs for pair in of_step)
            own = here.share(of_step)
            sums = add_gradients(net, reference, own, len(of_step), n_tokens, n_inputs, tokenizer.eot_id, here)
            lr, norm = run.update()

        # 3. log
        totals = processes.all_sum([sums[name] for name in NUMBERS], here.device)
        row = {name: total / pairs_per_step for name, total in zip(NUMBERS, totals)}
        row |= {"lr": lr, "grad_norm": norm, "pairs": len(train_pairs)}
        if of_step:
            watch.look(row)
        run.end_step(row, LINE.format_map(row) if of_step else "no pairs: all answers to a problem are worth the same")
    run.finish(f"python sample.py {out_dir} --interactive")


if __name__ == "__main__":
    main()
