"""A trained model and its tokenizer, from a run's folder, a checkpoint's, or a Hugging Face folder."""

import sys
from pathlib import Path

import torch

import hf
from data import chat
from data.shards import PUBLISHED, read_meta
from data.tokenizer_json import begin_ids, read_object
from data.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_dict
from generate import ThinkBudget
from training import checkpoint
from training.arguments import number
from training.knobs import find_device
from training.run_folder import is_from_hugging_face


class NoTokenizer(ValueError):
    """Raised where no file says which tokenizer a model has."""


def load(
    path: Path,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: str | None = None,
    for_text: bool = True,
    average: bool = True,
) -> tuple:
    """Returns the model in eval mode, its tokenizer, and the ids that every prompt begins with.

    dtype: auto is bfloat16 on CUDA, else float32. tokenizer: the name or path of one, for a folder that has none.
    for_text: False returns None in the place of a tokenizer that is not known, which is no error then.
    average: of a run that has an average of its weights that one is taken.
    ValueError and OSError say what is missing, or does not belong together.
    """
    # 1. the model
    device = find_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    weights_in = getattr(torch, dtype)
    if not (path / "config.json").exists() and not checkpoint.folders(path):
        kinds = "a run's folder, a checkpoint's, or that of a Hugging Face model, with its config.json"
        raise FileNotFoundError(f"no model in {path}: give {kinds}")
    if is_from_hugging_face(path):
        model = hf.load(path, device, weights_in)
    else:
        model, _ = checkpoint.load_model(path, device, average)
        model = model.to(weights_in)

    # 2. the tokenizer, and how our documents, or those of a Hugging Face model, begin
    try:
        found, prefix = find_tokenizer(path, tokenizer)
    except NoTokenizer:
        if for_text:
            raise
        return model, None, []
    except OSError as error:  # GPT-2's, which a run on published shards has, cannot be downloaded
        if for_text or tokenizer:
            raise
        print(f"without its tokenizer the loss is measured, but no bits per byte: {error}", file=sys.stderr)
        return model, None, []
    n = model.config.vocab_size
    if found.vocab_size > n:
        advice = "they do not belong together"
        if found.eot_id == n == found.vocab_size - 1:
            advice = f"no room for {found.eot}: give config.json the eos_token_id of the token that ends a text"
        raise ValueError(f"the tokenizer {found.name} has {found.vocab_size} tokens, and the model {n}: {advice}")
    return model, found, prefix


def find_tokenizer(path: Path, name: str | None) -> tuple:
    """Returns the tokenizer of this name, or else that of the folder; and the ids that its documents begin with."""
    if name:
        tokenizer = load_tokenizer(name)
        prefix = [] if is_from_hugging_face(path) else [tokenizer.eot_id]
        return tokenizer, prefix
    for file in (path / "tokenizer.json", path / "tokenizer.model"):
        if file.exists():
            try:
                tokenizer = load_tokenizer(str(file))
            except ValueError:
                if file.name == "tokenizer.json" and (path / "tokenizer.model").exists():
                    continue  # sentencepiece's, as of Llama 2, of which tokenizer.json is a translation
                raise
            return tokenizer, begin_ids(file, tokenizer)
    for folder in (path, path.resolve().parent):  # of a run, and of a checkpoint in it
        file = folder / "data.json"
        if not file.exists():
            continue
        meta = read_meta(file, f"copy meta.json of its data to {file}")
        if meta["tokenizer"]:
            tokenizer = tokenizer_from_dict(meta["tokenizer"])
        elif (meta["vocab_size"], meta["eot_id"]) == PUBLISHED[2]:
            tokenizer = load_tokenizer("gpt2")  # GPT-2's published shards come without a tokenizer
        else:
            what = f"{meta['vocab_size']:,} tokens and no tokenizer"
            raise NoTokenizer(f"the data of {path} has {what}: name its own with --tokenizer, such as a tokenizer.json")
        return tokenizer, [tokenizer.eot_id]
    if (path / "vocab.json").exists():
        convert = f"AutoTokenizer as T; T.from_pretrained('{path}').save_pretrained('{path}')"
        what = f"{path} has a vocab.json and no tokenizer.json, which transformers makes of it"
        raise NoTokenizer(f'{what}:  python -c "from transformers import {convert}"')
    raise NoTokenizer(f"{path} has no tokenizer: name one with --tokenizer, for example --tokenizer gpt2")


def known_tokenizer(path: str | Path) -> Tokenizer | None:
    """Returns the tokenizer of a folder; None where no file says which it is."""
    try:
        return find_tokenizer(Path(path), None)[0]
    except NoTokenizer:
        return None


def hide_padding(model, tokenizer, temperature: float = 1.0) -> None:
    """Leaves out the logits of what only pads the vocabulary, as no text stands behind those ids; divides the others.

    What is trained so has the distribution that it is sampled from.
    """
    logits = model.logits
    model.logits = lambda x: logits(x)[..., : tokenizer.vocab_size] / temperature


def stop_tokens(tokenizer, path: Path | None = None) -> set[int]:
    """Returns the ids that end a text: that of the next document, and that of the end of a turn in a chat.

    path: where the model is from; a Hugging Face folder may name further ones.
    """
    ids = {tokenizer.eot_id, *tokenizer.stop_ids}
    if path is not None and is_from_hugging_face(path):
        ids |= set(hf.end_ids(path))
    return ids


def warn_of_template(path: Path) -> None:
    """Says that chats have Qwen3's form where a Hugging Face folder of another model has a template of its own."""
    if not is_from_hugging_face(path) or hf.read_config(path)["model_type"].startswith("qwen3"):
        return
    file = path / "tokenizer_config.json"
    if (path / "chat_template.jinja").exists() or file.exists() and "chat_template" in read_object(file):
        print(f"warning: chats are asked in the form of Qwen3's, and not by the template of {path}", file=sys.stderr)


def add_thinking(parser) -> None:
    """Adds to a command the arguments that say how the answers of a chat think."""
    add = parser.add_argument
    add("--think", action="store_true", default=None, help="begin each answer of a chat with thinking")
    add("--no_think", action="store_false", dest="think", help="answer without (default: as the model likes)")
    about_budget = "end thinking that has come to N tokens, and go on with the answer"
    add("--think_budget", type=number("[0, 1e9]"), metavar="N", help=about_budget)


def think_budget(tokenizer: Tokenizer, n: int) -> ThinkBudget:
    """Returns what ends a model's thinking after n tokens: the end of a block of thinking, as a chat has it."""
    chat.check(tokenizer)
    tokens = tokenizer.special_tokens | tokenizer.added_tokens
    end = tokens[chat.END_THINK]
    return ThinkBudget(n, tokens[chat.THINK], end, [*tokenizer.encode("\n"), end, *tokenizer.encode("\n\n")])
