"""Reinforcement learning by groups of samples: GRPO (https://arxiv.org/abs/2402.03300) and what came of it.

    python grpo.py --init_from=out/sft --data=problems.jsonl --rewards=math:1 --out_dir=out/grpo
    torchrun --standalone --nproc_per_node=8 grpo.py config/grpo_gsm8k.py

Each step samples G answers to each of some problems. r is the reward of an answer, and within its group of G

    A = (r - mean r) / (std r + 1e-4)                        scale_rewards=none: A = r - mean r
    ratio = p / p_old                                        p of a token now, and before the step's first update
    loss of a token = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + beta KL(policy, reference)

A step's loss is a weighted sum over all tokens that the policy chose in its N answers (think_budget forces others,
mask_truncated leaves out answers that were cut). Each of the n tokens of an answer has the weight

    grpo      1 / (n N)         each answer alike, so that a token of a long one counts less
    dapo      1 / n_total       each token alike, of n_total in all answers (https://arxiv.org/abs/2503.14476)
    dr_grpo   1 / (N n_max)     n_max = max_new_tokens; its paper has scale_rewards=none (https://arxiv.org/abs/2503.20783)
    gspo      as grpo, and the ratio is one for the whole answer: exp(mean log ratio) (https://arxiv.org/abs/2507.18071)
    cispo     as dapo, with -min(ratio, 1 + clip_high).detach() A log p (https://arxiv.org/abs/2506.13585)

Watch `reward`. The loss says little: with one update and beta=0 it is 0 for grpo and gspo, and for the others it shows
whether long answers did better. And watch `logprob_difference`, the largest |log p by the sampler - log p by the
trainer|: above 1e-3 in float32 a cache, a mask or a position is wrong; in bfloat16 some hundredths are rounding.

With `teacher` A of a token is log p_teacher - log p_old: on-policy distillation (https://arxiv.org/abs/2306.13649, its
reverse KL estimated from the sampled tokens). Rewards are then only logged; --rewards= leaves them out.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Literal

import torch

from configurator import configure
from data.text import print_any_text
from distributed import processes
from evals import rewards as rewards_of
from training import load, machine, output, start
from training.answers import Problems, Sampler, evaluate, nothing_to_learn, samples_of, score, summary
from training.knobs import check_run
from training.pictures import Curve
from training.policy import build, fingerprint, frozen, load_like, logprobs, pad, reference_logprobs
from training.reward_model import learned_reward
from training.run import Run

# ---- knobs: every field of the model's GPTConfig is one too ----------------------------------------------------------
# model and data
model = "baseline"  # which model_<model>.py: that of init_from
init_from = ""  # the policy to begin with: a run, a checkpoint or a Hugging Face folder, that knows chats
data = ""  # problems to answer: a .jsonl file, or a named set such as gsm8k
eval_data = ""  # problems that are never trained on
out_dir = "out/grpo"  # the run: config, metrics, samples, checkpoints, picture
seed = 1  # of the order of problems and of what is sampled
think: Literal["free", "always", "never"] = (
    "free"  # free: the model decides; always: prompts open <think>; never: they hold an empty block
)
# rewards
rewards = "math:1"  # name:weight,...: math, format, arithmetic, code, learned, or your own my_module:my_function
reward_model = ""  # the run of reward.py whose score is the reward `learned`
allow_code_execution = False  # run the programs of answers, in the sandbox: what the reward `code` needs
# samples
group_size = 8  # answers to each problem
problems_per_step = 48  # over all devices
max_new_tokens = 256  # of an answer: longer ones are cut
temperature = 1.0  # of sampling; the trainer's logits are divided by it, too
think_budget = 0  # above 0: thoughts are ended after so many tokens
rollout_rows = 512  # answers that a device samples at once, in whole groups: lower it if memory runs out
# loss
loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = (
    "dapo"  # how answers of different lengths count, see the head of grpo.py
)
scale_rewards: Literal["group", "none"] = "group"  # divide by the (unbiased) standard deviation of the group
clip_low = 0.2  # gspo wants 3e-4; cispo has none
clip_high = 0.28  # gspo wants 4e-4
beta = 0.0  # weight of the KL divergence to the policy of init_from; 0: no copy of that is kept
mask_truncated = False  # learn nothing from answers that were cut at max_new_tokens
teacher = ""  # the run of a model to learn from instead of rewards, with the same tokenizer
# optimizer
optimizer: Literal["muon", "adamw"] = "adamw"
max_steps = 100  # each samples new answers
updates_per_batch = 1  # of the optimizer on the samples of a step; from the second on the ratio is not 1
micro_batch = 64  # answers at once on a device: lower it if memory runs out
learning_rate = 1e-6  # for billions of parameters; 3e-4 for a third of a million
min_lr = 0.0  # where the schedule ends
warmup_steps = 0  # steps in which the learning rate rises to its value
schedule: Literal["cosine", "wsd", "constant"] = "constant"
weight_decay = 0.0
beta1 = 0.9  # of AdamW
beta2 = 0.95
grad_clip = 1.0  # 0: off
# loop
eval_every = 20  # steps between evaluations, which are also at step 0 and at the end
eval_problems = 128  # of eval_data, the first ones; 0: all
eval_samples = 0  # k: also sample so many answers to each of them, at `temperature`, for pass@1 and pass@k
save_every = 100  # steps; also before each evaluation and at the end
keep_last = 3  # checkpoints, besides the best; 0: all
log_every = 1  # steps between printed lines; metrics.jsonl gets every step
log_samples = 4  # how many of each step's answers, the first ones, go to samples.jsonl with their rewards
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

OF_TOKENS = ("loss", "kl", "clipped_low", "clipped_high")
THINK = {"free": None, "always": True, "never": False}
LINE = (
    "reward {reward:.3f} +- {reward_std:.3f} | {length:.1f} tokens, {thinks:.0%} think, {truncated:.0%} cut | entropy "
    "{entropy:.3f} | {flat_groups:.0%} flat | logprob difference {logprob_difference:.1e} | norm {grad_norm:.3f}"
)


# ---- the algorithm ---------------------------------------------------------------------------------------------------
def advantages(rewards, scale_rewards):
    """Returns by how much each reward is better than the mean of its group: (problems, G), as rewards are."""
    above = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_rewards == "group":
        above = above / (rewards.std(dim=1, keepdim=True) + 1e-4)
    return above


def policy_loss(logp, old_logp, advantage, is_target, loss_type, clip_low, clip_high):
    """Returns the loss of each token (rows, T), and whether the lower and the upper bound were active.

    logp, old_logp: log p of each token, now and before the first update. advantage: (rows, 1), or of each token.
    """
    log_ratio = (logp - old_logp) * is_target
    if loss_type == "gspo":
        lengths = is_target.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(dim=1, keepdim=True) / lengths).expand_as(logp)
    ratio = log_ratio.exp()
    is_low = (ratio < 1 - clip_low) & is_target
    is_high = (ratio > 1 + clip_high) & is_target
    if loss_type == "cispo":
        loss = -ratio.clamp(max=1 + clip_high).detach() * advantage * logp
        return loss * is_target, torch.zeros_like(is_low), is_high
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    return loss * is_target, is_low & (advantage < 0), is_high & (advantage > 0)


def kl_to_reference(logp, reference_logp):
    """Returns an estimate of KL(policy, reference) at each token: never negative, and right in the mean over what the
    policy samples (k3 of http://joschu.net/blog/kl-approx.html)."""
    log_ratio = reference_logp - logp
    return log_ratio.exp() - log_ratio - 1


def token_weights(is_target, loss_type, max_new_tokens, n_answers, n_tokens):
    """Returns the weight of each token's loss (rows, T). n_answers, n_tokens: of the step, on all processes."""
    if loss_type in ("grpo", "gspo"):
        lengths = is_target.sum(dim=1, keepdim=True).clamp(min=1)
        return is_target / (lengths * n_answers)
    if loss_type == "dr_grpo":
        return is_target / (n_answers * max_new_tokens)
    return is_target / n_tokens


def lessons_of(answers, totals):
    """Returns the answers that teach something, each with its advantage, and whether each group is flat.

    totals: their rewards. A group is flat where they are all the same: its advantages are 0, and it is left out unless
    beta or a teacher gives its tokens a loss.
    """
    groups = torch.tensor(totals).view(-1, group_size)
    advantage = advantages(groups, scale_rewards).flatten().tolist()
    is_flat = (groups == groups[:, :1]).all(dim=1).tolist()
    lessons = []
    for i, answer in enumerate(answers):
        teaches = bool(beta or teacher) or not is_flat[i // group_size]
        if teaches and any(answer.is_target):
            lessons.append((answer, advantage[i]))
    return lessons, is_flat


class Batch:
    """A micro-batch: rows of T tokens, and what is known of them before the first update."""

    def __init__(self, lessons, eot_id, device):
        answers = [answer for answer, _ in lessons]
        prompts = [answer.problem.prompt for answer in answers]
        targets = [answer.is_target for answer in answers]
        self.x, self.y = pad(prompts, [answer.ids for answer in answers], targets, eot_id, device)  # (rows, T)
        self.is_target = self.y >= 0
        self.n_inputs = sum(answer.n_inputs for answer in answers)  # tokens of x without what fills up the rows
        self.advantage = torch.tensor([advantage for _, advantage in lessons], device=device)[:, None]  # (rows, 1)
        self.sampled_logp = torch.zeros_like(self.x, dtype=torch.float32)  # by the sampler
        for row, answer in enumerate(answers):
            first = len(answer.problem.prompt) - 1
            self.sampled_logp[row, first : first + len(answer.ids)] = torch.tensor(answer.logprobs)
        self.old_logp = None  # by the trainer
        self.reference_logp = None

    def note_first(self, logp, reference):
        """Keeps the log-probabilities before the first update, and those of the reference or the teacher."""
        self.old_logp = logp.detach()
        if reference is not None:
            self.reference_logp = reference_logprobs(reference, self.x, self.y)
        if teacher:
            self.advantage = self.reference_logp - self.old_logp  # (rows, T)


def add_gradients(net, reference, batches, n_answers, n_tokens, n_inputs, here):
    """Adds up the gradients of a step's batches; returns {name: sum over their tokens} of what is worth a look.

    n_answers, n_tokens: as for token_weights. n_inputs: tokens of all rows of all processes.
    """
    autocast = here.autocast()
    sums = Counter()
    for i, batch in enumerate(batches):
        with processes.backward_of(net, last=i == len(batches) - 1):
            with autocast:
                logp, auxiliary = logprobs(net, batch.x, batch.y)
                if batch.old_logp is None:
                    batch.note_first(logp, reference)
            losses, is_low, is_high = policy_loss(
                logp, batch.old_logp, batch.advantage, batch.is_target, loss_type, clip_low, clip_high
            )
            if beta:
                kl = kl_to_reference(logp, batch.reference_logp) * batch.is_target
                losses = losses + beta * kl
                sums["kl"] += kl.sum().item()
            weights = token_weights(batch.is_target, loss_type, max_new_tokens, n_answers, n_tokens)
            loss = (losses * weights).sum() + auxiliary * batch.n_inputs / n_inputs
            # DDP averages gradients over processes; times their number they are the sum that the weights expect.
            (loss * here.world_size).backward()
        sums["loss"] += loss.item()
        sums["clipped_low"] += is_low.sum().item()
        sums["clipped_high"] += is_high.sum().item()
    return sums


def logprob_difference(batches):
    """Returns the largest |log p by the sampler - log p by the trainer| of what this process learned from."""
    between = [((b.sampled_logp - b.old_logp) * b.is_target).abs().max().item() for b in batches]
    return max(between, default=0.0)


# ---- the run ---------------------------------------------------------------------------------------------------------
def main():
    output.outlast_readers()
    print_any_text()
    with output.errors_in_one_line():
        config = configure(globals(), starting_from=start.config_of)
        check_run(config)
        here = machine.join(device, dtype, timeout, deterministic=deterministic)

        # 1. models
        policy, tokenizer = build(config, here)
        reference = None
        if teacher:
            reference = load_like(teacher, tokenizer, policy.config.block_size, here.device)
        elif beta:
            reference = frozen(policy)
        for each in (policy, reference):  # which are copies by now: what is set here would call the policy's own
            if each is not None:
                load.hide_padding(each, tokenizer, temperature)
        net = processes.averaging_gradients(policy, here.device) if here.parallel == "ddp" else policy

        # 2. problems and rewards
        room = policy.config.block_size - max_new_tokens
        problems = Problems(data, tokenizer, THINK[think], room, here)
        held_out = Problems(eval_data, tokenizer, THINK[think], room, here) if eval_data else None
        learned = learned_reward(reward_model, tokenizer, here) if reward_model else None
        graders = rewards_of.load(rewards, allow_code_execution, learned) if rewards else []

        # 3. the run's folder
        identity = {"data": data, "tokenizer": tokenizer.fingerprint, "data_fingerprint": problems.fingerprint}
        if reference is not None:
            identity["reference"] = fingerprint(reference)
        curve = Curve("reward", "eval_reward", "reward")
        run = Run(config, here, policy, tokenizer, identity, curve, evaluates=held_out is not None)
    sampler = Sampler(
        policy, tokenizer, load.stop_tokens(tokenizer, Path(init_from)), max_new_tokens=max_new_tokens, seed=seed,
        autocast=here.autocast(), think_budget=think_budget, rows=rollout_rows,
    )  # fmt: skip
    policy.train()

    while True:
        run.save_if_due()
        if run.evaluation_is_due:
            report = evaluate(sampler, held_out.all[: eval_problems or None], graders, eval_samples, here, run.fail)
            run.note_evaluation(report, error=-report["eval_reward"])
        if run.is_done or run.asked_to_stop():
            run.save_if_due(now=True)
            break

        # 1. G answers to each problem, and their rewards
        run.begin_step()
        begin = time.perf_counter()
        answers = sampler.sample(problems.of_step(run.step, problems_per_step, seed), run.step, group_size)
        seconds_sampling = time.perf_counter() - begin
        scores = score(graders, answers, run.fail)
        if mask_truncated:
            answers = [answer.without_targets() if answer.is_truncated else answer for answer in answers]

        # 2. what is learned from
        lessons, is_flat = lessons_of(answers, scores.totals)
        own = [
            sum(any(answer.is_target) for answer in answers),  # N
            sum(sum(answer.is_target) for answer in answers),  # n_total
            sum(answer.n_inputs for answer, _ in lessons),
            len(lessons),
            sum(len(answer.ids) for answer in answers),
            sum(is_flat),
        ]
        n_answers, n_tokens, n_inputs, n_lessons, n_sampled, n_flat = processes.all_sum(own, here.device)
        if not lessons:  # DDP waits for gradients from every process, even if they are 0
            lessons = [(nothing_to_learn(tokenizer.eot_id), 0.0)]
        lessons.sort(key=lambda lesson: -lesson[0].n_inputs)  # rows of like lengths together, the longest first
        batches = []
        for i in range(0, len(lessons), micro_batch):
            batches.append(Batch(lessons[i : i + micro_batch], tokenizer.eot_id, here.device))

        # 3. learn
        begin = time.perf_counter()
        lr = norm = 0.0
        sums = Counter()
        for _ in range(updates_per_batch if n_lessons else 0):
            sums = add_gradients(net, reference, batches, n_answers, n_tokens, n_inputs, here)
            lr, norm = run.update()
        seconds_training = time.perf_counter() - begin

        # 4. log; what follows of the loss is of the last update
        loss, kl, low, high = processes.all_sum([sums[name] for name in OF_TOKENS], here.device)
        row = summary(answers, scores) | {"loss": loss, "lr": lr, "grad_norm": norm}
        row["flat_groups"] = n_flat / problems_per_step
        row["logprob_difference"] = max(processes.gather(logprob_difference(batches))) if n_lessons else 0.0
        if beta:
            row["kl"] = kl / max(n_tokens, 1)
        row |= {"clipped_low": low / max(n_tokens, 1), "clipped_high": high / max(n_tokens, 1)}
        row["sampled_per_second"] = n_sampled / seconds_sampling
        row["trained_per_second"] = n_inputs * updates_per_batch / seconds_training
        run.note_samples(samples_of(answers[:log_samples], scores, tokenizer))
        run.end_step(row, LINE.format_map(row))
    run.finish(f"python sample.py {out_dir} --interactive")


if __name__ == "__main__":
    main()
