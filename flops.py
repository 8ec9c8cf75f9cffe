"""What a model costs: FLOPs, parameters, memory and cache by component, counted from the model itself.

    python flops.py config/train_moe.py --n_expert=64 --device H200 --json moe.json
    python flops.py config/train_moe.py --match config/train_baseline.py --knob n_expert_inner

Any model_<name>.py is built of fake tensors, which have shapes and no contents, and run once: every operation that
passes is asked what it multiplies, and every tensor how long it lives. A multiply and an add are 2 FLOPs, and only
matrix products, attention, convolutions, triangular solves and Fourier transforms count. Attention is counted over all
keys that are multiplied, mostly T, as PaLM and torchtitan do; the causal count has the keys that a query sees,
(T + 1) / 2 on average, or what the mixer says in keys_seen(T). Attention's backward is twice its forward, without what
fused kernels compute again.
"""

import argparse
import bisect
import importlib
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent
aten = torch.ops.aten


# ---- one operation --------------------------------------------------------------------------------------------------
def attention_flops(q, k, v, *args, **kwargs):
    """Scores q k^T and sums p v for q (B, H, T, D), k (B, G, S, D), v (B, G, S, M)."""
    B, H, T, D = q.shape
    return 2 * B * H * T * k.size(2) * (D + v.size(3))


def attention_backward_flops(gradient, q, k, v, *args, **kwargs):
    return 2 * attention_flops(q, k, v)


def grouped_flops(x, weight, *args, out_val, **kwargs):
    """Rows (R, in) by their expert's (E, in, out), or for a weight's gradient (in, R) by (R, out): the real rows."""
    return 2 * x.numel() * out_val.size(-1)


def grouped_output(x, weight, offs, *args, **kwargs):
    """Returns what F.grouped_mm would; of fake tensors torch takes bf16 alone, and on a CPU the real one fp32, too."""
    if weight.ndim == 3:
        return x.new_empty(x.size(0), weight.size(2))
    return x.new_empty(len(offs), x.size(0), weight.size(1))


def solve_flops(matrix, right, *args, **kwargs):
    """A column of the right side takes L^2 / 2 multiply-adds for a triangular matrix (L, L)."""
    return right.numel() * matrix.size(-1)


def fft_flops(x, dims, *args, **kwargs):
    """5 N log2 N for a complex transform of N numbers, half of it for a real one."""
    n = math.prod(x.size(d) for d in dims)
    return int(x.numel() * 5 * math.log2(n) / (1 if x.is_complex() else 2))


BETWEEN_TOKENS = {  # batched products: of activations with activations, and of latent attention's weights in decoding
    aten.bmm: flop_registry[aten.bmm],
    aten.baddbmm: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    aten.linalg_solve_triangular: solve_flops,
    aten._fft_r2c: fft_flops,
    aten._fft_c2r: fft_flops,
    aten._fft_c2c: fft_flops,
}
WITH_WEIGHTS = {
    aten.mm: flop_registry[aten.mm],
    aten.addmm: flop_registry[aten.addmm],
    aten.convolution: flop_registry[aten.convolution],
    aten.convolution_backward: flop_registry[aten.convolution_backward],
    aten._grouped_mm: grouped_flops,
}


# ---- one run --------------------------------------------------------------------------------------------------------
def component(path: str) -> str:
    """Returns the row of the table for a module: attn of blocks.3.attn.wq, mlp.shared of blocks.3.mlp.shared.w_up."""
    parts = [part for part in path.split(".") if part not in ("", "blocks") and not part.isdigit()]
    if not parts and path:
        return "block"  # what a Block itself multiplies
    if not parts or parts[-1] == "lm_head":
        return "head"  # what GPT itself multiplies is the tied embedding
    if parts[-1].endswith("norm"):
        return "norms"
    if parts[-1].startswith("w") and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


@dataclass
class Cost:
    """What a run of B windows of T tokens took: FLOPs by component; bytes beside weights and their gradients."""

    forward: dict = field(default_factory=lambda: defaultdict(int))
    backward: dict = field(default_factory=lambda: defaultdict(int))
    scores: dict = field(default_factory=lambda: defaultdict(int))  # {module's path: FLOPs of its causal attention}
    one_pair: dict = field(default_factory=dict)  # {path: what a query with one key costs}
    peak_bytes: int = 0


class Counter(TorchDispatchMode):
    """Adds up FLOPs by the module at work, and the bytes of tensors that are alive, of what runs under it.

    times: {index in model.blocks: how many blocks of the real model it stands for}.
    """

    def __init__(self, gpt, times):
        super().__init__()
        self.times = times
        self.paths = [""]  # of the modules at work, the innermost last
        for path, module in gpt.named_modules():
            module.register_forward_pre_hook(partial(self.enter, path))
            module.register_forward_hook(self.leave)
        self.path_of_node = {}
        self.cost = Cost()
        self.in_attention = False
        # {storage: bytes}; what is there before, such as weights, is not of the run, although views of it are made.
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in [*gpt.parameters(), *gpt.buffers()]}
        self.live_bytes = 0

    def enter(self, path, *_):
        self.paths.append(path)

    def leave(self, *_):
        self.paths.pop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # An operation of the backward pass belongs where the one stood whose gradient it is: autograd numbers its nodes
        # in the order of the forward pass.
        node = torch._C._current_autograd_node()
        if node is None:
            path = self.paths[-1]
        else:
            path = self.path_of_node.get(node._sequence_nr(), "")
        self.path_of_node[torch._C._autograd._get_sequence_nr() - 1] = path
        operation = function._overloadpacket
        if operation is aten._grouped_mm:
            out = grouped_output(*args, **kwargs)
        else:
            out = function(*args, **kwargs)
        formula = BETWEEN_TOKENS.get(operation) or WITH_WEIGHTS.get(operation)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            self.add(path, operation in BETWEEN_TOKENS, flops, backward=node is not None)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor.untyped_storage())
        return out

    def attending(self, attend, q, k, v, *args):
        """Calls a module's attend, whose products are those of causal attention however it multiplies."""
        self.in_attention = True
        out = attend(q, k, v, *args)
        self.in_attention = False
        path = self.paths[-1]
        queries = q.size(0) * q.size(2)  # there may be more of them than tokens, to fill up a block
        self.cost.one_pair[path] = self.times_of(path) * attention_flops(q, k[:, :, :1], v) / queries
        return out

    def add(self, path, between_tokens, flops, backward):
        flops *= self.times_of(path)
        row = component(path)
        if between_tokens:
            row += " between tokens"
        if backward:
            self.cost.backward[row] += flops
        else:
            self.cost.forward[row] += flops
        if self.in_attention and not backward:
            self.cost.scores[path] += flops

    def times_of(self, path):
        index = re.match(r"blocks\.(\d+)", path)
        return self.times[int(index[1])] if index else 1

    def follow(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.live_bytes += storage.nbytes()
            self.cost.peak_bytes = max(self.cost.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.live_bytes -= self.alive.pop(key)


class AttentionWatch(TorchFunctionMode):
    """Tells the counter which products are those of causal attention."""

    def __init__(self, counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        self.counter.in_attention = True
        out = function(*args, **kwargs)
        self.counter.in_attention = False
        return out


# ---- a model of fake tensors ----------------------------------------------------------------------------------------
def module_of(model: str):
    return importlib.import_module(f"model_{model}")


def on_meta(model: str, config) -> nn.Module:
    """Returns the model without contents and without the time that initial values take."""
    return without_contents(module_of(model).GPT, config)


def without_contents(GPT: type, config) -> nn.Module:
    """Returns GPT(config) on the meta device, where init_weights would have nothing to fill."""
    # Its functions are found where GPT's are, by the name of the module.
    skeleton = type("GPT", (GPT,), {"init_weights": lambda self: None, "__module__": GPT.__module__})
    with torch.device("meta"):
        return skeleton(config)


def kind(block: nn.Module) -> tuple:
    """Returns what blocks that cost the same have in common: shapes, classes, and plain attributes but the index."""
    facts = [(name, tuple(p.shape)) for name, p in block.named_parameters()]
    for name, module in block.named_modules():
        held = vars(module).items()
        plain = {k: v for k, v in held if isinstance(v, int | float | str | tuple) and k not in ("layer", "depth")}
        facts.append((name, type(module).__name__, tuple(sorted(plain.items(), key=str))))
    return tuple(facts)


def with_one_block_of_each_kind(gpt: nn.Module) -> dict[int, int]:
    """Cuts gpt.blocks down to the first of each kind; returns {its new index: how many it stands for}."""
    first, times = {}, {}
    for block in gpt.blocks:
        index = first.setdefault(kind(block), len(first))
        times[index] = times.get(index, 0) + 1
    found = dict.fromkeys(first)
    for block in gpt.blocks:
        found[kind(block)] = found[kind(block)] or block
    gpt.blocks = nn.ModuleList(found.values())
    return times


def to_fake(gpt: nn.Module, dtype=torch.float32) -> None:
    """Replaces meta tensors by fake ones on the CPU, inside a FakeTensorMode; floating parameters in dtype."""
    for module in gpt.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


REMEMBERED = {}  # what was run already


def run(model: str, config, T: int, batch: int = 1, dtype: str = "float32", recompute: bool = False) -> Cost:
    """Returns the cost of one forward and backward pass over batch windows of T tokens, with autocast to dtype.

    recompute: blocks keep their input alone and run again in the backward pass (train.py's gradient_checkpointing).
    """
    key = (module_of(model).GPT, repr(config), T, batch, dtype, recompute)
    if key not in REMEMBERED:
        measure = partial(run_once, model, config, batch=batch, dtype=dtype, recompute=recompute)
        step = step_of_lengths(config)
        if T <= max(LONGEST_RUN, 3 * step) or has_key_blocks(config):
            REMEMBERED[key] = measure(T=T)
        else:
            REMEMBERED[key] = from_shorter_runs(measure, T, step)
    return REMEMBERED[key]


def run_once(model, config, T, batch, dtype, recompute):
    gpt = on_meta(model, config).train()
    times = with_one_block_of_each_kind(gpt)
    kept = {}  # {index: bytes that the block leaves for the backward pass}
    with FakeTensorMode():
        to_fake(gpt)
        idx = torch.zeros(batch, T, dtype=torch.long)
        counter = Counter(gpt, times)
        for module in gpt.modules():
            if hasattr(module, "attend"):
                module.attend = partial(counter.attending, module.attend)
        for p in gpt.parameters():
            p.register_post_accumulate_grad_hook(drop_gradient)
        for index, block in enumerate(gpt.blocks):
            if recompute:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            block.register_forward_pre_hook(lambda *_, i=index: kept.update({i: counter.live_bytes}))
            block.register_forward_hook(lambda *_, i=index: kept.update({i: counter.live_bytes - kept[i]}))
        with counter, AttentionWatch(counter):
            with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
                loss = gpt(idx, idx)
            loss.backward()
    # At the peak all blocks have kept what they keep; here one block of each kind has.
    counter.cost.peak_bytes += sum((times[i] - 1) * kept[i] for i in kept)
    return counter.cost


def drop_gradient(p):
    """Takes a gradient out of what is alive: `memory` counts those of all blocks."""
    p.grad = None


LONGEST_RUN = 4096  # of longer windows the cost follows from shorter ones: a loop over chunks takes too long


def has_key_blocks(config):
    """Returns whether a query meets chosen blocks of keys, so that costs are no polynomial of the length."""
    return hasattr(config, "key_block")


def step_of_lengths(config):
    """Returns the tokens from one length to the next along which costs are quadratic: 512, which chunks divide.

    Pooled windows have to divide them, too: it is the first multiple of a window from 512 on.
    """
    window = 1
    if hasattr(config, "n_slot"):
        window = config.window
    return window * math.ceil(512 / window)


def from_shorter_runs(measure, T, step):
    """Returns measure(T) from three short lengths: costs are quadratic in T along steps that chunks and windows divide.

    In steps of 512, T=5000 is 8 steps beyond the first of 904, 1416 and 1928 tokens.
    """
    costs = [measure(T=T % step + n * step) for n in (1, 2, 3)]
    n = T // step - 1
    result = Cost()

    def extrapolate(a, b, c):
        return a + n * (b - a) + n * (n - 1) // 2 * (c - 2 * b + a)

    for name in ("forward", "backward", "scores", "one_pair"):
        for key in getattr(costs[0], name):
            getattr(result, name)[key] = extrapolate(*(getattr(cost, name)[key] for cost in costs))
    result.peak_bytes = extrapolate(*(cost.peak_bytes for cost in costs))
    return result


# ---- what the runs add up to ----------------------------------------------------------------------------------------
def whole(number):
    """Returns an int where it is one: FLOPs of a token can be a fraction where chunks are padded."""
    return int(number) if number == int(number) else number


def forward_flops(model: str, config, T: int, causal: bool = False) -> dict[str, float]:
    """Returns {component: FLOPs of one token} of a forward pass over T tokens.

    causal: attention over the keys that a query sees alone, by its module's keys_seen(T), else (T + 1) / 2.
    """
    cost = run(model, config, T)
    total = dict(cost.forward)
    if causal:
        gpt = on_meta(model, config)
        with_one_block_of_each_kind(gpt)
        for path, flops in cost.scores.items():
            mixer = gpt.get_submodule(path)
            seen = mixer.keys_seen(T) if hasattr(mixer, "keys_seen") else (T + 1) / 2
            total[f"{component(path)} between tokens"] += T * seen * cost.one_pair[path] - flops
    return {row: whole(flops / T) for row, flops in total.items()}


def forward_flops_per_token(model: str, config, T: int) -> float:
    return whole(sum(run(model, config, T).forward.values()) / T)


def training_flops(model: str, config, T: int, causal: bool = False) -> dict[str, float]:
    """Returns {component: FLOPs of one token} of a forward and a backward pass over T tokens."""
    cost = run(model, config, T)
    forward = forward_flops(model, config, T)
    seen = forward_flops(model, config, T, causal)
    total = {}
    for row in forward:
        spared = forward[row] - seen[row]
        total[row] = whole((cost.forward[row] + cost.backward[row]) / T - 3 * spared)
    return total


def training_flops_per_token(model: str, config, T: int) -> float:
    cost = run(model, config, T)
    return whole((sum(cost.forward.values()) + sum(cost.backward.values())) / T)


def optimizer_cost(model: str, config, optimizer: str = "muon") -> tuple[int, int]:
    """Returns FLOPs of one step of muon.py's optimizer, whatever the tokens, and bytes of its state (fp32 weights)."""
    gpt = on_meta(model, config)
    with FakeTensorMode():
        to_fake(gpt)
        opt = importlib.import_module("muon").make_optimizer(gpt, optimizer)
        for p in gpt.parameters():
            p.grad = torch.empty_like(p)
        counter = Counter(gpt, times={})
        with counter:
            opt.step()
        states = [x for state in opt.state.values() for x in state.values() if torch.is_tensor(x) and x.ndim > 0]
        return sum(counter.cost.forward.values()), sum(x.nbytes for x in states)


def decode_flops(model: str, config, context: int) -> dict[str, float]:
    """Returns {component: FLOPs} of one token that is decoded with context tokens in the cache, itself among them."""
    longest = max(LONGEST_RUN, 4 * getattr(config, "window", 0), 4 * getattr(config, "index_topk", 0))
    if context > longest and not has_key_blocks(config):  # linear in the context, from where all windows are full
        near = decode_flops(model, config, longest // 2)
        far = decode_flops(model, config, longest)
        steps = context / (longest // 2) - 1
        return {row: whole(near[row] + steps * (far[row] - near[row])) for row in near}
    gpt = on_meta(model, config).eval()
    times = with_one_block_of_each_kind(gpt)
    with FakeTensorMode(), torch.no_grad():
        to_fake(gpt)
        past = gpt.new_cache(1, context)
        if context > 1:
            with Counter(gpt, times):  # not counted
                gpt(torch.zeros(1, context - 1, dtype=torch.long), cache=past, last_only=True)
        counter = Counter(gpt, times)
        with counter:
            gpt(torch.zeros(1, 1, dtype=torch.long), cache=past)
    return dict(counter.cost.forward)


def parameters(model: str, config) -> dict[str, int]:
    """Returns {component: parameters}; a tied head has none of its own."""
    counts = defaultdict(int)
    for name, p in on_meta(model, config).named_parameters():
        counts[component(name.rpartition(".")[0])] += p.numel()
    return dict(counts)


def stacks(model: str, config) -> dict[str, tuple[int, int]]:
    """Returns {component: (parameters in stacks of matrices, those of them that a token passes through)}.

    A token's share follows from its FLOPs: twice the numbers of each matrix that it is multiplied with. These stand
    between tokens where a stack is multiplied by bmm or einsum.
    """
    found, matrices = defaultdict(int), defaultdict(int)
    for name, p in on_meta(model, config).named_parameters():
        row = component(name.rpartition(".")[0])
        found[row] += p.numel() * (p.ndim == 3 and p.size(1) > 1)
        matrices[row] += p.numel() * (p.ndim == 2)
    forward = forward_flops(model, config, min(64, config.block_size))
    active = {}
    for row, n in found.items():
        if n:
            products = forward.get(row, forward.get(f"{row} between tokens", 0))
            active[row] = (n, whole(products / 2 - matrices[row]))
    return active


def active_parameters(model: str, config) -> dict[str, int]:
    """Returns {component: parameters at work on a token}: all, but of experts only the chosen ones."""
    counts = parameters(model, config)
    for row, (n, active) in stacks(model, config).items():
        counts[row] += active - n
    return counts


def table_parameters(model: str, config) -> int:
    """Returns the parameters that are looked up, a row a token: embeddings."""
    modules = on_meta(model, config).modules()
    return sum(module.weight.numel() for module in modules if isinstance(module, nn.Embedding))


def weights_read(model: str, config, batch: int) -> float:
    """Returns the numbers that one decoding step over batch sequences reads.

    Of a table a row a sequence; of experts as many as a uniform choice would meet; of a tied table the head reads all.
    """
    read = sum(parameters(model, config).values())
    gpt = on_meta(model, config)
    for module in gpt.modules():
        if isinstance(module, nn.Embedding):
            read += batch * module.embedding_dim - module.weight.numel()
    if getattr(gpt, "lm_head", None) is None:
        read += forward_flops(model, config, min(64, config.block_size))["head"] / 2
    for n, active in stacks(model, config).values():
        read -= n * (1 - active / n) ** batch
    return read


def cache_bytes(model: str, config, length: int, bytes_per_number: int) -> int:
    """Returns the bytes that a cache for one sequence of this length holds."""
    dtype = {4: torch.float32, 2: torch.bfloat16}[bytes_per_number]
    held = on_meta(model, config).to(dtype).new_cache(1, length)
    tensors = [x for x in tree_leaves(list(vars(held).values())) if torch.is_tensor(x) and x.is_floating_point()]
    return sum(x.nbytes for x in tensors)


def cache_bytes_per_token(model: str, config, bytes_per_number: int) -> int:
    """Returns what one token more adds to the cache of a full context, on average where some comes by the block."""
    tokens = getattr(config, "key_block", 1)
    if hasattr(config, "n_slot"):
        tokens = config.window
    full = cache_bytes(model, config, config.block_size, bytes_per_number)
    return whole((full - cache_bytes(model, config, config.block_size - tokens, bytes_per_number)) / tokens)


def state_bytes(model: str, config, bytes_per_number: int) -> int:
    """Returns what a sequence has in the cache besides, at any length."""
    full = cache_bytes(model, config, config.block_size, bytes_per_number)
    return full - config.block_size * cache_bytes_per_token(model, config, bytes_per_number)


def memory(
    model, config, T, dtype, micro_batch, optimizer="muon", gradient_checkpointing=False, accumulation=2
) -> dict[str, int]:
    """Returns the bytes that train.py needs on one device, with autocast to dtype; weights are fp32 all the same.

    Activations are all that lives beside weights and gradients at the peak, mostly at the beginning of the backward
    pass: what blocks keep, weights cast to dtype, the logits and their gradient. With a single micro-batch a step
    (accumulation=1) activations go as gradients come, so that the larger of both counts.
    """
    weights = 4 * sum(parameters(model, config).values())
    activations = run(model, config, T, micro_batch, dtype, gradient_checkpointing).peak_bytes
    gradients = weights
    if accumulation == 1:
        gradients = max(weights - activations, 0)
    return {
        "weight_bytes": weights,
        "gradient_bytes": gradients,
        "optimizer_bytes": optimizer_cost(model, config, optimizer)[1],
        "activation_bytes": activations,
    }


# ---- devices --------------------------------------------------------------------------------------------------------
# Dense peak in FLOP/s without sparsity and bytes/s of memory, from the makers' data sheets: the device's whole name
# without its maker, bf16 or fp16, fp32, memory. A slice of a GPU (MIG), a laptop's or a Ti is another device.
GPUS = [
    ("B200", 2250e12, 1100e12, 8.0e12),
    ("H200", 989e12, 494e12, 4.8e12),
    ("H200 NVL", 835e12, 417e12, 4.8e12),
    ("H100 | H100 80GB HBM3", 989e12, 494e12, 3.35e12),
    ("H100 NVL", 835e12, 417e12, 3.9e12),
    ("H100 PCIe", 756e12, 378e12, 2.0e12),
    ("A100 80GB | A100 80GB PCIe | A100-SXM4-80GB", 312e12, 156e12, 2.0e12),
    ("A100 | A100-SXM4-40GB | A100-PCIE-40GB", 312e12, 156e12, 1.555e12),
    ("L40S", 362e12, 183e12, 0.864e12),
    ("L4", 121e12, 60e12, 0.3e12),
    ("A10G", 70e12, 35e12, 0.6e12),
    ("RTX 4090", 165e12, 82.6e12, 1.008e12),
    ("RTX 3090", 71e12, 35.6e12, 0.936e12),
    ("V100 | V100-SXM2-16GB | V100-SXM2-32GB", 125e12, 15.7e12, 0.9e12),
    ("V100-PCIE-16GB | V100-PCIE-32GB", 112e12, 14e12, 0.9e12),
    ("T4", 65e12, 8.1e12, 0.3e12),
]


def known_gpu(device_name):
    name = re.sub("NVIDIA |Tesla |GeForce ", "", device_name)
    rows = [row for row in GPUS if name in row[0].split(" | ")]
    return rows[0] if rows else None


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The device's peak in FLOP/s, fp32 as TF32 where it has that; None where it is not known, CPUs among them."""
    gpu = known_gpu(device_name)
    return gpu and gpu[2 if dtype == "float32" else 1]


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


# ---- equal cost -----------------------------------------------------------------------------------------------------
TOLERANCE = 0.005
LARGEST = 2**17


def width_knob(config) -> str:
    """Returns the size that is changed where nothing else is said: the last width of an MLP, or n_embd."""
    widths = [f.name for f in fields(config) if f.name.endswith("_inner")]
    return widths[-1] if widths else "n_embd"


def first_that_costs(target, values, cost):
    """Returns the index of the first value that costs target or more; small ones are tried first, as they are quick."""
    reach = 1
    while reach < len(values) and cost(values[reach - 1]) < target:
        reach *= 2
    return bisect.bisect_left(values, target, hi=min(reach, len(values)), key=cost)


def match(
    model: str, sizes: dict, T: int, target: float, knob: str, by: str = "flops", optimizer: tuple | None = None
) -> tuple[int, float]:
    """Returns (value, reached): the value of a size in the model's config with which it costs target, to 0.5 %.

    sizes: fields of GPTConfig, and others, which are left alone; by: training "flops" per token in windows of T, or
    "parameters"; optimizer: (its name, tokens a step) counts its FLOPs, too. The roundest value that will do is taken:
    a multiple of 64, else of 8, else any; what GPTConfig refuses is passed over. ValueError names the nearest one if
    none does. The cost may not fall as the value grows.
    """
    config = module_of(model).GPTConfig
    sizes = {f.name: sizes[f.name] for f in fields(config) if f.name in sizes}
    integers = [key for key, value in sizes.items() if type(value) is int]
    if knob not in integers:
        raise ValueError(f"{knob!r} is no size of {model}: try one of {', '.join(integers)}")

    @cache
    def cost(value):
        c = config(**sizes | {knob: value})
        if by == "parameters":
            return sum(parameters(model, c).values())
        flops = training_flops_per_token(model, c, T)
        if optimizer:
            name, tokens = optimizer
            flops += optimizer_cost(model, c, name)[0] / tokens
        return flops

    def accepted(value):
        try:
            config(**sizes | {knob: value})
        except ValueError:
            return False
        return True

    best = None
    low, high = 0, LARGEST
    for step in (64, 8, 1):
        values = [v for v in range((low // step + 1) * step, high + 1, step) if accepted(v)]
        if not values:
            continue
        first = first_that_costs(target, values, cost)
        for value in values[max(first - 1, 0) : first + 1]:
            if best is None or abs(cost(value) - target) < abs(cost(best) - target):
                best = value
        if first < len(values):
            high = values[first]
        if first > 0:
            low = values[first - 1]
        if abs(cost(best) - target) <= TOLERANCE * target:
            return best, cost(best)
    what = "training FLOPs a token" if by == "flops" else "parameters"
    if best is None:
        raise ValueError(f"{model} accepts no {knob} from 1 to {LARGEST} beside its other sizes: try another knob")
    near = f"the nearest is {knob}={best} with {cost(best):.4g} ({cost(best) / target - 1:+.2%})"
    raise ValueError(
        f"no {knob} brings {model} within {TOLERANCE:.1%} of {target:.4g} {what}: {near}; try another knob"
    )


# ---- command line ---------------------------------------------------------------------------------------------------
def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@cache
def vocab_size(data, default):
    """Returns the vocabulary of tokenized data, rounded up as train.py does, or the default where there is none."""
    meta = Path(data) / "meta.json"
    if meta.exists():
        try:
            return math.ceil(json.loads(meta.read_bytes())["vocab_size"] / 64) * 64
        except (ValueError, TypeError, KeyError) as error:
            fail(f"{meta} does not say how large the vocabulary is ({error!r}): prepare the data again")
    print(f"{data}/meta.json is not here: vocab_size is taken to be {default:,}")
    return default


def built(argv):
    """Returns a run's knobs as train.py would resolve them, the model's fields among them, and its config."""
    configurator = importlib.import_module("configurator")
    knobs = configurator.resolve(ROOT / "train.py", argv)
    config = configurator.config_class(knobs["model"])[0]
    data, _ = importlib.import_module("data.loader").read_mixture(knobs["data"])[0]  # all have one tokenizer
    if knobs["stages"]:
        print(f"of the first of {1 + len(knobs['stages'])} stages; --key=value can be those of another")
    knobs["vocab_size"] = knobs["vocab_size"] or vocab_size(data, config.vocab_size)
    sizes = {f.name: knobs[f.name] for f in fields(config)}
    try:
        return knobs, sizes, config(**sizes)
    except ValueError as error:
        fail(error)


def step_cost(knobs, config, with_optimizer):
    """Returns the FLOPs of a training step."""
    cost = training_flops_per_token(knobs["model"], config, knobs["block_size"]) * knobs["batch_tokens"]
    if with_optimizer:
        cost += optimizer_cost(knobs["model"], config, knobs["optimizer"])[0]
    return cost


def matched(args, argv):
    """Returns the command line with one knob set so that the run costs what that of --match does."""
    knobs, sizes, config = built(argv)
    other, _, other_config = built([args.match])
    model, T = knobs["model"], knobs["block_size"]
    knob = args.knob or width_knob(config)
    if knob == "max_steps":
        if args.match_by == "parameters":
            fail("--match_by parameters: max_steps changes none")
        target = step_cost(other, other_config, args.match_optimizer) * other["max_steps"]
        step = step_cost(knobs, config, args.match_optimizer)
        value = max(round(target / step), 1)
        reached = value * step
        what = "training FLOPs"
        if abs(reached / target - 1) > TOLERANCE:
            near = f"the nearest is max_steps={value} with {reached:.4g} ({reached / target - 1:+.2%})"
            fail(f"max_steps brings {model} not to {target:.4g} FLOPs: {near}; lower batch_tokens")
    else:
        target = sum(parameters(other["model"], other_config).values())
        what = "parameters"
        extra = None
        if args.match_by == "flops":
            target = step_cost(other, other_config, args.match_optimizer) / other["batch_tokens"]
            what = "training FLOPs a token"
            if args.match_optimizer:
                extra = (knobs["optimizer"], knobs["batch_tokens"])
        try:
            value, reached = match(model, sizes, T, target, knob, args.match_by, extra)
        except ValueError as error:
            fail(error)
    print(f"{knob}={value}: {reached:.5g} {what}; {args.match}: {target:.5g} ({reached / target - 1:+.2%})\n")
    return [a for a in argv if not a.startswith(f"--{knob}=")] + [f"--{knob}={value}"]


def costs(knobs, config, gpu, args):
    """Returns all that is printed, as a dict of plain numbers: of one token, one step, one decoded token, one run."""
    model, T, batch = knobs["model"], knobs["block_size"], args.batch
    context = args.context or T
    dtype = knobs["dtype"]
    if dtype == "auto":
        dtype = "bfloat16" if gpu else "float32"
    width = 4 if dtype == "float32" else 2
    tokens = knobs["max_steps"] * knobs["batch_tokens"]
    columns = {
        "parameters": parameters(model, config),
        "active_parameters": active_parameters(model, config),
        "forward_flops": forward_flops(model, config, T),
        "forward_flops_causal": forward_flops(model, config, T, causal=True),
        "training_flops": training_flops(model, config, T),
        "training_flops_causal": training_flops(model, config, T, causal=True),
    }
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    total = {name: sum(column.values()) for name, column in columns.items()}
    per_token = cache_bytes_per_token(model, config, width)
    state = state_bytes(model, config, width)
    decoded = sum(decode_flops(model, config, context).values())
    # The weights are read once for all sequences.
    read = width * weights_read(model, config, batch) / batch + cache_bytes(model, config, context, width)
    how = {key: knobs[key] for key in ("micro_batch", "optimizer", "gradient_checkpointing")}
    how["accumulation"] = max(knobs["batch_tokens"] // (T * knobs["micro_batch"]), 1)
    needs = memory(model, config, T, dtype, **how)
    step = optimizer_cost(model, config, knobs["optimizer"])[0]
    found = {
        "model": model,
        "config": asdict(config),
        "components": {row: {name: column.get(row, 0) for name, column in columns.items()} for row in rows},
        "total": total,
        "table_parameters": table_parameters(model, config),
        "training": {
            "tokens": tokens,
            "flops": tokens * total["training_flops"],
            "flops_causal": tokens * total["training_flops_causal"],
            "optimizer_flops_per_step": step,
            "optimizer_flops": step * knobs["max_steps"],
        },
        "memory": {"dtype": dtype} | how | needs | {"total_bytes": sum(needs.values())},
        "cache": {"bytes_per_token": per_token, "bytes_at_any_length": state},
        "decoding": {
            "context": context,
            "batch": batch,
            "flops_per_token": decoded,
            "bytes_read_per_token": round(read),
        },
    }
    if gpu:
        peak = peak_flops(gpu, dtype)
        bandwidth = known_gpu(gpu)[3]
        speed = args.mfu * peak / total["training_flops"]
        found["device"] = {
            "name": gpu,
            "peak_flops": peak,
            "bytes_per_second": bandwidth,
            "mfu": args.mfu,
            "training_tokens_per_second": speed,
            "training_hours": tokens / speed / 3600,
            "decoding_tokens_per_second_at_most": min(peak / decoded, bandwidth / read),
        }
    return found


def text(n):
    if isinstance(n, str | bool):
        return n
    if isinstance(n, int) and n < 1e13:
        return f"{n:,}"
    if 1e3 <= n < 1e9:
        return f"{n:,.0f}"
    return f"{n:.4g}"


def show(found, T):
    print(f"{found['model']} in windows of {T:,} tokens. FLOPs of one token: attention over all keys that are\n"
          "multiplied or, causal, over those that a query sees, on average. Active: at work on a token.\n")  # fmt: skip
    heads = ("parameters", "active", "forward", "causal", "training", "causal")
    print(" " * 28 + "".join(f"{head:>15}" for head in heads))
    for row, numbers in (found["components"] | {"total": found["total"]}).items():
        print(f"{row:<28}" + "".join(f"{round(n):>15,}" for n in numbers.values()))
    print(f"of which in tables that are looked up: {found['table_parameters']:,} parameters\n")
    for section in ("training", "memory", "cache", "decoding", "device"):
        for name, value in found.get(section, {}).items():
            print(f"{section:<10}{name.replace('_', ' '):<36}{text(value)}")


def gpu_here():
    """Returns the name of the GPU of this machine, "" where the table does not know it, or where it is in slices."""
    if not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", "--query-gpu=name,mig.mode.current", "--format=csv,noheader"]
    first = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    name, _, slices = first.partition(", ")
    return name if known_gpu(name) and slices != "Enabled" else ""


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="What a run of train.py costs; its config files and --key=value too.",
        usage="python flops.py [config/x.py ...] [--key=value ...] [options]",
        allow_abbrev=False,
    )
    parser.error = fail
    add = parser.add_argument
    add("--json", metavar="FILE", help="write all of it there too")
    add("--device", default="", help='a GPU, for example "H200"; without it the one here, if any')
    add("--mfu", type=float, default=0.4, help="share of its peak that training reaches (%(default)s)")
    add("--context", type=int, default=0, help="tokens in the cache when one is decoded (block_size)")
    add("--batch", type=int, default=1, help="sequences that are decoded at once (%(default)s)")
    add("--match", metavar="CONFIG", help="set one knob so that this run costs as much as that one")
    add("--knob", help="what --match sets: a size of the model or max_steps (default: the width of the MLP)")
    add("--match_by", choices=("flops", "parameters"), default="flops", help="what is matched (%(default)s)")
    add("--match_optimizer", action="store_true", help="count the optimizer's FLOPs of each step, too")
    args, argv = parser.parse_known_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may have letters that the output lacks
    if not 0 < args.mfu <= 1:
        fail(f"--mfu {args.mfu}: a share of the peak is above 0 and at most 1: 0.3 to 0.5 is usual")
    gpu = args.device or gpu_here()
    if gpu and not known_gpu(gpu):
        fail(f"--device {gpu} is not known here: try one of {', '.join(row[0].split(' | ')[0] for row in GPUS)}")
    if args.match:
        argv = matched(args, argv)
    elif args.knob or args.match_optimizer or args.match_by != "flops":
        fail("--knob, --match_by and --match_optimizer say how to match: give --match CONFIG, too")
    knobs, _, config = built(argv)
    if not 1 <= args.batch <= 1e9 or not 0 <= args.context <= config.block_size:
        fail(f"--batch {args.batch} --context {args.context}: try 1 or more, and up to block_size={config.block_size}")
    found = costs(knobs, config, gpu, args)
    if args.json is not None:
        try:
            Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
        except OSError as error:
            fail(f"--json {args.json}: {error.strerror}")
    show(found, knobs["block_size"])
    if args.match:
        print(f"\npython train.py {shlex.join(argv)}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # what nobody reads any further (`| head`) is no error
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
