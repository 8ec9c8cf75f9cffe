"""sample.py, on a model that a test trained for nothing: what it says is noise, how it says it is checked."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch

import generate
import hf
import sample
from data import tokenizer_json
from data.bpe import CHAT_TOKENS
from data.tokenizers import PATTERNS, load_tokenizer
from tests.test_tokenizers import save_hugging_face
from tests.tiny import ROOT, build, module
from training import checkpoint
from training import load as load_module
from training.load import load


def make_run(folder, add_tokens=(), name="baseline", block_size=64, step=3):
    """A run folder as train.py leaves it: byte tokenizer, random weights of which some are large."""
    tokenizer = load_tokenizer("byte", add_tokens)
    torch.manual_seed(0)
    sizes = module(name).TINY | dict(vocab_size=320, block_size=block_size)
    config = module(name).GPTConfig(**sizes)
    model = module(name).GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    saved = {"model": name, "model_config": vars(config), "knobs": {}}
    saved_in = checkpoint.save(folder, step, model, torch.optim.AdamW(model.parameters()), saved, {})
    checkpoint.note_evaluation(saved_in, 1.0, {})
    meta = {"tokenizer": tokenizer.to_dict(), "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id}
    (folder / "data.json").write_text(json.dumps(meta))
    return folder, model.eval(), tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def text_of(capsys, *arguments):
    sample.main([str(a) for a in arguments])
    return capsys.readouterr().out


def error_of(*arguments):
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as said:
        sample.main([str(a) for a in arguments])
    assert caught.value.code == 2
    return said.getvalue().strip().splitlines()[-1]


def test_the_text_is_what_the_model_generates_after_eot_and_the_prompt(run, capsys):
    folder, model, tokenizer = run
    prompt = [tokenizer.eot_id, *tokenizer.encode("héllo")]
    head = model.logits
    model.logits = lambda x: head(x)[..., : tokenizer.vocab_size]
    ids = generate.generate(model, [prompt], 30, temperature=0, stop=[tokenizer.eot_id])[0]
    model.logits = head
    want = tokenizer.decode(prompt[1:] + ids) + "\n"
    for path in (folder, folder / "best", folder / "step-00000003"):
        assert text_of(capsys, path, "--prompt", "héllo", "--temperature", 0, "--max_new_tokens", 30) == want


def test_a_compiled_step_changes_nothing_and_is_taken_for_each_token_but_the_first(run, capsys, monkeypatch):
    lengths, compiler = [], torch.compile

    def compiled(forward, **options):
        step = compiler(forward, backend="eager", **options)
        return lambda idx, **rest: lengths.append(idx.size(1)) or step(idx, **rest)

    monkeypatch.setattr(torch, "compile", compiled)
    arguments = (run[0], "--prompt", "héllo", "--temperature", 0, "--max_new_tokens", 6)
    assert text_of(capsys, *arguments, "--compile") == text_of(capsys, *arguments) and lengths == [1] * 5


def test_the_cache_changes_nothing(run, capsys):
    arguments = (run[0], "--prompt", "ab", "--temperature", 0, "--max_new_tokens", 80)  # past block_size too
    assert text_of(capsys, *arguments) == text_of(capsys, *arguments, "--no_cache")


def test_a_seed_repeats_and_samples_differ(run, capsys):
    arguments = (run[0], "--prompt", "ab", "--num_samples", 3, "--max_new_tokens", 20, "--temperature", 1.5)
    first = text_of(capsys, *arguments)
    assert first == text_of(capsys, *arguments) != text_of(capsys, *arguments, "--seed", 7)
    parts = first.split("---- sample ")[1:]
    assert len(parts) == 3 and len({part.split("----\n")[1] for part in parts}) == 3


def test_the_prompt_may_come_from_a_file_or_standard_input(run, capsys, monkeypatch, tmp_path):
    arguments = (run[0], "--temperature", 0, "--max_new_tokens", 9)
    want = text_of(capsys, *arguments, "--prompt", "one\ntwo")
    (tmp_path / "prompt.txt").write_text("one\ntwo")
    assert text_of(capsys, *arguments, "--prompt_file", tmp_path / "prompt.txt") == want
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo")))
    assert text_of(capsys, *arguments, "--prompt_file", "-") == want


def test_an_empty_prompt_begins_a_document(run, capsys):
    folder, model, tokenizer = run
    assert len(text_of(capsys, folder, "--max_new_tokens", 5)) > 1


def test_text_arrives_piece_by_piece_and_whole_characters_only(run, monkeypatch, capsys):
    _, model, tokenizer = run
    written = []
    monkeypatch.setattr(
        sample, "print", lambda *a, end="\n", flush=False: written.append((*a, "")[0] + end), raising=False
    )
    ids = tokenizer.encode("naïve 😀 text")
    monkeypatch.setattr(generate, "stream", lambda *a, **k: (torch.tensor([i]) for i in ids))
    sample.say(model, tokenizer, [tokenizer.eot_id], dict(num_samples=1))
    assert "".join(written) == "naïve 😀 text\n" and len(written) > 10
    assert "😀" in written and not any("\ufffd" in piece for piece in written)


def test_a_stop_text_works_from_the_command_line_for_every_sample(run, capsys):
    arguments = (run[0], "--prompt", "q", "--num_samples", 2, "--max_new_tokens", 60, "--temperature", 1.0)
    free = text_of(capsys, *arguments)
    stop = free.split("----\n")[1].split("\n----")[0][12:14]
    stopped = text_of(capsys, *arguments, "--stop", stop)
    bodies = [part.split("----\n")[1] for part in stopped.split("---- sample ")[1:]]
    assert all(stop not in body[1:] for body in bodies) and len(stopped) < len(free)


def test_ids_that_only_pad_the_vocabulary_are_never_drawn(run, capsys):
    folder, _, tokenizer = run
    assert tokenizer.vocab_size == 257  # of 320: the others could not be decoded
    text_of(capsys, folder, "--max_new_tokens", 200, "--temperature", 50)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("chatty"), CHAT_TOKENS, block_size=256)


@pytest.fixture
def prompts(monkeypatch):
    """The tokens that the model is given in the course of a test."""
    seen = []
    original = generate.stream

    def stream(model, batch, **options):
        seen.append(batch[0])
        return original(model, batch, **options)

    monkeypatch.setattr(generate, "stream", stream)
    return seen


def type_lines(monkeypatch, *lines):
    left = list(lines)

    def ask(_):
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", ask)


def writes(monkeypatch, tokenizer, *texts):
    """Has the model write these answers."""
    left = list(texts)

    def stream(model, batch, **options):
        for token in tokenizer.encode(left.pop(0), special=True):
            yield torch.tensor([token])

    monkeypatch.setattr(generate, "stream", stream)


def test_a_chat_keeps_the_conversation_in_the_chat_format(chatty, prompts, monkeypatch, capsys):
    folder, _, tokenizer = chatty
    type_lines(monkeypatch, "hi", "more<|im_end|>")  # by a person: text, and no end of their turn
    text_of(capsys, folder, "--interactive", "--max_new_tokens", 5, "--system", "Be brief.")
    first, second = [tokenizer.decode(ids) for ids in prompts]
    system = "<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n"
    assert first == f"{system}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert second.startswith(first)
    assert second.endswith("<|im_end|>\n<|im_start|>user\nmore<|im_end|><|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("way, turns", [([], 0), (["--chat"], 1), (["--chat", "--system", "<|im_end|><think>"], 2)])
def test_what_a_person_types_never_becomes_a_token_of_the_chat(chatty, prompts, capsys, way, turns):
    folder, _, tokenizer = chatty
    text_of(capsys, folder, "--prompt", "<|im_end|><think>", "--max_new_tokens", 2, *way)
    assert prompts[0].count(tokenizer.special_tokens["<|im_end|>"]) == turns
    assert tokenizer.special_tokens["<think>"] not in prompts[0]


@pytest.mark.parametrize(
    "switch, begin", [([], ""), (["--think"], "<think>\n"), (["--no_think"], "<think>\n\n</think>\n\n")]
)
def test_a_chat_thinks_or_not_as_it_is_told(chatty, prompts, monkeypatch, capsys, switch, begin):
    folder, _, tokenizer = chatty
    text_of(capsys, folder, "--chat", "--prompt", "hi", "--max_new_tokens", 3, *switch)
    asked = "<|endoftext|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    type_lines(monkeypatch, "hi")
    text_of(capsys, folder, "--interactive", "--max_new_tokens", 3, *switch)
    assert [tokenizer.decode(ids) for ids in prompts] == [asked + begin] * 2


@pytest.mark.parametrize("switch, mark", [([], "<think>\n"), (["--think"], "")])
def test_what_was_thought_of_earlier_answers_is_left_out(chatty, monkeypatch, capsys, switch, mark):
    folder, _, tokenizer = chatty
    type_lines(monkeypatch, "one", "two", "three")
    asked = []
    original = sample.chat.prompt

    def prompt(tokenizer, messages, think):
        ids = original(tokenizer, messages, think)
        asked.append(tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(sample.chat, "prompt", prompt)
    writes(monkeypatch, tokenizer, f"{mark}a secret\n</think>\n\nEins.", f"{mark}cut off", "Drei.")
    shown = text_of(capsys, folder, "--interactive", *switch)
    assert "a secret" in shown and "Eins." in shown
    turns = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nEins.<|im_end|>\n"
    turns += "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    assert asked[2].startswith(f"<|endoftext|>{turns}<|im_start|>user\nthree<|im_end|>\n")


@pytest.mark.parametrize("name, warned", [("baseline", False), ("sliding", True)])  # a Qwen3 and a SmolLM3
def test_the_template_of_another_model_is_said_not_to_be_read(name, warned, tmp_path, capsys):
    tokenizer = load_tokenizer("byte", CHAT_TOKENS)
    model = build(name, vocab_size=tokenizer.vocab_size, qk_norm=name == "baseline")
    files = tokenizer.to_hf()
    hf.save(model, tmp_path / "a", files)
    files["tokenizer_config.json"]["chat_template"] = "{{ messages }}"
    hf.save(model, tmp_path / "b", files)
    hf.save(model, tmp_path / "c", files | {"chat_template.jinja": b"{{ messages }}"})
    for folder, has_template in (("a", False), ("b", True), ("c", True)):
        sample.main([str(tmp_path / folder), "--chat", "--prompt", "a", "--max_new_tokens", "1"])
        said = f"warning: chats are asked in the form of Qwen3's, and not by the template of {tmp_path / folder}\n"
        assert capsys.readouterr().err == (said if warned and has_template else "")


def test_a_budget_ends_the_thinking_of_a_chat(chatty, capsys):
    folder, _, _ = chatty
    arguments = (folder, "--chat", "--prompt", "hi", "--think", "--max_new_tokens", 12, "--temperature", 0)
    free = text_of(capsys, *arguments)
    limited = text_of(capsys, *arguments, "--think_budget", 1)  # the line break behind <think> is one
    begin = "<think>\n\n</think>\n\n"  # the first line is the prompt's, and shown
    assert limited.startswith(begin) and free.startswith("<think>\n") and not free.startswith(begin)
    assert len(limited) > len(f"{begin}\n")


def test_what_is_of_a_chat_is_refused_elsewhere(run, chatty):
    for option in (["--think"], ["--no_think"], ["--think_budget", "5"], ["--system", "x"]):
        assert "of a chat: give --chat or --interactive" in error_of(chatty[0], *option)
        assert "has no token <|im_start|>" in error_of(run[0], "--chat", *option)


def test_without_chat_tokens_each_line_is_continued_by_itself(run, monkeypatch, capsys):
    folder, _, tokenizer = run
    type_lines(monkeypatch, "def f", "def g")
    seen = []

    def stream(model, batch, **options):
        seen.append(tokenizer.decode(batch[0]))
        return iter(())

    monkeypatch.setattr(generate, "stream", stream)
    text_of(capsys, folder, "--interactive")
    assert seen == ["<|endoftext|>def f", "<|endoftext|>def g"]


@pytest.mark.parametrize("name", ["baseline", "gpt2"])
def test_a_model_goes_to_transformers_and_comes_back(name, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    folder, model, tokenizer = make_run(tmp_path / "run", CHAT_TOKENS, name=name)
    hf = tmp_path / "hf"
    assert "generation_config.json, model.safetensors, tokenizer" in text_of(capsys, folder, "--save_pretrained", hf)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf)
    x = torch.randint(256, (1, 20))
    torch.testing.assert_close(theirs(x).logits, model(x), atol=1e-4, rtol=0)

    # the text that either continues a prompt with, which begins a document
    arguments = ("--prompt", "naïve", "--temperature", 0, "--max_new_tokens", 20)
    text = text_of(capsys, folder, *arguments)
    assert text_of(capsys, hf, *arguments) == text
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    prompt = their_tokenizer("naïve", return_tensors="pt")
    assert prompt.input_ids[0].tolist() == [tokenizer.eot_id, *tokenizer.encode("naïve")]
    bad = [[i] for i in range(tokenizer.vocab_size, 320)]  # padding of the vocabulary, which sample.py hides
    ids = theirs.generate(**prompt, max_new_tokens=20, do_sample=False, bad_words_ids=bad)[0]
    stop = theirs.generation_config.eos_token_id
    assert stop == [tokenizer.eot_id, tokenizer.special_tokens["<|im_end|>"]]
    ids = [i for i in ids[1:].tolist() if i not in stop]
    assert their_tokenizer.decode(ids) + "\n" == text

    assert text_of(capsys, hf, "--save_pretrained", tmp_path / "again").startswith("wrote")
    for file in hf.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    (hf / "tokenizer.json").unlink()
    assert "no tokenizer" in error_of(hf)
    assert text_of(capsys, hf, "--tokenizer", "byte", *arguments).startswith("naïve")


def test_a_model_is_not_saved_into_its_own_run_nor_over_anything_else(run, tmp_path):
    folder = run[0]
    before = sorted(folder.rglob("*"))
    for path in (folder, folder / "best"):
        assert "is not empty: give a new folder" in error_of(path, "--save_pretrained", folder)
        assert "is not empty: give a new folder" in error_of(folder, "--save_pretrained", path)
    assert sorted(folder.rglob("*")) == before


def test_without_a_tokenizer_that_transformers_could_have_nothing_is_saved(run, tmp_path, monkeypatch):
    tokenizer = load_tokenizer("byte")
    tokenizer.kind = "sentencepiece"
    monkeypatch.setattr(load_module, "find_tokenizer", lambda *_: (tokenizer, []))
    assert "byte: a sentencepiece tokenizer has no" in error_of(run[0], "--save_pretrained", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("in_sequence", [False, True])
def test_a_prompt_begins_with_what_the_folders_own_tokenizer_puts_before_it(in_sequence, tmp_path, capsys):
    folder, _, tokenizer = make_run(tmp_path / "run", ["<s>"])
    text_of(capsys, folder, "--save_pretrained", tmp_path / "hf")
    file = tmp_path / "hf" / "tokenizer.json"
    written = json.loads(file.read_text())
    arguments = sample.parse_arguments([str(tmp_path / "hf")])
    assert load(arguments.path, tokenizer=arguments.tokenizer)[2] == [tokenizer.eot_id]
    before = tokenizer.to_hf([tokenizer.special_tokens["<s>"]])["tokenizer.json"]["post_processor"]
    before["single"].append(before["single"][0])  # the same token behind the text is none before it
    if in_sequence:  # as in the file of Llama 3
        before = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, before]}
    file.write_text(json.dumps(written | {"post_processor": before}))
    assert load(arguments.path, tokenizer=arguments.tokenizer)[2] == [tokenizer.special_tokens["<s>"]]
    file.write_text(json.dumps(written | {"post_processor": None}))
    assert load(arguments.path, tokenizer=arguments.tokenizer)[2] == []


def published(folder, kind, vocab_size):
    """Writes a tiny Llama as the Hub has it: keys of older transformers, an index, other files beside the weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="60KB")
    llama3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    contents = dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, bos_token_id=1, eos_token_id=2, hidden_act="silu",
        hidden_size=32, initializer_range=0.02, intermediate_size=64, max_position_embeddings=512, model_type="llama",
        num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, pretraining_tp=1, rms_norm_eps=1e-6,
        rope_scaling=llama3 | {"rope_type": "llama3"}, tie_word_embeddings=False, torch_dtype="bfloat16",
        transformers_version="4.31.0", use_cache=True, vocab_size=vocab_size,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(contents))
    (folder / "generation_config.json").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    (folder / "consolidated.safetensors").write_bytes(b"of the same weights, by other names")
    (folder / "pytorch_model.bin").write_bytes(b"\x80 a pickle")
    kind(folder)
    return folder


def as_llama3(folder):
    """Writes a tokenizer.json with the post_processor of Llama 3, whose tokens end with <|eot_id|>."""
    file = save_hugging_face(folder, PATTERNS["newer"], added=["<|begin_of_text|>", "<|eot_id|>"])
    d = json.loads(file.read_text())
    before = tokenizer_json.before_text({"<|begin_of_text|>": 600})
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    d["post_processor"] = {"type": "Sequence", "processors": [byte_level, before]}
    d["decoder"] = byte_level
    file.write_text(json.dumps(d))
    names = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def as_llama2(folder):
    """Writes a sentencepiece model, and its translation to a tokenizer.json that cannot be read here."""
    import sentencepiece

    out = io.BytesIO()
    lines = [f"def test_{n}(x): return x + {n * n}" for n in range(2000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=700,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    names = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": True}))
    transformers = pytest.importorskip("transformers")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # with tokenizer.json


@pytest.mark.parametrize("kind, vocab_size, begin", [(as_llama3, 602, 600), (as_llama2, 700, 1)])
def test_a_published_llama_says_what_it_says_in_transformers(kind, vocab_size, begin, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    folder = published(tmp_path / "llama", kind, vocab_size)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("def test", return_tensors="pt").input_ids
    assert prompt[0, 0] == begin

    # 1. the same text, up to the id that config.json says
    ids = theirs.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=-1)[0].tolist()
    new = ids[prompt.size(1) :]
    end = next(token for token in new[3:] if token not in new[:3] and token != begin)
    contents = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(contents | dict(eos_token_id=[end])))
    arguments = ("--prompt", "def test", "--temperature", 0, "--max_new_tokens", 30)
    text = text_of(capsys, folder, *arguments)
    want = tokenizer.decode(ids[: ids.index(end, prompt.size(1))], skip_special_tokens=True)
    assert text == want + "\n"

    # 2. a saved folder says it too, there and here
    text_of(capsys, folder, "--save_pretrained", tmp_path / "again")
    assert text_of(capsys, tmp_path / "again", *arguments) == text
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.generation_config.eos_token_id in (end, [end])
    same = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert same("def test").input_ids == prompt[0].tolist()
    torch.testing.assert_close(again(prompt).logits, theirs(prompt).logits)


def test_a_prompt_for_a_sentencepiece_model_alone_begins_with_its_own_token_unless_the_config_says_no(tmp_path):
    as_llama2(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for config, prefix in (({}, [1]), (dict(add_bos_token=True), [1]), (dict(add_bos_token=False), [])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_module.find_tokenizer(tmp_path, None)[1] == prefix


def test_a_vocabulary_and_merges_become_a_tokenizer_by_the_command_that_the_refusal_names(tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "a"
    hf.save(build("gpt2", vocab_size=601), folder)
    whole = json.loads(save_hugging_face(tmp_path, "gpt2", added=["<|endoftext|>"]).read_text())
    vocabulary = whole["model"]["vocab"] | {"<|endoftext|>": 600}
    merges = [" ".join(pair) for pair in whole["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    exec(error_of(folder).split("python -c ")[1].strip().strip('"'))
    tokenizer = load(folder)[1]
    assert tokenizer.encode("def test it") == load_tokenizer(str(tmp_path / "tokenizer.json")).encode("def test it")
    assert tokenizer.eot_id == 600


def test_a_folder_of_2019_without_a_model_type_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(n_ctx=64, n_embd=32, n_head=2, n_layer=2, vocab_size=320)))
    assert "model_type=None; these can be read: " in error_of(tmp_path)


def test_what_cannot_be_sampled_is_one_line_that_says_what_to_do(run, tmp_path):
    folder, _, _ = run
    for path in (tmp_path / "nowhere", folder / "data.json", tmp_path):
        assert f"no model in {path}: give a run's folder" in error_of(path)
    assert "not among" in error_of(folder, "--tokenizer", "char") or "alphabet" in error_of(
        folder, "--tokenizer", "char"
    )
    if not torch.cuda.is_available():
        assert "try device=cpu" in error_of(folder, "--device", "cuda")
    (tmp_path / "config.json").write_text('{"model_type": "mamba9"}')
    assert "'mamba9'; these can be read: " in error_of(tmp_path)
    assert "--dtype" in error_of(folder, "--dtype", "fp8")


def test_ctrl_c_ends_it_without_a_traceback(run, monkeypatch, capsys):
    def stream(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream", stream)
    with pytest.raises(SystemExit) as caught:
        sample.main([str(run[0])])
    assert caught.value.code == 130 and capsys.readouterr().err == "\n"


@pytest.mark.parametrize("option, values", [
    ("--temperature", ["-1", "nan", "inf", "9" * 400]),
    ("--top_p", ["0", "-1", "1.1", "nan", "1e-400"]),
    ("--repetition_penalty", ["0", "-1", "nan", "inf", "1e300"]),
    ("--top_k", ["-1", "1.5"]),
    ("--num_samples", ["0", "9" * 400]),
    ("--max_new_tokens", ["0", "9" * 5000]),
    ("--think_budget", ["-1", "9" * 400]),
    ("--seed", ["-1", str(2**64), "1" * 20, "9" * 400]),
    ("--stop", [""]),
    ("--tokenizer", [""]),
    ("--save_pretrained", [""]),
    ("--device", ["foo", "meta", "mps:9", "cuda:99", ""]),
])  # fmt: skip
def test_a_value_that_cannot_be_meant_is_refused_in_one_short_line(chatty, option, values):
    for value in values:
        with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as said:
            sample.main([str(chatty[0]), "--chat", f"{option}={value}"])
        (line,) = said.getvalue().splitlines()
        name = option.removeprefix("--")
        assert caught.value.code == 2 and len(line) < 250
        message = f"error: {name}={value} is " if name == "device" else f"error: argument {option}: {value[:60]}"
        assert line.startswith(message)


def test_the_least_temperature_is_greedy_and_the_largest_draws_evenly(run, capsys):
    arguments = (run[0], "--max_new_tokens", 20, "--temperature")
    assert text_of(capsys, *arguments, "1e-40") == text_of(capsys, *arguments, 0)
    assert text_of(capsys, *arguments, 1000) != text_of(capsys, *arguments, 1000, "--seed", 2)


def test_one_prompt_is_given_and_not_two(run):
    assert "not allowed with argument --prompt" in error_of(run[0], "--prompt", "a", "--interactive")
    assert "not allowed with argument --prompt" in error_of(run[0], "--prompt", "a", "--prompt_file", "b")


def test_a_line_that_the_tokenizer_cannot_have_does_not_end_a_chat(monkeypatch, capsys):
    type_lines(monkeypatch, "ab", "a1", "b")
    assert list(sample.typed_lines(load_tokenizer("char", chars="ab"))) == ["ab", "b"]
    error, _ = capsys.readouterr().out.splitlines()
    assert error.startswith("error: '1' is not among the 2 characters of this tokenizer")


def test_a_chat_ends_at_ctrl_d_in_a_new_line(chatty, monkeypatch, capsys):
    type_lines(monkeypatch)
    assert text_of(capsys, chatty[0], "--interactive") == "\n"


def test_a_mistake_of_ours_keeps_its_traceback(run, monkeypatch):
    def stream(*args, **options):
        raise TypeError("of a model")

    monkeypatch.setattr(generate, "stream", stream)
    with pytest.raises(TypeError, match="of a model"):
        sample.main([str(run[0])])


def test_a_reader_that_goes_ends_the_text_without_a_word(run):
    command = [sys.executable, ROOT / "sample.py", run[0], "--max_new_tokens=5000", "--num_samples=3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() != 0


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    folder, _, _ = make_run(tmp_path, [f"<{i}>" for i in range(100)])
    assert "357 tokens, and the model 320: they do not belong together" in error_of(folder)


def test_a_vocabulary_without_room_for_a_token_that_begins_documents_is_said_to_have_none(tmp_path):
    hf.save(build("baseline", vocab_size=602), tmp_path / "hf")
    save_hugging_face(tmp_path / "hf", "gpt2", added=["<begin>", "<end>"])
    assert "the model 602: no room for <|endoftext|>: give config.json the eos_token_id" in error_of(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | dict(eos_token_id=601)))
    _, tokenizer, _ = load(tmp_path / "hf")
    assert tokenizer.eot == "<end>" and tokenizer.vocab_size == 602
