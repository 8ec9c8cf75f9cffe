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
made whole on one process, its owner, which orthogonalizes it for all.
"""

from collections.abc import Callable
from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Polar Express (Amsel et al. 2025, arXiv 2505.16932): coefficients a, b, c of a*x + b*x^3 + c*x^5, a step each.
# The t-th is about the best quintic for the interval that the step before leaves, beginning with [0.001, 1].
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

# Odd quintics that push singular values towards 1, one a step. Steps beyond a table's end use its last row.
# "quintic" is steep at zero and never settles: 5 steps map [0.003, 1] into [0.68, 1.21], and less to less.
# "polar_express" settles: 5 steps map [0.001, 1] into [0.84, 1.13]. Rounding may throw a value out of its interval,
# beyond which the polynomials explode. Dividing their argument by 1.01 prevents that; the last one needs no such care.
POLYNOMIALS = {
    "quintic": [(3.4445, -4.7750, 2.0315)],
    "polar_express": [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS] + [(1.875, -1.25, 0.375)],
}

METHODS = ("muon", "adamw")
SCALES = ("match_rms_adamw", "original")  # see update_scale

# What a model's OPTIMIZER may say of a parameter, see param_groups.
EXCEPTIONS = ("method", "weight_decay", "lr_scale")


def orthogonalize(x: Tensor, polynomial: str = "polar_express", steps: int = 5) -> Tensor:
    """Returns each matrix U S V^T of x (B, rows, columns) replaced by about U V^T, in x's shape and dtype."""
    table = POLYNOMIALS[polynomial]
    tall = is_tall(x)
    if tall:
        x = x.mT  # the products below are rows by rows: rows become the short side

    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value exceeds 1
    for step in range(steps):
        a, b, c = table[min(step, len(table) - 1)]
        gram = torch.bmm(x, x.mT)  # G = x x^T, (B, rows, rows)
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # bG + cG^2, (B, rows, rows)
        x = torch.baddbmm(x, p, x, beta=a)  # (aI + bG + cG^2) x, (B, rows, columns)

    if tall:
        x = x.mT
    return x


def update_scale(scale: str, fan_out: int, fan_in: int) -> float:
    """Returns what an orthogonal matrix (fan_out, fan_in) is multiplied by to be an update at lr = 1."""
    if scale == "match_rms_adamw":
        return 0.2 * sqrt(max(fan_out, fan_in))
    return sqrt(max(1, fan_out / fan_in))


class MuonAdamW(torch.optim.Optimizer):
    """An optimizer with one method per parameter group; the options below may differ between groups.

    AdamW equals torch.optim.AdamW with the same lr, betas, eps and weight_decay. Muon with polynomial="quintic" and
    dtype=torch.bfloat16 equals torch.optim.Muon, where scale is called adjust_lr_fn, and "original" unless it is given.
    State of a parameter: exp_avg, exp_avg_sq, step (adamw) or momentum_buffer (muon).
    """

    def __init__(
        self,
        params,
        method: str = "adamw",  # "adamw" takes any shape; "muon" 2-D weights (out, in) and 3-D stacks (E, in, out)
        lr: float = 1e-3,  # learning rate of both methods; a schedule sets group["lr"] before each step
        weight_decay: float = 0.1,  # a step shrinks weights by the factor 1 - lr * weight_decay, see decay_with_lr
        lr_scale: float = 1.0,  # a group steps by lr * lr_scale, so that a schedule may set one lr in all groups
        betas: tuple[float, float] = (0.9, 0.95),  # AdamW: how much its averages of g and g^2 keep in a step
        eps: float = 1e-8,  # AdamW: added to the root of the average of g^2
        momentum: float = 0.95,  # Muon: how much its average of g keeps in a step
        nesterov: bool = True,  # Muon: look ahead to the next average
        steps: int = 5,  # Muon: steps of orthogonalize; fewer are cheaper and coarser
        polynomial: str = "polar_express",  # Muon: polar_express or quintic
        scale: str = "match_rms_adamw",  # Muon: match_rms_adamw, or original with an lr of its own, about 0.02
        dtype: torch.dtype | None = None,  # Muon: of orthogonalize; None: bfloat16 on CUDA, else float32 or finer
        cautious_decay: bool = False,  # decay only where update * weight >= 0 (Chen et al. 2025, arXiv 2510.12402)
        decay_with_lr: bool = True,  # a step shrinks weights by lr * weight_decay; False: by initial_lr * weight_decay
    ):
        defaults = dict(
            method=method,
            lr=lr,
            weight_decay=weight_decay,
            lr_scale=lr_scale,
            betas=betas,
            eps=eps,
            momentum=momentum,
            nesterov=nesterov,
            steps=steps,
            polynomial=polynomial,
            scale=scale,
            dtype=dtype,
            cautious_decay=cautious_decay,
            decay_with_lr=decay_with_lr,
            fused=True,  # tells load_state_dict that AdamW's step counts live beside their parameters
        )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group, those given at the beginning too; ValueError names an option that cannot be."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("initial_lr", group["lr"])
        for name, choices in (("method", METHODS), ("polynomial", POLYNOMIALS), ("scale", SCALES)):
            if group[name] not in choices:
                raise ValueError(f"{name}={group[name]!r} is unknown: choose one of {', '.join(choices)}")
        if group["steps"] < 1:
            raise ValueError(f"steps={group['steps']}: Muon needs at least 1 step of orthogonalize, 5 is usual")
        wrong = [tuple(p.shape) for p in group["params"] if p.ndim not in (2, 3)]
        if group["method"] == "muon" and wrong:
            raise ValueError(f"Muon takes 2-D and 3-D parameters, not {wrong}: give them method='adamw'")

    def __setstate__(self, state):
        """Restores the groups. An option that they lack, since they were saved before it existed, has its default."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group.setdefault("initial_lr", group["lr"])

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """Updates every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            batches = {}  # fused and batched kernels want one device and one dtype
            for p in group["params"]:
                if p.grad is not None:
                    batches.setdefault((p.device, p.dtype), []).append(p)
            for params in batches.values():
                if group["method"] == "muon":
                    self._step_muon(group, params)
                else:
                    self._step_adamw(group, params)
        return loss

    def _step_adamw(self, group, params):
        # 1. averages and step counts of parameters that have none
        for p in params:
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)

        # 2. what this process holds of each
        weights = [to_local(p) for p in params]
        grads = [to_local(p.grad) for p in params]
        averages = [to_local(self.state[p]["exp_avg"]) for p in params]
        squares = [to_local(self.state[p]["exp_avg_sq"]) for p in params]
        counts = [self.state[p]["step"] for p in params]

        # 3. decay, unless it is the usual one: that is part of the fused kernel
        beta1, beta2 = group["betas"]
        weight_decay = group["weight_decay"]
        is_usual = group["decay_with_lr"] and not group["cautious_decay"]
        if weight_decay and not is_usual:
            next_averages = torch._foreach_lerp(averages, grads, 1 - beta1)  # they have the update's signs
            decay(group, weights, next_averages)
            weight_decay = 0.0

        # 4. update
        torch._foreach_add_(counts, 1)
        lr = group["lr"] * group["lr_scale"]
        options = dict(lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=group["eps"])
        torch._fused_adamw_(weights, grads, averages, squares, [], counts, **options, amsgrad=False, maximize=False)

    def _step_muon(self, group, params):
        # 1. buffers of parameters that have none
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)

        # 2. what this process holds of each
        weights = [to_local(p) for p in params]
        grads = [to_local(p.grad) for p in params]
        buffers = [to_local(self.state[p]["momentum_buffer"]) for p in params]

        # 3. momentum
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = buffers
        if group["nesterov"]:
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])

        # 4. orthogonalize
        if is_sharded(params[0]):
            directions = orthogonal_shards(group, params, updates)
        else:
            directions = orthogonal_updates(group, updates)

        # 5. no update for the matrices of a stack that have no gradient: experts which no token of this step has chosen
        # would go on at full size for hundreds of steps, since what is left of their momentum is scaled up. They decay
        # like all weights.
        for grad, direction in zip(grads, directions):
            if grad.ndim == 3:
                idle = grad.abs().amax(dim=(1, 2), keepdim=True) == 0  # (E, 1, 1)
                direction.masked_fill_(idle, 0.0)

        # 6. decay, update
        decay(group, weights, directions)
        torch._foreach_add_(weights, directions, alpha=-group["lr"] * group["lr_scale"])


def decay(group, weights, updates):
    """Shrinks the weights in place; a cautious decay spares those that their updates push away from zero."""
    lr = group["lr"] if group["decay_with_lr"] else group["initial_lr"]
    shrink = lr * group["lr_scale"] * group["weight_decay"]
    if group["cautious_decay"]:
        torch._foreach_sub_(weights, [shrink * w * (w * u >= 0) for w, u in zip(weights, updates)])
    else:
        torch._foreach_mul_(weights, 1 - shrink)


def orthogonal_updates(group, updates):
    """Returns the updates, (out, in) or stacks (E, in, out), with each matrix orthogonalized and scaled."""
    # 1. find the matrices that one batch can hold: of one shape, lying or standing, and of one scale. (8, 4), (4, 8)
    # and a stack (3, 4, 8) are 5 wide matrices (4, 8): one batch with scale="match_rms_adamw". With "original" the tall
    # one and the stack, which has (in, out), have another scale than the wide one: two batches.
    batches = {}
    for i, update in enumerate(updates):
        if update.ndim == 2:
            fan_out, fan_in = update.shape
        else:
            _, fan_in, fan_out = update.shape
        scale = update_scale(group["scale"], fan_out, fan_in)
        shape = as_wide_stack(update).shape[1:]
        batches.setdefault((shape, scale), []).append(i)

    # 2. orthogonalize each batch, and cut it up again
    directions = [None] * len(updates)
    for (_, scale), indices in batches.items():
        stacks = [as_wide_stack(updates[i]) for i in indices]
        batch = torch.cat(stacks)  # (B, rows, columns)
        dtype = group["dtype"]
        if dtype is None:
            dtype = torch.bfloat16 if batch.is_cuda else torch.promote_types(batch.dtype, torch.float32)
        orthogonal = orthogonalize(batch.to(dtype), group["polynomial"], group["steps"])
        orthogonal = orthogonal.to(batch.dtype).mul_(scale)
        for i, direction in zip(indices, orthogonal.split([len(stack) for stack in stacks])):
            if is_tall(updates[i]):
                direction = direction.mT
            directions[i] = direction.view_as(updates[i])
    return directions


def is_tall(matrix):
    return matrix.size(-2) > matrix.size(-1)


def as_wide_stack(update):
    """Returns a matrix (as a stack of one) or a stack of matrices as (E, rows, columns) with rows <= columns."""
    stack = update.reshape(-1, *update.shape[-2:])
    if is_tall(update):
        stack = stack.mT
    return stack


# ---- parameters cut over processes ----------------------------------------------------------------------------------
def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")  # a DTensor


def to_local(tensor: Tensor) -> Tensor:
    """Returns what this process holds of a tensor: its shard of a DTensor, the whole of a plain one."""
    if is_sharded(tensor):
        return tensor.to_local()
    return tensor


def orthogonal_shards(group, params, updates):
    """Returns what orthogonal_updates would, where `updates` are this process's rows for the DTensors `params`.

    Each 2-D matrix has an owner: its rows go there by one exchange, and come back orthogonalized by another. 3-D stacks
    are cut between their matrices, and stay where they are. Over 2 processes, of A (4, 8), B (4, 8) and C (5, 7):
        process 0 holds A[:2] B[:2] C[:3] and owns A and C; process 1 holds A[2:] B[2:] C[3:] and owns B
        process 0 sends B[:2], receives A[2:] and C[3:], orthogonalizes A and C, sends these rows back, receives B[:2]
    """
    processes = params[0].device_mesh.get_group()
    world_size = dist.get_world_size(processes)
    rank = dist.get_rank(processes)

    # 1. deal the matrices out in the order of their shapes, so that each process owns as many of a shape
    stacks = [i for i, p in enumerate(params) if p.ndim == 3]
    matrices = [i for i, p in enumerate(params) if p.ndim == 2]
    matrices.sort(key=lambda i: params[i].shape)
    owned = [matrices[r::world_size] for r in range(world_size)]  # owned[r]: indices of the matrices of process r

    # 2. send each owner its rows, and fill the matrices that this process owns
    own_matrices = [updates[0].new_empty(params[i].shape) for i in owned[rank]]
    rows_by_owner = [pick(updates, indices) for indices in owned]
    exchange(rows_by_owner, rows_by_process(own_matrices, world_size), updates[0], processes)

    # 3. orthogonalize
    directions = orthogonal_updates(group, own_matrices + pick(updates, stacks))
    own_directions = directions[: len(own_matrices)]
    stack_directions = directions[len(own_matrices) :]

    # 4. send the rows back, and fill those of this process
    results = [torch.empty_like(update) for update in updates]
    rows_by_owner = [pick(results, indices) for indices in owned]
    exchange(rows_by_process(own_directions, world_size), rows_by_owner, updates[0], processes)
    for i, direction in zip(stacks, stack_directions):
        results[i] = direction
    return results


def pick(tensors, indices):
    return [tensors[i] for i in indices]


def rows_by_process(matrices, world_size):
    """Returns the rows of the matrices that each process holds, as views: FSDP cuts as torch.chunk does.

    5 rows are 3 + 2 over 2 processes, and 2 + 2 + 1 over 4: the last one holds none.
    """
    rows = [[] for _ in range(world_size)]
    for matrix in matrices:
        for r, chunk in enumerate(matrix.chunk(world_size)):
            rows[r].append(chunk)
    return rows


def exchange(sent, received, like, processes):
    """Sends the tensors sent[r] to process r, and fills the tensors received[r] with what process r sends here.

    like: a tensor of their dtype and device, since a process may have nothing to send.
    """
    sent_sizes = [sum(map(torch.numel, tensors)) for tensors in sent]
    received_sizes = [sum(map(torch.numel, tensors)) for tensors in received]
    outgoing = like.new_empty(sum(sent_sizes))
    incoming = like.new_empty(sum(received_sizes))
    for tensor, piece in slices(sent, outgoing):
        piece.copy_(tensor)
    dist.all_to_all_single(incoming, outgoing, received_sizes, sent_sizes, processes)
    for tensor, piece in slices(received, incoming):
        tensor.copy_(piece)


def slices(tensors_by_process, buffer):
    """Yields each tensor with its slice of the flat buffer, in which they stand one after the other."""
    start = 0
    for tensors in tensors_by_process:
        for tensor in tensors:
            end = start + tensor.numel()
            yield tensor, buffer[start:end].view_as(tensor)
            start = end


# ---- which parameter goes where -------------------------------------------------------------------------------------
def kind_of(name: str, p: Tensor, is_table_or_filter: bool) -> str:
    """Returns the group that a parameter's shape and place ask for: matrices, decayed or undecayed."""
    if p.numel() == max(p.shape, default=1):  # a scalar or a vector, also one of shape (1, C) or (1, C, 1)
        return "undecayed"
    in_block = any(part.isdigit() for part in name.split("."))
    is_matrix = p.ndim in (2, 3) and min(p.shape[-2:]) > 1  # (out, in), or a stack (E, in, out)
    if in_block and is_matrix and not is_table_or_filter:
        return "matrices"
    return "decayed"


def exceptions(model: nn.Module) -> dict[Tensor, str]:
    """Returns the key of the model's OPTIMIZER that names a parameter, for those that are named.

    ValueError for a setting that is none of EXCEPTIONS, for an unknown method, and for a key that names no parameter,
    unless the model has None in its place: that is a module or parameter which this config leaves out.
    """
    found = {}
    for key, changes in getattr(model, "OPTIMIZER", {}).items():
        unknown = [repr(name) for name in changes if name not in EXCEPTIONS]
        if unknown:
            raise ValueError(f"OPTIMIZER[{key!r}] has {', '.join(unknown)}: choose from {', '.join(EXCEPTIONS)}")
        if changes.get("method", "adamw") not in METHODS:
            raise ValueError(f"OPTIMIZER[{key!r}] has method={changes['method']!r}: choose muon or adamw")
        named = [p for name, p in model.named_parameters(remove_duplicate=False) if key in name.split(".")]
        left_out = any(getattr(module, key, module) is None for module in model.modules())
        if not named and not left_out:
            raise ValueError(
                f"OPTIMIZER[{key!r}] names no parameter: try one part of a name, wq of blocks.0.attn.wq.weight"
            )
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
    "undecayed": scalars, and what has one dimension above 1 at most, such as (C,) and (1, C), by AdamW without decay.

    A model's class may make exceptions, which form further groups, named for what they are, like "router (adamw)":
        OPTIMIZER = {"router": dict(method="adamw"), "table": dict(lr_scale=5.0, weight_decay=0.0)}
    A key is the name of a module or parameter: one part of the dotted names of the parameters it stands for. Where two
    keys name a parameter, only the later one counts. What its dict leaves open is decided as for any other parameter.
    The learning rate is lr * lr_scale. Vectors are AdamW's whatever the method, and with optimizer="adamw" all is.
    """
    if optimizer not in METHODS:
        raise ValueError(f"optimizer={optimizer!r} is unknown: choose muon or adamw")
    rules = {
        "matrices": dict(method=optimizer, weight_decay=weight_decay, lr_scale=1.0),
        "decayed": dict(method="adamw", weight_decay=weight_decay, lr_scale=1.0),
        "undecayed": dict(method="adamw", weight_decay=0.0, lr_scale=1.0),
    }
    keys = exceptions(model)
    # An embedding is a table of vectors and a convolution a row of filters. Neither is one map from vectors to vectors,
    # whose directions Muon could make equally large.
    tables_and_filters = set()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
            tables_and_filters.update(module.parameters(recurse=False))

    groups = {kind: dict(name=kind, params=[], **rule) for kind, rule in rules.items()}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = kind_of(name, p, p in tables_and_filters)
        if p not in keys:
            groups[kind]["params"].append((name, p))
            continue
        settings = rules[kind] | model.OPTIMIZER[keys[p]]
        if optimizer == "adamw" or kind == "undecayed":
            settings["method"] = "adamw"
        title = exception_title(keys[p], settings, weight_decay)
        group = groups.setdefault(title, dict(name=title, params=[], **settings))
        group["params"].append((name, p))
    return [group for group in groups.values() if group["params"]]


def make_optimizer(
    model: nn.Module, optimizer: str = "muon", learning_rate: float = 1e-3, weight_decay: float = 0.1, **options
) -> MuonAdamW:
    """Returns the optimizer of a whole model: param_groups with MuonAdamW's options, spelled as training scripts do.

    beta1 and beta2 stand for betas, and Muon's options may begin with muon_ (muon_momentum, muon_steps...).
    """
    options = {name.removeprefix("muon_"): value for name, value in options.items()}
    beta1 = options.pop("beta1", 0.9)
    beta2 = options.pop("beta2", 0.95)
    groups = param_groups(model, optimizer, weight_decay)
    return MuonAdamW(groups, lr=learning_rate, betas=(beta1, beta2), **options)


def group_table(optimizer: MuonAdamW) -> list[tuple[str, str, int, int, float]]:
    """Returns rows (group, method, tensors, parameters, weight decay), for a log or a manifest."""
    rows = []
    for group in optimizer.param_groups:
        params = group["params"]
        parameters = sum(p.numel() for p in params)
        rows.append((group["name"], group["method"], len(params), parameters, group["weight_decay"]))
    return rows
