"""Models with kernels: which methods they take over, which they leave alone, and that the model computes the same."""

import copy
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import kernels
import kernels_delta
import model_baseline
from tests import test_models
from tests.differences import tracked
from tests.kernel_checks import kernels_run  # noqa: F401
from tests.tiny import EOT, MODELS, ROOT, build, module, tokens

FITTING = {"mla": dict(nope_dim=8, rope_dim=8, v_dim=16)}  # keys as wide as values, as the kernel wants them
FITTING["indexer"] = FITTING["mla"]
each_model = pytest.mark.parametrize("name", MODELS)


def kinds(model):
    """Returns how many modules of each class a model has."""
    return Counter(type(part).__name__ for part in model.modules())


def overridden(model):
    """Returns the methods that kernels took over: {"blocks.0.mlp.forward", ...}."""
    found = set()
    for name, part in model.named_modules():
        found |= {f"{name}.{method}".lstrip(".") for method in vars(part).get("swapped", ())}
    return found


def losses_and_gradients(model, net=None):
    x = tokens(2, 24)
    x[0, [5, 6]] = x[1, 20] = EOT
    y = tokens(2, 24, seed=2)
    y[0, :3] = -1
    net = model if net is None else net
    loss = net(x, y)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def agree(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * max(1.0, b.abs().max().item()), rtol=0)


# ---- what is taken over ----------------------------------------------------------------------------------------------


def check_report(installed, model):
    """Every part of a known name is taken over, but no MLP of another kind, and no rotation of a part of each head.

    What the parts of one's own variant compute nobody knows here: each is taken over, or left alone and named.
    """
    parts = kinds(model)
    swapped = Counter(installed.swapped)
    if f"{type(model).__module__}.py" not in tracked():
        for operations, method in (("flash_attention", "Attention.attend"), ("swiglu", "MLP.forward")):
            named = sum(n for reason, n in installed.left_alone.items() if reason.startswith(method))
            assert swapped[operations] + named == parts[method.split(".")[0]]
        return
    left_alone = Counter()
    gated = any(hasattr(part, "w_gate") for part in model.modules() if type(part).__name__ == "MLP")
    rotations = parts["Attention"]
    if not hasattr(next(part for part in model.modules() if type(part).__name__ == "Attention"), "rotate"):
        rotations = 0
    if not gated:
        left_alone["MLP.forward (computes something else)"] = parts["MLP"]
    if getattr(model.config, "rotary_fraction", 1.0) < 1:
        left_alone["Attention.rotate (computes something else)"] = rotations
        rotations = 0
    has_slots = hasattr(model.config, "n_slot")
    has_blocks = hasattr(model.config, "key_block")
    chosen_by_mask = parts["Indexer"] > 0 and model.config.eot_id >= 0  # who chooses keys asks the mask for all
    own_mask = has_slots or has_blocks or chosen_by_mask
    if has_slots:
        left_alone["Attention.attend (its mask: computes something else)"] = parts["Attention"]
    if has_blocks:  # attends to blocks, where the others take a mask
        left_alone["Attention.attend (not tried, TypeError)"] = parts["Attention"]
    if chosen_by_mask:
        left_alone["Attention.attend (its mask: another one needs the mask)"] = parts["Attention"]
    assert installed.left_alone == +left_alone
    assert swapped["swiglu"] == parts["MLP"] * gated
    assert swapped["norm_rope"] + swapped["rope"] == rotations
    assert swapped["rms_norm"] == parts["RMSNorm"] - 2 * swapped["norm_rope"]
    assert parts["Attention"] > 0
    assert swapped["flash_attention"] == parts["Attention"] * (not own_mask)
    assert swapped["moe"] == parts["MoE"]
    assert swapped["gated_delta_rule"] == parts["GatedDelta"]
    assert swapped["linear_cross_entropy"] == 1
    has_window = hasattr(model.config, "window") and not has_slots
    assert swapped["document_starts"] == (model.config.eot_id >= 0 and not has_window and not own_mask)
    assert swapped["window_starts"] == has_window


@each_model
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_every_method_that_has_a_kernel_is_taken_over(name, eot_id):
    model = build(name, eot_id=eot_id)
    check_report(kernels_delta.install(model), model)


@each_model
def test_a_large_model_without_weights_yet_is_as_a_tiny_one(name):
    config = module(name).GPTConfig(n_layer=4, eot_id=EOT)
    with torch.device("meta"):
        model = module(name).GPT(config)
    check_report(kernels_delta.install(model), model)


def test_the_baselines_report_names_every_kernel():
    model = build("baseline")
    installed = kernels.install(model)
    assert installed.swapped == dict(rms_norm=5, norm_rope=2, flash_attention=2, swiglu=2, linear_cross_entropy=1)
    assert sum(installed.swapped.values()) == len(overridden(model))
    assert "2 x norm_rope" in str(installed) and "left alone" not in str(installed)
    model = build("gpt2")
    assert str(kernels.install(model)).endswith("; left alone: 2 x MLP.forward (computes something else)")


@pytest.mark.parametrize("qk_norm, operation", [(True, "norm_rope"), (False, "rope")])
def test_a_rotation_is_fused_with_the_norms_where_there_are_any(qk_norm, operation):
    installed = kernels.install(build("baseline", qk_norm=qk_norm))
    assert installed.swapped[operation] == 2 and installed.swapped["rms_norm"] == 5


def test_a_norm_whose_weight_is_around_zero_is_taken_over_too(monkeypatch):
    def around_zero(self, x):
        return (F.rms_norm(x, x.shape[-1:], eps=self.eps) * (1 + self.weight)).to(x.dtype)

    monkeypatch.setattr(model_baseline.RMSNorm, "forward", around_zero)
    model = build("baseline").train()
    before = losses_and_gradients(model)
    installed = kernels.install(model)
    assert installed.swapped["rms_norm"] == 9 and installed.swapped["rope"] == 2  # no kernel fuses these
    agree(losses_and_gradients(model), before)


# ---- the same results ------------------------------------------------------------------------------------------------


@each_model
def test_losses_and_gradients_with_kernels_are_those_without_in_copies_and_after_uninstall(name):
    model = build(name, **FITTING.get(name, {})).train()
    before = losses_and_gradients(model)
    names = list(model.state_dict())
    kernels_delta.install(model)
    assert list(model.state_dict()) == names
    with_kernels = losses_and_gradients(model)
    agree(with_kernels, before)
    assert not all(torch.equal(a, b) for a, b in zip(with_kernels, before))  # something else did compute them
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    kernels.uninstall(model)
    again = losses_and_gradients(other)  # a copy has its own weights, and the kernels
    assert all(torch.equal(a, b) for a, b in zip(again, with_kernels))
    kernels.uninstall(other)
    assert all(torch.equal(a, b) for a, b in zip(losses_and_gradients(other), before))


@each_model
def test_losses_and_gradients_of_documents_with_kernels_compiled_are_those_without(name):
    model = build(name, eot_id=EOT, **FITTING.get(name, {})).train()
    before = losses_and_gradients(model)
    kernels_delta.install(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    agree(losses_and_gradients(model, compiled), before)


@each_model
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_cached_logits_with_kernels_are_the_full_ones_without(name, eot_id):
    model = build(name, eot_id=eot_id, **FITTING.get(name, {}))
    x = tokens(2, 9)
    x[0, 4] = x[1, 7] = EOT
    with torch.no_grad():
        want = model(x)
        one = model(x[:, :1])
        kernels_delta.install(model)
        assert (test_models.run_in_pieces(model, x, [6, 2, 1]) - want).abs().max() < 1e-4
        assert (model(x[:, :1]) - one).abs().max() < 1e-4


def test_a_model_with_kernels_is_saved_whole_and_read_back_with_them(tmp_path):
    model = build("baseline", eot_id=EOT)
    kernels.install(model)
    torch.save(model, tmp_path / "model.pt")
    back = torch.load(tmp_path / "model.pt", weights_only=False)
    assert overridden(back) == overridden(model) != set()
    with torch.no_grad():
        back.norm.weight.mul_(2.0)  # its own weights
        torch.testing.assert_close(back(tokens(1, 8)), 2 * model(tokens(1, 8)))
    kernels.uninstall(back)
    assert not overridden(back) and overridden(model)


def test_a_weight_near_one_is_not_lost_in_bf16_where_the_kernel_falls_back_to_its_twin():
    norm = build("hybrid").bfloat16().norm
    norm.weight.data = 1e-3 * torch.randn_like(norm.weight)  # in bf16 1 + 0.001 is 1
    x = torch.randn(9, 64).bfloat16()
    assert torch.equal(kernels._norm_around_one(norm, x), norm(x))


@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_attention_with_a_scale_of_its_own_keeps_it(eot_id):
    yarn = dict(rope_scaling="yarn", rope_factor=40.0, rope_original=16)
    model = build("mla", eot_id=eot_id, **FITTING["mla"], **yarn)
    x = tokens(1, 12)
    with torch.no_grad():
        want = model(x)
        assert kernels.install(model).swapped["flash_attention"] == 2
        torch.testing.assert_close(model(x), want, atol=1e-4, rtol=0)


def test_heads_that_the_kernel_does_not_take_falls_back_to_the_same_attention():
    model = build("mla", eot_id=EOT).train()  # keys of 16 + 8, values of 16
    before = losses_and_gradients(model)
    assert kernels.install(model).swapped["flash_attention"] == 2
    agree(losses_and_gradients(model), before)


def test_without_triton_install_computes_the_same(tmp_path):
    for file in ("kernels.py", "model_baseline.py"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "triton.py").write_text("raise ImportError")
    code = (
        "import torch, kernels, model_baseline\n"
        "model = model_baseline.GPT(model_baseline.GPTConfig(**model_baseline.TINY, eot_id=3))\n"
        "x = torch.randint(9, (2, 20))\n"
        "loss = model(x, x)\n"
        "print(kernels.install(model))\n"
        "torch.testing.assert_close(model(x, x), loss)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and "5 x rms_norm" in ran.stdout, ran.stderr
    assert ran.stderr.count("kernels.swiglu: Triton is not installed") == 1


# ---- what does not depend on what ------------------------------------------------------------------------------------


def influences(model, x, rows):
    """Returns the logits (T, V) of x (1, T), and how far each token's embedding moves those of these rows (T,)."""
    embeddings = []
    hook = model.embed.register_forward_hook(lambda module, inputs, output: embeddings.append(output))
    logits = model(x)[0]
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[rows].square().sum(), embeddings)
    return logits.detach(), gradient[0].abs().amax(dim=-1)


def assert_unchanged(model, ours, theirs):
    """Bit for bit where the order of summation is the kernels' own.

    A mixture sorts its rows by expert. In the interpreter a product is BLAS's, where the order of summation, and so the
    bits of a row, depend on the row's place in a tile: one token more for an expert moves all rows behind it.
    """
    if kinds(model)["MoE"] > 0:
        torch.testing.assert_close(ours, theirs)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["baseline", "hybrid", "moe"])
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_logits_with_kernels_depend_on_no_later_token_and_on_no_other_document(name, eot_id):
    model, x = build(name, eot_id=eot_id), tokens(1, 24)
    kernels_delta.install(model)
    x[0, [0, 7]] = EOT
    later, other = x.clone(), x.clone()
    later[0, 15] = (x[0, 15] + 1) % EOT
    other[0, 3] = (x[0, 3] + 1) % EOT
    want, influence = influences(model, x, slice(7, 15))
    with torch.no_grad():
        with_other_later = model(later)[0]
        with_other_before = model(other)[0]
    assert_unchanged(model, with_other_later[:15], want[:15])
    assert (with_other_later - want)[15:].abs().amax(dim=-1).min() > 1e-4
    # A product with zeros is 0 in every order of summation: what has no influence has none to the bit.
    assert (influence[15:] == 0).all() and (influence[7:15] > 0).all()
    if eot_id == EOT:
        assert_unchanged(model, with_other_before[7:], want[7:])
        assert (influence[:7] == 0).all()
    else:
        assert (with_other_before - want)[7:].abs().amax(dim=-1).min() > 1e-4
        assert (influence[:7] > 0).all()


# ---- what is left alone ----------------------------------------------------------------------------------------------


def layer_norm(self, x):
    return F.layer_norm(x, x.shape[-1:], self.weight, eps=self.eps)


def norm_of_other_eps(self, x):
    return F.rms_norm(x, x.shape[-1:], self.weight, eps=10 * self.eps)


def norm_without_gradient(self, x):
    return x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt().detach() * self.weight


def relu_squared(self, x):
    return self.w_down(F.relu(self.w_gate(x)).square() * self.w_up(x))


def geglu(self, x):
    return self.w_down(F.gelu(self.w_gate(x)) * self.w_up(x))


def clamped_swiglu(self, x):
    return self.w_down(F.silu(self.w_gate(x).clamp(max=20.0)) * self.w_up(x))


def swiglu_with_dropout(self, x):
    return self.w_down(F.dropout(F.silu(self.w_gate(x)) * self.w_up(x), 0.1, self.training))


def rotate_before_norm(self, q, k, rope):
    q = self.q_norm(model_baseline.apply_rope(q, *rope))
    k = self.k_norm(model_baseline.apply_rope(k, *rope))
    return q, k


def rotate_nothing(self, q, k, rope):
    return self.q_norm(q), self.k_norm(k)


def rotate_neighbours(self, q, k, rope):
    """Turns the pairs (x_2i, x_2i+1)."""

    def turn(x):
        x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return model_baseline.apply_rope(x, *rope)

    return turn(self.q_norm(q)), turn(self.k_norm(k))


def attend_with_temperature(self, q, k, v, mask):
    causal = mask is None and q.size(2) > 1
    return F.scaled_dot_product_attention(1.1 * q, k, v, mask, is_causal=causal, enable_gqa=True)


def scores_and_values(q, k, v, mask):
    """Returns masked scores (B, H, T, S), and the values of each query head."""
    R = q.size(1) // k.size(1)
    scores = q @ k.repeat_interleave(R, dim=1).mT * q.size(-1) ** -0.5
    T, S = scores.shape[-2:]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return scores.masked_fill(~mask, -torch.inf), v.repeat_interleave(R, dim=1)


def attend_with_softcap(self, q, k, v, mask):
    scores, v = scores_and_values(q, k, v, mask)
    return (50 * torch.tanh(scores / 50)).masked_fill(scores == -torch.inf, -torch.inf).softmax(dim=-1) @ v


def attend_with_sink(self, q, k, v, mask):
    scores, v = scores_and_values(q, k, v, mask)
    return F.pad(scores, (1, 0)).softmax(dim=-1)[..., 1:] @ v


def attend_within_window(self, q, k, v, mask):
    scores, v = scores_and_values(q, k, v, mask)
    T, S = scores.shape[-2:]
    window = torch.ones(T, S, dtype=torch.bool).triu(S - T - 39)  # 40 keys
    return scores.masked_fill(~window, -torch.inf).softmax(dim=-1) @ v


def attend_within_window_without_a_mask(self, q, k, v, mask):
    if mask is None:
        return attend_within_window(self, q, k, v, mask)
    scores, v = scores_and_values(q, k, v, mask)
    return scores.softmax(dim=-1) @ v


def attend_with_dropout(self, q, k, v, mask):
    scores, v = scores_and_values(q, k, v, mask)
    return F.dropout(scores.softmax(dim=-1), 0.1, self.training) @ v


def loss_with_temperature(self, x, targets):
    return F.cross_entropy(self.logits(x).flatten(0, 1).float() / 1.1, targets.flatten(), ignore_index=-1)


def loss_with_softcap(self, x, targets):
    logits = 500 * torch.tanh(self.logits(x).flatten(0, 1).float() / 500)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)


def loss_with_z_loss(self, x, targets):
    logits = self.logits(x).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1) + 1e-5 * logits.logsumexp(dim=-1).square().mean()


def loss_of_all_targets(self, x, targets):
    logits = self.logits(x).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum") / targets.numel()


def loss_of_smoothed_targets(self, x, targets):
    logits = self.logits(x).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, label_smoothing=0.01)


def experts_of_relu(self, x, chosen, gates):
    y = 0
    for k in range(chosen.size(1)):
        h = F.relu(torch.einsum("nc,nci->ni", x, self.w_gate.weight[chosen[:, k]]))
        h = h * torch.einsum("nc,nci->ni", x, self.w_up.weight[chosen[:, k]])
        y = y + gates[:, k, None] * torch.einsum("ni,nic->nc", h, self.w_down.weight[chosen[:, k]])
    return y


def experts_behind_their_gates(self, x, chosen, gates):
    y = 0
    for k in range(chosen.size(1)):
        y = y + type(self).own_experts(self, gates[:, k, None] * x, chosen[:, k, None], torch.ones_like(gates[:, :1]))
    return y


def gates_without_gradient(self, x, chosen, gates):
    return type(self).own_experts(self, x, chosen, gates.detach())


def delta_rule_of_larger_steps(self, q, k, v, log_decay, beta, first, state):
    return type(self).own_delta_rule(self, q, k, v, log_decay, 2 * beta, first, state)


def delta_rule_across_documents(self, q, k, v, log_decay, beta, first, state):
    return type(self).own_delta_rule(self, q, k, v, log_decay, beta, torch.zeros_like(first), state)


def delta_rule_without_its_state(self, q, k, v, log_decay, beta, first, state):
    y, _ = type(self).own_delta_rule(self, q, k, v, log_decay, beta, first, state)
    return y, state


CHANGES = [
    ("baseline", "RMSNorm.forward", [layer_norm, norm_of_other_eps, norm_without_gradient]),
    ("baseline", "MLP.forward", [relu_squared, geglu, clamped_swiglu, swiglu_with_dropout]),
    ("baseline", "Attention.rotate", [rotate_before_norm, rotate_nothing, rotate_neighbours]),
    ("baseline", "Attention.attend", [attend_with_temperature, attend_with_softcap, attend_with_sink]),
    ("baseline", "Attention.attend", [attend_within_window, attend_within_window_without_a_mask, attend_with_dropout]),
    ("baseline", "GPT.lm_loss", [loss_with_temperature, loss_with_softcap, loss_with_z_loss]),
    ("baseline", "GPT.lm_loss", [loss_of_all_targets, loss_of_smoothed_targets]),
    ("moe", "MoE.experts", [experts_of_relu, experts_behind_their_gates, gates_without_gradient]),
    ("hybrid", "GatedDelta.delta_rule", [delta_rule_of_larger_steps, delta_rule_across_documents]),
    ("hybrid", "GatedDelta.delta_rule", [delta_rule_without_its_state]),
]


@pytest.mark.parametrize(
    "name, seam, change",
    [(name, seam, change) for name, seam, changes in CHANGES for change in changes],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_variants_changed_method_is_left_alone_and_named(name, seam, change, monkeypatch):
    owner, method = seam.split(".")
    cls = getattr(module(name), owner)
    own = build(name)
    before = kernels_delta.install(own)
    monkeypatch.setattr(cls, f"own_{method}", getattr(cls, method), raising=False)
    monkeypatch.setattr(cls, method, change)
    model = build(name)
    installed = kernels_delta.install(model)
    changed = {f"{path}.{method}".lstrip(".") for path, part in model.named_modules() if type(part) is cls}
    assert changed & overridden(model) == set()
    assert overridden(own) - changed <= overridden(model)  # and the norms of a rotation that is not fused
    assert installed.left_alone == before.left_alone | {f"{seam} (computes something else)": len(changed)}


@pytest.mark.parametrize(
    "name, options, left",
    [
        ("baseline", dict(logit_softcap=30.0), {"GPT.lm_loss": 1}),
        ("hybrid", dict(rotary_fraction=0.5), {"Attention.rotate": 1}),
        ("hybrid", dict(rotary_fraction=1.0), {}),
    ],
)
def test_what_a_config_changes_is_left_alone(name, options, left):
    installed = kernels_delta.install(build(name, **options))
    assert installed.left_alone == {f"{seam} (computes something else)": n for seam, n in left.items()}


def norm_by_hand(self, x):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def mlp_by_hand(self, x):
    gate = self.w_gate(x)
    return self.w_down(gate * gate.sigmoid() * self.w_up(x))


def rotate_by_hand(self, q, k, rope):
    cos, sin = (torch.cat((x, x), dim=-1) for x in rope)

    def turn(x):
        x1, x2 = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-x2, x1), dim=-1) * sin

    return turn(self.q_norm(q)), turn(self.k_norm(k))


def attend_by_hand(self, q, k, v, mask):
    scores, v = scores_and_values(q, k, v, mask)
    return scores.softmax(dim=-1) @ v


def loss_by_hand(self, x, targets):
    kept = targets >= 0
    return self.logits(x[kept]).float().log_softmax(dim=-1).gather(-1, targets[kept][:, None]).mean().neg()


@pytest.mark.parametrize(
    "owner, method, same",
    [
        ("RMSNorm", "forward", norm_by_hand),
        ("MLP", "forward", mlp_by_hand),
        ("Attention", "rotate", rotate_by_hand),
        ("Attention", "attend", attend_by_hand),
        ("GPT", "lm_loss", loss_by_hand),
    ],
)
def test_the_same_written_in_another_way_is_taken_over(owner, method, same, monkeypatch):
    want = kernels.install(build("baseline"))
    monkeypatch.setattr(getattr(model_baseline, owner), method, same)
    assert kernels.install(build("baseline")) == want


def with_changed(part, method, change, *arguments):
    """Returns a module like this one, of a class of the same name, whose method is changed."""
    cls = type(type(part).__name__, (type(part),), {method: change})
    new = cls(*arguments)
    new.load_state_dict(part.state_dict())
    return new


@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_one_changed_layer_is_left_alone_and_computes_what_it_did(eot_id):
    model = build("baseline", eot_id=eot_id).train()
    first, second = model.blocks
    first.mlp = with_changed(first.mlp, "forward", relu_squared, model.config)
    second.attn = with_changed(second.attn, "attend", attend_with_sink, model.config, 1)
    before = losses_and_gradients(model)
    installed = kernels.install(model)
    assert {"blocks.0.mlp.forward", "blocks.1.attn.attend"} & overridden(model) == set()
    assert "blocks.1.mlp.forward" in overridden(model)
    # With documents a layer that needs the mask would be given starts: then no layer attends by the kernel.
    assert ("blocks.0.attn.attend" in overridden(model)) == (eot_id < 0)
    assert installed.swapped.get("flash_attention", 0) == (eot_id < 0)
    assert "document_starts" not in installed.swapped
    assert sum(n for why, n in installed.left_alone.items() if why.startswith("Attention.attend")) == 1 + (eot_id >= 0)
    agree(losses_and_gradients(model), before)


def mask_within_window(self, idx, cache=None):
    positions, mask = type(self).own_positions_and_mask(self, idx, cache)
    T = idx.size(1)
    return positions, mask & torch.ones(T, T, dtype=torch.bool).triu(-39)  # 40 keys


def mask_of_both_sides(self, idx, cache=None):
    positions, mask = type(self).own_positions_and_mask(self, idx, cache)
    return positions, mask | mask.mT


def mask_across_documents(self, idx, cache=None):
    positions, mask = type(self).own_positions_and_mask(self, idx, cache)
    return positions, torch.ones_like(mask).tril()


def positions_across_documents(self, idx, cache=None):
    positions, mask = type(self).own_positions_and_mask(self, idx, cache)
    return torch.arange(idx.size(1)).expand_as(positions), mask


@pytest.mark.parametrize(
    "change", [mask_within_window, mask_of_both_sides, mask_across_documents, positions_across_documents]
)
def test_a_changed_mask_leaves_attention_alone(change, monkeypatch):
    own = model_baseline.GPT.positions_and_mask
    monkeypatch.setattr(model_baseline.GPT, "own_positions_and_mask", own, raising=False)
    monkeypatch.setattr(model_baseline.GPT, "positions_and_mask", change)
    model = build("baseline", eot_id=EOT)
    installed = kernels.install(model)
    assert "positions_and_mask" not in overridden(model) and "flash_attention" not in installed.swapped
    assert installed.left_alone == {"Attention.attend (its mask: computes something else)": 2}
    assert installed.swapped["norm_rope"] == 2


def test_a_method_that_cannot_be_tried_or_is_overridden_already_is_left_alone(monkeypatch):
    def needs_more(self, x):
        return self.w_down(self.gates_of_the_last_layer * self.w_up(x))

    monkeypatch.setattr(model_baseline.MLP, "forward", needs_more)
    model = build("baseline")
    model.blocks[0].attn_norm.forward = mine = torch.zeros_like
    installed = kernels.install(model)
    assert installed.left_alone == {
        "RMSNorm.forward (overridden already)": 1,
        "MLP.forward (not tried, AttributeError)": 2,
    }
    kernels.uninstall(model)
    assert model.blocks[0].attn_norm.forward is mine and not overridden(model)


# ---- installing ------------------------------------------------------------------------------------------------------


@each_model
def test_installing_leaves_random_numbers_modes_weights_and_buffers_as_they_were(name):
    model = build(name, eot_id=EOT)
    model.blocks[0].train()
    modes = [part.training for part in model.modules()]
    state = {n: x.clone() for n, x in [*model.named_parameters(), *model.named_buffers()]}
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    kernels_delta.install(model)
    assert torch.equal(torch.rand(3), want) and not kernels.TWINS_ONLY
    assert [part.training for part in model.modules()] == modes
    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in state)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_on_the_meta_device_takes_kernels_before_it_has_weights():
    want = build("baseline", eot_id=EOT).train()
    with torch.device("meta"):
        model = model_baseline.GPT(want.config)
    kernels.install(model)
    model.to_empty(device="cpu").load_state_dict(want.state_dict())
    agree(losses_and_gradients(model), losses_and_gradients(want))


def test_a_second_installation_is_refused_until_the_first_is_undone():
    model = build("baseline")
    first = kernels.install(model)
    with pytest.raises(ValueError, match="installed already"):
        kernels.install(model)
    kernels.uninstall(model)
    assert not overridden(model) and kernels.install(model) == first


def test_the_delta_rules_kernel_comes_with_its_own_install():
    model = build("hybrid")
    assert "gated_delta_rule" not in kernels.install(model).swapped
    kernels.uninstall(model)
    assert kernels_delta.install(model).swapped["gated_delta_rule"] == kinds(model)["GatedDelta"] > 0
