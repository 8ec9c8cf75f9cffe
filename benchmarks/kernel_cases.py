"""The operations that `python bench.py kernels` measures: sizes, arguments, the work they must do, other libraries.

A kernel is bounded by the bytes that it must move or by the FLOPs that it must do. Bytes are counted as one read of
each input and one write of each output, forward and backward; what an implementation moves beyond that is its loss.

N tokens, C n_embd, B batch, T time, H query heads, G key/value heads, D head_dim, E experts, K experts per token
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Sizes of Qwen3-0.6B (MoE: Qwen3-30B-A3B; delta rule: Qwen3-Next), so large that no cache holds them.
SIZES = {
    "rows": (131072, 1024, 3072),  # N, C, n_inner
    "heads": (4, 16384, 16, 128),  # B, T, H, D
    "attention": [  # B, H, G, T, D, window
        (4, 16, 8, 4096, 128, 0),
        (4, 16, 8, 8192, 128, 0),
        (4, 16, 8, 16384, 128, 0),
        (4, 16, 8, 16384, 128, 1024),
        (4, 16, 16, 8192, 64, 0),
    ],
    "loss": (8192, 1024, 151936),  # N, C, V
    "moe": (32768, 2048, 768, 128, 8),  # N, C, n_expert_inner, E, K
    "delta": [(1, 16, 8192, 128), (1, 64, 32768, 128)],  # B, H, T, D
}
EPS = 1e-6
LIGER = "liger_kernel.transformers.functional"
FLASH_LINEAR_ATTENTION = "fla.ops.gated_delta_rule"


@dataclass
class Case:
    """The kernel NAME and its twin NAME_ref on the same arguments, and others that compute the same from them."""

    name: str
    size: str
    arguments: Callable  # of how many times fewer tokens -> arguments
    unit: str  # what bounds it: "B" or "FLOP"
    work: tuple[float, float]  # bytes or FLOPs of forward, and of forward and backward
    others: dict[str, Callable] = field(default_factory=dict)
    compiled: bool = True  # measure torch.compile of the twin
    fixed: int = 0  # so many of the last arguments get no gradient


@dataclass
class RandomTensors:
    """Makes random tensors of any shape: on zeros a GPU runs faster."""

    device: str
    dtype: torch.dtype

    def __call__(self, *shape, scale=1.0):
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)


def installed(name):
    """Returns a module, or None where it is not here."""
    try:
        return import_module(name)
    except ImportError:
        return None


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yields every kernel at every size."""
    random = RandomTensors(device, dtype)
    yield rms_norm_case(random)
    yield add_rms_norm_case(random)
    yield rope_case(random)
    yield norm_rope_case(random)
    yield swiglu_case(random)
    for sizes in SIZES["attention"]:
        yield attention_case(random, *sizes)
    yield cross_entropy_case(random)
    yield moe_case(random)
    for sizes in SIZES["delta"]:
        yield delta_case(random, *sizes)
    largest = SIZES["delta"][-1]
    yield delta_case(RandomTensors(device, torch.float32), *largest)  # in fp32, as model_hybrid.py calls it


# ---- bounded by bytes -----------------------------------------------------------------------------------------------
def rms_norm_case(random):
    N, C, _ = SIZES["rows"]
    once = N * C * random.dtype.itemsize  # bytes of a read or a write of x

    def arguments(fewer):
        return random(N // fewer, C), random(C), EPS

    others = {}
    liger = installed(LIGER)
    if liger:
        others["Liger"] = partial(liger.liger_rms_norm, in_place=False)
    return Case(
        name="rms_norm",
        size=f"{N:,} x {C:,}",
        arguments=arguments,
        unit="B",
        work=(2 * once, 5 * once),  # x -> y; x, dy -> dx
        others=others,
    )


def add_rms_norm_case(random):
    N, C, _ = SIZES["rows"]
    once = N * C * random.dtype.itemsize  # bytes of a read or a write of x

    def arguments(fewer):
        return random(N // fewer, C), random(N // fewer, C), random(C), EPS

    others = {}
    liger = installed(LIGER)
    if liger:
        others["Liger"] = partial(liger.liger_fused_add_rms_norm, in_place=False)
    return Case(
        name="add_rms_norm",
        size=f"{N:,} x {C:,}",
        arguments=arguments,
        unit="B",
        work=(4 * once, 8 * once),  # x, residual -> sum, y; sum, dsum, dy -> dx, which is the residual's too
        others=others,
    )


def rope_of(random, T, D):
    """Returns cos and sin (T, 1, D / 2)."""
    position = torch.arange(T, device=random.device)
    frequency = 1e4 ** -(torch.arange(0, D, 2, device=random.device) / D)
    angle = position[:, None, None] * frequency
    return angle.cos(), angle.sin()


def rope_case(random):
    B, T, H, D = SIZES["heads"]
    once = B * T * H * D * random.dtype.itemsize  # bytes of a read or a write of x

    def arguments(fewer):
        cos, sin = rope_of(random, T // fewer, D)
        return random(B, T // fewer, H, D), cos, sin

    return Case(
        name="rope",
        size=f"{B} x {T:,} x {H} x {D}",
        arguments=arguments,
        unit="B",
        work=(2 * once, 4 * once),  # x -> y; dy -> dx
    )


def norm_rope_case(random):
    B, T, H, D = SIZES["heads"]
    once = B * T * H * D * random.dtype.itemsize  # bytes of a read or a write of x

    def arguments(fewer):
        cos, sin = rope_of(random, T // fewer, D)
        return random(B, T // fewer, H, D), random(D), EPS, cos, sin

    return Case(
        name="norm_rope",
        size=f"{B} x {T:,} x {H} x {D}",
        arguments=arguments,
        unit="B",
        work=(2 * once, 5 * once),  # x -> y; x, dy -> dx
        fixed=2,
    )


def swiglu_case(random):
    rows, _, n_inner = SIZES["rows"]
    N = rows // 2
    once = N * n_inner * random.dtype.itemsize  # bytes of a read or a write of the gate

    def arguments(fewer):
        return random(N // fewer, n_inner), random(N // fewer, n_inner)

    others = {}
    liger = installed(LIGER)
    if liger:  # its backward writes over both
        others["Liger, with copies"] = lambda gate, up: liger.liger_swiglu(gate.clone(), up.clone())
    return Case(
        name="swiglu",
        size=f"{N:,} x {n_inner:,}",
        arguments=arguments,
        unit="B",
        work=(3 * once, 8 * once),  # gate, up -> y; gate, up, dy -> dgate, dup
        others=others,
    )


# ---- bounded by FLOPs -----------------------------------------------------------------------------------------------
def attention_case(random, B, H, G, T, D, window):
    """Returns causal attention, of all keys or of the newest `window` ones."""
    pairs = T * (T + 1) // 2  # of a query and a key: 1 + 2 + ... + T
    size = f"{B} x {T:,}, {H} / {G} heads of {D}"
    if window:
        pairs = window * T - window * (window - 1) // 2
        size += f", window {window:,}"
    forward = 4 * B * H * D * pairs

    def arguments(fewer):
        q = random(B, T // fewer, H, D).transpose(1, 2)  # (B, H, T, D)
        k = random(B, T // fewer, G, D).transpose(1, 2)  # (B, G, T, D)
        v = random(B, T // fewer, G, D).transpose(1, 2)  # (B, G, T, D)
        return q, k, v, True, window

    others = {}
    if not window:
        others["cuDNN"] = partial(attention_by, SDPBackend.CUDNN_ATTENTION)
        others["FlashAttention-2"] = partial(attention_by, SDPBackend.FLASH_ATTENTION)
    return Case("flash_attention", size, arguments, "FLOP", (forward, 3.5 * forward), others)


def attention_by(backend, q, k, v, causal, window):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))


def cross_entropy_case(random):
    N, C, V = SIZES["loss"]
    forward = 2 * N * C * V

    def arguments(fewer):
        targets = torch.randint(V, (N // fewer,), device=random.device)
        return random(N // fewer, C), random(V, C, scale=C**-0.5), targets

    others = {}
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options:  # without them it is not chunked
        others["F.linear_cross_entropy"] = partial(F.linear_cross_entropy, options=options())
    liger = installed(LIGER)
    if liger:
        others["Liger"] = liger.liger_fused_linear_cross_entropy
    return Case(
        name="linear_cross_entropy",
        size=f"{N:,} x {C:,} x {V:,}",
        arguments=arguments,
        unit="FLOP",
        work=(forward, 3 * forward),
        others=others,
    )


def moe_case(random):
    N, C, n_inner, E, K = SIZES["moe"]
    forward = 3 * 2 * N * K * C * n_inner  # gate, up and down

    def arguments(fewer):
        x = random(N // fewer, C)
        w_gate = random(E, C, n_inner, scale=C**-0.5)
        w_up = random(E, C, n_inner, scale=C**-0.5)
        w_down = random(E, n_inner, C, scale=n_inner**-0.5)
        scores = torch.rand(N // fewer, E, device=random.device)
        chosen_scores, chosen = scores.topk(K)  # (N, K) each
        gates = chosen_scores / chosen_scores.sum(dim=-1, keepdim=True)
        return x, w_gate, w_up, w_down, chosen, gates.to(random.dtype)

    return Case(
        name="moe",
        size=f"{N:,} x {C:,}, {K} of {E} experts {n_inner} wide",
        arguments=arguments,
        unit="FLOP",
        work=(forward, 3 * forward),
    )


def delta_case(random, B, H, T, D):
    chunk = 64  # tokens
    with_state = 3 * 2 * D * D  # FLOPs a token: what the state knows of k, what it is told, what it says to q
    within_chunk = 5 * 2 * chunk * D  # five products of a chunk with (chunk, chunk) numbers
    forward = B * H * T * (with_state + within_chunk)
    size = f"{B} x {T:,}, {H} heads of {D}"
    if random.dtype == torch.float32:
        size += ", fp32"

    def arguments(fewer):
        T_fewer = T // fewer
        q = F.normalize(random(B, T_fewer, H, D), dim=-1) * D**-0.5
        k = F.normalize(random(B, T_fewer, H, D), dim=-1)
        v = random(B, T_fewer, H, D)
        log_decay = F.logsigmoid(random(B, H, T_fewer).float() + 3)
        beta = torch.rand(B, H, T_fewer, device=random.device)
        first = torch.zeros(1, 1, T_fewer, dtype=torch.bool, device=random.device)
        state = torch.zeros(B, H, D, D, device=random.device)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]  # (B, H, T, D) each
        return *heads_first, log_decay, beta, first, state

    others = {}
    library = installed(FLASH_LINEAR_ATTENTION)
    if library:
        others["flash-linear-attention"] = partial(delta_rule_by, library)
    return Case(
        name="gated_delta_rule",
        size=size,
        arguments=arguments,
        unit="FLOP",
        work=(forward, 3.5 * forward),
        others=others,
        compiled=T <= 8192,  # the twin's loop over chunks is unrolled, which takes minutes
    )


def delta_rule_by(library, q, k, v, log_decay, beta, first, state):
    """Calls flash-linear-attention, where time stands before heads."""
    by_time = [x.transpose(1, 2) for x in (q, k, v, log_decay, beta)]
    y, state = library.chunk_gated_delta_rule(*by_time, 1.0, state, True)
    return y.transpose(1, 2), state
