"""A reward model: which of two answers people, or a judge, would like better (https://arxiv.org/abs/2203.02155).

    python reward.py --init_from=out/sft --data=pairs.jsonl --out_dir=out/reward
    python grpo.py --init_from=out/sft --data=problems.jsonl --reward_model=out/reward --rewards=learned

With r the score of a prompt and its answer, by a linear head on the last token (training/reward_model.py):

    -log sigmoid(r_chosen - r_rejected - margin) + centering (r_chosen + r_rejected)^2

after Bradley and Terry (1952): sigmoid(r_chosen - r_rejected) is the probability that the first is liked better. Only
differences count in it; the second term keeps scores around 0 (https://arxiv.org/abs/2312.09244). The first loss is
ln 2 = 0.6931.

Watch `eval_accuracy`, on pairs that are not trained on. Whether a higher score is a better answer is another question:
with eval_data and best_of, the answer with the best score of each problem is held against the mean of all.
"""

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
from training.answers import Problems, Sampler, score
from training.knobs import check_run
from training.pictures import Curve
from training.policy import build, frozen
from training.reward_model import RewardModel, scores_of, side_by_side
from training.run import Run

# ---- knobs: every field of the model's GPTConfig is one too ----------------------------------------------------------
# model and data
model = "baseline"  # which model_<model>.py: that of init_from
init_from = ""  # what the backbone begins with: a run, a checkpoint or a Hugging Face folder, best a fine-tuned one
data = ""  # pairs of answers: a .jsonl file, or a named set such as ultrafeedback
eval_pairs = ""  # pairs that are never trained on
out_dir = "out/reward"  # the run: config, metrics, checkpoints, picture
seed = 1  # of the order of pairs
# loss
margin = 0.0  # by how much the chosen score is to be above the other
centering = 0.01  # of the squared sum of the scores
# best of n
eval_data = ""  # problems, for the answers to which `rewards` says what they are worth
best_of = 0  # n: of so many answers of init_from to each of them take the one with the best score; 0: none
rewards = "math:1"
allow_code_execution = False  # run the programs of answers, in the sandbox
max_new_tokens = 256  # of an answer
eval_problems = 128  # of eval_data, the first ones; 0: all
rollout_rows = 512  # answers that a device samples at once
# optimizer
optimizer: Literal["muon", "adamw"] = "adamw"
max_steps = 500
pairs_per_step = 64  # over all devices
micro_batch = 16  # pairs at once on a device: lower it if memory runs out
learning_rate = 1e-5  # for billions of parameters; 3e-4 for a third of a million
min_lr = 0.0  # where the schedule ends
warmup_steps = 20  # steps in which the learning rate rises to its value
schedule: Literal["cosine", "wsd", "constant"] = "cosine"
weight_decay = 0.01
beta1 = 0.9  # of AdamW
beta2 = 0.95
grad_clip = 1.0  # 0: off
# loop
eval_every = 100  # steps between evaluations, which are also at step 0 and at the end
save_every = 500  # steps; also before each evaluation and at the end
keep_last = 3  # checkpoints, besides the best; 0: all
log_every = 10  # steps between printed lines; metrics.jsonl gets every step
wandb: Literal["", "online", "offline"] = ""  # log to Weights & Biases too
tensorboard = False  # write out_dir/tensorboard too
# system
device = "auto"  # cuda, cuda:1, mps or cpu; auto: the first of these that is there
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: the best that the device is fast at
kernels = False  # Triton kernels in place of PyTorch's, on GPUs since the H100
deterministic = False  # the same bits each time, on a GPU as well; slower
timeout = 600  # seconds that a process waits for another
resume: bool | Literal["auto"] = False  # go on from the newest whole checkpoint of the run in out_dir; auto: or begin
overwrite = False  # delete the run that is in out_dir

NUMBERS = ("loss", "accuracy", "margin", "score_chosen", "score_rejected")
LINE = (
    "loss {loss:.4f} | accuracy {accuracy:.0%} | margin {margin:.3f} | scores {score_chosen:.3f} and "
    "{score_rejected:.3f} | norm {grad_norm:.3f}"
)


# ---- the algorithm ---------------------------------------------------------------------------------------------------
def bradley_terry(chosen, rejected, margin, centering):
    """Returns the loss (pairs,) of the scores of the chosen and the rejected answers (pairs,)."""
    return -F.logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2


def scores_of_pairs(net, some, eot_id, here):
    """Returns the scores of the chosen answers (pairs,) and of the rejected ones."""
    texts = [pair.prompt + pair.chosen for pair in some] + [pair.prompt + pair.rejected for pair in some]
    with here.autocast():
        scores = net(*side_by_side(texts, eot_id, here.device)).float()
    return scores.chunk(2)


def add_gradients(net, some, n_pairs, eot_id, here):
    """Adds up the gradients of this process's pairs, of n_pairs in all; returns {name: sum over them}.

    Where no gradients are wanted (torch.no_grad) it returns the sums alone.
    """
    sums = Counter()
    for begin in range(0, len(some), micro_batch):
        part = some[begin : begin + micro_batch]
        with processes.backward_of(net, last=begin + len(part) == len(some)):
            chosen, rejected = scores_of_pairs(net, part, eot_id, here)
            losses = bradley_terry(chosen, rejected, margin, centering)
            if torch.is_grad_enabled():
                (losses.sum() / n_pairs * here.world_size).backward()  # averaged over processes: this adds them up
        sums["loss"] += losses.sum().item()
        sums["accuracy"] += (chosen > rejected).sum().item()
        sums["margin"] += (chosen - rejected).sum().item()
        sums["score_chosen"] += chosen.sum().item()
        sums["score_rejected"] += rejected.sum().item()
    return sums


@torch.no_grad()
def evaluate_pairs(scorer, some, eot_id, here):
    """Returns the accuracy and the mean margin on pairs."""
    scorer.eval()
    sums = add_gradients(scorer, here.share(some), len(some), eot_id, here)
    scorer.train()
    right, margins = processes.all_sum([sums["accuracy"], sums["margin"]], here.device)
    return {"eval_accuracy": right / len(some), "eval_margin": margins / len(some)}


def best_of_n(scorer, sampler, problems, graders, here):
    """Returns what answers are worth by `rewards`: the mean of all, and those with the best scores of each problem."""
    own = here.share(problems)
    answers = sampler.sample(own, step=0, n=best_of)
    worth = torch.tensor(score(graders, answers).totals).view(len(own), best_of)
    scorer.eval()
    texts = [answer.problem.prompt + answer.ids for answer in answers]
    scores = torch.tensor(scores_of(scorer, texts, here)).view(len(own), best_of)
    scorer.train()
    chosen = worth.gather(1, scores.argmax(dim=1, keepdim=True))
    mean, best, count = processes.all_sum([worth.mean(dim=1).sum(), chosen.sum(), len(worth)], here.device)
    return {"eval_reward": mean / count, f"eval_reward_best_of_{best_of}": best / count}


# ---- the run ---------------------------------------------------------------------------------------------------------
def main():
    output.outlast_readers()
    print_any_text()
    with output.errors_in_one_line():
        config = configure(globals(), starting_from=start.config_of)
        check_run(config)
        if best_of and not eval_data:
            raise ValueError(f"best_of={best_of} needs problems: give eval_data")
        here = machine.join(device, dtype, timeout, deterministic=deterministic)
        backbone, tokenizer = build(config, here)
        sampler = None
        if best_of:
            policy = frozen(backbone)
            load.hide_padding(policy, tokenizer)
            sampler = Sampler(
                policy, tokenizer, load.stop_tokens(tokenizer, Path(init_from)), max_new_tokens=max_new_tokens,
                seed=seed, autocast=here.autocast(), rows=rollout_rows,
            )  # fmt: skip
            problems = Problems(eval_data, tokenizer, None, policy.config.block_size - max_new_tokens, here)
            graders = rewards_of.load(rewards, allow_code_execution)
        scorer = RewardModel(backbone).to(here.device)
        net = processes.averaging_gradients(scorer, here.device) if here.parallel == "ddp" else scorer

        all_pairs = pairs.read(data, tokenizer, backbone.config.block_size, here)
        held_out = pairs.read(eval_pairs, tokenizer, backbone.config.block_size, here) if eval_pairs else None
        identity = {"data": data, "tokenizer": tokenizer.fingerprint, "data_fingerprint": pairs.fingerprint(all_pairs)}
        curve = Curve("accuracy", "eval_accuracy", "accuracy on pairs")
        run = Run(config, here, scorer, tokenizer, identity, curve, evaluates=bool(held_out or sampler))
    scorer.train()

    while True:
        run.save_if_due()
        if run.evaluation_is_due:
            report = evaluate_pairs(scorer, held_out, tokenizer.eot_id, here) if held_out else {}
            if sampler:
                report |= best_of_n(scorer, sampler, problems.all[: eval_problems or None], graders, here)
            run.note_evaluation(report, error=-report.get("eval_accuracy", 0.0))
        if run.is_done or run.asked_to_stop():
            run.save_if_due(now=True)
            break
        run.begin_step()
        of_step = pairs.of_step(all_pairs, run.step, pairs_per_step, seed)
        sums = add_gradients(net, here.share(of_step), len(of_step), tokenizer.eot_id, here)
        lr, norm = run.update()
        totals = processes.all_sum([sums[name] for name in NUMBERS], here.device)
        row = {name: total / len(of_step) for name, total in zip(NUMBERS, totals)} | {"lr": lr, "grad_norm": norm}
        run.end_step(row, LINE.format_map(row))
    run.finish(f"python grpo.py --reward_model={out_dir} --rewards=learned ...")


if __name__ == "__main__":
    main()
