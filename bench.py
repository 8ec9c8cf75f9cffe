"""Measures speed and writes results/NAME_cpu.json (or _cuda.json) and the table drawn from it, NAME_cpu.md.

    python bench.py shakespeare    how soon two configs reach validation loss 1.88, in steps and in seconds
    python bench.py train          training tokens/s, against gpt2 and transformers (train config/x.py: of a config)
    python bench.py decode         prefill and decoding, against transformers (decode config/x.py: of a config)
    python bench.py variants       what a mixture of experts, latent attention and delta layers cost and save
    python bench.py kernels        each Triton kernel against PyTorch, torch.compile and other libraries, on a GPU
    python bench.py parallel       FSDP beside DDP, a save beside writing its bytes, how soon a resumed run goes on
    python bench.py loader         the loader's share of a step, and its memory over a large shard

Machines differ and get busy, so nothing is said in absolute times alone: what is compared runs in turn, round by round,
and the median of the rounds' ratios counts.
"""

import argparse
import copy
import dataclasses
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

import configurator
import flops
import hf
import kernels_delta
import muon
from benchmarks.kernels import bench_kernels, kernels_markdown
from benchmarks.parallel import parallel, parallel_markdown
from benchmarks.timing import (
    TokenTimes,
    bandwidth,
    begin,
    build,
    describe,
    device_and_dtype,
    held_bytes,
    in_turn,
    machine,
    make_step,
    middle,
    peak_memory,
    random_batch,
    ratios,
    training_step,
)
from benchmarks.variants import variants, variants_markdown
from generate import CompiledStep, stream

ROOT = Path(__file__).resolve().parent
TARGET = 1.88  # what nanoGPT reports for its CPU setting after 2,000 steps, from a sample of the validation split
OURS, NANOGPT = "config/train_shakespeare_char_cpu.py", "config/train_shakespeare_char_nanogpt.py"


def write(folder: str | Path, name: str, result: dict, label: str = "") -> None:
    """label: of what else than the defaults was measured, so that it overwrites no result of theirs."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = MARKDOWN[name](result)
    name = "_".join(filter(None, (name, label, "cuda" if "gpu" in result["machine"] else "cpu")))
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)
    print(table)


def as_transformers(model, dtype=torch.float32):
    """transformers' model with the same weights, on the same device; None where it is not here or has no such model."""
    if not find_spec("transformers"):
        return None
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        try:
            hf.save(model, Path(folder) / "model")
        except ValueError as error:
            print(f"without transformers: {error}", file=sys.stderr)
            return None
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)
    return theirs.to(model.embed.weight.device)


def workload(argv):
    """(knobs, fields of GPTConfig, a name) of the config files and --key=value of the command line."""
    knobs = configurator.resolve(ROOT / "train.py", argv)
    variant = importlib.import_module(f"model_{knobs['model']}")
    fields = {field.name: knobs[field.name] for field in dataclasses.fields(variant.GPTConfig)}
    fields["vocab_size"] = fields["vocab_size"] or variant.GPTConfig.vocab_size  # 0 is the data's
    try:
        variant.GPTConfig(**fields)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return knobs, fields, "_".join([Path(x).stem for x in argv if x.endswith(".py")] or [knobs["model"]])


# ---- shakespeare: steps and seconds to a loss -----------------------------------------------------------------------
def run_training(config, out, data, **knobs):
    """Trains with train.py and returns its rows of metrics.jsonl."""
    options = [f"--{key}={value}" for key, value in {"data": data, "out_dir": out, "overwrite": True, **knobs}.items()]
    subprocess.run([sys.executable, "train.py", config, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (ROOT / out / "metrics.jsonl").read_text().splitlines()]


def summary(rows):
    """What a run is judged by: where the line between two evaluations falls to TARGET, and training time to there.

    A run that never falls to it counts with all its steps, and reached is False.
    """
    curve = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    ms = [row["ms"] for row in rows if "ms" in row]
    found = {"curve": curve, "median_ms": statistics.median(ms)}
    for (s0, l0), (s1, l1) in zip(curve, curve[1:]):
        if l1 <= TARGET:
            steps = int(-(-(s0 + (l0 - TARGET) / (l0 - l1) * (s1 - s0)) // 1))
            return found | {"reached": True, "steps": steps, "seconds": sum(ms[:steps]) / 1000}
    return found | {"reached": False, "steps": len(ms), "seconds": sum(ms) / 1000}


def step_of(folder, device="cpu"):
    """Returns the training step of a run, from the config that it saved."""
    config = json.loads((ROOT / folder / "config.json").read_text())
    return training_step(config["model"], config["model_config"], config["knobs"], device)


def shakespeare(args):
    result = {
        "command": f"python bench.py shakespeare --seeds {' '.join(map(str, args.seeds))}",
        "machine": machine(),
        "target": TARGET,
        "seeds": args.seeds,
    }
    result |= {"ours": [], "nanogpt": [], "long": []}
    for seed in args.seeds:
        for who, config, knobs in (
            ("ours", OURS, dict(eval_every=20)),
            ("nanogpt", NANOGPT, dict(eval_every=100)),
            ("long", OURS, dict(eval_every=500, max_steps=2000)),
        ):
            print(f"seed {seed}: {config} {knobs}", file=sys.stderr)
            rows = run_training(config, f"out/bench/{who}_{seed}", args.data, seed=seed, **knobs)
            result[who].append(summary(rows))
    steps = [step_of(f"out/bench/{who}_{args.seeds[0]}") for who in ("ours", "nanogpt")]
    took = in_turn(steps, random_batch(12, 64), rounds=30, times=3)
    result["step_ms"] = [[round(1000 * x, 2) for x in seconds] for seconds in took]  # ours, nanoGPT's
    write(args.out, "shakespeare_char", result)


def spread(values, form):
    whole = f" ({form(min(values))} to {form(max(values))}, {len(values)} seeds)" if len(values) > 1 else " (1 seed)"
    return form(statistics.mean(values)) + whole


def shakespeare_markdown(result):
    ours, nanogpt, target = result["ours"], result["nanogpt"], result["target"]
    lines = [
        f"# Tiny Shakespeare by character: steps and seconds to a validation loss of {target}\n",
        describe(result),
        "Batches of 12 x 64 tokens; the loss is over the whole validation split, the time of training alone; mean and "
        "range over seeds. Evaluations are 20 steps apart (100 in nanoGPT's setting), and the step is where the line "
        "between two of them falls to the target.\n",
        "| | nanoGPT's setting | ours | ours / nanoGPT's (median) |",
        "|---|---|---|---|",
    ]
    for key, form in (("steps", "{:,.0f}".format), ("seconds", "{:.1f}".format)):
        theirs_, ours_ = [run[key] for run in nanogpt], [run[key] for run in ours]
        ratio = statistics.median(a / b for a, b in zip(ours_, theirs_))
        lines.append(f"| {key} | {spread(theirs_, form)} | {spread(ours_, form)} | {ratio:.3f} |")
    step_ratio = statistics.median(a / b for a, b in zip(*result["step_ms"]))
    ours_, theirs_ = map(statistics.median, result["step_ms"])
    share = step_ratio * statistics.median(a["steps"] / b["steps"] for a, b in zip(ours, nanogpt))
    lines += [
        f"| ms a step, {len(result['step_ms'][0])} rounds in turn in one process | {theirs_:.1f} | {ours_:.1f} | "
        f"{step_ratio:.3f} |",
        f"| **time, as steps x ms a step in turn** | | | **{share:.3f}** |",
    ]
    for label, runs in (("nanoGPT's setting", nanogpt), ("ours", ours)):
        missed = sum(not run["reached"] for run in runs)
        if missed:
            lines.append(f"\n{missed} of {len(runs)} runs of {label} ended above {target}: they count as if their last "
                         "step had reached it.")  # fmt: skip
    lines += ["\n| config | steps | validation loss at the end |", "|---|---|---|"]
    for who, label in (("nanogpt", NANOGPT), ("ours", OURS), ("long", f"{OURS} --max_steps=2000")):
        ends = [run["curve"][-1] for run in result[who]]
        lines.append(f"| `{label}` | {ends[0][0]:,} | {spread([loss for _, loss in ends], '{:.4f}'.format)} |")
    return "\n".join(lines) + "\n"


# ---- train: tokens per second ---------------------------------------------------------------------------------------
SIZES = {  # (windows, tokens in one), sizes of both models, and the baseline's own
    "n_embd 128": ((12, 64), dict(n_layer=4, n_head=4, n_embd=128), dict(n_kv_head=4, head_dim=32, n_inner=344)),
    "n_embd 384": ((4, 256), dict(n_layer=6, n_head=6, n_embd=384), dict(n_kv_head=6, head_dim=64, n_inner=1024)),
}
SETTINGS = {  # dtype, compiled
    "cpu": (("float32", False), ("float32", True), ("bfloat16", True)),
    "cuda": (("bfloat16", False), ("bfloat16", True)),
}


def train(args):
    device, _ = device_and_dtype(args.device)
    jobs, label = {}, ""
    if args.config:
        knobs, fields, label = workload(args.config)
        jobs[label] = (knobs["micro_batch"], knobs["block_size"]), {knobs["model"]: fields}
    else:
        for size, (batch, both, own) in SIZES.items():
            both = both | {"block_size": batch[1], "vocab_size": 66}
            jobs[size] = batch, {"gpt2": both | {"bias": False}, "baseline": both | own}
    result = begin(args, device, ["train", *args.config, f"--tokens {args.tokens}"]) | {"sizes": {}}
    for size, (batch, models) in jobs.items():
        result["sizes"][size] = {"batch": batch, "rows": training_rows(models, batch, args.rounds, args.tokens, device)}
        write(args.out, "training_speed", result, label)


def training_rows(models, batch, rounds, tokens, device="cpu"):
    """Steps of AdamW, in turn, of models {variant: fields} and of transformers' with the weights of the last one."""
    settings, entrants = SETTINGS[torch.device(device).type], []
    x, y = random_batch(*batch, min(fields["vocab_size"] for fields in models.values()), device)
    for variant, fields in models.items():
        model = build(variant, fields, device)
        per_token = flops.training_flops_per_token(variant, model.config, batch[1])
        entrants.append((variant, model, model, settings if variant == list(models)[-1] else settings[:1], per_token))
    if device.startswith("cuda"):
        fused = copy.deepcopy(model)
        kernels_delta.install(fused)
        entrants.append((f"{variant} with kernels", fused, fused, settings, per_token))
    theirs = as_transformers(model)
    if theirs is not None:

        def their_loss(x, y):
            logits = theirs(x, use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1)

        with torch.no_grad():
            torch.testing.assert_close(their_loss(x, y), model.eval()(x, y), rtol=1e-3, atol=1e-3)
        model.train()
        entrants.append(("transformers", theirs.train(), their_loss, settings[:2], per_token))
    rows, steps, held = [], [], []
    for name, net, loss, wanted, per_token in entrants:
        optimizer = muon.make_optimizer(net, "adamw")
        for dtype, compiled in wanted:
            steps.append(make_step(net, optimizer, dtype, torch.compile(loss) if compiled else loss))
            held.append((net, optimizer))
            facts = {"model": name, "dtype": dtype, "compile": compiled, "flops_per_token": per_token}
            facts["parameters"] = sum(p.numel() for p in net.parameters())
            facts["peak_flops"] = flops.peak_flops(flops.device_name(device), dtype)
            rows.append(facts)
    took = in_turn(steps, (x, y), rounds, max(1, tokens // (batch[0] * batch[1])), device)
    for row, measured, step, owned in zip(rows, took, steps, held):
        row["seconds"] = [round(x, 5) for x in measured]
        row["peak_bytes"] = held_bytes(*owned) + peak_memory(partial(step, x, y), device)
    return rows


def train_markdown(result):
    names = {row["model"] for measured in result["sizes"].values() for row in measured["rows"]}
    others = [name for name in ("gpt2", "transformers") if name in names]
    lines = [
        "# Training tokens per second\n",
        describe(result),
        f"One step of AdamW with clipping; {result['rounds']} rounds in which all settings take turns; medians, and of "
        "tokens/s the range. x gpt2, x transformers: how many times as fast as the first row of that name. FLOPs by "
        "the formulas of flops.py; memory is that of weights, gradients, optimizer and activations together.\n",
        "| size | model | parameters | dtype | compiled | tokens/s | GFLOP/s | MFU | peak MB |"
        + "".join(f" x {name} |" for name in others),
        "|---|---|---|---|---|---|---|---|---|" + "---|" * len(others),
    ]
    for size, measured in result["sizes"].items():
        (windows, length), rows = measured["batch"], measured["rows"]
        for row in rows:
            speeds = [windows * length / s for s in row["seconds"]]
            done = statistics.median(speeds) * row["flops_per_token"]
            cells = [
                f"{size}, {windows} x {length}", row["model"], f"{row['parameters']:,}", row["dtype"],
                "yes" if row["compile"] else "no", middle(speeds, "{:,.0f}".format), f"{done / 1e9:,.1f}",
                f"{done / row['peak_flops']:.1%}" if row["peak_flops"] else "n/a", f"{row['peak_bytes'] / 1e6:,.1f}",
            ]  # fmt: skip
            for name in others:
                first = next((r["seconds"] for r in rows if r["model"] == name), None)
                cells.append(f"{statistics.median(ratios(first, row['seconds'])):.2f}" if first else "n/a")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---- decode: tokens per second of one sequence or a few -------------------------------------------------------------
DECODING = {  # the first spends its time on calls, the second on reading its weights
    "2.6M": dict(n_layer=4, n_head=4, n_kv_head=4, head_dim=48, n_embd=192, n_inner=512, vocab_size=4096),
    "82M": dict(n_layer=12, n_head=12, n_kv_head=4, head_dim=64, n_embd=768, n_inner=2048, vocab_size=8192),
}


def decode(args):
    device, dtype = device_and_dtype(args.device, args.dtype)
    compiled = args.compile or device.startswith("cuda")
    jobs, label = {size: ("baseline", fields) for size, fields in DECODING.items()}, ""
    if args.config:
        knobs, fields, label = workload(args.config)
        jobs = {label: (knobs["model"], fields)}
    words = ["decode", *args.config, f"--batch {args.batch} --prompt {args.prompt} --new {args.new} --dtype {dtype}"]
    result = begin(args, device, words + ["--compile"] * compiled)
    result |= {"batch": args.batch, "prompt": args.prompt, "new": args.new, "dtype": dtype}
    result["limit"], result["limit_from"] = bandwidth(device)
    result["sizes"] = {}
    for size, (variant, fields) in jobs.items():
        fields = fields | {"block_size": max(fields.get("block_size", 0), args.prompt + args.new)}
        model = build(variant, fields, device).to(getattr(torch, dtype)).eval()
        idx = random_batch(args.batch, args.prompt, model.config.vocab_size, device)[0]
        result["sizes"][size] = {
            "model": variant,
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes_per_step": bytes_per_step(variant, model, args.batch, args.prompt + args.new // 2),
            "rows": decoding_rows(model, idx, args.new, args.rounds, compiled, device),
        }
        write(args.out, "decoding_speed", result, label)


def bytes_per_step(variant, model, batch, context):
    """What a decoding step must read: the weights once, and of each sequence the cache and the state."""
    width = model.embed.weight.element_size()
    cache = flops.cache_bytes_per_token(variant, model.config, width) * context
    cache += flops.state_bytes(variant, model.config, width)
    return round(flops.weights_read(variant, model.config, batch) * width + batch * cache)


def our_tokens(model, idx, new, step=None):
    """Returns greedy ids (B, new), (seconds to the first token, seconds between tokens). step: as stream takes it."""
    times = TokenTimes()
    tokens = []
    times.put(idx)
    for token in stream(model, idx, new, temperature=0, step=step):
        times.put(token)
        tokens.append(token)
    return torch.stack(tokens, dim=1).tolist(), times.seconds()


def their_tokens(theirs, idx, new):
    """The same from transformers' generate."""
    times = TokenTimes()
    ids = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, do_sample=False, streamer=times)
    return ids[:, idx.size(1) :].tolist(), times.seconds()


def decoding_rows(model, idx, new, rounds, compiled, device="cpu"):
    """Each of them generates in every round; `same` counts the first tokens that are those of the first row."""
    runs = {"eager": (model, our_tokens)}
    if compiled:
        runs["compiled"] = model, partial(our_tokens, step=CompiledStep(model))
    theirs = as_transformers(model, model.embed.weight.dtype)
    if theirs is not None:
        theirs.eval().generation_config.eos_token_id = None  # nothing ends before `new` tokens
        theirs.generation_config.pad_token_id = 0
        runs["transformers' generate"] = theirs, their_tokens
    rows, first = [], None
    for name, (net, run) in runs.items():
        ids, _ = run(net, idx, new)  # compiles
        first = first or ids
        same = next((i for i, (a, b) in enumerate(zip(zip(*first), zip(*ids))) if a != b), new)
        rows.append({"who": name, "same": same, "prefill": [], "step": []})
    for _ in range(rounds):
        for row, (net, run) in zip(rows, runs.values()):
            prefill, step = run(net, idx, new)[1]
            row["prefill"].append(round(prefill, 6))
            row["step"].append(round(step, 7))
    for row, (net, run) in zip(rows, runs.values()):
        row["peak_bytes"] = held_bytes(net) + peak_memory(partial(run, net, idx, new), device)
    return rows


def decode_markdown(result):
    batch, prompt, new, limit = result["batch"], result["prompt"], result["new"], result["limit"]
    lines = [
        "# Decoding tokens per second\n",
        describe(result),
        f"{batch} sequence(s), prompts of {prompt} tokens and {new} new ones, greedy, in {result['dtype']}; "
        f"{result['rounds']} rounds in which all take turns; medians, and of decoding the range. GB/s: the bytes of "
        f"weights and cache that a step must read; the limit is {limit / 1e9:,.1f} GB/s ({result['limit_from']}). "
        "Memory is that of weights, cache and activations together.\n",
        "| size | parameters | who | prefill tokens/s | decoding tokens/s | GB/s | of the limit | peak MB | "
        "x transformers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for size, measured in result["sizes"].items():
        theirs = next((row["step"] for row in measured["rows"] if row["who"].startswith("transformers")), None)
        for row in measured["rows"]:
            rate = measured["bytes_per_step"] / statistics.median(row["step"])
            cells = [
                f"{size} ({measured['model']})", f"{measured['parameters']:,}", row["who"],
                f"{batch * prompt / statistics.median(row['prefill']):,.0f}",
                middle([batch / s for s in row["step"]], "{:,.1f}".format), f"{rate / 1e9:,.1f}", f"{rate / limit:.0%}",
                f"{row['peak_bytes'] / 1e6:,.1f}",
                f"{statistics.median(ratios(theirs, row['step'])):.2f}" if theirs else "n/a",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
            if row["same"] < new:
                notes.append(f"{size}, {row['who']}: only the first {row['same']} of {new} ids are those of eager.")
    return "\n".join([*lines, "", *(notes or [f"All emit the same {new} ids."])]) + "\n"


# ---- loader: its share of a step, and its memory --------------------------------------------------------------------
def read_everything(folder):
    """Peak MB of this process after it has read an epoch of a folder's windows (Linux)."""
    from data.shards import Loader, Shards

    loader = Loader(Shards(folder, "train"), 1024, 64)
    for step in range(loader.windows_per_epoch // 64):
        list(loader.batches(step))
    status = Path("/proc/self/status").read_text()  # getrusage's peak would begin at that of the parent
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def loader(args):
    import multiprocessing

    import numpy as np

    from data.shards import Loader, Shards, write_shard

    result = {
        "command": f"python bench.py loader --steps {args.steps}",
        "machine": machine(),
        "steps": args.steps,
        "memory": [],
    }
    # 1. its share of the shortest step that we train with
    batch, both, own = SIZES["n_embd 128"]
    batches = Loader(Shards(args.data, "train"), batch[1], batch[0])
    model = build("baseline", both | own | {"block_size": batch[1], "vocab_size": 66})
    step = make_step(model, muon.make_optimizer(model, "adamw"))
    load = total = 0.0
    for i in range(-3, args.steps):
        begin = time.perf_counter()
        ((x, y),) = batches.batches(i + 3)
        loaded = time.perf_counter()
        step(x, y)
        if i >= 0:
            load, total = load + loaded - begin, total + time.perf_counter() - begin
    result |= {"batch": batch, "load_us": 1e6 * load / args.steps, "step_us": 1e6 * total / args.steps}
    # 2. the memory of a process that reads all of a shard, for each size a process of its own
    for tokens in (2_000_000, 20_000_000, 200_000_000):
        with tempfile.TemporaryDirectory() as folder:
            write_shard(Path(folder) / "train_000000.bin", np.resize(np.arange(1000, dtype=np.uint16), tokens), 50257)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                result["memory"].append({"tokens": tokens, "peak_mb": pool.apply(read_everything, [folder])})
    write(args.out, "loader", result)


def loader_markdown(result):
    load, step = result["load_us"], result["step_us"]
    windows, length = result["batch"]
    lines = [
        "# What the loader costs\n",
        describe(result),
        f"{result['steps']} steps of the 0.8M-parameter baseline on {windows} x {length} tokens: loading takes "
        f"{load:.0f} us of {step / 1000:.1f} ms, **{load / step:.2%}** of a step.\n",
        "A process that reads every window of a shard once:\n",
        "| tokens | MB on disk | peak MB of the process |",
        "|---|---|---|",
    ]
    lines += [f"| {m['tokens']:,} | {m['tokens'] * 2 / 1e6:,.0f} | {m['peak_mb']:,.0f} |" for m in result["memory"]]
    return "\n".join(lines) + "\n"


MARKDOWN = {
    "shakespeare_char": shakespeare_markdown,
    "training_speed": train_markdown,
    "decoding_speed": decode_markdown,
    "variants": variants_markdown,
    "kernels": kernels_markdown,
    "parallel": parallel_markdown,
    "loader": loader_markdown,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", default=str(ROOT / "results"), help="where the results go")
    parser.add_argument("--data", default=str(ROOT / "data/shakespeare"), help="a folder that data/prepare.py made")
    parser.add_argument("--device", default="auto", help="cuda or cpu; auto: cuda if it is there")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name, run, text):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    command = add("shakespeare", shakespeare, "steps and seconds to a validation loss")
    command.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    train_ = add("train", train, "training tokens/s, MFU and memory")
    train_.add_argument("--tokens", type=int, default=4096, help="at least so many in each turn")
    decode_ = add("decode", decode, "tokens/s of prefill and decoding, bandwidth and memory")
    decode_.add_argument("--batch", type=int, default=1, help="sequences at once")
    decode_.add_argument("--prompt", type=int, default=128, help="tokens")
    decode_.add_argument("--new", type=int, default=64, help="tokens to generate")
    decode_.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    decode_.add_argument("--compile", action="store_true", help="measure a compiled step too (always on a GPU)")
    for command in (train_, decode_):
        text = "config files, and --key=value of any knob of train.py or its model: measure that model"
        command.add_argument("config", nargs="*", help=text)
    variants_ = add("variants", lambda args: write(args.out, "variants", variants(args)), "costs and savings of ideas")
    kernels_ = add("kernels", lambda args: write(args.out, "kernels", bench_kernels(args)), "each Triton kernel")
    parallel_ = add("parallel", lambda args: write(args.out, "parallel", parallel(args)), "processes and checkpoints")
    for command, rounds in ((train_, 9), (decode_, 9), (variants_, 5), (kernels_, 5), (parallel_, 3)):
        command.add_argument("--rounds", type=int, default=rounds)
    parallel_.set_defaults(data="data/stdlib")
    command = add("loader", loader, "the loader's share of a step, and its memory")
    command.add_argument("--steps", type=int, default=200)
    args, knobs = parser.parse_known_args(argv)
    if knobs and "config" not in args:
        parser.error(f"unknown arguments: {' '.join(knobs)}")
    if "config" in args:
        args.config += knobs
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}, but torch {torch.__version__} sees no CUDA device: try --device cpu")
    for name, least in dict(rounds=1, tokens=1, batch=1, prompt=1, new=2, steps=1).items():
        if getattr(args, name, least) < least:
            parser.error(f"--{name} {getattr(args, name)}: try {least} or more")
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")  # as train.py
    args.run(args)


if __name__ == "__main__":
    main()
