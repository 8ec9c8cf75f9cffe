"""What is special to model_sparse.py: blocks by rule and by choice, the mask that they make, and the gathered form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flops
import model_baseline
import model_sparse
from model_sparse import Attention, block_means, blocks_of, choose_blocks, mask_of_blocks
from tests import test_models
from tests.test_models import run_in_pieces
from tests.tiny import EOT, TINY, build, cache_tensors, tokens

MOBA = dict(block_stride=0, n_global_block=0)  # the own block and those of the largest mean
STATIC = dict(n_local_block=2, block_stride=3, n_global_block=1, top_k_block=1)
EVERY = dict(n_local_block=2, block_stride=3, n_global_block=1, top_k_block=3)
CASES = {
    "moba": MOBA | dict(top_k_block=3),
    "own alone": MOBA | dict(top_k_block=1),
    "local and global": STATIC | dict(block_stride=0),
    "local and strided": STATIC | dict(n_global_block=0),
    "rule and choice": EVERY,
    "blocks of one": EVERY | dict(key_block=1),
}
each_case = pytest.mark.parametrize("case", CASES)


def always_gathered(monkeypatch):
    """Lets texts of any length be attended to by the chosen blocks alone."""
    monkeypatch.setattr(Attention, "attend", Attention.attend_gathered)


def attend_masked(self, q, k, v, blocks, slots, chosen):
    return F.scaled_dot_product_attention(q, k, v, mask_of_blocks(blocks, slots, chosen), enable_gqa=True)


def always_masked(monkeypatch):
    monkeypatch.setattr(Attention, "attend", attend_masked)


FORMS = {"gathered": always_gathered, "masked": always_masked}
each_form = pytest.mark.parametrize("form", FORMS)


def random_heads(T, seed=0, B=2, H=4, G=2, D=8):
    """Returns q (B, H, T, D), k and v (B, G, T, D) in fp64."""
    torch.manual_seed(seed)
    q = torch.randn(B, H, T, D, dtype=torch.float64)
    k = torch.randn(B, G, T, D, dtype=torch.float64)
    v = torch.randn(B, G, T, D, dtype=torch.float64)
    return q, k, v


def document_starts(T, *rows):
    """Returns (B, T), the place where each token's document begins, for documents that begin at 0 and at the places."""
    begins = torch.zeros(len(rows), T, dtype=torch.long)
    for row, places in zip(begins, rows):
        row[list(places)] = torch.tensor(places)
    return begins.cummax(dim=1).values


def attention_of(config, q, k, v, doc_start):
    """Returns what a layer makes of heads, and the mask that it stands for."""
    attn = Attention(config, 0)
    blocks = blocks_of(torch.arange(q.size(2)), doc_start, config)
    slots, chosen = choose_blocks(q, block_means(k, blocks.start, config.key_block), blocks, config)
    return attn.attend(q, k, v, blocks, slots, chosen), mask_of_blocks(blocks, slots, chosen)


# ---- the definition --------------------------------------------------------------------------------------------------


def slow_loop(q, k, v, doc_start, c):
    """Returns attention and its mask from the formula, one query, one head and one block at a time."""
    B, H, T, D = q.shape
    share = H // k.size(1)
    y = torch.zeros_like(q)
    mask = torch.zeros(B, H, T, T, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                first = doc_start[b, t].item()
                own = (t - first) // c.key_block
                static, others = [own], []
                for j in range(own):
                    places = range(first + j * c.key_block, first + (j + 1) * c.key_block)
                    strided = c.block_stride > 0 and (own - j) % c.block_stride == 0
                    if own - j < c.n_local_block or j < c.n_global_block or strided:
                        static.append(j)
                    else:
                        mean = sum(k[b, h // share, s] for s in places) / c.key_block
                        others.append((torch.dot(q[b, h, t], mean).item(), j))
                best = sorted(others, reverse=True)[: c.top_k_block - 1]
                seen = set(static) | {j for _, j in best}
                places = [s for s in range(first, t + 1) if (s - first) // c.key_block in seen]
                mask[b, h, t, places] = True
                keys, values = k[b, h // share, places], v[b, h // share, places]
                y[b, h, t] = (keys @ q[b, h, t] / math.sqrt(D)).softmax(dim=0) @ values
    return y, mask


@each_case
@each_form
def test_attention_is_that_of_a_slow_loop_over_queries_heads_and_blocks(case, form, monkeypatch):
    FORMS[form](monkeypatch)
    c = build("sparse", **CASES[case]).config
    T = 31  # the last block is not complete
    q, k, v = random_heads(T)
    doc_start = document_starts(T, [0], [1, 3, 9, 10])
    got, mask = attention_of(c, q, k, v, doc_start)
    want, seen = slow_loop(q, k, v, doc_start, c)
    assert torch.equal(mask, seen)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@each_case
def test_a_layer_is_that_of_the_slow_loop(case):
    model = build("sparse", n_layer=1, **CASES[case]).double()
    c, attn = model.config, model.blocks[0].attn
    torch.manual_seed(0)
    x = torch.randn(2, 31, c.n_embd, dtype=torch.float64)
    positions, blocks = model.positions_and_mask(tokens(2, 31))
    rope = model_sparse.rope_cos_sin(positions, c)
    q, k = attn.rotate(attn.wq(x).view(2, 31, 4, 16), attn.wk(x).view(2, 31, 2, 16), rope)
    v = attn.wv(x).view(2, 31, 2, 16)
    want, _ = slow_loop(*(each.transpose(1, 2) for each in (q, k, v)), torch.zeros(2, 31, dtype=torch.long), c)
    want = attn.wo(want.transpose(1, 2).reshape(2, 31, -1))
    torch.testing.assert_close(attn(x, rope, blocks), want, atol=1e-12, rtol=0)


def test_static_blocks_follow_their_formulas():
    c = model_sparse.GPTConfig(block_size=32, key_block=4, top_k_block=1, n_local_block=2, block_stride=3)
    q, k, v = random_heads(32, B=1, H=1, G=1)
    _, mask = attention_of(c, q, k, v, document_starts(32, [0]))
    last = mask[0, 0, 31].view(8, 4).all(dim=-1)  # which of the blocks the last query sees
    assert last.nonzero().flatten().tolist() == [1, 4, 6, 7]  # 6 and 3 before its own, and the two last
    c.n_global_block = 1
    _, mask = attention_of(c, q, k, v, document_starts(32, [0]))
    assert mask[0, 0, 31].view(8, 4).all(dim=-1).nonzero().flatten().tolist() == [0, 1, 4, 6, 7]


# ---- the gathered form -----------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("T", [1, 3, 4, 37, 64])
def test_the_gathered_form_and_its_gradients_are_those_of_the_mask(case, T, monkeypatch):
    c = build("sparse", **CASES[case]).config
    doc_start = document_starts(T, [0], [min(T - 1, 2), min(T - 1, 13)])
    results = {}
    for form in FORMS:
        with monkeypatch.context() as patched:
            FORMS[form](patched)
            leaves = [x.requires_grad_() for x in random_heads(T)]
            y, mask = attention_of(c, *leaves, doc_start)
        q, k, v = random_heads(T)
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True))
        torch.manual_seed(2)
        results[form] = [y, *torch.autograd.grad(y, leaves, torch.randn_like(y))]
    for got, want in zip(results["gathered"], results["masked"]):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_all_queries_may_choose_the_same_block():
    c = build("sparse", **MOBA, top_k_block=2).config
    q, k, v = random_heads(64)
    k[:, :, 8:12] += 10 * q.mean()  # and none are left for the others
    q, k = q.abs(), torch.cat((k[:, :, :8], k[:, :, 8:12].abs() + 9, k[:, :, 12:]), dim=2)
    blocks = blocks_of(torch.arange(64), document_starts(64, [0], [0]), c)
    slots, chosen = choose_blocks(q, block_means(k, blocks.start, 4), blocks, c)
    assert (slots[:, :, 12:] == 2).all() and chosen[:, :, 4:].all()
    got = Attention(c, 0).attend_gathered(q, k, v, blocks, slots, chosen)
    want = F.scaled_dot_product_attention(q, k, v, mask_of_blocks(blocks, slots, chosen), enable_gqa=True)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_a_long_text_is_gathered_and_a_short_one_masked(monkeypatch):
    calls = []
    own = Attention.attend_gathered
    monkeypatch.setattr(Attention, "attend_gathered", lambda *args: calls.append(args[1].size(2)) or own(*args))
    model = build("sparse", **MOBA, n_layer=1, block_size=512)
    model(tokens(1, 16))
    assert calls == []
    model(tokens(1, 512))
    cache = model.new_cache(1, 512)
    model(tokens(1, 511), cache=cache)
    model(tokens(1, 1), cache=cache)
    assert calls == [512, 511, 1]


class Largest(TorchDispatchMode):
    """Finds the largest tensor that anything under it returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if torch.is_tensor(x) and x._base is None]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_memory_is_bounded_and_queries_that_are_attended_to_in_turn_give_the_same(monkeypatch):
    model = build("sparse", **MOBA, n_layer=1, block_size=512).double()
    x = tokens(1, 512)
    with torch.no_grad():
        want = model(x)
        monkeypatch.setattr(model_sparse, "QUERIES_AT_ONCE", 8)
        torch.testing.assert_close(model(x), want, atol=1e-9, rtol=0)
        attn = model.blocks[0].attn
        positions, blocks = model.positions_and_mask(x)
        rope = model_sparse.rope_cos_sin(positions, model.config)
        with Largest() as largest:
            attn(torch.randn(1, 512, 64, dtype=torch.float64), rope, blocks)
    assert largest.numbers <= 512 * 4 * 16  # the queries, and no scores


# ---- traps -----------------------------------------------------------------------------------------------------------


@each_form
def test_no_query_is_led_by_a_block_that_holds_later_tokens(form, monkeypatch):
    FORMS[form](monkeypatch)
    c = build("sparse", **MOBA, top_k_block=2).config
    q, k, v = random_heads(32)
    blocks = blocks_of(torch.arange(32), document_starts(32, [0], [0]), c)
    before = choose_blocks(q, block_means(k, blocks.start, 4), blocks, c)
    changed = k.clone()
    changed[:, :, 18:20] = 1000 * q[:, ::2, 17:18]  # later tokens of the block of 17, which would lead it there
    after = choose_blocks(q, block_means(changed, blocks.start, 4), blocks, c)
    for a, b in zip(before, after):
        assert torch.equal(a[:, :, :20], b[:, :, :20])
    y = attention_of(c, q, k, v, document_starts(32, [0], [0]))[0]
    assert torch.equal(attention_of(c, q, changed, v, document_starts(32, [0], [0]))[0][:, :, :18], y[:, :, :18])
    assert (after[0][:, ::2, 20:, 0] == 4).any()  # those behind it are led there


@each_form
def test_early_queries_with_fewer_blocks_than_they_may_choose_see_all_that_is_there(form, monkeypatch):
    FORMS[form](monkeypatch)
    c = build("sparse", **MOBA, top_k_block=5).config
    q, k, v = random_heads(40)
    got, mask = attention_of(c, q, k, v, document_starts(40, [0], [0]))
    assert got.isfinite().all()
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got[:, :, :20], dense[:, :, :20], atol=1e-12, rtol=0)  # five blocks of four
    assert (got - dense)[:, :, 20:].abs().amax(dim=-1).min() > 1e-6
    assert torch.equal(mask.any(dim=-1), torch.ones_like(mask[..., 0]))


def test_the_own_block_counts_among_the_top_k():
    q, k, v = random_heads(40)
    for top_k in (1, 2, 3):
        c = build("sparse", **MOBA, top_k_block=top_k).config
        mask = attention_of(c, q, k, v, document_starts(40, [0], [0]))[1]
        n_blocks = mask.unflatten(3, (10, 4)).any(dim=-1).sum(dim=-1)  # (B, H, T)
        own = torch.arange(40) // 4
        assert (n_blocks == (own + 1).clamp(max=top_k)).all()
        assert mask.unflatten(3, (10, 4)).any(dim=-1).gather(3, own[None, None, :, None].expand(2, 4, 40, 1)).all()


@each_form
def test_with_top_k_1_each_block_attends_to_itself(form, monkeypatch):
    FORMS[form](monkeypatch)
    c = build("sparse", **MOBA, top_k_block=1).config
    q, k, v = random_heads(40)
    got = attention_of(c, q, k, v, document_starts(40, [0], [0]))[0]
    apart = [x.unflatten(2, (10, 4)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*apart, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, want.unflatten(0, (2, 10)).transpose(1, 2).flatten(2, 3), atol=1e-12, rtol=0)


@each_form
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_with_as_many_blocks_as_there_are_it_is_the_baseline(form, eot_id, monkeypatch):
    FORMS[form](monkeypatch)
    model = build("sparse", **MOBA, top_k_block=16, eot_id=eot_id).double()
    sizes = TINY["baseline"] | dict(vocab_size=97, block_size=64, eot_id=eot_id)
    dense = model_baseline.GPT(model_baseline.GPTConfig(**sizes)).double()
    dense.load_state_dict(model.state_dict())
    x = tokens(2, 61)
    x[0, 21] = EOT
    torch.testing.assert_close(model(x), dense(x), atol=1e-10, rtol=0)
    model.config.top_k_block = 15
    assert (model(x) - dense(x)).abs().max() > 1e-6


def test_a_built_model_takes_another_choice_and_equals_one_built_with_it():
    model, other = build("sparse", **MOBA).double(), build("sparse", **EVERY).double()
    x = tokens(2, 40)
    assert (model(x) - other(x)).abs().max() > 1e-3
    for field, value in EVERY.items():
        setattr(model.config, field, value)
    assert torch.equal(model(x), other(x))
    assert torch.equal(run_in_pieces(model, x, [9, 1, 30]), run_in_pieces(other, x, [9, 1, 30]))


def test_each_head_chooses_for_itself():
    c = build("sparse", **MOBA, top_k_block=2).config
    q, k, v = random_heads(40)
    mask = attention_of(c, q, k, v, document_starts(40, [0], [0]))[1]
    assert not torch.equal(mask[:, 0], mask[:, 1])  # two heads of one key


# ---- the cache -------------------------------------------------------------------------------------------------------


CONTRACT = {
    "causal": (test_models.test_changing_a_token_leaves_earlier_logits_unchanged, EOT),
    "cached": (test_models.test_cached_logits_equal_full_ones_for_every_split_of_prefill_and_decode, EOT),
    "static": (test_models.test_a_static_cache_gives_the_same_logits_from_shapes_that_never_change, EOT),
    "rewind": (test_models.test_a_rewound_cache_goes_on_as_if_the_forgotten_had_never_been_or_refuses, False),
    "branch": (test_models.test_a_branch_is_a_copy_that_shares_nothing, False),
    "documents": (test_models.test_packed_documents_have_the_logits_of_each_alone, None),
    "trained": (test_models.test_every_parameter_is_trained_and_in_exactly_one_optimizer_group, EOT),
}


@pytest.mark.parametrize("contract", CONTRACT)
def test_the_gathered_form_keeps_the_contract(contract, monkeypatch):
    always_gathered(monkeypatch)
    options = MOBA | dict(key_block=2, top_k_block=2)
    monkeypatch.setattr(test_models, "build", lambda *a, **more: build(*a, **options | more))
    test, argument = CONTRACT[contract]
    test("sparse") if argument is None else test("sparse", argument)


def test_the_gathered_form_compiles_to_one_graph(monkeypatch):
    always_gathered(monkeypatch)
    model, x = build("sparse", **MOBA, n_layer=1), tokens(2, 16)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", dynamic=False, fullgraph=True)(x), model(x))


@each_form
def test_many_documents_in_long_and_short_pieces_have_the_logits_of_all_at_once(form, monkeypatch):
    FORMS[form](monkeypatch)
    model = build("sparse", eot_id=EOT, **MOBA, top_k_block=2).double()
    x = tokens(3, 60)
    x[0, [0, 2, 3, 9, 30]] = x[1, [5, 6, 7, 25, 26, 27, 28]] = EOT
    full = model(x)
    for pieces in ([60], [1, 2, 4, 8, 45], [30, 1, 29], [26, 2, 1, 31], [1] * 60, [3, 4, 5] * 5):
        torch.testing.assert_close(run_in_pieces(model, x, pieces), full, atol=1e-9, rtol=0)


@each_form
def test_rows_with_padding_have_the_blocks_of_the_text_behind_it(form, monkeypatch):
    FORMS[form](monkeypatch)
    model = build("sparse", **MOBA, top_k_block=2).double()
    x, pad = tokens(3, 30), torch.tensor([0, 3, 7])
    for lengths in ([30], [8, 9, 13], [10] + [1] * 20):
        got = run_in_pieces(model, x, lengths, pad)
        for row, n in enumerate(pad.tolist()):
            torch.testing.assert_close(got[row, n:], model(x[row : row + 1, n:])[0], atol=1e-9, rtol=0)


def test_a_decoded_token_reads_its_blocks_and_the_kept_means_and_nothing_else(monkeypatch):
    always_gathered(monkeypatch)
    model = build("sparse", **MOBA, top_k_block=2, n_layer=1).double()
    x = tokens(1, 42)
    want = model(x)[:, -1]
    chosen = []
    own = model_sparse.choose_blocks
    monkeypatch.setattr(model_sparse, "choose_blocks", lambda *args: chosen.append(own(*args)) or chosen[-1])
    cache = model.new_cache(1, 42)
    model(x[:, :41], cache=cache)
    copied = cache.branch(1)
    model(x[:, 41:], cache=copied)
    slots = chosen[-1][0].unique().tolist()
    assert len(slots) <= 4 < 10
    for slot in set(range(10)) - set(slots):
        cache.k[0][:, :, 4 * slot : 4 * slot + 4] = math.nan
        cache.v[0][:, :, 4 * slot : 4 * slot + 4] = math.nan
    torch.testing.assert_close(model(x[:, 41:], cache=cache)[:, -1], want, atol=1e-9, rtol=0)


def test_the_cache_keeps_a_mean_for_each_block_beside_keys_and_values():
    model = build("sparse")
    c = model.config
    cache = model.new_cache(1, 64)
    held = sum(x.nbytes for x in cache_tensors(cache))
    per_token = 4 * c.n_layer * c.n_kv_head * c.head_dim * (2 + 1 / c.key_block)
    assert held == 64 * per_token == flops.cache_bytes("sparse", c, 64, 4)
    assert cache.bytes_per_token() == per_token == flops.cache_bytes_per_token("sparse", c, 4)
    x = tokens(1, 64)
    run_in_pieces(model, x, [64])
    for at in range(0, 64, 16):
        model(x[:, at : at + 16], cache=cache)
    for k, means in zip(cache.k, cache.means):
        torch.testing.assert_close(means, k.unflatten(2, (16, 4)).mean(dim=3))


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("T", [3, 24, 61])
def test_the_keys_that_a_query_sees_are_those_of_the_mask(case, T):
    c = build("sparse", **CASES[case]).config
    q, k, v = random_heads(T)
    mask = attention_of(c, q, k, v, document_starts(T, [0], [0]))[1]
    assert Attention(c, 0).keys_seen(T) == pytest.approx(mask.double().sum(dim=-1).mean().item())


def keys_computed(T, c):
    """Returns with how many keys a query is multiplied on average, by the sizes of what is multiplied."""
    b, N, heads = c.key_block, T // c.key_block, c.n_head // c.n_kv_head
    if 5 * b * c.top_k_block > T:
        return T
    pairs = 0
    for first in range(0, T, 512):
        queries = min(512, T - first)
        w = min(queries, b)
        pairs += -(-queries // w) * w * (w + b - 1)  # with the own block, and what else so many neighbours see
        choices = heads * queries * (c.top_k_block - 1)
        rows = 1 + choices // (2 * N + 1)
        pairs += (N + (choices - N) // rows) * rows * b / heads
    return pairs / T


@pytest.mark.parametrize("T", [16, 502, 4140])
def test_flops_are_those_of_the_keys_computed_and_with_causal_of_the_keys_chosen(T):
    c = build("sparse", **MOBA, block_size=4140, n_layer=3, key_block=4 if T < 4140 else 60).config
    key = 3 * 4 * c.n_head * c.head_dim  # score and sum in three layers
    choosing = 3 * 2 * c.n_head * c.head_dim * (T // c.key_block)  # a score for each mean
    computed = keys_computed(T, c)
    row = "attn between tokens"
    assert flops.forward_flops("sparse", c, T)[row] == pytest.approx(key * computed + choosing)
    seen = flops.forward_flops("sparse", c, T, causal=True)[row]
    assert seen == pytest.approx(key * Attention(c, 0).keys_seen(T) + choosing)
    assert flops.training_flops("sparse", c, T)[row] == pytest.approx(3 * key * computed + choosing)
    assert computed == T or computed < T / 4


def test_what_is_computed_falls_with_what_is_chosen():
    c = build("sparse", **MOBA, block_size=1024, key_block=16, n_layer=1).config
    computed = {}
    for c.top_k_block in (2, 5, 9, 64):
        choosing = 2 * c.n_head * c.head_dim * 64
        found = flops.forward_flops("sparse", c, 1024)["attn between tokens"] - choosing
        computed[c.top_k_block] = found / (4 * c.n_head * c.head_dim)
        assert computed[c.top_k_block] == pytest.approx(keys_computed(1024, c))
    assert computed[64] == 1024
    for n in (5, 9):
        assert computed[n] - computed[2] == pytest.approx(1.5 * 16 * (n - 2), rel=0.1)  # tiles are two thirds full


def test_decoding_far_into_a_text_costs_the_chosen_blocks_and_a_score_for_each_block():
    c = build("sparse", **MOBA, n_layer=1, block_size=4400, key_block=44).config
    key = c.n_layer * 4 * c.n_head * c.head_dim
    found = flops.decode_flops("sparse", c, 4400)["attn between tokens"]
    assert found == key * 3 * 44 + c.n_layer * 2 * c.n_head * c.head_dim * 100


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(key_block=0), "key_block=0"),
        (dict(key_block=5), "block_size=64 is no multiple of key_block=5: try 16"),
        (dict(key_block=128), "block_size=64 is no multiple of key_block=128"),
        (dict(n_local_block=0), "n_local_block=0: a query sees at least its own block"),
        (dict(top_k_block=0), "top_k_block=0 counts the own block"),
        (dict(block_stride=-1), "block_stride=-1 and n_global_block=1 are counts"),
        (dict(n_global_block=-1), "block_stride=4 and n_global_block=-1 are counts"),
    ],
)
def test_what_makes_no_model_is_refused_with_the_numbers(options, says):
    with pytest.raises(ValueError, match=says):
        build("sparse", **options)
