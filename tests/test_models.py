"""The contract of a model file, over every model_*.py."""

import ast
import copy
import dataclasses
import re
import shutil
import subprocess
import sys
import typing
from collections import Counter
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from muon import make_optimizer
from tests.differences import changed, claim, definitions, docstring, taken
from tests.tiny import BLOCK, EOT, MODELS, ROOT, VOCAB, build, cache_tensors, module, tokens

each_model = pytest.mark.parametrize("name", MODELS)
METHODS = "__init__ init_weights forward positions_and_mask logits lm_loss token_losses new_cache generate".split()


def with_field(field):
    """The models whose config has a field."""
    return pytest.mark.parametrize("name", [n for n in MODELS if hasattr(module(n).GPTConfig, field)])


# ---- the file --------------------------------------------------------------------------------------------------------


def test_one_file_is_the_first_and_each_other_one_names_its_parent():
    first = [name for name in MODELS if claim(ROOT / f"model_{name}.py")[0] is None]
    assert first == ["gpt2"]


@each_model
def test_the_last_lines_of_the_docstring_name_exactly_what_differs_from_the_parent(name):
    path = ROOT / f"model_{name}.py"
    parent, names = claim(path)
    if parent is not None:
        assert names == changed(path, ROOT / parent)
        last = docstring(path).split("\n\n")[-1]
        assert last.startswith("Differs from ")


@each_model
def test_what_is_taken_from_another_file_stands_there_unchanged(name):
    path = ROOT / f"model_{name}.py"
    own = definitions(path)
    for file, names in taken(path).items():
        theirs = definitions(ROOT / file)
        for each in names:
            assert own[each] == theirs[each], f"{each} is not as in {file}"
        assert set(names) <= set(claim(path)[1])


@each_model
def test_the_file_imports_only_the_standard_library_and_torch_and_keeps_the_skeleton(name):
    tree = ast.parse((ROOT / f"model_{name}.py").read_text())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots <= set(sys.stdlib_module_names) | {"torch"}
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    skeleton = ["GPTConfig", "RMSNorm", "Attention", "MLP", "Block", "KVCache", "GPT"]
    assert [c for c in classes if c in skeleton] == [c for c in skeleton if c in classes] and "GPT" in classes
    methods = [each.removeprefix("GPT.") for each in definitions(ROOT / f"model_{name}.py") if each.startswith("GPT.")]
    assert [m for m in methods if m in METHODS] == METHODS
    last = tree.body[-2]
    assert isinstance(last, ast.Assign) and last.targets[0].id == "TINY"


@each_model
def test_a_copy_in_an_empty_folder_runs_its_demo(name, tmp_path):
    shutil.copy(ROOT / f"model_{name}.py", tmp_path)
    run = subprocess.run([sys.executable, f"model_{name}.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", run.stdout).groups())
    assert before > 5 and after < before / 2
    greedy, truth = re.search(r"greedy (\[.*?\]) of (\[.*?\])", run.stdout).groups()
    assert greedy == truth  # an overfit batch is known by heart


# ---- what the model computes -----------------------------------------------------------------------------------------


def assert_unchanged(name, a, b):
    """To the bit; with experts to rounding, which depends on where a row stands among the others of its expert."""
    if hasattr(module(name), "grouped_matmul"):
        tolerance = 1e-5 if a.dtype == torch.float32 else 1e-12
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    else:
        assert torch.equal(a, b)


@each_model
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_changing_a_token_leaves_earlier_logits_unchanged(name, eot_id):
    model, x = build(name, eot_id=eot_id), tokens(2, 24)
    x[:, 7] = EOT
    y = x.clone()
    y[:, 15] = (y[:, 15] + 1) % EOT
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        a, b = model(x), model(y)
        assert_unchanged(name, a[:, :15], b[:, :15])
        assert (a[:, 15:] - b[:, 15:]).abs().amax(dim=-1).min() > 1e-4


def run_in_pieces(model, x, lengths, pad=None, static=False):
    cache, out, at = model.new_cache(x.size(0), x.size(1), pad, static), [], 0
    for n in lengths:
        out.append(model(x[:, at : at + n], cache=cache))
        at += n
    assert at == x.size(1) == cache.length
    return torch.cat(out, dim=1)


@each_model
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_cached_logits_equal_full_ones_for_every_split_of_prefill_and_decode(name, eot_id):
    model, x = build(name, eot_id=eot_id).double(), tokens(2, 13)
    x[0, [0, 5, 6]] = x[1, 9] = EOT
    full = model(x)
    for prefill in range(1, 14):
        torch.testing.assert_close(run_in_pieces(model, x, [prefill] + [1] * (13 - prefill)), full, atol=1e-6, rtol=0)
    for chunks in ([5, 5, 3], [1, 6, 6], [4, 1, 1, 7]):
        torch.testing.assert_close(run_in_pieces(model, x, chunks), full, atol=1e-6, rtol=0)


@each_model
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_a_static_cache_gives_the_same_logits_from_shapes_that_never_change(name, eot_id):
    model, x = build(name, eot_id=eot_id).double(), tokens(2, 13)
    x[0, [0, 5, 6]] = x[1, 9] = EOT
    full = model(x)
    for lengths in ([13], [6] + [1] * 7, [4, 1, 1, 7]):
        torch.testing.assert_close(run_in_pieces(model, x, lengths, static=True), full, atol=1e-6, rtol=0)
    pad = torch.tensor([0, 3])
    padded = model(torch.cat((x[:, :3], x[:, :10]), dim=1)[1:, 3:])
    x = torch.cat((x[:, :3], x[:, :10]), dim=1)
    for static in (False, True):
        got = run_in_pieces(model, x, [2, 9, 1, 1], pad, static)
        torch.testing.assert_close(got[1:, 3:], padded, atol=1e-6, rtol=0)


@each_model
@pytest.mark.parametrize("static", [False, True])
def test_a_rewound_cache_goes_on_as_if_the_forgotten_had_never_been_or_refuses(name, static):
    model, x = build(name, eot_id=EOT).double(), tokens(2, 12)
    other = tokens(2, 12, seed=3)
    other[:, 7] = EOT
    cache = model.new_cache(2, 12, torch.tensor([0, 4]), static)
    model(x[:, :5], cache=cache)
    model(other[:, 5:9], cache=cache)
    with pytest.raises(ValueError, match="9 tokens cannot be rewound to 10"):
        cache.rewind(10)
    try:
        cache.rewind(5)
    except ValueError as error:
        assert "state" in str(error)  # a state cannot forget, and says so
        cache.rewind(0)
        model(x[:, :5], cache=cache)
    assert cache.length == 5
    got = model(x[:, 5:], cache=cache)
    fresh = model.new_cache(2, 12, torch.tensor([0, 4]))
    want = model(x, cache=fresh)
    torch.testing.assert_close(got, want[:, 5:], atol=1e-6, rtol=0)
    cache.rewind(0)
    torch.testing.assert_close(model(x, cache=cache), want, atol=1e-6, rtol=0)


@each_model
def test_a_decoded_token_depends_on_the_cached_past(name):
    model, x = build(name), tokens(1, 8)
    y = x.clone()
    y[:, 2] = (y[:, 2] + 1) % EOT
    a, b = run_in_pieces(model, x, [7, 1]), run_in_pieces(model, y, [7, 1])
    assert (a[:, -1] - b[:, -1]).abs().max() > 1e-4


@each_model
def test_packed_documents_have_the_logits_of_each_alone(name):
    model = build(name, eot_id=EOT).double()
    documents = [torch.cat((torch.tensor([EOT]), tokens(n, seed=n))) for n in (9, 4, 17)]
    packed = torch.cat(documents)[None]
    alone = torch.cat([model(d[None])[0] for d in documents])
    torch.testing.assert_close(model(packed)[0], alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(run_in_pieces(model, packed, [12, 3] + [1] * 18)[0], alone, atol=1e-6, rtol=0)


@each_model
def test_changing_one_document_leaves_the_next_bit_equal_only_if_documents_are_on(name):
    x = tokens(1, 30)
    x[0, [0, 12]] = EOT
    y = x.clone()
    y[0, 5] = (y[0, 5] + 1) % EOT
    on, off = build(name, eot_id=EOT), build(name, eot_id=-1)
    for dtype in (torch.float32, torch.float64):
        on.to(dtype)
        off.to(dtype)
        assert_unchanged(name, on(x)[:, 12:], on(y)[:, 12:])
        assert (off(x)[:, 12:] - off(y)[:, 12:]).abs().max() > 1e-4


@each_model
def test_the_loss_is_the_mean_cross_entropy_without_ignored_targets(name):
    model, x, y = build(name), tokens(2, 10), tokens(2, 10, seed=2)
    y[0, :4] = -1
    kept = y >= 0
    want = F.cross_entropy(model(x)[kept].double(), y[kept])
    torch.testing.assert_close(model(x, y).double(), want, atol=1e-5, rtol=0)
    assert model(x, y).ndim == 0


@each_model
def test_the_losses_of_single_tokens_and_their_gradients_are_those_of_the_mean(name):
    model, x, y = build(name).train(), tokens(40, 60), tokens(40, 60, seed=2)  # three chunks
    y[0, :4] = -1
    losses, auxiliary = model(x, y, per_token=True)
    assert losses.shape == y.shape and losses.dtype == torch.float32 and auxiliary.ndim == 0
    assert torch.equal(losses == 0, y < 0)
    mean = losses.sum() / (y >= 0).sum() + auxiliary
    want = model(x, y)
    torch.testing.assert_close(mean, want, atol=1e-5, rtol=0)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(mean, parameters), torch.autograd.grad(want, parameters)):
        torch.testing.assert_close(a, b, atol=2e-5 * max(1.0, b.abs().max().item()), rtol=0)
    assert model.eval()(x, y, per_token=True)[1] == 0


@each_model
def test_the_logits_of_the_last_token_alone_are_those_of_all(name):
    model, x = build(name).double(), tokens(2, 9)
    torch.testing.assert_close(model(x, last_only=True), model(x)[:, -1:], atol=1e-9, rtol=0)


@each_model
def test_a_fresh_model_knows_nothing(name):
    model = build(name, bold=False)
    loss = model(tokens(8, 32), tokens(8, 32, seed=2)).item()
    assert abs(loss - torch.tensor(float(VOCAB)).log().item()) < 0.05


@each_model
def test_init_weights_sets_every_parameter(name):
    model = build(name, bold=False)
    fresh = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model.init_weights()
    for n, p in model.named_parameters():
        assert p.isfinite().all(), n
        if fresh[n].std() == 0 or p.numel() == 1:
            assert torch.equal(p, fresh[n]), n
        elif p.ndim > 1:  # the spread of a few random numbers says little
            assert abs(p.std() / fresh[n].std() - 1) < 0.25, n


@each_model
def test_init_weights_raises_on_a_parameter_that_it_does_not_know(name):
    for kind in ("unheard_of", "w_new.weight"):
        model = build(name)
        block = model.blocks[0]
        owner = block
        if "." in kind:
            block.w_new = torch.nn.Linear(3, 3, bias=False)
        else:
            owner.unheard_of = torch.nn.Parameter(torch.ones(3))
        with pytest.raises(ValueError, match=rf"blocks.0.{kind}: say how it begins"):
            model.init_weights()


@each_model
def test_a_model_made_on_the_meta_device_can_be_filled_later(name):
    with torch.device("meta"):
        model = module(name).GPT(build(name).config)
    model.to_empty(device="cpu").init_weights()
    assert model(tokens(1, 8)).isfinite().all()


@each_model
def test_matrices_that_write_to_the_residual_stream_start_smaller(name):
    options = dict(n_shared_expert=1) if hasattr(module(name).GPTConfig, "n_shared_expert") else {}
    model = build(name, bold=False, n_layer=8, **options)
    std = model.config.init_std
    weights = {}  # {delta.wo: those of all layers}
    for path, p in model.blocks.named_parameters():
        if path.endswith(("wo.weight", "w_down.weight", "w_up.weight")):
            weights.setdefault(path.split(".", 1)[1], []).append(p.flatten())
    assert len(weights) >= 3
    for path, found in weights.items():
        want = std if "w_up" in path else std / 4
        assert abs(torch.cat(found).std() / want - 1) < 0.03, path


@each_model
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_every_parameter_is_trained_and_in_exactly_one_optimizer_group(name, eot_id):
    model, x = build(name, eot_id=eot_id).train(), tokens(2, BLOCK)
    model(x, tokens(2, BLOCK, seed=2)).backward()
    for n, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, n
    for kind in ("adamw", "muon"):
        groups = make_optimizer(model, optimizer=kind, learning_rate=1e-3, weight_decay=0.1).param_groups
        times = Counter(id(p) for group in groups for p in group["params"])
        assert times == Counter(id(p) for p in model.parameters())


@each_model
def test_a_batch_is_learned_by_heart(name):
    model, x, y = build(name, bold=False).train(), tokens(4, 16), tokens(4, 16, seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


@each_model
def test_a_model_compiled_for_any_length_equals_the_eager_one(name):
    torch._dynamo.reset()
    backend = "aot_eager"
    if name in ("hybrid", "linear", "linformer"):
        backend = "eager"  # one graph for every length too; a backward pass of symbolic chunks takes half a minute more
    options = dict(n_layer=1)
    if hasattr(module(name).GPTConfig, "n_dense_layer"):
        options["n_dense_layer"] = 0  # the one layer has experts
    model = build(name, **options)
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(specialize_float=True):  # lengths are symbols, and not eps: in half the time
        for T in (16, 7):
            torch.testing.assert_close(compiled(tokens(2, T)), model(tokens(2, T)))


@each_model
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_the_compiled_model_has_the_loss_and_gradients_of_the_eager_one(name, eot_id):
    model, x, y = build(name, eot_id=eot_id).train(), tokens(2, 16), tokens(2, 16, seed=2)
    eager = model(x, y)
    want = torch.autograd.grad(eager, list(model.parameters()))
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(x, y)
    got = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, eager, atol=1e-5, rtol=0)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@each_model
def test_bf16_is_close_to_fp32(name):
    options = {}
    if hasattr(module(name).GPTConfig, "top_k_block"):
        options["top_k_block"] = 8  # all blocks: of two that are nearly as good bf16 may choose the other one
    model, x = build(name, bold=False, **options), tokens(2, 32)
    want, got = model(x), model.bfloat16()(x)
    assert got.dtype == torch.bfloat16
    assert F.cosine_similarity(got.float(), want, dim=-1).min() > 0.999
    loss = F.cross_entropy(got.flatten(0, 1).float(), x.flatten())  # of logits in bf16, and itself in fp32
    assert torch.equal(model(x, x), loss)
    torch.testing.assert_close(model(x, x, per_token=True)[0].mean(), loss, atol=1e-5, rtol=0)


@each_model
def test_norms_of_a_bf16_model_round_once(name):
    """A product in bf16 would be a second rounding, and 1 + weight in bf16 would lose what is below 1/256."""
    model = build(name).bfloat16()
    norms = [part for part in model.modules() if type(part).__name__ in ("RMSNorm", "LayerNorm")]
    assert len(norms) >= 5
    for norm in norms:
        x = torch.randn(50, len(norm.weight)).bfloat16()
        exact = copy.deepcopy(norm).double()(x.double())
        assert norm(x).dtype == torch.bfloat16
        assert (norm(x) == exact.bfloat16()).float().mean() > 0.99  # the sum of squares is in fp32


@each_model
def test_dropout_is_active_in_training_only(name):
    model, x = build(name, dropout=0.5), tokens(1, 8)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def without_branches(model):
    """The model, with blocks that add nothing to the residual stream."""
    with torch.no_grad():
        for key, p in model.blocks.named_parameters():
            if p.dim() > 1 or key.endswith("bias"):
                p.zero_()
    return model


@each_model
def test_dropout_is_on_every_branch_and_in_gpt2_on_the_embedding(name):
    model, x = build(name, dropout=1.0).train(), tokens(1, 8)
    got = model(x)
    want = without_branches(model).eval()(x)
    if name == "gpt2":
        want = got[:, :1].expand_as(got)  # nothing of the tokens is left
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@with_field("zero_init_residual")
def test_with_zero_init_residual_every_block_begins_as_the_identity(name):
    model, x = build(name, bold=False, zero_init_residual=True), tokens(1, 8)
    got = model(x)
    torch.testing.assert_close(got, without_branches(model)(x), atol=1e-6, rtol=0)


@with_field("scale_embeddings")
def test_embeddings_are_scaled_by_the_root_of_their_width(name):
    plain = build(name, tie_embeddings=False)
    scaled = build(name, tie_embeddings=False, scale_embeddings=True)
    with torch.no_grad():
        plain.embed.weight *= plain.config.n_embd**0.5
    torch.testing.assert_close(scaled(tokens(1, 8)), plain(tokens(1, 8)), atol=1e-4, rtol=0)


@with_field("logit_softcap")
def test_a_softcap_bends_logits_towards_its_value(name):
    want = 3 * torch.tanh(build(name)(tokens(1, 8)) / 3)
    torch.testing.assert_close(build(name, logit_softcap=3.0)(tokens(1, 8)), want, atol=1e-5, rtol=0)


def alternatives(annotation, value):
    """Returns other values for a field of a config, by its type alone: a field of one's own needs no entry here."""
    if typing.get_origin(annotation) is typing.Literal:
        return [choice for choice in typing.get_args(annotation) if choice != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value or 1, value + 1, 2, 1, 5]
    if isinstance(value, float):
        return [2 * value, 0.5]
    if isinstance(value, str):
        return list("adqkv")
    return [(0,)]  # layers


@each_model
def test_every_field_of_the_config_changes_something(name):
    """No dead knobs: logits or loss of a training step or logits of the next one, alone or beside one other field."""
    base = build(name).config
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    hints = typing.get_type_hints(type(base))
    others = {field: alternatives(hints[field], value) for field, value in values.items()}

    @cache
    def outcome(*changes):
        try:
            model = build(name, bold=False, **dict(changes))
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(5.0)  # attention must not be uniform
            x = tokens(2, 12)
            x[0, 4] = 5
            torch.manual_seed(0)
            logits = model.train()(x)
            loss = model(x, x)
            if hasattr(model, "after_step"):
                model.after_step()
            return logits.sum().item(), loss.item(), model(x).sum().item()
        except ValueError:
            return "refused"
        except (IndexError, RuntimeError):  # such as a vocabulary that is too small for the tokens
            return "failed"

    def changes_something(field, *beside):
        found = {outcome(*beside)} | {outcome(*beside, (field, value)) for value in others[field]}
        found.discard("failed")
        if isinstance(values[field], str):  # an unknown letter is refused, whether the known ones do something or not
            found.discard("refused")
        return len(found) > 1

    for field in values:
        if not changes_something(field):
            beside = [(other, value) for other in values if other != field for value in others[other]]
            assert any(changes_something(field, each) for each in beside), field


@each_model
def test_metrics_are_numbers_or_tables(name):
    model = build(name).train()
    model(tokens(2, 8), tokens(2, 8))
    if hasattr(model, "after_step"):
        model.after_step()
    for value in model.metrics().values() if hasattr(model, "metrics") else ():
        assert isinstance(value, float) or all(isinstance(x, float | int) for row in value for x in row)


# ---- the cache and sampling ------------------------------------------------------------------------------------------


@each_model
def test_greedy_tokens_are_those_of_full_forwards_within_the_context_and_past_it(name):
    model, x = build(name, block_size=16).double(), tokens(2, 9)
    want = x
    for _ in range(14):
        token = model(want[:, -16:])[:, -1].argmax(dim=-1, keepdim=True)
        want = torch.cat((want, token), dim=1)
    assert torch.equal(model.generate(x, 14, temperature=0), want)
    assert torch.equal(model.generate(x, 14, top_k=1), want)
    assert torch.equal(model.generate(want[:, :20], 3, temperature=0), want)  # a prompt longer than the context


@each_model
def test_sampling_follows_temperature_and_top_k(name):
    model, x = build(name), tokens(1, 6)
    p = model(x)[0, -1].softmax(dim=-1).double()
    for options, want in (
        ({}, p),
        (dict(temperature=0.5), p**2 / (p**2).sum()),
        (dict(top_k=3), torch.where(p >= p.topk(3).values[-1], p, 0) / p.topk(3).values.sum()),
    ):
        torch.manual_seed(0)
        drawn = model.generate(x.expand(8000, -1), 1, **options)[:, -1]
        got = torch.bincount(drawn, minlength=VOCAB) / 8000
        assert (got - want).abs().max() < 0.025, options
        assert not options.get("top_k") or (got > 0).sum() == 3


@each_model
def test_branches_of_one_prefill_continue_like_separate_prefills(name):
    model, x = build(name).double(), tokens(2, 6)
    cache = model.new_cache(2, 12)
    model(x, cache=cache)
    branched, next_tokens = cache.branch(3), tokens(6, 4, seed=5)
    got = torch.cat([model(next_tokens[:, i : i + 1], cache=branched) for i in range(4)], dim=1)
    want = model(torch.cat((x.repeat_interleave(3, dim=0), next_tokens), dim=1))[:, 6:]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert cache.length == 6 and branched.length == 10


@each_model
@pytest.mark.parametrize("static", [False, True])
def test_a_branch_is_a_copy_that_shares_nothing(name, static):
    model, x = build(name, eot_id=EOT).double(), tokens(2, 10)
    cache = model.new_cache(2, 10, static=static)
    want = model(x, cache=model.new_cache(2, 10))
    model(x[:, :4], cache=cache)
    other = tokens(2, 6, seed=7)
    for _ in range(2):
        copied = cache.branch(1)
        model(other[:, :5], cache=copied)
        assert cache.length == 4 and copied.length == 9
    torch.testing.assert_close(model(x[:, 4:], cache=cache), want[:, 4:], atol=1e-6, rtol=0)
    last = model(torch.cat((x[:, :4], other), dim=1))[:, -1:]  # what the first one wrote since is not in the copy
    torch.testing.assert_close(model(other[:, 5:], cache=copied), last, atol=1e-6, rtol=0)


@each_model
def test_a_sequence_or_a_cache_longer_than_the_block_is_refused(name):
    model = build(name, block_size=16)
    with pytest.raises(ValueError, match="17 tokens are more than block_size=16"):
        model(tokens(1, 17))
    with pytest.raises(ValueError, match="max_len=17 is more than block_size=16"):
        model.new_cache(1, 17)


@each_model
def test_a_cache_of_the_wrong_shape_is_refused_with_the_numbers(name):
    model = build(name)
    cache = model.new_cache(2, 8)
    with pytest.raises(ValueError, match=r"3 x \(0 \+ 4\) tokens do not fit a cache of \(2, 8\)"):
        model(tokens(3, 4), cache=cache)
    model(tokens(2, 6), cache=cache)
    with pytest.raises(ValueError, match=r"2 x \(6 \+ 3\) tokens do not fit a cache of \(2, 8\)"):
        model(tokens(2, 3), cache=cache)


@each_model
def test_decoding_allocates_no_new_cache_memory(name):
    model, cache = build(name), build(name).new_cache(1, 32)
    before = [x.data_ptr() for x in cache_tensors(cache)]
    for _ in range(32):
        model(tokens(1, 1), cache=cache)
    assert len(before) >= 2 and [x.data_ptr() for x in cache_tensors(cache)] == before
