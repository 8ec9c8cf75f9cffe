"""Trains any model_<model>.py on token shards, on one device or, under torchrun, on many.

    python train.py config/quickstart.py --learning_rate=1e-3
    torchrun --standalone --nproc_per_node=8 train.py config/train_baseline.py

Read from top to bottom: knobs, devices, data, model, optimizer, run folder, loop. The batch is given in tokens;
the number of devices and micro_batch change how it is computed, and not the result. `--help` lists all the knobs.
"""

import dataclasses
import importlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import deque
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from training import checkpoint
import flops
from training import guard
import muon
from training import run_folder
from configurator import configure
from data.shards import Loader, Shards, eval_batches
from data.tokenizers import tokenizer_from_dict
from eval import bytes_of_tokens, loss_report, loss_sums

# ---- knobs: every field of the model's GPTConfig is one too ---------------------------------------------------------
model = "baseline"  # which model_<model>.py
data = "data/stdlib"  # a folder that data/prepare.py made
out_dir = "out/run"  # the run: config, metrics, checkpoints, picture
seed = 1  # of weights, data order and dropout
device = "auto"  # cuda, cuda:1, mps or cpu; auto: the first of these that is there
dtype = "auto"  # bfloat16, float16 (with a loss scaler) or float32; auto: the best that the device is fast at
tf32 = True  # float32 matmuls in TF32 on GPUs that have it
compile: bool | str = "auto"  # True, False; auto: on CUDA
kernels = False  # Triton kernels in place of PyTorch's (kernels.py), on GPUs since the H100
deterministic = False  # the same bits each time, on a GPU as well; slower, and an error where an operation cannot
parallel = "auto"  # under torchrun: ddp, or fsdp where weights fill the memory; auto: ddp there, else none
reshard = True  # fsdp: gather a block's weights again for its backward; False: keep them till then
cpu_offload = False  # fsdp: weights and optimizer state in the CPU's memory: slow, for what fits nowhere else
timeout = 30  # seconds that a process waits for another before it gives up
resume: bool | str = False  # go on from the newest whole checkpoint in out_dir; auto: or begin where there is no run
overwrite = False  # delete the run that is in out_dir
# how much
max_steps = 1000
batch_tokens = 32768  # 32 * 1024 tokens a step, over all devices
micro_batch = 8  # windows at once on a device: lower it if memory runs out
block_size = 1024  # tokens in a window
vocab_size = 0  # 0: the data's, rounded up to a multiple of 64
document_mask = False  # nothing crosses from one document to the next (sets the model's eot_id)
document_start_probability = 0.0  # this share of the windows begins where a document does
mask_document_crossing = False  # no loss where the target is the next document's first token
gradient_checkpointing = False  # recompute each block in the backward pass: a third more work, far less memory
# optimizer
optimizer = "muon"  # muon (matrices; AdamW for the rest) or adamw
learning_rate = 2e-3  # the same for both: try 5e-4 to 5e-3
min_lr = 0.0  # where the schedule ends
warmup_steps = 50
schedule = "cosine"  # wsd (constant, then down over the last decay_fraction) or constant
decay_fraction = 0.2  # of max_steps (wsd)
decay_shape = "linear"  # cosine or sqrt (1 - sqrt of the time) (wsd)
lr_batch_tokens = 0  # n: learning_rate was tuned at batches of n tokens, and is scaled by sqrt(batch_tokens / n)
weight_decay = 0.1  # on matrices only
decay_with_lr = True  # weight decay follows the schedule, as in torch's AdamW; False: constant
cautious_decay = False  # only where update and weight agree in sign
beta1 = 0.9
beta2 = 0.95  # of AdamW: 0.99 for small batches
muon_momentum = 0.95
muon_steps = 5  # of orthogonalisation
muon_polynomial = "polar_express"  # or quintic, the classic
muon_dtype = "auto"  # of the orthogonalisation: float32 or bfloat16; auto: bfloat16 on CUDA
grad_clip = 1.0  # 0: off
max_skipped = 10  # stop after so many steps in a row with a gradient that is not finite
# loop
eval_every = 250  # steps; also at the end
eval_tokens = 262144  # the same ones every time; 0: the whole validation split
save_every = 1000  # steps; also at the end and where the validation loss is the best so far
keep_last = 3  # checkpoints, besides the best; 0: all
keep_every = 0  # of the older ones those of each so many steps; 0: none
async_save = False  # write a copy while training goes on: a save costs less of a step, and the state's size of memory
log_every = 10  # steps between printed lines; metrics.jsonl gets every step
wandb = ""  # online or offline: log there too
tensorboard = False  # write out_dir/tensorboard too
config = configure(globals())


def die(message, code=2):
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code) if dist.is_initialized() else sys.exit(
        code
    )  # gloo's threads may abort a process that ends otherwise


# ---- devices --------------------------------------------------------------------------------------------------------
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
main = rank == 0
say = tqdm.write if main else lambda *_: None
try:
    guard.check_knobs(config, world_size)
except ValueError as error:
    die(error)
if deterministic:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
if device == "auto":
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
parallel = parallel if parallel != "auto" else "ddp" if world_size > 1 else "none"
if parallel != "none":
    processes = importlib.import_module("parallel")
    device = processes.setup(device, timeout)
try:
    device_type = torch.empty(0, device=device).device.type
except (RuntimeError, AssertionError) as error:
    die(f"device={device}: {str(error).splitlines()[0]}: try device=cpu or device=auto")
if device_type == "cuda":
    torch.cuda.set_device(device)
if dtype == "auto":
    dtype = "float32"
    if device_type == "cuda":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
if parallel == "fsdp" and dtype == "float16":
    die("dtype=float16 needs a loss scaler, which parallel=fsdp has not: try bfloat16, float32 or parallel=ddp")
if compile == "auto":
    compile = device_type == "cuda"
torch.set_float32_matmul_precision("high" if tf32 and device_type == "cuda" else "highest")
autocast = torch.autocast(device_type, getattr(torch, dtype)) if dtype != "float32" else nullcontext()
name = flops.device_name(device)
say(f"{world_size} x {name}, {dtype}, {'compiled' if compile else 'eager'}"
    + (f", {parallel}" if parallel != "none" else ""))  # fmt: skip

# ---- data -----------------------------------------------------------------------------------------------------------
try:
    train_data, val_data = Shards(data, "train"), Shards(data, "val")
    windows = batch_tokens // block_size
    if windows * block_size != batch_tokens or windows % world_size:
        unit = block_size * world_size
        near = sorted({max(batch_tokens // unit, 1) * unit, -(-batch_tokens // unit) * unit})
        die(f"batch_tokens={batch_tokens} is not a multiple of block_size={block_size} times {world_size} processes: "
            f"try {' or '.join(map(str, near))}")  # fmt: skip
    loader = Loader(train_data, block_size, windows, seed, rank, world_size, micro_batch, device,
                    document_start_probability, mask_document_crossing)  # fmt: skip
except (OSError, ValueError) as error:
    die(error)
tokenizer = tokenizer_from_dict(train_data.meta["tokenizer"]) if train_data.meta["tokenizer"] else None
identity = {"data": data, "data_fingerprint": train_data.fingerprint, "tokenizer": tokenizer and tokenizer.fingerprint,
            "shards": [train_data.contents, val_data.contents]}  # fmt: skip
vocab_size = vocab_size or -(-train_data.vocab_size // 64) * 64
if vocab_size < train_data.vocab_size:
    die(f"vocab_size={vocab_size} is smaller than that of {data}, {train_data.vocab_size}: try 0")
bytes_of = bytes_of_tokens(tokenizer, vocab_size)
accumulation = len(range(loader.first, loader.last, micro_batch))
say(f"{data}: {len(train_data):,} tokens to train on, {len(val_data):,} to validate; a step is {windows} windows of "
    f"{block_size} = {accumulation} x {min(micro_batch, loader.last - loader.first)} on each process; "
    f"{max_steps} steps are {max_steps * windows / loader.windows_per_epoch:.2f} epochs")  # fmt: skip

# ---- model ----------------------------------------------------------------------------------------------------------
torch.manual_seed(seed)
variant = importlib.import_module(f"model_{model}")
config |= {"vocab_size": vocab_size}
fields = {field.name: config[field.name] for field in dataclasses.fields(variant.GPTConfig)}
if document_mask:
    fields["eot_id"] = train_data.eot_id
try:
    guard.check_ranks(config=config, data=identity, code=guard.code_of(model))
    model_config = variant.GPTConfig(**fields)
    raw_model = processes.empty(variant.GPT, model_config) if parallel == "fsdp" else variant.GPT(model_config)
except ValueError as error:
    die(error)
if kernels:
    say(f"kernels: {importlib.import_module('kernels_delta').install(raw_model)}")
if gradient_checkpointing:
    for block in raw_model.blocks:
        block.forward = partial(recompute, block.forward, use_reentrant=False)
if parallel == "fsdp":
    processes.shard(raw_model, variant.GPT, device, getattr(torch, dtype), reshard, cpu_offload, compile)
else:
    raw_model.to(device)
net = torch.compile(raw_model) if compile and parallel != "fsdp" else raw_model
if parallel == "ddp":
    ids = [torch.device(device).index] if device_type == "cuda" else None
    net = DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)  # counts are each process's own

# ---- optimizer ------------------------------------------------------------------------------------------------------
peak_lr = learning_rate * (math.sqrt(batch_tokens / lr_batch_tokens) if lr_batch_tokens else 1.0)
muon_type = None if muon_dtype == "auto" else getattr(torch, muon_dtype)
opt = muon.make_optimizer(
    raw_model, optimizer, peak_lr, weight_decay, beta1=beta1, beta2=beta2, muon_momentum=muon_momentum,
    muon_steps=muon_steps, muon_polynomial=muon_polynomial, muon_dtype=muon_type, decay_with_lr=decay_with_lr,
    cautious_decay=cautious_decay,
)  # fmt: skip
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
parameters = sum(p.numel() for p in raw_model.parameters())
flops_per_token = flops.training_flops_per_token(model, raw_model.config, block_size) if main else None
peak = flops.peak_flops(name, dtype) if main else None
say(f"{model}: {parameters:,} parameters, {flops_per_token or math.nan:.3g} FLOPs a token; "
    + ", ".join(f"{tensors} {group} by {method}" for group, method, tensors, *_ in muon.group_table(opt)))  # fmt: skip


def lr_at(step):
    """Warm-up, then the schedule: from peak_lr to min_lr, which the last step would reach one step later."""
    if step < warmup_steps:
        return peak_lr * (step + 1) / (warmup_steps + 1)
    down = {"cosine": max_steps, "wsd": round(decay_fraction * max_steps), "constant": 0}[schedule]
    first = max(max_steps - down, warmup_steps)
    if step < first:
        return peak_lr
    t = (step - first) / max(max_steps - first, 1)
    shape = "cosine" if schedule == "cosine" else decay_shape
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * t)), "linear": 1 - t, "sqrt": 1 - math.sqrt(t)}[shape]
    return min_lr + (peak_lr - min_lr) * left


# ---- run folder -----------------------------------------------------------------------------------------------------
out = Path(out_dir)
knobs = {key: value for key, value in config.items() if key not in (*fields, "model", "resume", "overwrite")}
saved_config = {"model": model, "model_config": fields, "knobs": knobs}
step, tokens, best, skipped = 0, 0, math.inf, 0
machine = {"processes": world_size, "device": name, "torch": torch.__version__}
try:
    held = resume and checkpoint.folders(out) or record.exists(out)
    if resume is True and not held:
        die(f"--resume given but no checkpoint in {out}")
    lock = guard.lock(out)
    if held and not (resume or overwrite):
        die(f"{out} already holds a run: go on with --resume, delete it with --overwrite, or choose another --out_dir")
    path = checkpoint.newest(out, say) if resume else None
    if resume and held and not path:
        say(f"no checkpoint in {out} yet: beginning again")
    if path:
        old_config, state = checkpoint.load_config(path), json.loads((path / "trainer.json").read_text())
        for line in checkpoint.changed_keys(old_config, saved_config):
            say(f"changed since the checkpoint: {line}")
        if old_config["knobs"]["optimizer"] != optimizer:
            die(f"{path} has the state of optimizer={old_config['knobs']['optimizer']}: resume with that")
        before = state["identity"]
        if before["tokenizer"] != identity["tokenizer"]:
            die(f"{data} has another tokenizer than the data of {path}: give that data, or another out_dir")
        if before["data"] == data and not before.items() <= identity.items():
            die(f"{data} changed since {path} was written: restore it, or begin another run in another out_dir")
        checkpoint.restore(path, raw_model, opt)
        step, tokens, best, skipped = (state[key] for key in ("step", "tokens", "best", "skipped"))
        for key, then in state.get("machine", {}).items():
            if then != machine[key]:
                say(f"changed since the checkpoint: {key}: {then} -> {machine[key]}: equal to rounding, not to the bit")
        if state["scaler"]:  # it is empty where dtype was not float16
            scaler.load_state_dict(state["scaler"])
        say(f"resuming from {path}")
    if parallel != "none":
        dist.barrier()  # nobody writes before all have read
    if main:
        if held and not resume:
            record.delete(out)
        hardware = {"device": name, "processes": world_size, "parallel": parallel, "dtype": dtype, "compile": compile,
                    "peak_flops": peak}  # fmt: skip
        work = {"parameters": parameters, "flops_per_token": flops_per_token, "tokens": batch_tokens * max_steps}
        facts = {"seed": seed, **identity, "hardware": hardware, **work, "optimizer": muon.group_table(opt)}
        record.describe(out, saved_config, train_data.meta, facts)
        metrics = record.Log(out, step, config, wandb, tensorboard)
except (OSError, ValueError, checkpoint.CheckpointError) as error:
    die(error)


def save(is_best=False):
    """All take part; afterwards, or with async_save some steps later, the checkpoint is on the disk."""
    if changed := train_data.changed() + val_data.changed():
        die(f"{changed[0]} was written to while this run read it: restore it, and go on with --resume")
    trainer = {"tokens": tokens, "best": best, "skipped": skipped, "scaler": scaler.state_dict(), "identity": identity,
               "machine": machine}  # fmt: skip
    on_disk(checkpoint.finish)  # the one before
    wait = not async_save or step >= max_steps or stop > 0
    on_disk(checkpoint.save, out, step, raw_model, opt, saved_config, trainer, keep_last, is_best, keep_every, wait)


def on_disk(call, *arguments):
    """Part of a save. On a full disk a run that has steps left goes on: what was saved before stays."""
    try:
        if folder := call(*arguments):
            is_best = (out / "best").resolve().name == folder.name
            say(f"step {step:>6} | saved {folder}{', the best so far' if is_best else ''}")
            if main:
                record.plot(out, f"{out}: {model}, {parameters / 1e6:.1f}M parameters")
    except (OSError, checkpoint.CheckpointError) as error:
        if step >= max_steps or stop > 0:
            die(error)
        if main:
            print(f"WARNING: {error}", file=sys.stderr)


def evaluate():
    """(loss, bits per byte of text) over the first eval_tokens of the validation split, without auxiliary losses."""
    raw_model.eval()
    batches = eval_batches(val_data, block_size, eval_tokens, micro_batch, rank, world_size, device)
    if parallel == "fsdp":
        batches = processes.in_step(raw_model, batches, block_size, device)
    report = loss_report(all_sum(loss_sums(raw_model, batches, bytes_of, autocast)))
    raw_model.train()
    return report["loss"], report["bits_per_byte"]


def all_sum(values):
    """Sums of a few numbers over all processes."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if parallel != "none":
        values = values.to(device) if device_type == "cuda" else values
        dist.all_reduce(values)
    return values.tolist()


def log(**row):
    if main:
        metrics.write(row)


# ---- loop -----------------------------------------------------------------------------------------------------------
stopping, stop = [], 0  # signals received: here, and by all processes together


def on_signal(number, frame):
    if stopping:
        os._exit(128 + number)
    stopping.append(signal.Signals(number).name)


for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # the last is SLURM's before it takes the machine
    signal.signal(number, on_signal)
bar = tqdm(
    total=max_steps, initial=step, disable=not (main and sys.stderr.isatty()), dynamic_ncols=True, smoothing=0.05
)
losses, norms, in_a_row = deque(maxlen=100), deque(maxlen=100), 0
saved_at = evaluated_at = step if step > 0 else -1  # a checkpoint is written after the evaluation of its step
begin, timer, timed = time.perf_counter(), None, 0
raw_model.train()
while True:
    # 1. evaluate and save
    on_disk(checkpoint.finish, False)  # what is in flight, if it is there by now
    is_best = False
    if (step % eval_every == 0 or step >= max_steps) and step != evaluated_at:
        loss, bits = evaluate()
        bits_text = "n/a" if bits is None else f"{bits:.4f}"
        say(f"step {step:>6} | validation loss {loss:.4f} | {bits_text} bits per byte")
        log(step=step, val_loss=loss, val_bits_per_byte=bits, tokens=tokens)
        if step > 0:
            is_best, best = loss < best, min(best, loss)  # in this order: a loss of NaN is never the best
    if step > 0 and step != saved_at and (is_best or step % save_every == 0 or step >= max_steps):
        save(is_best)
        saved_at = step
    if step >= max_steps:
        break
    # 2. agree on what all processes must know: the number of targets, and whether to stop
    started = time.perf_counter()
    batches = list(loader.batches(step))
    targets, stop = all_sum([sum((y >= 0).sum().item() for _, y in batches), len(stopping)])
    if stop:
        if step > 0 and step != saved_at:
            save()
        command = shlex.join([a for a in sys.argv if a.split("=")[0] not in ("--resume", "--overwrite")] + ["--resume"])
        launcher = "torchrun ..." if parallel != "none" else "python"
        say(f"{stopping[0] if stopping else 'signal'}: stopped after step {step}; go on with  {launcher} {command}")
        break
    # 3. gradient: the mean over all targets of the step, whatever micro-batch or process they are in
    torch.manual_seed((((seed << 24) + step) * 4096 + rank) % 2**64)  # of dropout: nothing to store for a resume
    total_loss = torch.zeros((), device=device)
    for i, (x, y) in enumerate(batches):
        last = i == len(batches) - 1
        if parallel == "fsdp":
            processes.before_backward(net, last, reshard)
        with net.no_sync() if parallel == "ddp" and not last else nullcontext():
            with autocast:
                loss = net(x, y) * ((y >= 0).sum() * world_size / max(targets, 1))
            scaler.scale(loss).backward()
        total_loss += loss.detach()
    # 4. update
    scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    norm = (norm.full_tensor() if parallel == "fsdp" else norm).item()
    lr = lr_at(step)
    for group in opt.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        scaler.step(opt)
        in_a_row = 0
    else:
        skipped, in_a_row = skipped + 1, in_a_row + 1
    scaler.update()
    opt.zero_grad(set_to_none=True)
    if hasattr(raw_model, "after_step"):
        raw_model.after_step()
    loss = all_sum([total_loss.item() / world_size])[0]
    seconds = time.perf_counter() - started
    step, tokens = step + 1, tokens + batch_tokens
    bar.update()
    # 5. log
    speed = batch_tokens / seconds
    mfu = speed * flops_per_token / (peak * world_size) if peak else None
    memory = guard.peak_gb(device_type)
    watched = (("loss", losses, loss), ("grad_norm", norms, norm))
    spikes = [name for name, past, value in watched if record.spiked(past, value)]
    own = raw_model.metrics() if hasattr(raw_model, "metrics") else {}
    if step % log_every:  # tables, such as the load of each expert, now and then
        own = {key: value for key, value in own.items() if isinstance(value, float)}
    log(step=step, loss=loss, lr=lr, grad_norm=norm, ms=1000 * seconds, tokens_per_second=speed, mfu=mfu,
        memory_gb=memory, resident_gb=guard.resident_gb(), tokens=tokens, skipped=skipped, spikes=spikes,
        **own)  # fmt: skip
    if math.isfinite(norm):
        losses.append(loss)
        norms.append(norm)
    else:
        say(f"step {step:>6} | gradient norm {norm}, loss {loss:.4f}: skipped, {in_a_row} in a row, {skipped} in all")
    if spikes:
        say(f"step {step:>6} | SPIKE in {' and '.join(spikes)}: loss {loss:.4f}, gradient norm {norm:.3g}")
    if timer is None and parallel != "none":
        processes.set_timeout(timeout)
    timer, timed = (time.perf_counter(), 0) if timer is None else (timer, timed + 1)  # the first step compiles
    if step % log_every == 0 or step == max_steps:
        eta = (max_steps - step) * (time.perf_counter() - timer) / timed if timed else 0
        mfu_text = f"{mfu:.1%}" if mfu else "n/a"
        eta_text = f"{eta // 60:.0f}:{eta % 60:02.0f}"
        say(f"step {step:>6}/{max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | {1000 * seconds:.0f} ms | "
            f"{speed:,.0f} tokens/s | mfu {mfu_text} | {memory:.2f} GB | eta {eta_text}")  # fmt: skip
    if in_a_row >= max_skipped:
        last_good = checkpoint.newest(out, say)
        die(f"{in_a_row} steps in a row without a finite gradient: stopped. The last good checkpoint is {last_good}: "
            "try a lower learning_rate, or dtype=bfloat16 or float32", guard.DIVERGED)  # fmt: skip

on_disk(checkpoint.finish)
bar.close()
if main:
    metrics.close()
say(f"{time.perf_counter() - begin:.0f} s; see {out}/loss.png, and sample with  python sample.py {out}")
if parallel != "none":
    processes.finish()
