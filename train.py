"""Trains any model_<model>.py on token shards, on one device or, under torchrun, on many.

    python train.py config/quickstart.py --learning_rate=1e-3
    python train.py --init_from=out/base --data=data/mine --out_dir=out/mine      go on with trained weights
    torchrun --standalone --nproc_per_node=8 train.py config/train_baseline.py

Read from top to bottom: knobs, devices, data, model, optimizer, run folder, loop. The batch is given in tokens;
the number of devices and micro_batch change how it is computed, and not the result. Exceptions are what dropout and
router_jitter draw, and balance_over=batch, which evens each micro-batch. `--help` lists all the knobs.
"""

import importlib
import math
import sys
import time
from collections import deque
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import flops
import muon
from configurator import configure
from data.text import print_any_text
from data.tokenizers import tokenizer_from_dict
from distributed import processes
from training import atomic, checkpoint, evaluation, load, machine, metrics, output, pictures, run_folder, saving, start
from training import dry_run as dry
from training.average import Average
from training.calibration import count_steps
from training.knobs import check, minutes_or_steps
from training.loss import bytes_of_tokens, text_tokens
from training.schedule import learning_rate as learning_rate_at
from training.signals import DIVERGED, StopSignals
from training.stages import Plan, change
from training.update import update

# ---- knobs: every field of the model's GPTConfig is one too ----------------------------------------------------------
# model and data
model = "baseline"  # which model_<model>.py
init_from = ""  # start from the weights of this run, checkpoint or Hugging Face folder: new optimizer, step 0
data: str | list = "data/stdlib"  # a folder that data/prepare.py made; ["data/web:0.7", "data/math:0.3"]: a mixture
out_dir = "out/run"  # the run: config, metrics, checkpoints, picture
seed = 1  # of weights, data order and dropout
vocab_size = 0  # 0: the data's, rounded up to a multiple of 64, or that of init_from where it is large enough
document_mask = False  # nothing crosses from one document to the next (sets the model's eot_id)
document_start_probability = 0.0  # this share of the windows begins where a document does
mask_document_crossing = False  # no loss where the target is the next document's first token
pack: Literal["stream", "documents"] = "stream"  # documents: windows of whole ones, filled up with ignored targets
long_documents: Literal["cut", "skip"] = "cut"  # what pack=documents does with those longer than a window
# size
max_steps = 1000  # of the optimizer
minutes = 0.0  # above 0: measure this machine when a new run begins, and set max_steps so that it takes about so long
batch_tokens = 32768  # 32 * 1024 tokens a step, over all devices
block_size = 1024  # tokens in a window
micro_batch = 8  # windows at once on a device: lower it if memory runs out
stages = {}  # {1000: {"block_size": 2048}}: from that step on these knobs hold; 0.75: from that share of max_steps on
# optimizer
optimizer: Literal["muon", "adamw"] = "muon"  # muon is for matrices, with AdamW for the rest
learning_rate = 2e-3  # the same for both, as Muon's updates are scaled to AdamW's size: try 5e-4 to 5e-3
min_lr = 0.0  # where the schedule ends
warmup_steps = 50  # in which the learning rate rises to its value
schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: constant, then down over the last decay_fraction
decay_fraction = 0.2  # of max_steps, for wsd
decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"  # of wsd; sqrt is 1 - sqrt of the time
lr_batch_tokens = 0  # n: learning_rate was tuned at batches of n tokens, and is scaled by sqrt(batch_tokens / n)
weight_decay = 0.1  # on matrices only
decay_with_lr = True  # weight decay follows the schedule, as in torch's AdamW; False: constant
cautious_decay = False  # weight decay only where it and the update pull the same way
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW: 0.99 for small batches
muon_momentum = 0.95  # of Muon
muon_steps = 5  # of orthogonalisation
muon_polynomial: Literal["polar_express", "quintic"] = "polar_express"  # quintic is the classic
muon_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the orthogonalisation; auto: bfloat16 on CUDA
grad_clip = 1.0  # 0: off
ema = 0.0  # above 0, as 0.999: the decay of an average of the weights, evaluated in their place and saved beside them
max_skipped = 10  # stop after so many steps in a row with a gradient that is not finite
# loop
eval_every = 250  # steps; also at the end. The step is saved first
eval_tokens = 262144  # the same ones every time; 0: the whole validation split
save_every = 1000  # steps; also before each evaluation and at the end
keep_last = 3  # checkpoints, besides the best; 0: all
keep_every = 0  # 1000: of the older checkpoints those of steps 1000, 2000, 3000... stay; 0: none
async_save = False  # write a copy while training goes on: a save costs less of a step, and the state's size of memory
log_every = 10  # steps between printed lines; metrics.jsonl gets every step
sample_every = 0  # n: print every n steps how the model continues the beginning of the validation text; 0: never
wandb: Literal["", "online", "offline"] = ""  # log to Weights & Biases too
tensorboard = False  # write out_dir/tensorboard too
# system
device = "auto"  # cuda, cuda:1, mps or cpu; auto: the first of these that is there
dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: the best that the device is fast at
tf32 = True  # float32 matmuls in TF32 on GPUs that have it
compile: bool | Literal["auto"] = "auto"  # auto: on CUDA
kernels = False  # Triton kernels in place of PyTorch's (kernels.py, kernels_delta.py), on GPUs since the H100
deterministic = False  # the same bits each time, on a GPU as well; slower, and an error where an operation cannot
gradient_checkpointing = False  # recompute each block in the backward pass: a third more work, far less memory
parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"  # auto: ddp under torchrun; fsdp: less memory
reshard = True  # fsdp: gather a block's weights again for its backward; False: keep them till then
cpu_offload = False  # fsdp: weights and optimizer state in the CPU's memory: slow, for what fits nowhere else
timeout = 30  # seconds that a process waits for another, once a step is done: raise it for a slow disk
resume: bool | Literal["auto"] = False  # go on from the newest whole checkpoint of the run in out_dir; auto: or begin
overwrite = False  # delete the run that is in out_dir
eval_only = False  # print the validation loss of the newest checkpoint in out_dir, or else of init_from, and end
dry_run: bool | Literal["time"] = False  # print what the run would cost and write, and end; time: do three steps first
print_any_text()
with output.errors_in_one_line():
    config = configure(globals(), starting_from=start.knobs_of)

# ---- devices ---------------------------------------------------------------------------------------------------------
# One process is the case W = 1: no group is opened, and what all processes would agree on is agreed at once.
rank, world_size = processes.launched()
main = rank == 0
output.outlast_readers()
with output.errors_in_one_line():
    check(config, world_size)
    config["minutes"] = minutes = minutes_or_steps(minutes, sys.argv)
    here = machine.join(device, dtype, timeout, parallel, compile, tf32, deterministic)
device, dtype, parallel, compile = here.device, here.dtype, here.parallel, here.compile
say = here.say
autocast = here.autocast()

# ---- data ------------------------------------------------------------------------------------------------------------
variant = importlib.import_module(f"model_{model}")
with output.errors_in_one_line():
    plan = Plan(config, __file__, variant.GPTConfig)  # a run without stages has one
    plan.lay_out(max_steps, rank, world_size, device)
    plan.try_first_batches(eval_tokens, rank, world_size, device)  # before a folder is touched
    meta = plan.texts[0].meta  # that of all texts in what counts here
    tokenizer = tokenizer_from_dict(meta["tokenizer"]) if meta["tokenizer"] else None
    old_tokenizer = load.known_tokenizer(init_from) if init_from and tokenizer else None
    start.check_tokenizer(init_from, old_tokenizer, data, tokenizer)
    if vocab_size == 0:
        vocab_size = start.choose_vocab_size(meta["vocab_size"], init_from)
if vocab_size < meta["vocab_size"]:
    processes.fail(f"vocab_size={vocab_size} is smaller than that of {data}, {meta['vocab_size']}: try 0")
# What a resumed run must find again: the data order is a function of the seed and the tokens drawn before.
identity = {"data": data, "tokenizer": tokenizer and tokenizer.fingerprint, **plan.identity()}
for train_data, val_data in plan.opened.values():
    say(f"{train_data.folder}: {len(train_data):,} tokens to train on, {len(val_data):,} to validate")

# ---- model -----------------------------------------------------------------------------------------------------------
torch.manual_seed(seed)
config["vocab_size"] = vocab_size
with output.errors_in_one_line():
    processes.check_same(config=config, data=identity, code=run_folder.code_of(model))
    plan.settle(variant.GPTConfig, variant.GPT, vocab_size, meta["eot_id"])
    stage = plan.stages[0]
    if dry_run:
        refusal = dry.report(config, plan, parallel, dtype, device, world_size, say)
        if dry_run is True:
            processes.leave()
        if refusal:
            raise ValueError(refusal)
    if parallel == "fsdp":  # on no device yet: no process ever holds the whole model
        fsdp = importlib.import_module("distributed.fsdp")
        raw_model = fsdp.empty(variant.GPT, stage.model_config)
    else:
        raw_model = variant.GPT(stage.model_config)
if kernels:
    say(f"kernels: {importlib.import_module('kernels_delta').install(raw_model)}")
if gradient_checkpointing:
    for block in raw_model.blocks:
        block.forward = partial(recompute, block.forward, use_reentrant=False)
if parallel == "fsdp":
    fsdp.shard(raw_model, variant.GPT, device, getattr(torch, dtype), reshard, cpu_offload, compile)
    net = raw_model
else:
    raw_model.to(device)
    net = torch.compile(raw_model) if compile else raw_model
if parallel == "ddp":
    trains_a_part = any(getattr(each.model_config, "indexer_stage", "") == "dense" for each in plan.stages)
    net = processes.averaging_gradients(net, device, trains_a_part)

bytes_of = {val_data: bytes_of_tokens(tokenizer, vocab_size, val_data) for _, val_data in plan.opened.values()}
evaluate = partial(
    evaluation.evaluate, raw_model, bytes_of=bytes_of, eval_tokens=eval_tokens, rank=rank, world_size=world_size,
    device=device, autocast=autocast,
)  # fmt: skip
sampler = None
with output.errors_in_one_line():
    if sample_every:
        sampler = evaluation.Sampler(raw_model, stage.val_texts[0], tokenizer, vocab_size, device, seed)
    if eval_only:
        step = saving.load_newest(Path(out_dir), raw_model, tokenizer and tokenizer.fingerprint, say)
        if step is None and not init_from:
            raise ValueError(f"eval_only needs weights: there is no checkpoint in {out_dir}, and no init_from is given")
        if step is None:
            start.copy_weights(init_from, raw_model, tokenizer, old_tokenizer)
        stage = plan.at(step or 0)
        change(raw_model, variant.GPT, stage.model_config)
        say(metrics.evaluation_line(step or 0, evaluate(stage)))
        processes.leave()

# ---- optimizer -------------------------------------------------------------------------------------------------------


def peak_lr(stage):
    """Returns the learning rate of a stage before the schedule."""
    if not lr_batch_tokens:
        return learning_rate
    return learning_rate * math.sqrt(stage.batch_tokens / lr_batch_tokens)


muon_type = None if muon_dtype == "auto" else getattr(torch, muon_dtype)
make_optimizer = partial(
    muon.make_optimizer, optimizer=optimizer, learning_rate=peak_lr(stage), weight_decay=weight_decay, beta1=beta1,
    beta2=beta2, muon_momentum=muon_momentum, muon_steps=muon_steps, muon_polynomial=muon_polynomial,
    muon_dtype=muon_type, decay_with_lr=decay_with_lr, cautious_decay=cautious_decay,
)  # fmt: skip
opt = make_optimizer(raw_model)
scaler = torch.amp.GradScaler(here.device_type, enabled=dtype == "float16")
parameters = sum(p.numel() for p in raw_model.parameters())
if main:
    for each in plan.stages:
        each.flops_per_token = flops.training_flops_per_token(model, each.model_config, each.block_size)
groups = ", ".join(f"{tensors} {group} by {method}" for group, method, tensors, *_ in muon.group_table(opt))
say(f"{model}: {parameters:,} parameters, {stage.flops_per_token:.3g} FLOPs a token; {groups}")
if dry_run:
    with output.errors_in_one_line():
        seconds = dry.time_steps(net, opt, stage, reshard, autocast)
    say(dry.line(seconds, max_steps))
    processes.leave()

# ---- run folder ------------------------------------------------------------------------------------------------------
out = Path(out_dir)
step = 0
tokens = 0  # seen in training
evaluated_at = -1  # the last step that was evaluated
skipped = 0  # steps whose gradient was not finite
skipped_in_a_row = 0
recent_losses = deque(maxlen=100)  # by which spikes are known
recent_norms = deque(maxlen=100)
go_on = run_folder.resume_command(parallel)
with output.errors_in_one_line():
    lock, already_there = run_folder.claim(out, resume, overwrite)
    if minutes and resume and already_there:
        config["max_steps"] = max_steps = run_folder.saved_knob(out, "max_steps")
    elif minutes:
        if parallel == "fsdp":
            raise ValueError("minutes is for models that one process holds: with parallel=fsdp give max_steps")
        measured = 0
        if main:  # on a copy of the model: the run that follows is as if nothing had been
            to_evaluate = chain(*(batches for _, batches in stage.evaluations(eval_tokens, rank, world_size, device)))
            measured = count_steps(minutes, raw_model, make_optimizer, plan.parts(variant.GPT), to_evaluate,
                                   eval_every, autocast, compile)  # fmt: skip
        config["max_steps"] = max_steps = int(processes.all_sum([measured], device)[0])
        say(f"minutes={minutes:g}: max_steps={max_steps} on this machine")
    if minutes:
        plan.lay_out(max_steps, rank, world_size, device)
    saved_config = run_folder.to_save(model, stage.fields, config)

    path = checkpoint.newest(out, say) if resume else None
    if path:
        stage = plan.at(atomic.step_of(path))
        change(raw_model, variant.GPT, stage.model_config)
        saved_config["model_config"] = stage.fields
        state = saving.go_on_from(path, raw_model, opt, scaler, saved_config, identity, here.facts(), say)
        step = state["step"]
        tokens = state["tokens"]
        evaluated_at = step if saving.was_evaluated(path) else -1
        skipped = state["skipped"]
        skipped_in_a_row = state.get("skipped_in_a_row", 0)  # checkpoints of earlier versions lack these
        recent_losses.extend(state.get("recent_losses", []))
        recent_norms.extend(state.get("recent_norms", []))
        if tokens != plan.tokens_before(step):
            plan.go_on(step, tokens)
            say(f"{step} steps had {tokens:,} tokens, and the batch is another now: {max_steps - step} steps are left, "
                "by which the schedule goes, too")  # fmt: skip
    else:
        if resume and already_there:
            say(f"no checkpoint in {out} yet: beginning again")
        if init_from:
            start.copy_weights(init_from, raw_model, tokenizer, old_tokenizer)
            unknown = " (which says nothing of its tokenizer)" if tokenizer and not old_tokenizer else ""
            say(f"starting with the weights of {init_from}{unknown}")
    average = Average(raw_model, ema) if ema else None
    if average and path:
        average.go_on_from(path, state.get("averaged_steps", 0))
    processes.barrier()  # nobody writes before all have read
    if main:
        if already_there and not resume:  # overwrite was given, or no step was ever done there
            run_folder.delete(out)
        to_come = plan.tokens_before(max_steps) - plan.tokens_before(step)
        work = {"parameters": parameters, "flops_per_token": plan.stages[0].flops_per_token,
                "tokens": tokens + to_come, "stages": plan.described()}  # fmt: skip
        facts = {"seed": seed, **identity, "hardware": here.described(), **work, "optimizer": muon.group_table(opt)}
        run_folder.describe(out, saved_config, meta, facts)
        album = pictures.Album(out, f"{out}: {model}, {parameters / 1e6:.1f}M parameters",
                               [each.first for each in plan.stages[1:]])  # fmt: skip
        log = metrics.Log(out, step, config, wandb, tensorboard, album, evaluated=evaluated_at == step)
        run_folder.write_state(out, "running", step, max_steps, go_on)
saver = saving.Saver(out, lock, raw_model, opt, saved_config, keep_last, keep_every, say, average)
if path:
    saver.repair(path)
say(stage.describe())
for each in plan.stages[1:]:
    say(f"from step {each.first} on {each.describe()}")
epochs = ", ".join(f"{n:.2f} epochs of {name}" for name, n in plan.epochs(max_steps).items())
say(f"{max_steps} steps are {epochs}")


def save():
    """All processes take part; afterwards, or with async_save some steps later, the checkpoint is on the disk."""
    changed = [path for shards in plan.splits for path in shards.changed()]
    if changed:  # what was read since may be anything, and so may the weights
        processes.fail(f"{changed[0]} was written to while this run read it: restore it, and go on with --resume")
    trainer = {"tokens": tokens, "skipped": skipped, "skipped_in_a_row": skipped_in_a_row,
               "recent_losses": [*recent_losses], "recent_norms": [*recent_norms],
               "scaler": scaler.state_dict(), "identity": identity, "machine": here.facts()}  # fmt: skip
    is_last = step >= max_steps or stop > 0
    saver.save(step, trainer, wait=is_last or not async_save, must=is_last)


# ---- loop ------------------------------------------------------------------------------------------------------------
in_use = average.in_place if average else nullcontext  # the weights that are evaluated, and not those that learn
signals = StopSignals(quiet=not main)
stop = 0  # signals that any process got
bar = tqdm(
    total=max_steps, initial=step, disable=not (main and sys.stderr.isatty()), dynamic_ncols=True, smoothing=0.05
)
begin = time.perf_counter()
clock = metrics.Clock()
raw_model.train()
while True:
    saver.finish(wait=False)  # a save that a thread is at may be done by now
    if plan.at(step) is not stage:
        stage = plan.at(step)
        change(raw_model, variant.GPT, stage.model_config)
        saver.config = saved_config | {"model_config": stage.fields}
        say(f"step {step:>6} | {stage.describe()}")

    # 1. save, then evaluate: what was learned is on the disk before anything that can fail
    evaluation_is_due = step != evaluated_at and (step % eval_every == 0 or step >= max_steps)
    save_is_due = step != saver.saved_at and (evaluation_is_due or step % save_every == 0 or step >= max_steps)
    if save_is_due:
        save()
    if evaluation_is_due:
        with in_use():
            reports = evaluate(stage)
        report = reports[""]
        say(metrics.evaluation_line(step, reports))
        if main:
            log.write(metrics.evaluation_row(step, reports, tokens))
        if step > 0:
            saver.note_evaluation(step, report["loss"], tokens)
        evaluated_at = step
    if sampler and step > 0 and step % sample_every == 0 and (main or parallel == "fsdp"):
        with in_use():
            say(f"step {step:>6} | sample {sampler.text(autocast)}")
    if step >= max_steps:
        break
    if main and step > 0 and (save_is_due or evaluation_is_due):
        album.draw()

    # 2. agree on what all processes must know: the numbers of targets and of tokens, and whether to stop
    started = time.perf_counter()
    with output.errors_in_one_line():  # a token that the vocabulary does not have
        batches = list(stage.loader.batches(step))
    own_targets = 0
    own_text = []  # of each micro-batch, the tokens that its auxiliary losses are means over
    if stage.is_uneven:
        own_targets = sum((y >= 0).sum().item() for _, y in batches)
        own_text = [text_tokens(raw_model, x) for x, _ in batches]
    targets, text, stop = processes.all_sum([own_targets, sum(own_text), signals.count()], device)
    if stop:
        saver.finish()  # a save that a thread is at may fail, and this one is the last chance
        if step != saver.saved_at:
            save()
        break

    # 3. gradient: the mean over all targets of the step, whatever micro-batch or process they are in. A mean of the
    # micro-batches' means would favour windows with few targets. Auxiliary losses are means over all tokens instead,
    # but for padding where the model knows it.
    # Dropout and router_jitter are drawn from (seed, step, process), with nothing to store for a resume. What they draw
    # depends on micro_batch.
    torch.manual_seed((((seed << 24) + step) * 4096 + rank) % 2**64)  # room for 2^24 steps and 4096 processes
    total_loss = torch.zeros((), device=device)
    for i, (x, y) in enumerate(batches):
        is_last = i == len(batches) - 1
        share = len(x) * world_size / stage.loader.batch_windows  # processes are averaged: world_size makes it a sum
        # Gradients go between processes in the last backward alone: before it they only add up.
        with processes.backward_of(net, is_last, reshard):
            with autocast:
                if stage.is_uneven:  # a loss for each token, at the price of computing the logits twice
                    losses, auxiliary = net(x, y, per_token=True)
                    share = own_text[i] * world_size / max(text, 1)
                    loss = losses.sum() * world_size / max(targets, 1) + auxiliary * share
                else:
                    loss = net(x, y) * share  # the model adds its auxiliary losses itself
            scaler.scale(loss).backward()
        total_loss += loss.detach()

    # 4. update
    lr = learning_rate_at(step, peak_lr(stage), min_lr, warmup_steps, max_steps, schedule, decay_fraction, decay_shape)
    norm = update(raw_model, opt, scaler, lr, grad_clip)
    is_finite = math.isfinite(norm)
    if average and is_finite:
        average.update()
    skipped_in_a_row = 0 if is_finite else skipped_in_a_row + 1
    skipped += not is_finite
    loss = processes.all_sum([total_loss.item() / world_size], device)[0]
    step += 1
    tokens += stage.batch_tokens

    # 5. log
    seconds = time.perf_counter() - started
    clock.tick()
    bar.update()
    speed = stage.batch_tokens / seconds
    mfu = speed * stage.flops_per_token / (here.peak_flops * world_size) if here.peak_flops else None
    smoothed = metrics.smoothed([*recent_losses, loss])
    row = dict(step=step, loss=loss, smoothed_loss=smoothed, lr=lr, grad_norm=norm,
               ms=1000 * seconds, tokens_per_second=speed, mfu=mfu,
               memory_gb=metrics.peak_gb(here.device_type), resident_gb=metrics.resident_gb(), tokens=tokens,
               skipped=skipped, spikes=metrics.spikes(loss, recent_losses, norm, recent_norms))  # fmt: skip
    if is_finite and math.isfinite(loss):
        recent_losses.append(loss)
        recent_norms.append(norm)
    if not is_finite:
        count = f"{skipped_in_a_row} in a row, {skipped} in all"
        say(f"step {step:>6} | gradient norm {norm}, loss {loss:.4f}: skipped, {count}")
    if row["spikes"]:
        say(f"step {step:>6} | SPIKE in {' and '.join(row['spikes'])}: loss {loss:.4f}, gradient norm {norm:.3g}")
    if step % log_every == 0 or step == max_steps:
        say(metrics.step_line(row, max_steps, clock.seconds_left(max_steps - step)))
    if main:
        log.write(row | metrics.of_model(raw_model, with_tables=step % log_every == 0))
    if clock.steps == 1:
        processes.set_timeout(timeout)  # the first step, which compiles, is done everywhere
    if skipped_in_a_row >= max_skipped:
        saver.finish()
        if main:
            run_folder.write_state(out, "diverged", step, max_steps, go_on)
        advice = "try a lower learning_rate, or dtype=bfloat16 or float32"
        processes.fail(f"{skipped_in_a_row} steps in a row without a finite gradient: stopped. Last good checkpoint "
                       f"is {saver.in_place}: {advice}", DIVERGED)  # fmt: skip

saver.finish(must=True)
bar.close()
if main:
    log.close()
    album.finish()
    run_folder.write_state(out, "stopped" if stop else "finished", step, max_steps, go_on)
if stop:
    reason = signals.received[0] if signals.received else "signal"
    say(f"{reason}: stopped after step {step}; go on with  {go_on}")
say(f"{time.perf_counter() - begin:.0f} s; see {out}/loss.png, and sample with  python sample.py {out}")
processes.finish()
