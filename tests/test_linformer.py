"""What is special to model_linformer.py: windows and their slots, what a query sees, the cache, and its cost."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flops
import model_linformer
from tests import test_models
from tests.test_models import run_in_pieces
from tests.tiny import EOT, build, cache_tensors, tokens

# ---- what a query sees -----------------------------------------------------------------------------------------------


def document_starts(x):
    """Returns for each token of a list the place where its document begins."""
    return [max([s for s in range(t + 1) if x[s] == EOT], default=0) for t in range(len(x))]


def slow_loop(attn, q, k, v, starts):
    """Returns the attention (T, H, D) of a text's q (T, H, D) to k, v (T, G, D), one query and one slot at a time."""
    E, Fv = attn.w_pool_k.weight, attn.w_pool_v.weight
    R, W = E.shape
    T, H, D = q.shape
    shared = H // k.size(1)
    y = torch.zeros_like(q)
    for t in range(T):
        first = starts[t] + (t - starts[t]) // W * W  # of the window of t
        for h in range(H):
            g = h // shared
            keys = [k[s, g] for s in range(first, t + 1)]
            values = [v[s, g] for s in range(first, t + 1)]
            for begin in range(starts[t], first, W):
                for r in range(R):
                    keys.append(sum(E[r, j] * k[begin + j, g] for j in range(W)))
                    values.append(sum(Fv[r, j] * v[begin + j, g] for j in range(W)))
            scores = torch.stack([q[t, h] @ key / D**0.5 for key in keys])
            y[t, h] = scores.softmax(dim=0) @ torch.stack(values)
    return y


@pytest.mark.parametrize("window, n_slot", [(4, 2), (3, 1), (1, 1), (18, 2)])
def test_attention_is_that_of_a_slow_loop_over_the_keys_and_slots_that_are_seen(window, n_slot):
    model = build("linformer", window=window, n_slot=n_slot, eot_id=EOT).double()
    attn = model.blocks[0].attn
    x = tokens(2, 19)
    x[0, [0, 2, 9, 10]] = x[1, 13] = EOT  # windows that are cut off, and one that ends where its document does
    positions, mask = model.positions_and_mask(x)
    rope = model_linformer.rope_cos_sin(positions, model.config)
    torch.manual_seed(0)
    u = torch.randn(2, 19, 64, dtype=torch.float64)
    q = attn.wq(u).view(2, 19, 4, 16)
    k = attn.wk(u).view(2, 19, 2, 16)
    v = attn.wv(u).view(2, 19, 2, 16)
    q, k = attn.rotate(q, k, rope)
    got = attn(u, rope, mask)
    for row in range(2):
        want = slow_loop(attn, q[row], k[row], v[row], document_starts(x[row].tolist()))
        torch.testing.assert_close(got[row], attn.wo(want.flatten(1)), atol=1e-12, rtol=1e-10)


def with_slots_that_are_the_tokens(model):
    """The model, with each slot the token of the same number in its window."""
    with torch.no_grad():
        for block in model.blocks:
            block.attn.w_pool_k.weight.copy_(torch.eye(model.config.window))
            block.attn.w_pool_v.weight.copy_(torch.eye(model.config.window))
    return model


@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_as_many_slots_as_tokens_can_be_full_attention_and_begin_as_it(eot_id):
    fresh = build("linformer", bold=False, window=4, n_slot=4)
    ours = with_slots_that_are_the_tokens(build("linformer", window=4, n_slot=4, eot_id=eot_id)).double()
    assert torch.equal(fresh.blocks[0].attn.w_pool_k.weight, torch.eye(4))
    dense = build("baseline", eot_id=eot_id).double()
    dense.load_state_dict({name: p for name, p in ours.state_dict().items() if "pool" not in name})
    x = tokens(2, 30)
    x[0, [7, 8]] = x[1, 13] = EOT
    torch.testing.assert_close(ours(x), dense(x), atol=1e-9, rtol=0)
    torch.testing.assert_close(run_in_pieces(ours, x, [9, 1, 20]), dense(x), atol=1e-9, rtol=0)
    parameters = ["blocks.0.attn.wk.weight", "embed.weight"]
    ours(x, x).backward()
    dense(x, x).backward()
    for name in parameters:
        torch.testing.assert_close(ours.get_parameter(name).grad, dense.get_parameter(name).grad, atol=1e-9, rtol=1e-7)


def test_a_slot_begins_as_the_mean_of_its_part_of_the_window():
    pool = build("linformer", bold=False, window=6, n_slot=2).blocks[1].attn.w_pool_v
    k = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(pool.double()(k), torch.stack((k[:3].mean(), k[3:].mean())))


# ---- the future ------------------------------------------------------------------------------------------------------


def linformer_2020(attn, q, k, v, E):
    """Returns the attention of the paper (T, H, D): all T keys are pooled by E (slots, T), and all queries see that."""
    k = (E @ k.transpose(0, 1)).repeat_interleave(2, dim=0)  # (H, slots, D)
    v = (E @ v.transpose(0, 1)).repeat_interleave(2, dim=0)  # (H, slots, D)
    p = (q.transpose(0, 1) @ k.transpose(1, 2) / 4).softmax(dim=-1)  # (H, T, slots)
    return (p @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [11, 12, 15])
def test_the_papers_slots_show_the_future_and_these_do_not_to_the_bit(last, dtype):
    """A later token is in every slot of the paper. Here it changes no bit of what came before it."""
    T = 24
    attn = build("linformer").blocks[0].attn.to(dtype)
    model = build("linformer").to(dtype)
    torch.manual_seed(0)
    u = torch.randn(1, T, 64, dtype=dtype)
    changed = u.clone()
    changed[:, last + 1 :] += torch.randn(1, T - last - 1, 64, dtype=dtype)
    positions, mask = model.positions_and_mask(tokens(1, T))
    rope = model_linformer.rope_cos_sin(positions, model.config)
    E = torch.randn(8, T, dtype=dtype)
    papers, ours = [], []
    for each in (u, changed):
        q, k = attn.rotate(attn.wq(each).view(1, T, 4, 16), attn.wk(each).view(1, T, 2, 16), rope)
        papers.append(linformer_2020(attn, q[0], k[0], attn.wv(each).view(T, 2, 16), E))
        ours.append(attn(each, rope, mask)[0])
    before = slice(0, last + 1)
    assert (papers[0] - papers[1])[before].abs().amax(dim=(1, 2)).min() > 1e-3  # each query has seen what comes
    assert torch.equal(ours[0][before], ours[1][before])
    assert (ours[0] - ours[1])[last + 1 :].abs().amax(dim=1).min() > 1e-3


def influences(model, x):
    """Returns (T, T), True where the logits of a token depend on the embedding of another."""
    embedded = model.embed(x).detach().requires_grad_()
    model.embed.forward = lambda idx: embedded
    logits = model(x)[0]
    del model.embed.forward
    rows = [torch.autograd.grad(row.square().sum(), embedded, retain_graph=True)[0][0] for row in logits]
    return torch.stack(rows).abs().sum(dim=-1) > 0


def test_a_token_depends_on_all_of_its_document_up_to_itself_and_on_nothing_else():
    x = tokens(1, 30)
    x[0, [0, 3, 17]] = EOT
    starts = document_starts(x[0].tolist())
    want = torch.tensor([[starts[t] <= s <= t for s in range(30)] for t in range(30)])
    assert torch.equal(influences(build("linformer", eot_id=EOT).double(), x), want)


def test_long_texts_with_many_masked_slots_have_no_nan_and_no_bit_of_the_future():
    """More masked keys before the first visible one than a fused kernel takes at once."""
    model = build("linformer", n_layer=1, block_size=2100, window=16, n_slot=8)
    x = tokens(1, 2100)
    y = x.clone()
    y[:, 1100:] = tokens(1, 1000, seed=5)
    got = model(x)
    model(x, x).backward()
    assert got.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(got[:, :1100], model(y)[:, :1100])


# ---- the cache -------------------------------------------------------------------------------------------------------


CONTRACT = {
    "cached": (test_models.test_cached_logits_equal_full_ones_for_every_split_of_prefill_and_decode, EOT),
    "static": (test_models.test_a_static_cache_gives_the_same_logits_from_shapes_that_never_change, EOT),
    "rewind": (test_models.test_a_rewound_cache_goes_on_as_if_the_forgotten_had_never_been_or_refuses, False),
    "branch": (test_models.test_a_branch_is_a_copy_that_shares_nothing, False),
    "trained": (test_models.test_every_parameter_is_trained_and_in_exactly_one_optimizer_group, EOT),
}


@pytest.mark.parametrize("contract", CONTRACT)
@pytest.mark.parametrize("window, n_slot", [(1, 1), (6, 2)])
def test_other_windows_keep_the_contract(contract, window, n_slot, monkeypatch):
    monkeypatch.setattr(test_models, "build", lambda *a, **more: build(*a, window=window, n_slot=n_slot, **more))
    test, argument = CONTRACT[contract]
    test("linformer", argument)


@pytest.mark.parametrize("static", [False, True])
def test_many_documents_in_chunks_of_any_length_leave_the_right_slots(static):
    model = build("linformer", eot_id=EOT, n_layer=3).double()
    x = tokens(3, 60)
    x[0, [0, 2, 3, 9, 30]] = x[1, [5, 6, 7, 25, 26, 27, 28]] = EOT  # documents shorter than a window too
    full = model(x)
    for chunks in ([60], [1, 2, 4, 8, 45], [30, 1, 29], [26, 2, 1, 31], [1] * 60, [5, 1, 3, 9, 7, 3, 32]):
        torch.testing.assert_close(run_in_pieces(model, x, chunks, static=static), full, atol=1e-9, rtol=0)


@pytest.mark.parametrize("lengths", [[60], [7, 1, 30, 22]])
def test_whole_windows_are_written_to_places_of_their_own_and_the_others_to_the_last(lengths):
    """Which of two writes to one place comes last is not said on a GPU."""
    W = 4
    cache = build("linformer", eot_id=EOT, window=W).new_cache(20, 60)
    x = torch.where(torch.rand(20, 60, generator=torch.Generator().manual_seed(0)) < 0.2, EOT, tokens(20, 60))
    for new in x.split(lengths, dim=1):
        cache.advance(new)
        for row in cache.slot.tolist():
            whole = [slot for slot in row if slot < 60 // W]
            assert len(set(whole)) == len(whole)
    for row, slot_start in zip(x.tolist(), cache.slot_start.tolist()):
        starts = document_starts(row)
        want = [t - W + 1 for t in range(60) if (t + 1 - starts[t]) % W == 0]
        assert [start for start in slot_start if start >= 0] == want and slot_start[-1] == -1


def test_rows_with_padding_count_their_windows_from_behind_it():
    model = build("linformer").double()
    x, pad = tokens(4, 24), torch.tensor([0, 3, 4, 7])
    for lengths in ([24], [8, 9, 7], [10] + [1] * 14):
        got = run_in_pieces(model, x, lengths, pad)
        for row, n in enumerate(pad.tolist()):
            torch.testing.assert_close(got[row, n:], model(x[row : row + 1, n:])[0], atol=1e-9, rtol=0)


def test_a_cache_that_is_used_again_shows_nothing_of_the_first_text():
    model = build("linformer", eot_id=EOT).double()
    x = tokens(2, 30, seed=4)
    x[:, 5] = EOT  # windows that begin at other places than those of the first text
    cache = model.new_cache(2, 30)
    model(tokens(2, 30), cache=cache)
    cache.rewind(0)
    got = torch.cat([model(x[:, :14], cache=cache), model(x[:, 14:], cache=cache)], dim=1)
    torch.testing.assert_close(got, model(x), atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="the state of the last 4 tokens cannot be rewound from 30 to 29: only to 0"):
        cache.rewind(29)


@pytest.mark.parametrize("window, n_slot", [(4, 2), (16, 1)])
def test_the_cache_holds_one_window_and_the_slots_of_all(window, n_slot):
    model = build("linformer", window=window, n_slot=n_slot, block_size=4096)
    c = model.config
    token = 2 * 4 * c.n_layer * c.n_kv_head * c.head_dim  # a key and a value in fp32
    for max_len in (1, 63, 64, 4096):
        held = sum(x.nbytes for x in cache_tensors(model.new_cache(1, max_len)))
        slots = (max_len // window + 1) * n_slot
        assert held == token * (window + slots) == flops.cache_bytes("linformer", c, max_len, 4)
    assert model.new_cache(1, 64).bytes_per_token() == token * n_slot / window


# ---- what it costs ---------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max([self.elements] + [x.numel() for x in tree_leaves(out) if torch.is_tensor(x)])
        return out


def test_no_tensor_of_a_training_step_is_as_large_as_the_square_of_its_tokens():
    T = 2048
    sizes = dict(n_layer=1, n_embd=16, n_inner=16, n_head=1, n_kv_head=1, head_dim=8, vocab_size=17)
    model = build("linformer", window=64, n_slot=4, block_size=T, **sizes)
    x = torch.randint(17, (1, T))
    with Largest() as largest:
        model(x, x).backward()
    assert largest.elements <= T**2 / 8  # the mask: T (2 W + R T / W) = 256 T


def test_sixteen_times_the_tokens_cost_less_than_twenty_times_the_flops():
    c = model_linformer.GPTConfig(block_size=16384)
    short = flops.training_flops_per_token("linformer", c, 1024)
    long = flops.training_flops_per_token("linformer", c, 16384)
    assert 1 < long / short < 20 / 16
    blocks = 16384 // c.window
    keys = 2 * c.window + c.n_slot * blocks
    between = flops.forward_flops("linformer", c, 16384)["attn between tokens"]
    assert between == 4 * c.n_layer * c.n_head * c.head_dim * keys


@pytest.mark.parametrize("T", [1, 3, 4, 22])
def test_the_causal_count_has_the_keys_and_slots_that_are_seen(T):
    model = build("linformer")
    c = model.config
    _, (_, seen) = model.positions_and_mask(tokens(1, T))
    n = seen.squeeze(1).flatten(0, 1)[:T].sum().item() / T
    assert model.blocks[0].attn.keys_seen(T) == n
    causal = flops.forward_flops("linformer", c, T, causal=True)["attn between tokens"]
    assert causal == pytest.approx(4 * c.n_layer * c.n_head * c.head_dim * n)


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_pooling_and_what_has_ended_are_those_of_deepseek_v4():
    """Its compressor without a gate pools by the softmax of a table; of one for all channels that is a row of E."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    from transformers import DeepseekV4Config

    W, T, D = 4, 22, 16
    rates = {"compressed_sparse_attention": 2, "heavily_compressed_attention": W}
    config = DeepseekV4Config(hidden_size=64, head_dim=D, num_attention_heads=4, compress_rates=rates)
    torch.manual_seed(0)
    theirs = modeling.DeepseekV4HCACompressor(config).double()
    table = torch.randn(W, 1, dtype=torch.float64)
    model = build("linformer", n_slot=1, window=W, n_kv_head=1).double()
    attn = model.blocks[0].attn
    with torch.no_grad():
        theirs.gate_proj.weight.zero_()
        theirs.position_bias.copy_(table.expand(W, D))
        theirs.kv_norm.weight.copy_(1 + 0.3 * torch.randn(D))
        theirs.kv_proj.weight.copy_(attn.wv.weight)
        attn.w_pool_v.weight.copy_(table.softmax(dim=0).T)
    x = torch.randn(2, T, 64, dtype=torch.float64)
    place = torch.arange(T).expand(2, T)
    want, bias = theirs(x, None, place, None, 0)
    _, (starts, seen) = model.positions_and_mask(tokens(2, T))
    v = F.pad(attn.wv(x)[:, None], (0, 0, W, 0))
    slots = attn.pool(attn.w_pool_v, v, starts)[:, :, : T // W, 0]  # without the open window
    # A slot of theirs is then normed and turned by the place where its window begins.
    cos, sin = theirs.rotary_emb(slots, position_ids=place[:, : T // W] * W, layer_type="compress")
    got = modeling.apply_rotary_pos_emb(theirs.kv_norm(slots), cos, sin)
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    # With its window's last token theirs see its slot already; here the token sees the window itself, and the next one
    # begins with the slot.
    ours = seen.view(2, -1, seen.size(-1))[:, :T, 2 * W :][:, 1:, : T // W]
    assert torch.equal(ours, (bias == 0)[:, 0, :-1])


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(window=0), "window=0 is not between 1 and block_size=64"),
        (dict(window=65), "window=65 is not between 1 and block_size=64"),
        (dict(n_slot=0), "n_slot=0 does not divide window=4"),
        (dict(n_slot=3), "n_slot=3 does not divide window=4"),
        (dict(n_slot=8), "n_slot=8 does not divide window=4"),
    ],
)
def test_what_makes_no_model_is_refused_with_the_numbers(options, says):
    with pytest.raises(ValueError, match=says):
        build("linformer", **options)
