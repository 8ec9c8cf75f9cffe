"""tokenizer.json, the file of Hugging Face's package tokenizers: read and written with the same ids on both sides.

A tokenizer is here what Tokenizer.to_dict() in data/tokenizers.py returns. Byte-level BPE is read, as in the files of
GPT-2, Llama 3 and Qwen, and what this file writes.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from data.bpe import EOT, PATTERNS, format_ranks, parse_ranks

# GPT-2 spells each byte as a character: a printable one as itself, the others in order as U+0100, U+0101, ...
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
SPELLING = {byte: chr(byte) for byte in PRINTABLE}
SPELLING |= {byte: chr(256 + n) for n, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
BYTE_OF = {character: byte for byte, character in SPELLING.items()}

EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(d: dict, path: Path) -> dict:
    """Returns the tokenizer of a file's contents d; raises where ours would give other ids."""
    special = {token["content"]: token["id"] for token in d.get("added_tokens", ())}
    tokenizer = {"name": path.name, "special_tokens": special}
    chars = read_characters(d, special)
    if chars:
        return {"kind": "char", **tokenizer, "chars": chars}
    return {"kind": "bpe", **tokenizer, **read_bpe(d, path, special)}


def read_characters(d, special):
    """Returns the alphabet of a file that characters() wrote, or an empty text."""
    model = d.get("model", {})
    if model.get("type") != "WordLevel":
        return ""
    vocab = model.get("vocab", {})
    chars = [token for token in sorted(vocab, key=vocab.get) if token not in special]
    written = characters(chars)
    written["model"]["vocab"] |= special
    if any(d.get(key) != value for key, value in written.items()):
        return ""
    return "".join(chars)


def read_bpe(d, path, special):
    def refuse(found, problem):
        if found:
            only = "only byte-level BPE like GPT-2's, Llama 3's or Qwen's can be read"
            raise ValueError(f"{path}: {problem}; {only}")

    # 1. how text is cut into words: by a pattern of its own, or by GPT-2's, which the step ByteLevel knows
    pre_tokenizer = d.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    split = steps[0]
    last = steps[-1]
    own_regex = last.get("use_regex", True)
    pattern = None
    if kinds == ["ByteLevel"] and own_regex:
        pattern = PATTERNS["gpt2"]
    elif kinds == ["Split", "ByteLevel"] and split["behavior"] == "Isolated" and not split["invert"] and not own_regex:
        pattern = split["pattern"].get("Regex")

    # 2. its model
    model = d.get("model", {})
    kind = model.get("type", "BPE")
    refuse(kind != "BPE" or not model.keys() >= {"vocab", "merges"}, f"its model is {kind}")
    options = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    options = [option for option in options if model.get(option)]
    refuse(options, f"its model has {', '.join(options)}")
    normalizer = d.get("normalizer")
    refuse(normalizer not in (None, {"type": "NFC"}), f"its normalizer is {normalizer}")
    refuse(not pattern or last.get("add_prefix_space"), f"its pre_tokenizer is {d.get('pre_tokenizer')}")

    # 3. its tokens
    vocab = model["vocab"]
    merged = ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    made = set(merged)
    plain = {token: i for token, i in vocab.items() if token in made or special.get(token) != i}
    unmade = [token for token in plain if len(token) > 1 and token not in made or not BYTE_OF.keys() >= set(token)]
    refuse(unmade, f"its tokens {unmade[:3]} are made by no merge of bytes")
    spaced = [t["content"] for t in d.get("added_tokens", ()) if t["lstrip"] or t["rstrip"] or t["single_word"]]
    refuse(spaced, f"its tokens {spaced[:3]} take the spaces around them or want a word of their own")
    in_order = sorted(merged, key=lambda token: vocab.get(token, -1))
    refuse(in_order != merged, "its ids do not follow the order of its merges")

    if pattern not in PATTERNS.values():  # here text that no alternative matches is a word; tiktoken would drop it
        pattern += rf"|(?:(?!{pattern})[\s\S])+"
    ranks = {bytes(BYTE_OF[character] for character in token): i for token, i in plain.items()}
    return {"ranks": format_ranks(ranks), "pattern": pattern, "nfc": normalizer is not None}


def ids_before_text(d: dict) -> list[int]:
    """Returns the ids that the package puts before every text, for example that of <|begin_of_text|> of Llama 3."""
    processor = d.get("post_processor") or {}
    ids = []
    for step in processor.get("processors", [processor]):
        for piece in step.get("single", ()):
            if "SpecialToken" not in piece:
                break
            ids += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids


# ---- writing ---------------------------------------------------------------------------------------------------------


def files(tokenizer: dict, begin: Sequence[int] = ()) -> dict[str, dict]:
    """Returns {file name: contents} with which AutoTokenizer gives the same ids; raises where it cannot.

    begin: the special tokens that it puts before every text.
    """
    name = tokenizer["name"]
    special = tokenizer["special_tokens"]
    kind = tokenizer["kind"]
    if kind == "bpe":
        ranks = parse_ranks(tokenizer["ranks"], name)
        contents = bpe(ranks, tokenizer["pattern"], tokenizer["nfc"])
    elif kind == "byte":  # BPE that merges nothing: where words end does not matter
        contents = bpe({bytes([byte]): byte for byte in range(256)}, PATTERNS["gpt2"], nfc=False)
    elif kind == "char":
        contents = characters(tokenizer["chars"])
    else:
        advice = "save the model without one, and put the tokenizer's own file beside it"
        raise ValueError(f"{name}: a {kind} tokenizer has no tokenizer.json with the same ids: {advice}")

    # Special tokens stand in the vocabulary too: one that does not gets the next free id, whatever the file says.
    vocab = contents["model"]["vocab"]
    for token, i in special.items():
        if token in vocab:
            both = f"the special token {token!r} is spelled like the token {vocab[token]} there"
            raise ValueError(f"{name} has no tokenizer.json with the same ids: {both}")
        vocab[token] = i
    options = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    contents["added_tokens"] = [{"id": i, "content": token, **options} for token, i in special.items()]
    contents["post_processor"] = before_text({token: i for token, i in special.items() if i in begin})

    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=EOT, eos_token=EOT)
    config["clean_up_tokenization_spaces"] = False  # True takes the space before a full stop out of decoded text
    ends = [special[token] for token in (EOT, "<|im_end|>") if token in special]
    return {
        "tokenizer.json": {"version": "1.0", **contents},
        "tokenizer_config.json": config,
        "generation_config.json": {"bos_token_id": special[EOT], "eos_token_id": ends},
    }


def bpe(ranks, pattern, nfc):
    # 1. words. Oniguruma, the engine of the package, repeats with {1,3}+; in that of tiktoken it is {1,3} that gives no
    #    match back, and at the end of an alternative the same as {1,3}.
    pattern = pattern.replace("{1,3}+|", "{1,3}|")
    if re.search(r"\{\d+,?\d*\}\+", pattern):
        raise ValueError(f"the pattern {pattern} has no tokenizer.json with the same ids: it has no {{n,m}}+")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    normalizer = None
    if nfc:
        normalizer = {"type": "NFC"}

    # 2. merges. tiktoken merges any two tokens that make a token, those that make the one of lowest rank first:
    #    the package does so with all such pairs, in this order.
    vocab = {spelled(token): i for token, i in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        for cut in range(1, len(token)):
            left = token[:cut]
            right = token[cut:]
            if left in ranks and right in ranks:
                merges.append(f"{spelled(left)} {spelled(right)}")
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        # A word that is a token is that token, whether merges make it or not: so it is in tiktoken.
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }


def spelled(token):
    return "".join(SPELLING[byte] for byte in token)


def characters(chars):
    # A character that is not among them becomes unk_token, which is no token here: the package raises, as ours does.
    vocab = {character: i for i, character in enumerate(chars)}
    return {
        "normalizer": None,
        "pre_tokenizer": EACH_CHARACTER,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": ""},
    }


def before_text(tokens):
    """Returns the post_processor that puts special tokens {spelling: id} before a text and before a pair of texts."""
    if not tokens:
        return None
    before = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*before, first],
        "pair": [*before, first, second],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in tokens.items()},
    }
