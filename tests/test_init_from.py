"""Runs that start from trained weights: with more tokens, longer windows, in shares, and from Hugging Face folders."""

import json

import pytest
import torch
import torch.nn.functional as F

import hf
from data.loader import Loader, eval_batches
from data.shards import Shards
from data.tokenizers import load_tokenizer
from tests.test_train import KNOBS, SIZES, close, fail, finish, finished, together, train, weights, write_data
from tests.tiny import build
from training import checkpoint

BARE = dict.fromkeys(SIZES)  # the sizes come from the weights
STILL = BARE | dict(max_steps=1, learning_rate=1e-30, weight_decay=0.0)  # what is saved is what the run began with
NOT_GPT2 = dict(n_kv_head=None, head_dim=None, n_inner=None)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data of a tokenizer, of that with two more special tokens, and of another one."""
    folder = tmp_path_factory.mktemp("work")
    write_data(folder / "data", 0)
    write_data(folder / "chat", 1, add_tokens=["<|im_start|>", "<|im_end|>"])
    meta = json.loads((folder / "data" / "meta.json").read_text())
    letters = "".join(chr(i) for i in range(256))
    meta["tokenizer"] = load_tokenizer("char", chars=letters).to_dict()
    write_data(folder / "letters", 2)
    (folder / "letters" / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def base(work):
    """A run with a head of its own, 257 tokens and 63 rows of padding."""
    return train(work, "base", tie_embeddings=False)


@pytest.fixture(scope="module")
def small(work):
    """The same without padding."""
    return train(work, "small", tie_embeddings=False, vocab_size=257)


# ---- the vocabulary --------------------------------------------------------------------------------------------------
TABLES = ("embed.weight", "lm_head.weight")


def test_a_token_that_is_new_starts_at_the_mean_of_the_old_ones_in_what_was_padding(work, base):
    run = train(work, "in padding", "--init_from=base", **STILL, data="chat")
    before, after = weights(base.folder, 6), weights(run.folder, 1)
    for name in TABLES:
        mean = before[name][:257].double().mean(0).float()
        assert torch.equal(after[name][257:259], mean.expand(2, -1)), name
        assert torch.equal(after[name][:257], before[name][:257])
        assert torch.equal(after[name][259:], before[name][259:])  # still nothing but padding
    assert all(torch.equal(after[name], before[name]) for name in after if name not in TABLES)


def test_a_larger_vocabulary_has_rows_that_start_at_the_mean(work, small):
    run = train(work, "in new rows", "--init_from=small", **STILL, data="chat")
    before, after = weights(small.folder, 6), weights(run.folder, 1)
    for name in TABLES:
        mean = before[name].double().mean(0).float()
        assert after[name].shape == (320, 16)
        assert torch.equal(after[name], torch.cat((before[name], mean.expand(63, -1)))), name


def test_the_vocabulary_of_the_weights_is_taken_where_it_is_enough(work):
    train(work, "large", vocab_size=512, max_steps=1)
    train(work, "from large", "--init_from=large", **STILL, data="chat")
    assert checkpoint.load_config(work / "from large" / "step-00000001")["model_config"]["vocab_size"] == 512
    assert "vocab_size=320, which is less than 512" in fail(work, "less", "--init_from=large", **STILL, vocab_size=320)


def test_data_of_another_tokenizer_is_refused_by_name(work, base):
    message = fail(work, "other", "--init_from=base", **STILL, data="letters")
    assert "init_from=base has the tokenizer byte, and letters was made with char: id 128 is b'\\x80'" in message
    train(work, "chatty", max_steps=1, data="chat")
    message = fail(work, "other", "--init_from=chatty", **STILL, data="data")
    assert "id 257 is b'<|im_start|>' in the first and None in the second" in message
    assert not (work / "other").exists()


# ---- the context -----------------------------------------------------------------------------------------------------
def test_learned_positions_do_not_become_more(work):
    knobs = dict(model="gpt2", max_steps=1) | NOT_GPT2
    run = train(work, "gpt2", **knobs)
    model, _ = checkpoint.load_model(run.folder)
    hf.save(model, work / "gpt2 folder")
    for path in ("gpt2", "gpt2 folder"):
        message = fail(work, "longer", f"--init_from={path}", **STILL | dict(block_size=64))
        assert "pos_embed.weight is [32, 16], and would be [64, 16]" in message


# ---- many processes --------------------------------------------------------------------------------------------------
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("source", ["run", "folder"])
def test_processes_with_shares_start_from_what_one_process_starts_from(work, small, source):
    path = "small"
    if source == "folder":
        path = "small folder"
        model, _ = checkpoint.load_model(small.folder)
        hf.save(model, work / path)
    knobs = BARE | dict(init_from=path, data="chat", max_steps=2, save_every=1)
    one = train(work, f"one {source}", **knobs)
    results = [finish(*run) for run in together(work, 2, out_dir=f"two {source}", parallel="fsdp", **knobs)]
    assert [result.code for result in results] == [0, 0], results
    two = finished(work / f"two {source}")
    for key in ("loss", "grad_norm", "val_loss"):
        assert close(*([row[key] for row in run.rows if key in row] for run in (one, two))), key
    torch.testing.assert_close(weights(two.folder, 1), weights(one.folder, 1), atol=1e-5, rtol=0)


# ---- Hugging Face folders --------------------------------------------------------------------------------------------
def theirs(shape):
    """A model of transformers with random weights, large enough that its loss is not that of a uniform guess."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    if shape == "gpt2":
        config = transformers.GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.Qwen3Config(
            vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def loss_of(model, batches):
    """Returns the mean loss of targets that are not -1."""
    nats, targets = 0.0, 0
    for x, y in batches:
        nats += F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum").item()
        targets += (y >= 0).sum().item()
    return nats / targets


@pytest.mark.parametrize("shape", ["gpt2", "qwen3"])
def test_a_hugging_face_folder_goes_on_with_the_loss_that_transformers_has(work, shape):
    model = theirs(shape)
    model.save_pretrained(work / shape)
    length = model.config.max_position_embeddings
    run = train(work, f"from {shape}", f"--init_from={shape}", **BARE | dict(block_size=length, max_steps=1))
    batches = eval_batches(Shards(work / "data", "val"), length, KNOBS["eval_tokens"], 4)
    assert run.evaluations[0]["val_loss"] == pytest.approx(loss_of(model, batches), abs=2e-5)
    loader = Loader(Shards(work / "data", "train"), length, 256 // length, seed=1)
    assert run.losses[0] == pytest.approx(loss_of(model, loader.batches(0)), abs=2e-5)
    assert run.losses[0] > 6  # ln 300 is 5.7: these weights say something


@pytest.mark.parametrize("name", ["gpt2", "baseline", "moe", "mla", "hybrid"])
def test_a_folder_that_is_read_a_block_at_a_time_has_the_weights_of_one_that_is_read_whole(tmp_path, name):
    hf.save(build(name), tmp_path)
    whole = dict(hf.load(tmp_path).named_parameters())
    in_blocks = dict(hf.weights_of(tmp_path))
    assert whole.keys() == in_blocks.keys()
    assert all(torch.equal(whole[key], in_blocks[key]) for key in whole)
