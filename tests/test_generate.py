"""generate.py over every model file: what it says must be what the model's own full forwards say."""

import ast
import random

import pytest
import torch

import generate as generate_module
from generate import (
    CompiledStep,
    ThinkBudget,
    draw,
    draws,
    first_stop,
    generate,
    pick_token,
    rollout,
    stream,
    until_stop,
)
from tests.tiny import EOT, MODELS, ROOT, build, cache_tensors, module, tokens

each_model = pytest.mark.parametrize("name", MODELS)


def test_it_imports_nothing_of_ours():
    roots = set()
    for node in ast.walk(ast.parse((ROOT / "generate.py").read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert not roots & {path.stem for path in ROOT.glob("*")} and "torch" in roots


# ---- prompts, rows and the context -----------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_greedy_tokens_are_the_same_with_and_without_the_cache(name, eot_id):
    model, x = build(name, eot_id=eot_id).double(), tokens(2, 9)
    x[0, 3] = EOT
    cached = generate(model, x, 20, temperature=0)
    assert cached == generate(model, x, 20, temperature=0, use_cache=False)
    longer = torch.cat((x, torch.tensor(cached)), dim=1)
    assert torch.equal(model(longer)[:, 8:-1].argmax(-1), torch.tensor(cached))  # and those of one full forward


def test_behind_a_cache_a_token_is_computed_once_and_without_one_again_for_each_new_one():
    model, lengths = build("baseline"), []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].size(1)))
    generate(model, tokens(1, 5), 4)
    generate(model, tokens(1, 5), 4, use_cache=False)
    assert lengths == [5, 1, 1, 1] + [5, 6, 7, 8]


@each_model
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_a_ragged_batch_continues_each_prompt_as_if_it_were_alone(name, eot_id):
    model = build(name, eot_id=eot_id).double()
    prompts = [tokens(n, seed=n).tolist() for n in (3, 11, 1, 7)]
    prompts[3][2] = EOT
    alone = [generate(model, [p], 12, temperature=0)[0] for p in prompts]
    assert generate(model, prompts, 12, temperature=0) == alone
    assert generate(model, prompts, 12, temperature=0, use_cache=False) == alone


@each_model
def test_a_ragged_batch_goes_past_the_block_as_each_prompt_alone_and_loses_its_padding_first(name):
    model = build(name, block_size=16).double()
    prompts = [tokens(n, seed=n).tolist() for n in (3, 11, 7)]
    alone = [generate(model, [p], 20, temperature=0, crop=True)[0] for p in prompts]
    assert generate(model, prompts, 20, temperature=0, crop=True) == alone


@each_model
def test_num_samples_draws_independent_continuations_of_each_prompt(name):
    model, x = build(name, bold=False), tokens(2, 6)
    rows = generate(model, x, 8, num_samples=4, generator=torch.Generator().manual_seed(0))
    assert len(rows) == 8 and len({tuple(row) for row in rows}) == 8
    again = torch.Generator().manual_seed(0)
    assert rows == generate(model, x, 8, num_samples=4, generator=again, use_cache=False)
    greedy = generate(model, x, 8, num_samples=2, temperature=0)
    assert greedy[0] == greedy[1] == generate(model, x[:1], 8, temperature=0)[0] and greedy[2] == greedy[3]


@each_model
def test_a_row_ends_before_its_stop_token_and_the_others_go_on(name):
    model, x = build(name), tokens(3, 6)
    free = generate(model, x, 15, temperature=0)
    stop = free[0][4]
    want = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate(model, x, 15, temperature=0, stop=[stop]) == want
    streamed = list(stream(model, x[:1], 15, temperature=0, stop=[stop]))
    assert [token.item() for token in streamed] == want[0]


@each_model
def test_going_past_the_block_size_is_an_error_unless_cropped(name):
    model, x = build(name, block_size=16).double(), tokens(1, 10)
    assert len(generate(model, x, 7)[0]) == 7  # the last token is not fed back
    with pytest.raises(ValueError, match="10 \\+ 8 tokens do not fit block_size=16.*crop=True"):
        generate(model, x, 8)
    row = x.tolist()[0]
    for _ in range(14):
        row.append(model(torch.tensor([row[-16:]]))[0, -1].argmax().item())
    assert generate(model, x, 14, temperature=0, crop=True) == [row[10:]]
    assert generate(model, [row[:20]], 4, temperature=0, crop=True) == [row[20:24]]


@each_model
def test_an_empty_prompt_is_an_error_that_says_what_to_do(name):
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="begin with a token"):
            generate(build(name), prompts, 3)


# ---- picking a token -------------------------------------------------------------------------------------------------


def pick(logits, idx=(), n=20000, **options):
    """How often each of the tokens is picked."""
    logits = torch.tensor([logits]).expand(n, -1)
    idx = torch.tensor([idx], dtype=torch.long).expand(n, -1)
    picked = pick_token(logits, idx, generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(picked, minlength=logits.size(1)) / n


def test_sampling_draws_from_exactly_the_filtered_distribution():
    p = torch.tensor([0.4, 0.05, 0.3, 0.05, 0.2])
    for options, want in [
        ({}, p),
        (dict(temperature=0.5), p**2 / (p**2).sum()),
        (dict(top_k=2), torch.tensor([4.0, 0, 3, 0, 0]) / 7),
        (dict(top_p=0.71), torch.tensor([4.0, 0, 3, 0, 2]) / 9),
        (dict(top_p=0.69), torch.tensor([4.0, 0, 3, 0, 0]) / 7),
        (dict(top_k=3, top_p=0.75), torch.tensor([4.0, 0, 3, 0, 0]) / 7),  # 0.75 of the 0.9 that top_k leaves
        (dict(top_p=0.01), torch.tensor([1.0, 0, 0, 0, 0])),
        (dict(temperature=0), torch.tensor([1.0, 0, 0, 0, 0])),
        (dict(temperature=1e-40), torch.tensor([1.0, 0, 0, 0, 0])),
    ]:
        got = pick(p.log().tolist(), **options)
        assert torch.equal(got > 0, want > 0), options
        assert (got - want).abs().max() < 0.015, options


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    want = torch.tensor([2.0 / 1.5, 1.0, -1.0 * 1.5, -2.0]).softmax(0)
    got = pick([2.0, 1.0, -1.0, -2.0], idx=[0, 2, 0], repetition_penalty=1.5)
    assert (got - want).abs().max() < 0.015


def test_the_repetition_penalty_counts_the_tokens_of_the_prompt_and_no_padding():
    model = build("baseline").double()
    prompts = [tokens(n, seed=n).tolist() for n in (2, 9)]
    options = dict(temperature=0, repetition_penalty=3.0)
    alone = [generate(model, [p], 20, **options)[0] for p in prompts]
    assert generate(model, prompts, 20, **options) == alone
    assert alone[0] != generate(model, prompts[:1], 20, temperature=0)[0]


# ---- texts that end what is written ----------------------------------------------------------------------------------


def cut(pieces, stops, begin=0):
    return "".join(until_stop(iter(pieces), stops, begin))


def test_a_stop_text_ends_what_is_written_and_no_part_of_it_is_shown():
    whole = "one END two"
    assert cut(list(whole), ["END"]) == "one "
    assert cut(["one E", "ND two"], ["two", "END"]) == "one "
    assert cut(list(whole), ["end"]) == whole
    assert cut(list(whole), ["END"], begin=6) == whole  # within the prompt it is no stop
    assert cut(list(whole), []) == whole
    assert cut(list("END of it"), ["END"]) == ""
    assert list(until_stop(iter(["a", "bE", "x"]), ["END"])) == ["", "a", "b", "Ex"]  # as soon as it is no stop's part


def up_to_first_stop(text, stops, begin):
    """By its definition: what stands before the stop that is complete first, of those that end there the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if len(stop) <= end - begin and text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def test_where_a_text_stops_depends_neither_on_its_pieces_nor_on_how_far_it_goes_on():
    assert cut(["ab", "c"], ["abc", "b"]) == cut(["abc"], ["abc", "b"]) == "a"
    assert cut(["ab"], ["b", "ab"]) == cut(["a", "b"], ["b", "ab"]) == ""
    chance = random.Random(0)
    for _ in range(3000):
        text = "".join(chance.choices("abc", k=10))
        stops = ["".join(chance.choices("abc", k=chance.randint(1, 4))) for _ in range(3)]
        begin = chance.choice([0, 0, 2])
        pieces = []
        n = 0
        while n < len(text):
            pieces.append(text[n : n + chance.randint(0, 4)])
            n += len(pieces[-1])
        want = up_to_first_stop(text, stops, begin)
        assert cut(pieces, stops, begin) == want, (text, stops, pieces)
        if want != text:
            assert first_stop(text + "abc", stops, begin) == len(want)


# ---- rollouts --------------------------------------------------------------------------------------------------------


def without_limits(name):
    """A model whose experts take all that chose them, with documents."""
    options = dict(eot_id=EOT)
    if hasattr(module(name).GPTConfig, "capacity_factor"):
        options["capacity_factor"] = 0.0
    return build(name, **options)


def ragged_prompts():
    return [[EOT, *tokens(n, seed=n).tolist()] for n in (3, 9, 6)]


def trainers_logprobs(model, prompts, rows, num_samples):
    """What a trainer computes of the new tokens: rows padded at the right, and targets of -1 for all else."""
    texts = [prompts[i // num_samples] + new for i, new in enumerate(rows.tokens)]
    longest = max(map(len, texts))
    idx = torch.tensor([text + [EOT] * (longest - len(text)) for text in texts])
    targets = torch.full_like(idx, -1)
    for target, text, new in zip(targets, texts, rows.tokens):
        target[len(text) - len(new) : len(text)] = torch.tensor(new)
    with torch.no_grad():
        losses, _ = model(idx[:, :-1], targets[:, 1:], per_token=True)
    return [-row[wanted >= 0] for row, wanted in zip(losses, targets[:, 1:])]


@each_model
def test_log_probabilities_are_those_of_a_trainer_and_those_without_a_cache(name):
    model, prompts = without_limits(name), ragged_prompts()
    uniforms = draws(1, 0, range(3), 4, 16)
    options = dict(num_samples=4, uniforms=uniforms, stop=range(8))
    rows = rollout(model, prompts, 16, **options)
    uncached = rollout(model, prompts, 16, **options, use_cache=False)
    assert rows.tokens == uncached.tokens and {True, False} == set(rows.cut)
    for got, again, want in zip(rows.logprobs, uncached.logprobs, trainers_logprobs(model, prompts, rows, 4)):
        assert (torch.tensor(got) - want).abs().max() <= 1e-4
        assert (torch.tensor(again) - want).abs().max() <= 1e-4


@each_model
def test_a_row_of_a_rollout_is_what_it_is_alone(name):
    model, prompts = without_limits(name).double(), ragged_prompts()
    uniforms = draws(1, 0, range(3), 4, 16)
    rows = rollout(model, prompts, 16, 4, uniforms, stop=range(8))
    assert len({tuple(row) for row in rows.tokens}) > 6  # short ones may be alike by chance
    for i in range(12):
        alone = rollout(model, [prompts[i // 4]], 16, 1, uniforms[i : i + 1], stop=range(8))
        assert alone.tokens[0] == rows.tokens[i] and alone.cut[0] == rows.cut[i]
        assert alone.logprobs[0] == pytest.approx(rows.logprobs[i], abs=1e-6)
        assert alone.entropies[0] == pytest.approx(rows.entropies[i], abs=1e-6)


def test_a_rollouts_row_ends_with_its_stop_token_and_one_without_is_cut():
    model, prompts = build("baseline"), ragged_prompts()
    rows = rollout(model, prompts, 16, 4, draws(1, 0, range(3), 4, 16), stop=range(8))
    for row, is_cut in zip(rows.tokens, rows.cut):
        assert not any(token < 8 for token in row[:-1])
        assert (row[-1] >= 8) == is_cut and (len(row) == 16 or not is_cut)
    for per_token in (rows.logprobs, rows.entropies, rows.forced):
        assert [len(row) for row in per_token] == [len(row) for row in rows.tokens]
    assert not any(any(row) for row in rows.forced)


def test_token_i_of_a_row_is_chosen_by_number_i_of_it():
    model, prompts = build("baseline"), ragged_prompts()
    uniforms = draws(1, 0, range(3), 4, 8)
    other = torch.cat((uniforms[:, :5], 1 - uniforms[:, 5:] - 2**-53), dim=1)
    one = rollout(model, prompts, 8, 4, uniforms).tokens
    two = rollout(model, prompts, 8, 4, other).tokens
    assert [row[:5] for row in one] == [row[:5] for row in two]
    assert all(a[5:] != b[5:] for a, b in zip(one, two))


def test_a_greedy_rollout_is_what_generate_says_and_its_stop_token():
    model, prompts = build("baseline"), ragged_prompts()
    rows = rollout(model, prompts, 16, stop=range(8), temperature=0)
    assert [row if cut else row[:-1] for row, cut in zip(rows.tokens, rows.cut)] == generate(
        model, prompts, 16, temperature=0, stop=range(8)
    )


def test_temperature_and_filters_change_the_distribution_that_log_probabilities_are_of():
    model, prompt = build("baseline"), ragged_prompts()[0]
    logits = model(torch.tensor([prompt]))[0, -1]
    uniforms = draws(1, 0, [0], 8, 1)
    sharp = (logits / 0.5).log_softmax(-1)
    rows = rollout(model, [prompt], 1, 8, uniforms, temperature=0.5)
    for token, logprob, entropy in zip(rows.tokens, rows.logprobs, rows.entropies):
        assert logprob[0] == pytest.approx(sharp[token[0]].item(), abs=1e-5)
        assert entropy[0] == pytest.approx(-(sharp.exp() * sharp).sum().item(), abs=1e-5)
    best = logits.topk(2)
    rows = rollout(model, [prompt], 1, 8, uniforms, top_k=2)
    for token, logprob in zip(rows.tokens, rows.logprobs):
        place = best.indices.tolist().index(token[0])
        assert logprob[0] == pytest.approx(best.values.log_softmax(-1)[place].item(), abs=1e-5)


def test_a_uniform_number_chooses_the_token_in_whose_part_it_lies_and_never_an_impossible_one():
    probs = torch.tensor([[0.0, 0.2, 0.5, 0.0, 0.3, 0.0]])
    for uniform, want in [(0.0, 1), (0.19, 1), (0.21, 2), (0.69, 2), (0.71, 4), (1 - 2**-53, 4)]:
        assert draw(probs, torch.tensor([uniform], dtype=torch.float64)).item() == want, uniform


def test_a_device_without_fp64_draws_in_fp32_and_no_number_rounds_up_to_behind_the_last_token(monkeypatch):
    model, prompts = build("baseline"), ragged_prompts()
    uniforms = draws(1, 0, range(3), 4, 8)
    want = rollout(model, prompts, 8, 4, uniforms)
    dtypes = set()
    monkeypatch.setattr(generate_module, "dtype_of_sums", lambda device: torch.float32)
    monkeypatch.setattr(generate_module, "draw", lambda probs, u: dtypes.add(u.dtype) or draw(probs, u))
    assert rollout(model, prompts, 8, 4, uniforms).tokens == want.tokens and dtypes == {torch.float32}
    last = rollout(model, prompts, 8, 4, torch.full_like(uniforms, 1 - 2**-53))
    assert all(set(row) == {model.config.vocab_size - 1} for row in last.tokens)


def test_draws_are_a_function_of_seed_step_prompt_and_sample_and_as_even_as_chance():
    x = draws(1, 2, [7, 3], 4, 1000)
    assert x.shape == (8, 1000) and x.dtype == torch.float64
    assert torch.equal(x, draws(1, 2, [3, 7], 4, 1000).roll(4, dims=0))
    assert torch.equal(x[:2], draws(1, 2, [7], 2, 1000)) and torch.equal(x[:, :5], draws(1, 2, [7, 3], 4, 5))
    others = [draws(*args, 1, 1000) for args in ((2, 2, [7]), (1, 3, [7]), (1, 2, [8]), (2, 1, [7]))]
    every = torch.cat([x, *others])
    assert len(every.flatten().unique()) == every.numel()
    assert (every.mean(dim=1) - 0.5).abs().max() < 0.05 and abs(torch.corrcoef(every).triu(1)).max() < 0.15


def test_a_rollout_says_which_numbers_it_misses():
    model, prompts = build("baseline"), ragged_prompts()
    for uniforms, message in [
        (None, "make them with draws"),
        (torch.rand(5, 4), r"\(5, 4\) are not enough for 6 rows of 4 tokens"),
        (torch.rand(6, 3), r"\(6, 3\) are not enough"),
        (torch.ones(6, 4), "not including, 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            rollout(model, prompts, 4, 2, uniforms)


# ---- a budget of thinking --------------------------------------------------------------------------------------------

THINK, THINK_END = 90, 91
FORCED = [80, THINK_END, 81]


def test_thinking_is_ended_at_exactly_its_budget_and_what_is_forced_is_in_the_cache():
    model = without_limits("baseline")
    prompts = [[EOT, 5, THINK, 6], [EOT, 5, 7, 8, 9], [EOT, THINK, 5, THINK_END, 6]]
    budget = ThinkBudget(4, THINK, THINK_END, FORCED)
    uniforms = draws(1, 0, range(3), 8, 12)
    options = dict(num_samples=8, uniforms=uniforms, think_budget=budget)
    rows = rollout(model, prompts, 12, **options)
    uncached = rollout(model, prompts, 12, **options, use_cache=False)
    assert rows.tokens == uncached.tokens
    n_forced = 0
    for i, (row, forced) in enumerate(zip(rows.tokens, rows.forced)):
        want = [False] * 12
        so_far = 1 if i < 8 else None  # the first prompt thinks already, and its 6 counts
        place = 0
        while place < 12:
            if so_far is not None and so_far >= 4:
                assert row[place : place + 3] == FORCED[: 12 - place]
                want[place : place + 3] = [True] * len(row[place : place + 3])
                place += 3
                so_far = None
                continue
            if so_far is not None:
                so_far = None if row[place] == THINK_END else so_far + 1
            elif row[place] == THINK:
                so_far = 0
            place += 1
        assert forced == want
        n_forced += any(want)
    assert 8 <= n_forced < 24
    for got, forced, want in zip(rows.logprobs, rows.forced, trainers_logprobs(model, prompts, rows, 8)):
        free = ~torch.tensor(forced)
        assert (torch.tensor(got) - want)[free].abs().max() <= 1e-4
        assert not torch.tensor(got)[~free].any()


def test_a_stream_obeys_the_budget_too_and_one_that_is_used_up_is_forced_at_once():
    model = build("baseline")
    for n, prompt in [(2, [EOT, THINK]), (0, [EOT, THINK, 80, 7])]:
        budget = ThinkBudget(n, THINK, THINK_END, FORCED)
        row = generate(model, [prompt], 8, temperature=0, think_budget=budget)[0]
        assert row[n : n + 3] == FORCED
        free = generate(model, [prompt + row[: n + 3]], 5 - n, temperature=0)[0]
        assert row[n + 3 :] == free


def test_thinking_that_ends_by_itself_is_left_alone():
    model = build("baseline")
    row = generate(model, [[EOT, THINK]], 8, temperature=0)[0]
    budget = ThinkBudget(4, THINK, row[2], FORCED)
    assert generate(model, [[EOT, THINK]], 8, temperature=0, think_budget=budget)[0] == row


# ---- the compiled step -----------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_a_compiled_step_generates_what_the_model_does_and_caches_alike_share_one(name, eot_id, monkeypatch):
    graphs, compiler = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile", lambda f, mode, dynamic: compiler(f, backend=backend, fullgraph=True, dynamic=dynamic)
    )
    model = build(name, eot_id=eot_id)
    step, short, long = CompiledStep(model), tokens(1, 4)[0].tolist(), [5, EOT, 7, 8, 9, 10, 11]
    for prompts, new, num_samples, compiled in (
        ([short], 5, 1, 1),
        ([long], 9, 1, 1),  # 16 tokens again: what the first text left in the cache is not seen
        ([[3]], 12, 1, 1),  # one token is a prefill too
        ([short, long], 6, 2, 2),  # padding and branches
    ):
        options = dict(num_samples=num_samples)
        want = generate(model, prompts, new, generator=torch.Generator().manual_seed(1), **options)
        got = generate(model, prompts, new, generator=torch.Generator().manual_seed(1), step=step, **options)
        assert got == want and len(graphs) == compiled


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)


@each_model
def test_a_compiled_step_goes_past_the_block_as_the_model_does(name, uncompiled):
    model = build(name, block_size=16).double()
    prompts = [tokens(n, seed=n).tolist() for n in (5, 9)]
    options = dict(temperature=0, crop=True)
    assert generate(model, prompts, 20, step=CompiledStep(model), **options) == generate(model, prompts, 20, **options)


@each_model
def test_texts_use_the_same_memory_in_turn_so_that_a_cuda_graph_of_it_is_recorded_once(name, monkeypatch):
    model = build(name)
    seen = []  # the tensors themselves, so that none of their memory goes to another

    def compiler(forward, **options):
        def recorded(idx, cache, **rest):
            seen.append(cache_tensors(cache))
            return forward(idx, cache=cache, **rest)

        return recorded

    monkeypatch.setattr(torch, "compile", compiler)
    step = CompiledStep(model)
    for prompt in ([1, 2, 3], [4, 5], [6]):
        generate(model, [prompt], 5, step=step)
    addresses = [[x.data_ptr() for x in tensors] for tensors in seen]
    assert len(addresses) == 12 and all(these == addresses[0] for these in addresses)


def test_a_compiled_step_refuses_a_text_after_the_next_has_begun(uncompiled):
    model = build("baseline")
    step = CompiledStep(model)
    first, second = (stream(model, tokens(1, 4), 5, step=step) for _ in range(2))
    for texts in (first, first, second, second):
        next(texts)
    with pytest.raises(RuntimeError, match="one text"):
        next(first)
