"""Muon and AdamW in one optimizer: Muon for the matrices inside blocks, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the nearest
(semi-)orthogonal matrix, so that an update is equally large in every direction. For a gradient G and a weight W:
    M <- momentum * M + (1 - momentum) * G                    momentum buffer
    U  = momentum * M + (1 - momentum) * G                    Nesterov's look-ahead
    O  = orthogonalize(U)                                     singular values -> about 1, by matrix products alone
    W <- (1 - lr * weight_decay) * W - lr * scale * O         scale = 0.2 * sqrt(max(rows, columns))
With that scale an entry of the update is as large as AdamW's typically is (Liu et al. 2025, arXiv 2502.16982), so one
learning rate and one weight decay serve both methods.

Parameters may be DTensors whose dim 0 is cut over processes (FSDP). Their state is cut like them, and each matrix is
made whole on one process, which orthogonalizes it for all.
"""

from collections.abc import Callable
from functools import partial
from math import prod, sqrt

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Odd quintics a*x + b*x^3 + c*x^5 that push singular values towards 1, one a step; the last one repeats.
# "quintic": steep at zero, never settles: 5 steps map [0.003, 1] into [0.68, 1.21], and less to less; zero stays zero.
# "polar_express" (Amsel et al. 2025, arXiv 2505.16932): step t's is the best quintic for the interval that the step
# before leaves, beginning with [0.001, 1]: 5 steps map that into [0.84, 1.13]. The divisions by 1.01 keep rounding
# from throwing a value out of the interval, beyond which the polynomials explode; the last one needs none.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
POLYNOMIALS = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS), (1.875, -1.25, 0.375)),
}

# How far one update moves a weight of the given fan-out and fan-in at lr = 1.
SCALES = {
    "match_rms_adamw": lambda fan_out, fan_in: 0.2 * sqrt(max(fan_out, fan_in)),
    "original": lambda fan_out, fan_in: sqrt(max(1, fan_out / fan_in)),
}

# What a model's OPTIMIZER may say of a parameter.
EXCEPTIONS = ("method", "weight_decay", "lr_scale")


def orthogonalize(x: Tensor, polynomial: str = "polar_express", steps: int = 5) -> Tensor:
    """(B, rows, columns) -> same shape, each matrix U S V^T replaced by about U V^T, computed in x's dtype."""
    table = POLYNOMIALS[polynomial]
    coefficients = (table + table[-1:] * steps)[:steps]
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # the products below are rows by rows: make rows the short side
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value exceeds 1
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.mT)
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # bG + cG^2
        x = torch.baddbmm(x, p, x, beta=a)  # (aI + bG + cG^2) x
    return x.mT if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """One method per parameter group; the options below may differ between groups.

    AdamW equals torch.optim.AdamW; Muon with polynomial="quintic" and dtype=torch.bfloat16 equals torch.optim.Muon.
    State of a parameter: exp_avg, exp_avg_sq, step (adamw) or momentum_buffer (muon).
    """

    def __init__(
        self,
        params,
        method: str = "adamw",  # any shape; or "muon": 2-D weights (out, in), 3-D stacks (E, in, out)
        lr: float = 1e-3,  # of both methods; a schedule sets group["lr"] before each step
        weight_decay: float = 0.1,
        lr_scale: float = 1.0,  # a group steps by lr * lr_scale, so that a schedule may set one lr in all groups
        betas: tuple[float, float] = (0.9, 0.95),  # adamw
        eps: float = 1e-8,  # adamw
        momentum: float = 0.95,  # muon
        nesterov: bool = True,  # muon
        steps: int = 5,  # muon: of orthogonalize; fewer are cheaper and coarser
        polynomial: str = "polar_express",  # muon: or "quintic"
        scale: str = "match_rms_adamw",  # muon: or "original", which wants a learning rate of its own, about 0.02
        dtype: torch.dtype | None = None,  # muon: of orthogonalize; None: bfloat16 on CUDA, else float32 or finer
        cautious_decay: bool = False,  # decay only where update * weight >= 0 (Chen et al. 2025, arXiv 2510.12402)
        decay_with_lr: bool = True,  # a step shrinks weights by lr * weight_decay; False: by initial_lr * weight_decay
    ):
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        for knob, value, known in (("polynomial", polynomial, POLYNOMIALS), ("scale", scale, SCALES)):
            if value not in known:
                raise ValueError(f"{knob}={value!r} is unknown: choose one of {', '.join(known)}")
        if steps < 1:
            raise ValueError(f"steps={steps} leaves the momentum as it is: Muon needs at least 1, 5 is usual")
        # load_state_dict looks at "fused" to know that AdamW's step counts live beside their parameters.
        super().__init__(params, {**defaults, "fused": True})
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])
            wrong = [tuple(p.shape) for p in group["params"] if group["method"] == "muon" and p.ndim not in (2, 3)]
            if wrong:
                raise ValueError(f"Muon takes 2-D and 3-D parameters, not {wrong}: give them a method='adamw' group")

    def __setstate__(self, state):
        """Restores the groups. An option that is not in them, since they are older than it, has its default."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """Updates every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            buckets = {}  # fused and batched kernels want one device and one dtype
            for p in group["params"]:
                if p.grad is not None:
                    buckets.setdefault((p.device, p.dtype), []).append(p)
            for params in buckets.values():
                (self._muon if group["method"] == "muon" else self._adamw)(group, params, [p.grad for p in params])
        return loss

    def _adamw(self, group, params, grads):
        for p in params:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=step)
        states = [self.state[p] for p in params]
        averages, squares, steps = ([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq", "step"))
        params, grads, averages, squares = map(local, (params, grads, averages, squares))
        (beta1, beta2), weight_decay = group["betas"], group["weight_decay"]
        if weight_decay and (group["cautious_decay"] or not group["decay_with_lr"]):
            self._decay(group, params, torch._foreach_lerp(averages, grads, 1 - beta1))  # has the update's signs
            weight_decay = 0.0
        torch._foreach_add_(steps, 1)
        rates = {
            "lr": group["lr"] * group["lr_scale"],
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "eps": group["eps"],
        }
        torch._fused_adamw_(params, grads, averages, squares, [], steps, **rates, amsgrad=False, maximize=False)

    def _muon(self, group, params, grads):
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers, whole = [self.state[p]["momentum_buffer"] for p in params], params
        params, grads, buffers = map(local, (params, grads, buffers))
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        directions = by_owners(whole, updates, partial(self._directions, group))
        self._decay(group, params, directions)
        torch._foreach_add_(params, directions, alpha=-group["lr"] * group["lr_scale"])

    @staticmethod
    def _directions(group, updates):
        """The updates, orthogonalized and scaled."""
        # 1. matrices of one shape, lying or standing, of 2-D and 3-D parameters, become one stack (B, rows, columns)
        stacks = {}
        for i, u in enumerate(updates):
            scale = SCALES[group["scale"]](*(u.shape if u.ndim == 2 else (u.size(2), u.size(1))))  # of fan-out, fan-in
            u = u.reshape(-1, *u.shape[-2:])
            u = u.mT if u.size(1) > u.size(2) else u
            stacks.setdefault((u.shape[1:], scale), []).append((i, u))
        # 2. orthogonalize each stack and cut it up again
        directions = list(updates)
        for (_, scale), pairs in stacks.items():
            stack = torch.cat([u for _, u in pairs])
            dtype = torch.bfloat16 if stack.is_cuda else torch.promote_types(stack.dtype, torch.float32)
            stack = stack.to(group["dtype"] or dtype)
            stack = orthogonalize(stack, group["polynomial"], group["steps"]).to(updates[0].dtype).mul_(scale)
            for (i, _), o in zip(pairs, stack.split([len(u) for _, u in pairs])):
                u = updates[i]
                directions[i] = (o.mT if u.size(-2) > u.size(-1) else o).view_as(u)
        return directions

    @staticmethod
    def _decay(group, params, updates):
        lr = group["lr"] if group["decay_with_lr"] else group["initial_lr"]
        shrink = group["weight_decay"] * (lr * group["lr_scale"])
        if group["cautious_decay"]:
            torch._foreach_sub_(params, [shrink * p * (p * u >= 0) for p, u in zip(params, updates)])
        else:
            torch._foreach_mul_(params, 1 - shrink)


def local(tensors: list[Tensor]) -> list[Tensor]:
    """What this process holds of them: of plain tensors all."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def by_owners(params: list[Tensor], updates: list[Tensor], change: Callable) -> list[Tensor]:
    """change(updates), where `updates` are this process's rows of the `params`, and `change` wants whole matrices.

    The matrices are dealt out to the processes: their rows go to the owner by one exchange, and come back by another.
    3-D stacks are cut between their matrices, and stay where they are.
    """
    if not hasattr(params[0], "to_local"):
        return change(updates)
    group = params[0].device_mesh.get_group()
    ranks, me = range(dist.get_world_size(group)), dist.get_rank(group)
    stacks = [i for i, p in enumerate(params) if p.ndim == 3]
    order = sorted((i for i, p in enumerate(params) if p.ndim == 2), key=lambda i: params[i].shape)
    dealt = [order[r :: len(ranks)] for r in ranks]  # sorted, so that each gets as many of a shape

    def cut(i):  # as torch.chunk, and so FSDP, does: 5 rows are 3 + 2 over 2 processes, 2 + 2 + 1 + 0 over 4
        n, size = params[i].size(0), -(-params[i].size(0) // len(ranks))
        return [min(max(n - r * size, 0), size) for r in ranks]

    def exchange(parts, shapes):  # tensors for each process; shapes of those from each -> these
        sent = torch.cat([updates[0].new_empty(0), *(t.flatten() for part in parts for t in part)])
        sizes = [[prod(shape) for shape in part] for part in shapes]
        received = sent.new_empty(sum(map(sum, sizes)))
        sent_sizes = [sum(t.numel() for t in part) for part in parts]
        dist.all_to_all_single(received, sent, [sum(part) for part in sizes], sent_sizes, group)
        pieces = iter(received.split([size for part in sizes for size in part]))
        return [[next(pieces).view(shape) for shape in part] for part in shapes]

    shapes = [[(cut(i)[r], params[i].size(1)) for i in dealt[me]] for r in ranks]
    rows = exchange([[updates[i] for i in part] for part in dealt], shapes)
    changed = change([torch.cat(matrix) for matrix in zip(*rows)] + [updates[i] for i in stacks])
    parts = [o.split(cut(i)) for i, o in zip(dealt[me], changed)]
    rows = exchange([[part[r] for part in parts] for r in ranks], [[updates[i].shape for i in part] for part in dealt])
    result = dict(zip(stacks, changed[len(parts) :])) | dict(zip(sum(dealt, []), sum(rows, [])))
    return [result[i] for i in range(len(params))]


def kind_of(name: str, p: Tensor, is_table_or_filter: bool) -> str:
    """Returns the group of a parameter by what it is: matrices, decayed or undecayed (see param_groups)."""
    if p.numel() == max(p.shape, default=1):  # a scalar, or a vector, however many dimensions of size 1 it has
        return "undecayed"
    in_block = any(part.isdigit() for part in name.split("."))
    is_matrix = p.ndim in (2, 3) and min(p.shape[-2:]) > 1  # or a stack of matrices
    if in_block and is_matrix and not is_table_or_filter:
        return "matrices"
    return "decayed"


def exceptions(model: nn.Module) -> dict[Tensor, str]:
    """Returns the key of the model's OPTIMIZER that names a parameter, for those that are named.

    Raises ValueError for a key that names no parameter, unless the model has None in its place: that is a module or
    parameter which this config leaves out.
    """
    found = {}
    for key, changes in getattr(model, "OPTIMIZER", {}).items():
        unknown = [repr(name) for name in changes if name not in EXCEPTIONS]
        if unknown:
            raise ValueError(f"OPTIMIZER[{key!r}] has {', '.join(unknown)}: choose from {', '.join(EXCEPTIONS)}")
        if changes.get("method", "adamw") not in ("muon", "adamw"):
            raise ValueError(f"OPTIMIZER[{key!r}] has method={changes['method']!r}: choose muon or adamw")
        named = [p for name, p in model.named_parameters(remove_duplicate=False) if key in name.split(".")]
        left_out = any(getattr(module, key, module) is None for module in model.modules())
        if not named and not left_out:
            raise ValueError(f"OPTIMIZER[{key!r}] names no parameter: the key must be a part of a name between dots")
        for p in named:
            found[p] = key
    return found


def exception_title(key: str, settings: dict, weight_decay: float) -> str:
    """Returns the name of a group of exceptions: "router (adamw)", "table (adamw, weight_decay=0.0, lr_scale=5.0)"."""
    details = [settings["method"]]
    if settings["weight_decay"] != weight_decay:
        details.append(f"weight_decay={settings['weight_decay']}")
    if settings["lr_scale"] != 1.0:
        details.append(f"lr_scale={settings['lr_scale']}")
    return f"{key} ({', '.join(details)})"


def param_groups(model: nn.Module, optimizer: str = "muon", weight_decay: float = 0.1) -> list[dict]:
    """Returns groups with every trainable parameter of the model in exactly one; a tied one counts once.

    "matrices": matrices inside blocks (a number in the name: blocks.0.attn.wq.weight), and 3-D stacks of them, by Muon,
        or by AdamW with optimizer="adamw".
    "decayed": all else with two dimensions or more (embeddings, head, convolutions, what is outside blocks), by AdamW.
        Embeddings decay as in nanoGPT: with a tied head they are the output matrix too.
    "undecayed": vectors and scalars, by AdamW without decay.

    A model's class may make exceptions, which form further groups, named for what they are, like "router (adamw)":
        OPTIMIZER = {"router": dict(method="adamw"), "table": dict(lr_scale=5.0, weight_decay=0.0)}
    A key is the name of a module or parameter: one part of the dotted names of the parameters it stands for. Where two
    keys name a parameter, the later one counts. What its dict leaves open is decided as for any other parameter. The
    learning rate is lr * lr_scale. With optimizer="adamw" a method is ignored: all parameters are AdamW's.
    """
    if optimizer not in ("muon", "adamw"):
        raise ValueError(f"optimizer={optimizer!r} is unknown: choose muon or adamw")
    rules = {
        "matrices": dict(method=optimizer, weight_decay=weight_decay, lr_scale=1.0),
        "decayed": dict(method="adamw", weight_decay=weight_decay, lr_scale=1.0),
        "undecayed": dict(method="adamw", weight_decay=0.0, lr_scale=1.0),
    }
    tables_and_filters = set()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
            tables_and_filters.update(module.parameters(recurse=False))
    keys = exceptions(model)

    groups = {kind: dict(name=kind, params=[], **rule) for kind, rule in rules.items()}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = kind_of(name, p, p in tables_and_filters)
        if p not in keys:
            groups[kind]["params"].append((name, p))
            continue
        settings = rules[kind] | model.OPTIMIZER[keys[p]]
        if optimizer == "adamw":
            settings["method"] = "adamw"
        title = exception_title(keys[p], settings, weight_decay)
        group = groups.setdefault(title, dict(name=title, params=[], **settings))
        group["params"].append((name, p))
    return [group for group in groups.values() if group["params"]]


def make_optimizer(
    model: nn.Module, optimizer: str = "muon", learning_rate: float = 1e-3, weight_decay: float = 0.1, **options
) -> MuonAdamW:
    """The optimizer of a whole model: param_groups, and MuonAdamW's options, spelled as training scripts do.

    beta1 and beta2 stand for betas, and Muon's options may begin with muon_ (muon_momentum, muon_steps...).
    """
    options = {k.removeprefix("muon_"): v for k, v in options.items()}
    betas = (options.pop("beta1", 0.9), options.pop("beta2", 0.95))
    return MuonAdamW(param_groups(model, optimizer, weight_decay), lr=learning_rate, betas=betas, **options)


def group_table(optimizer: MuonAdamW) -> list[tuple[str, str, int, int, float]]:
    """Rows (group, method, tensors, parameters, weight decay), for a log or a manifest."""
    groups = optimizer.param_groups
    counts = [(len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups]
    return [(g["name"], g["method"], *count, g["weight_decay"]) for g, count in zip(groups, counts)]
