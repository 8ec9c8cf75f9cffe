"""generate.py over every model file: what it says must be what the model's own full forwards say."""

import ast

import pytest
import torch

from generate import CompiledStep, generate, pick_token, stream
from tests.tiny import EOT, MODELS, ROOT, build, cache_tensors, tokens

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
