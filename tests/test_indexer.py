"""What is special to model_indexer.py: which keys are chosen, from what the indexer learns, and what a choice saves."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import flops
import hf
import model_indexer
from model_indexer import choose
from tests import test_models
from tests.test_models import run_in_pieces
from tests.test_parity import ROPES, lift
from tests.tiny import EOT, build, cache_tensors, tokens

FEW = dict(index_topk=5)


def is_indexer(name):
    return ".indexer." in name


# ---- the choice ------------------------------------------------------------------------------------------------------


def slow_choice(scores, seen, K):
    """Returns the places of the K best of the keys that are seen, of equal scores the latest, for one query."""
    places = [s for s in range(len(scores)) if seen[s]]
    places.sort(key=lambda s: (-scores[s], -s))
    return sorted(places[:K])


@pytest.mark.parametrize("K", [1, 3, 7, 19])
def test_the_best_keys_are_chosen_and_of_ties_the_latest_however_many_keys_come_after_them(K):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-1, 4, (3, 20, 20), generator=generator).double()  # hardly one without a tie
    scores[scores == 0] *= -1.0  # a negative weight times a ReLU of 0 is -0.0
    seen = torch.ones(20, 20, dtype=torch.bool).tril() & (torch.rand(3, 20, 20, generator=generator) < 0.8)
    chosen = choose(scores, seen, K)
    assert (chosen.sum(dim=-1) == K).all()  # those that are not seen fill up
    for b in range(3):
        for t in range(20):
            found = (chosen & seen)[b, t].nonzero().flatten().tolist()
            assert found == slow_choice(scores[b, t].tolist(), seen[b, t], K)
    longer = choose(F.pad(scores, (0, 9), value=8.0), F.pad(seen, (0, 9)), K)
    assert torch.equal((chosen & seen), (longer & F.pad(seen, (0, 9)))[..., :20])


def slow_attention(attn, u, x, eot_id):
    """Returns scores and output of a layer of sparse attention for u (T, C) of the tokens x, by loops over formulas."""
    c = attn.config
    T = len(x)
    start = [max([s for s in range(t + 1) if x[s] == eot_id], default=0) for t in range(T)]
    angle = torch.tensor([t - start[t] for t in range(T)]).outer(
        c.rope_theta ** (-torch.arange(0, c.rope_dim, 2) / c.rope_dim)
    )

    def turn(z, t):
        a, b = z[: c.rope_dim // 2], z[c.rope_dim // 2 : c.rope_dim]
        cos, sin = angle[t].cos(), angle[t].sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin, z[c.rope_dim :]))

    def norm(z, weight):
        return z / (z.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight

    latent = norm(u @ attn.wkv_down.weight.T, attn.kv_norm.weight)
    q_latent = norm(u @ attn.wq_down.weight.T, attn.q_norm.weight)
    indexer = attn.indexer
    index_k = F.layer_norm(u @ indexer.wk.weight.T, (c.index_dim,), indexer.k_norm.weight, indexer.k_norm.bias, 1e-6)
    rows = []
    all_scores = torch.zeros(T, T, dtype=torch.float64)
    for t in range(T):
        seen = [start[t] <= s <= t for s in range(T)]
        scores = [0.0] * T
        for j in range(c.n_index_head):
            w = (u[t] @ indexer.w_head.weight[j]) / (c.n_index_head * c.index_dim) ** 0.5
            q = turn((q_latent[t] @ indexer.wq.weight.T).view(-1, c.index_dim)[j], t)
            for s in range(t + 1):
                scores[s] += (w * max(q @ turn(index_k[s], s), torch.tensor(0.0))).item()
        all_scores[t] = torch.tensor(scores)
        places = slow_choice(scores, seen, c.index_topk)
        heads = []
        for h in range(c.n_head):
            q = (q_latent[t] @ attn.wq.weight.T).view(c.n_head, -1)[h]
            q = torch.cat((q[: c.nope_dim], turn(q[c.nope_dim :], t)))
            keys = [(latent[s] @ attn.wk.weight.T).view(c.n_head, -1)[h] for s in places]
            keys = [torch.cat((k, turn(u[s] @ attn.wk_rope.weight.T, s))) for k, s in zip(keys, places)]
            values = [(latent[s] @ attn.wv.weight.T).view(c.n_head, -1)[h] for s in places]
            p = torch.stack([q @ k * (c.nope_dim + c.rope_dim) ** -0.5 for k in keys]).softmax(dim=0)
            heads.append(p @ torch.stack(values))
        rows.append(torch.cat(heads) @ attn.wo.weight.T)
    return all_scores, torch.stack(rows)


@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_a_layer_is_a_slow_loop_over_the_formulas_masked_and_gathered(eot_id):
    model = build("indexer", n_layer=1, eot_id=eot_id, **FEW).double()
    x = tokens(1, 18)
    x[0, 7] = EOT
    attn = model.blocks[0].attn
    inputs, outputs, scores = [], [], []
    attn.register_forward_hook(lambda module, given, output: inputs.append(given[0]) or outputs.append(output[0]))
    attn.indexer.register_forward_hook(lambda module, given, output: scores.append(output))
    with torch.no_grad():
        model(x)
        model.train()(x)
        want_scores, want = slow_attention(attn, inputs[0][0], x[0].tolist(), eot_id)
    for training in (0, 1):
        torch.testing.assert_close(outputs[training][0], want, atol=1e-6, rtol=0)  # angles are in fp32
        torch.testing.assert_close(scores[training][0].tril(), want_scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_gathered_attention_and_its_gradients_are_those_of_the_mask_in_any_number_of_queries(eot_id):
    model = build("indexer", eot_id=eot_id, block_size=160, **FEW).double()
    x = tokens(2, 150)  # more than are gathered at a time
    x[0, [0, 40, 43]] = x[1, 99] = EOT
    parameters = [p for name, p in model.named_parameters() if not is_indexer(name)]
    gathered = model(x)
    masked = model.train()(x)
    torch.testing.assert_close(gathered, masked, atol=1e-9, rtol=0)
    ours = torch.autograd.grad(gathered.sin().sum(), parameters)
    for a, b in zip(ours, torch.autograd.grad(masked.sin().sum(), parameters)):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_where_all_scores_are_equal_the_last_tokens_are_chosen_with_a_cache_and_without(eot_id):
    model = build("indexer", eot_id=eot_id, n_layer=1, **FEW).double()
    dense = build("indexer", eot_id=eot_id, n_layer=1, indexer_stage="dense").double()
    with torch.no_grad():
        model.blocks[0].attn.indexer.wq.weight.zero_()  # every ReLU is of 0
    x = tokens(2, 24)
    x[0, [0, 9, 11]] = EOT
    place = torch.arange(24)
    window = place > place[:, None] - 5
    positions, mask = dense.positions_and_mask(x)
    if mask is None:
        mask = place <= place[:, None]
    dense.positions_and_mask = lambda *_: (positions, mask & window)
    want = dense(x)
    torch.testing.assert_close(model(x), want, atol=1e-9, rtol=0)
    for lengths, static in (([24], False), ([7, 1, 1, 15], False), ([1] * 24, False), ([4, 1, 18, 1], True)):
        torch.testing.assert_close(run_in_pieces(model, x, lengths, static=static), want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_as_many_keys_as_tokens_are_dense_attention_to_the_bit_and_one_less_is_not(training):
    x = tokens(2, 20)
    x[0, 4] = EOT
    for eot_id in (-1, EOT):
        mla = build("mla", eot_id=eot_id).train(training)
        for options in (dict(index_topk=20), dict(index_topk=10**6), dict(indexer_stage="dense", index_topk=3)):
            model = build("indexer", eot_id=eot_id, **options).train(training)
            mla.load_state_dict({name: p for name, p in model.state_dict().items() if not is_indexer(name)})
            assert torch.equal(model(x), mla(x))
            if not training:
                for lengths in ([20], [9, 1, 1, 9]):
                    assert torch.equal(run_in_pieces(model, x, lengths), run_in_pieces(mla, x, lengths))
        model.config.indexer_stage = "sparse"
        model.config.index_topk = 19
        last = (model(x) - mla(x)).abs().amax(dim=-1)[1]
        assert last[:19].max() < 1e-4 and last[19] > 1e-3


def test_the_first_rows_of_each_document_see_all_of_it():
    model = build("indexer", n_layer=1, eot_id=EOT, **FEW).double()
    dense = build("indexer", n_layer=1, eot_id=EOT, indexer_stage="dense").double()
    x = tokens(1, 30)
    x[0, [0, 12]] = EOT
    far = (model(x) - dense(x)).abs().amax(dim=-1)[0]
    few = [t for t in range(30) if (t if t < 12 else t - 12) < 5]
    assert far[few].max() < 1e-9
    far[few] = 1.0
    assert far.min() > 1e-6


def test_a_stage_is_changed_on_a_built_model_and_in_the_middle_of_a_text():
    sparse = build("indexer", **FEW).double()
    dense = build("indexer", indexer_stage="dense", **FEW).double()
    x, y = tokens(2, 20), tokens(2, 20, seed=2)
    assert (sparse(x) - dense(x)).abs().max() > 1e-3
    cache = dense.new_cache(2, 20)
    dense(x[:, :12], cache=cache)
    dense.config.indexer_stage = "sparse"
    assert torch.equal(dense(x), sparse(x))
    assert torch.equal(dense.train()(x, y), sparse.train()(x, y))
    dense.eval()(x[:, 12:], cache=cache)
    torch.testing.assert_close(cache.index_k[0], filled(sparse.eval(), x).index_k[0])
    assert sparse.blocks[0].attn.keys_seen(20) == dense.blocks[0].attn.keys_seen(20)


# ---- the cache -------------------------------------------------------------------------------------------------------


def filled(model, x):
    cache = model.new_cache(*x.shape)
    model(x, cache=cache)
    return cache


CONTRACT = {
    "cached": (test_models.test_cached_logits_equal_full_ones_for_every_split_of_prefill_and_decode, EOT),
    "static": (test_models.test_a_static_cache_gives_the_same_logits_from_shapes_that_never_change, EOT),
    "rewind": (test_models.test_a_rewound_cache_goes_on_as_if_the_forgotten_had_never_been_or_refuses, False),
    "branch": (test_models.test_a_branch_is_a_copy_that_shares_nothing, False),
}


@pytest.mark.parametrize("contract", CONTRACT)
@pytest.mark.parametrize("K", [1, 5])
def test_few_keys_keep_the_contract(contract, K, monkeypatch):
    monkeypatch.setattr(test_models, "build", lambda *a, **more: build(*a, index_topk=K, **more))
    test, argument = CONTRACT[contract]
    test("indexer", argument)


def test_rows_with_padding_choose_among_their_own_tokens():
    model = build("indexer", **FEW).double()
    x, pad = tokens(3, 24), torch.tensor([0, 3, 7])
    for lengths in ([24], [8, 9, 7], [10] + [1] * 14):
        got = run_in_pieces(model, x, lengths, pad)
        for row, n in enumerate(pad.tolist()):
            torch.testing.assert_close(got[row, n:], model(x[row : row + 1, n:])[0], atol=1e-9, rtol=0)


def test_a_token_leaves_an_indexer_key_in_the_cache_too_and_no_key_that_is_not_chosen_is_touched():
    model = build("indexer", n_layer=1, **FEW).double()
    c, x = model.config, tokens(1, 16)
    cache = filled(model, x)
    numbers = c.kv_rank + c.rope_dim + c.index_dim
    assert sum(held.numel() for held in cache_tensors(cache)) == 16 * numbers
    assert cache.bytes_per_token() == 8 * numbers == 2 * flops.cache_bytes_per_token("indexer", c, 4)
    want = model(x)
    indexer = model.blocks[0].attn.indexer
    scores = []
    indexer.register_forward_hook(lambda module, inputs, output: scores.append(output))
    for T in (1, 4):
        cache.rewind(16 - T)
        model(x[:, -T:], cache=cache.branch(1))
        causal = torch.ones(T, 16, dtype=torch.bool).tril(16 - T)
        chosen = (choose(scores.pop(), causal, 5) & causal).any(dim=1)[0]
        assert 5 <= chosen.sum() < 16
        cache.kv[0][0, ~chosen] = torch.nan
        torch.testing.assert_close(model(x[:, -T:], cache=cache), want[:, -T:], atol=1e-9, rtol=0)
        cache = filled(model, x)
        scores.clear()


# ---- what the indexer learns from ------------------------------------------------------------------------------------


def slow_losses(model, x):
    """Returns the KL of each layer, from the scores and the queries, keys and masks of its attention."""
    of_scores, of_attention = [], []
    for block in model.blocks:
        attend = block.attn.attend
        block.attn.attend = lambda *given, attend=attend: of_attention.append(given) or attend(*given)
        block.attn.indexer.register_forward_hook(lambda module, inputs, output: of_scores.append(output))
    model(x)
    B, T = x.shape
    losses = []
    for scores, (q, k, _, mask) in zip(of_scores, of_attention, strict=True):
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool).tril()
        mask = mask.expand(B, 1, T, T)[:, 0]
        total = 0.0
        for b, t in [(b, t) for b in range(B) for t in range(T)]:
            seen = mask[b, t]
            attention = [(k[b, h, seen] @ q[b, h, t] * model.blocks[0].attn.scale).softmax(dim=0) for h in range(4)]
            p = sum(attention) / sum(a.sum() for a in attention)
            total += F.kl_div(scores[b, t, seen].log_softmax(dim=0), p, reduction="sum")
        losses.append(total / (B * T))
    return losses


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_the_loss_of_the_indexer_is_the_kl_of_what_attention_sees_in_its_stage(stage, eot_id):
    model = build("indexer", indexer_stage=stage, eot_id=eot_id, **FEW).double().train()
    x = tokens(2, 14)
    x[0, 6] = EOT
    losses, auxiliary = model(x, x, per_token=True)
    with torch.no_grad():
        want = slow_losses(model, x)
    assert min(want) > 0.01
    torch.testing.assert_close(auxiliary, sum(want), atol=1e-9, rtol=1e-9)
    assert model.metrics() == {"indexer_kl": pytest.approx(sum(want).item() / 2)}
    torch.testing.assert_close(model(x, x), model.lm_loss(hidden(model, x), x) + auxiliary, atol=1e-9, rtol=1e-9)


def hidden(model, x):
    found = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: found.append(output))
    model(x)
    hook.remove()
    return found[0]


def gradients(loss, model, wanted):
    """Returns those of the parameters whose names are wanted; None where there is no way to them."""
    parameters = [p for name, p in model.named_parameters() if wanted(name)]
    return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("per_token", [False, True])
def test_in_the_dense_stage_all_but_the_indexer_has_no_gradient(per_token):
    model = build("indexer", indexer_stage="dense", eot_id=EOT).train()
    x, y = tokens(2, 40), tokens(2, 40, seed=2)
    loss = model(x, y)
    if per_token:
        losses, auxiliary = model(x, y, per_token=True)
        loss = losses.mean() + auxiliary
    loss.backward()
    for name, p in model.named_parameters():
        if is_indexer(name):
            assert p.grad.abs().sum() > 0, name
        else:
            assert p.grad is None, name  # as good as 0, and the optimizer leaves the weight alone: no weight decay
    assert model.eval()(x, y).requires_grad  # of a loss that is no training


def test_in_the_sparse_stage_the_indexer_learns_from_the_kl_alone_and_all_else_from_the_text_alone():
    model = build("indexer", eot_id=EOT, **FEW).train()
    x, y = tokens(2, 40), tokens(2, 40, seed=2)
    losses, auxiliary = model(x, y, per_token=True)
    assert gradients(losses.mean(), model, is_indexer) == (None,) * 10
    rest = gradients(auxiliary, model, lambda name: not is_indexer(name))
    assert set(rest) == {None}
    for of_kl, of_all in zip(gradients(auxiliary, model, is_indexer), gradients(model(x, y), model, is_indexer)):
        assert of_kl.abs().sum() > 0
        torch.testing.assert_close(of_kl, of_all)


def held_by_the_chosen(model, x):
    """Returns the share of dense attention that lies on the keys that the indexer would choose, in the first layer."""
    given = []
    attn = model.blocks[0].attn
    attn.attend = lambda *inputs: given.append(inputs) or type(attn).attend(attn, *inputs)
    hook = attn.indexer.register_forward_hook(lambda module, inputs, output: given.append(output))
    with torch.no_grad():
        model(x)
    hook.remove()
    del attn.attend
    scores, (q, k, *_) = given
    causal = torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()
    p = (q @ k.transpose(2, 3) * attn.scale).masked_fill(~causal, -torch.inf).softmax(dim=-1).mean(dim=1)
    return (p * choose(scores, causal.expand_as(scores), 5))[:, 5:].sum(dim=-1).mean()


def test_an_indexer_that_has_learned_chooses_the_keys_that_attention_goes_to():
    model = build("indexer", indexer_stage="dense").train()
    x = tokens(8, 32)
    before = held_by_the_chosen(model, x)
    kept = {name: p.clone() for name, p in model.named_parameters() if not is_indexer(name)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.5)
    kl = []
    for _ in range(60):
        loss = model(x, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kl.append(model.metrics()["indexer_kl"])
    assert kl[-1] < 0.5 * kl[0]
    assert held_by_the_chosen(model, x) > before + 0.1
    assert all(torch.equal(model.get_parameter(name), p) for name, p in kept.items())


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "T, options",
    [(4, FEW), (40, FEW), (9, dict(indexer_stage="dense")), (40, dict(q_rank=0, n_index_head=3, index_dim=9))],
)
def test_attention_costs_the_chosen_keys_and_the_indexer_all(T, options):
    c = build("indexer", **options).config
    L, H, R, N, D, M = c.n_layer, c.n_head, c.kv_rank, c.nope_dim, c.rope_dim, c.v_dim
    J, Z, C = c.n_index_head, c.index_dim, c.n_embd
    key = 2 * H * (N + D) + 2 * H * M  # FLOPs of one query and one key: score and sum
    index_key = 2 * J * Z + 2 * J
    K = min(T, c.index_topk) if c.indexer_stage == "sparse" else T
    computed = flops.forward_flops("indexer", c, T)
    assert computed["attn.indexer"] == L * 2 * ((c.q_rank or C) * J * Z + C * Z + C * J)
    assert computed["attn.indexer between tokens"] == L * T * index_key
    assert computed["attn.indexer_loss between tokens"] == L * T * 2 * H * (N + D)
    assert computed["attn between tokens"] == L * T * key
    chosen = flops.forward_flops("indexer", c, T, causal=True)["attn between tokens"]
    assert chosen == pytest.approx(L * key * sum(min(t + 1, K) for t in range(T)) / T)
    decoded = flops.decode_flops("indexer", c, T)
    absorbed = 2 * H * N * R + 2 * H * R * M + 4 * K * H * (R + D)
    assert decoded["attn between tokens"] == L * absorbed
    assert decoded.get("attn.indexer between tokens", 0) == L * T * index_key * (K < T)
    assert flops.parameters("indexer", c)["attn.indexer"] * 2 == computed["attn.indexer"]


def test_decoding_far_beyond_the_chosen_keys_costs_them_and_the_scores(monkeypatch):
    monkeypatch.setattr(flops, "LONGEST_RUN", 16)
    c = build("indexer", index_topk=30, block_size=20000).config
    decoded = flops.decode_flops("indexer", c, 20000)
    assert decoded["attn between tokens"] == flops.decode_flops("indexer", c, 30)["attn between tokens"]
    scores = c.n_layer * 20000 * 2 * c.n_index_head * (c.index_dim + 1)
    assert decoded["attn.indexer between tokens"] == pytest.approx(scores, rel=1e-12)


# ---- transformers ----------------------------------------------------------------------------------------------------


NAMES = {
    "blocks.{}.attn.indexer.wq": "model.layers.{}.self_attn.indexer.wq_b",
    "blocks.{}.attn.indexer.wk": "model.layers.{}.self_attn.indexer.wk",
    "blocks.{}.attn.indexer.k_norm": "model.layers.{}.self_attn.indexer.k_norm",
    "blocks.{}.attn.indexer.w_head": "model.layers.{}.self_attn.indexer.weights_proj",
}


def deepseek_pair(rope, K):
    """Returns DeepSeek-V3.2 with random weights, no experts, and our model with the same, both in fp64."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    rope_parameters = ROPES[rope]
    scaling = dict(rope_theta=1e6)
    if rope == "yarn":
        rope_parameters = ROPES[rope] | dict(mscale=1.0, mscale_all_dim=1.0)
        scaling = dict(rope_scaling="yarn", rope_factor=4.0, rope_original=64)
    config = transformers.DeepseekV32Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, first_k_dense_replace=2,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=20, q_lora_rank=28, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=24, index_n_heads=8, index_head_dim=14, index_topk=K,
        rope_parameters=rope_parameters, max_position_embeddings=256, rms_norm_eps=1e-2, initializer_range=0.2,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.DeepseekV32ForCausalLM(config).eval().double()
    for p in theirs.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    config = model_indexer.GPTConfig(
        vocab_size=97, block_size=256, n_embd=32, n_inner=64, n_layer=2, n_head=4, kv_rank=20, q_rank=28, nope_dim=16,
        rope_dim=8, v_dim=24, n_index_head=8, index_dim=14, index_topk=K, norm_eps=1e-2, tie_embeddings=False,
        **scaling,
    )  # fmt: skip
    ours = model_indexer.GPT(config).double().eval()
    weights = theirs.state_dict()
    stored = hf.stored_weights(ours, replace(hf.DEEPSEEK_V3, names=hf.DEEPSEEK_V3.names | NAMES))
    assert stored.keys() == weights.keys()
    with torch.no_grad():
        for name, place in stored.items():
            place.to_ours(weights[name])
    return theirs, ours


@pytest.mark.parametrize("rope, K", [("plain", 4), ("yarn", 30), ("plain", 70)])
def test_logits_and_gradients_are_those_of_deepseek_v3_2(rope, K):
    theirs, ours = deepseek_pair(rope, K)
    x, y = tokens(2, 60), tokens(2, 60, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        lift(patch)
        want = theirs(x).logits
    assert want.std() > 0.5
    torch.testing.assert_close(ours(x), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.train()(x), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(run_in_pieces(ours.eval(), x, [20, 1, 1, 37, 1]), want, atol=1e-5, rtol=0)
    loss = F.cross_entropy(want.flatten(0, 1), y.flatten())
    want = torch.autograd.grad(loss, theirs.get_input_embeddings().weight)[0]
    got = torch.autograd.grad(ours.train()(x, y), ours.embed.weight)[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    ours.config.indexer_stage = "dense"  # which has other logits where there is a choice
    assert ((ours.eval()(x) - theirs(x).logits).abs().max() > 1e-2) == (K < 60)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(index_topk=0), "index_topk=0 is below 1: try 256"),
        (dict(n_index_head=0), "n_index_head=0 is below 1: try 8"),
        (dict(index_dim=6), "index_dim=6 has no room for rope_dim=8: try 8"),
        (dict(indexer_stage="warm"), "indexer_stage='warm' is unknown: try dense or sparse"),
    ],
)
def test_what_makes_no_model_is_refused_with_the_numbers(options, says):
    with pytest.raises(ValueError, match=says):
        build("indexer", **options)
