"""tokenizer.json, the file of Hugging Face's package tokenizers: read and written with the same ids on both sides.

A tokenizer is here what Tokenizer.to_dict() in data/tokenizers.py returns. Byte-level BPE, as in the files of GPT-2,
Llama 3, Qwen and SmolLM, becomes one for tiktoken's core, and a file that was written here what it was; any other keeps
its file, which the package reads (data/tokenizer_package.py). Values are of the kinds of a table before they are used.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from data.bpe import BYTE_OF, END_OF_TEXT, EOT, MAX_ID, PATTERNS, SPELLING, TURN_ENDS, format_ranks, parse_ranks
from data.text import read_json

EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


# SmolLM and StarCoder take out each digit before GPT-2's pattern cuts the rest: spaces end at a digit, too.
EACH_DIGIT = PATTERNS["gpt2"].replace(r" ?\p{N}+", r"\p{N}").replace(r"\s+(?!\S)", r"\s+(?![^\s\p{N}])")


# ---- the kinds of values ---------------------------------------------------------------------------------------------
# A dict names the keys of an object; those with ! must be there, others may be absent or null, and `...` is every key.
# A list has items of one kind.
PROCESSOR = {
    "single": [{"SpecialToken": {"id!": str}}],
    "special_tokens": {...: {"ids!": [int]}},
}
STEP = {
    "type!": str,
    "use_regex": bool,
    "add_prefix_space": bool,
    "behavior": str,
    "invert": bool,
    "pattern": {"Regex": str},
}
TOKENIZER_JSON = {
    "added_tokens": [{"content!": str, "id!": int, "special": bool, "normalized": bool}],
    "normalizer": {"type!": str},
    "pre_tokenizer": STEP | {"pretokenizers": [STEP]},
    "post_processor": PROCESSOR | {"processors": [PROCESSOR]},
    "model!": {"type": str},
}
VOCABULARY = {"vocab!": {...: int}}
CONFIG = {"add_bos_token": bool}
OURS = {
    "kind!": str,
    "name!": str,
    "special_tokens!": {...: int},
    "added": {...: int},
    "added_normalized": {...: int},
    "eot": str,
}
DATA = {  # what the kinds of our tokenizers have besides
    "byte": {},
    "char": {"chars!": str},
    "bpe": {"ranks!": str, "pattern!": str, "nfc!": bool},
    "sentencepiece": {"model!": str},
    "huggingface": {"file!": str},
}
NAMES = {
    str: "a text",
    int: f"a whole number from 0 to {MAX_ID}",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def read_object(path: Path) -> dict:
    """Returns the object that a JSON file holds; raises ValueError, with the file's name, if it holds none."""
    d = read_json(path)
    check(d, {}, path)
    return d


def check(value, kind, where: str | Path) -> None:
    """Raises ValueError, with the file and the key that `where` says, unless a value is of its kind."""
    of_type = kind
    if not isinstance(kind, type):
        of_type = type(kind)
    if type(value) is not of_type or of_type is int and not 0 <= value <= MAX_ID:
        raise ValueError(f"{where} is {str(value)[:40]!r} and must be {NAMES[of_type]}")
    if kind is of_type:
        return
    if of_type is list:
        for i, item in enumerate(value):
            check(item, kind[0], f"{where}[{i}]")
    elif ... in kind:
        for key, item in value.items():
            check(item, kind[...], f"{where}: {key}")
    else:
        for name, inner in kind.items():
            key = name.removesuffix("!")
            if value.get(key) is not None:
                check(value[key], inner, f"{where}: {key}")
            elif name.endswith("!"):
                raise ValueError(f"{where} has no {key}")


def check_ours(d: dict, where: str | Path) -> None:
    """Raises ValueError unless d is what Tokenizer.to_dict() returns."""
    check(d, OURS, where)
    if d["kind"] not in DATA:
        raise ValueError(f"{where}: kind is {d['kind']!r}, and must be {' or '.join(DATA)}")
    known = OURS | DATA[d["kind"]]
    check(d, known, where)
    unknown = sorted(d.keys() - {key.removesuffix("!") for key in known})
    if unknown:
        raise ValueError(f"{where} has {', '.join(unknown)}, which no {d['kind']} tokenizer has")


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(d: dict, path: Path) -> dict:
    """Returns the tokenizer of a file's contents d."""
    # 1. its added tokens: special ones are text unless they are asked for, the others are found in every text
    check(d, TOKENIZER_JSON, path)
    ids = {}
    kinds = {"special_tokens": {}, "added": {}, "added_normalized": {}}
    for token in d.get("added_tokens") or ():
        if token.get("special", True):
            kind = "special_tokens"
        elif token.get("normalized"):
            kind = "added_normalized"
        else:
            kind = "added"
        ids[token["content"]] = token["id"]
        kinds[kind][token["content"]] = token["id"]
    tokenizer = {"name": path.name, "special_tokens": kinds["special_tokens"]}
    tokenizer |= {kind: tokens for kind, tokens in kinds.items() if tokens}

    # 2. the one that begins a document
    eot = document_marker(d, path, ids)
    if eot not in (None, EOT):
        tokenizer["eot"] = eot

    # 3. its model
    chars = read_characters(d, ids)
    if chars:
        return {"kind": "char", **tokenizer, "chars": chars}
    model = read_bpe(d, path, ids) or read_other(d, path)
    return tokenizer | model


def document_marker(d: dict, path: Path, ids: dict[str, int]) -> str | None:
    """Returns the token that begins a document, None where a file's tokens `ids` have none for it.

    It is the one that is put before every text; else one that is known to end a text; else what tokenizer_config.json
    calls so, or the configs of the model beside it. It never is the end of a turn, as <|im_end|> of Qwen3, which
    tokenizer_config.json calls eos_token: a document that began at each would hide the turns of a chat from each other.
    """
    config = read_config(path)
    bos = config.get("bos_token")
    spelled = {i: token for token, i in ids.items()}
    candidates = [spelled.get(i) for i in ids_before_text(d, path)]
    if config.get("add_bos_token"):
        candidates.append(bos)
    candidates += [*END_OF_TEXT, config.get("eos_token"), bos]
    candidates += [spelled.get(i) for i in ids_of_model(path)]
    for token in candidates:
        if token in ids and token not in TURN_ENDS:
            return token
    return None


def read_config(path: Path) -> dict:
    """Returns what tokenizer_config.json says beside a tokenizer's file; bos_token and eos_token as spelled."""
    file = path.with_name("tokenizer_config.json")
    if not file.exists():
        return {}
    config = read_object(file)
    check(config, CONFIG, file)
    for key in ("bos_token", "eos_token"):
        token = config.get(key)
        if isinstance(token, dict):  # as of transformers' class AddedToken
            token = token.get("content")
        if token is not None:
            check(token, str, f"{file}: {key}")
        config[key] = token
    return config


def ids_of_model(path: Path) -> list[int]:
    """Returns the ids that end and begin a text by the configs of the model that a tokenizer's file stands beside."""
    ids = []
    for name in ("generation_config.json", "config.json"):
        file = path.with_name(name)
        if file.exists():
            config = read_object(file)
            for key in ("eos_token_id", "bos_token_id"):
                found = config.get(key)
                ids += found if isinstance(found, list) else [found]
    return [i for i in ids if isinstance(i, int)]


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


def read_bpe(d, path, added):
    """Returns the fields of a byte-level BPE, None where tiktoken's core would give other ids than the file means."""
    # 1. how text is cut into words: by a pattern of its own, or by GPT-2's, which the step ByteLevel knows
    pre_tokenizer = d.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    kinds = [step.get("type") for step in steps]
    first = steps[0]
    last = steps[-1]
    own_regex = last.get("use_regex", True)
    pattern = None
    if kinds == ["ByteLevel"] and own_regex:
        pattern = PATTERNS["gpt2"]
    elif kinds == ["Digits", "ByteLevel"] and own_regex and first.get("individual_digits"):
        pattern = EACH_DIGIT
    elif kinds == ["Split", "ByteLevel"] and not own_regex:
        if first.get("behavior") == "Isolated" and not first.get("invert"):
            pattern = (first.get("pattern") or {}).get("Regex")
    if not pattern or last.get("add_prefix_space"):
        return None

    # 2. its model
    model = d["model"]
    if model.get("type", "BPE") != "BPE" or not model.keys() >= {"vocab", "merges"}:
        return None
    if any(model.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")):
        return None
    normalizer = d.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        return None

    # 3. its tokens
    check(model, VOCABULARY | {"merges!": list}, f"{path}: model")
    vocab = model["vocab"]
    merged = []
    for i, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        check(pair, [str], f"{path}: model: merges[{i}]")
        merged.append("".join(pair))
    made = set(merged)
    plain = {token: i for token, i in vocab.items() if token in made or len(token) == 1 or added.get(token) != i}
    if any(len(token) > 1 and token not in made or not BYTE_OF.keys() >= set(token) for token in plain):
        return None  # a token that no merge of bytes makes
    spacing = ("lstrip", "rstrip", "single_word")  # tokens that take the spaces around them or want a word of their own
    if any(token.get(option) for token in d.get("added_tokens") or () for option in spacing):
        return None
    in_order = sorted(merged, key=lambda token: vocab.get(token, -1))
    if in_order != merged:  # a token's id is its rank in tiktoken's core
        return None

    if pattern not in PATTERNS.values():  # here text that no alternative matches is a word; tiktoken would drop it
        pattern += rf"|(?:(?!{pattern})[\s\S])+"
    ranks = {bytes(BYTE_OF[character] for character in token): i for token, i in plain.items()}
    return {"kind": "bpe", "ranks": format_ranks(ranks), "pattern": pattern, "nfc": normalizer is not None}


def read_other(d, path):
    """Returns the fields of any other tokenizer: its file, without what cuts, pads or begins a text."""
    if d["model"].get("dropout"):
        why = "it leaves out merges at random (model: dropout), so a text has no ids of its own"
        raise ValueError(f"{path}: {why}: set it to null")
    if isinstance(d["model"].get("vocab"), dict):
        check(d["model"], VOCABULARY, f"{path}: model")
    contents = d | {"truncation": None, "padding": None, "post_processor": None}
    contents["added_tokens"] = d.get("added_tokens") or []
    return {"kind": "huggingface", "file": json.dumps(contents, ensure_ascii=False, separators=(",", ":"))}


def begin_ids(path: Path, tokenizer) -> list[int]:
    """Returns the ids that transformers puts before every text, with the tokenizer of a folder's file.

    The post_processor of tokenizer.json says them, for example that of <|begin_of_text|> of Llama 3. A sentencepiece
    model alone, as of Llama 2, puts the token there that begins a document, unless tokenizer_config.json says no.
    """
    file = path.with_name("tokenizer.json")
    if file.exists():
        d = read_object(file)
        check(d, TOKENIZER_JSON, file)
        return ids_before_text(d, file)
    if read_config(path).get("add_bos_token") is False:
        return []
    return [tokenizer.eot_id]


def ids_before_text(d, path):
    """Returns the ids that the post_processor of a file's contents d puts before every text."""
    processor = d.get("post_processor") or {}
    ids = []
    for step in processor.get("processors") or [processor]:
        for piece in step.get("single") or ():
            token = piece.get("SpecialToken")
            if token is None:
                break
            known = step.get("special_tokens") or {}
            if token["id"] not in known:
                raise ValueError(f"{path}: post_processor: special_tokens has no {token['id']!r}")
            ids += known[token["id"]]["ids"]
    return ids


# ---- writing ---------------------------------------------------------------------------------------------------------


def files(tokenizer: dict, begin: Sequence[int] = ()) -> dict[str, dict]:
    """Returns {file name: contents} with which AutoTokenizer gives the same ids; raises where it cannot.

    begin: the special tokens that it puts before every text.
    """
    name = tokenizer["name"]
    special = tokenizer["special_tokens"]
    normalized = tokenizer.get("added_normalized", {})
    tokens = special | tokenizer.get("added", {}) | normalized
    eot = tokenizer.get("eot", EOT)
    kind = tokenizer["kind"]
    if kind == "bpe":
        ranks = parse_ranks(tokenizer["ranks"], name)
        contents = bpe(ranks, tokenizer["pattern"], tokenizer["nfc"])
    elif kind == "byte":  # BPE that merges nothing: where words end does not matter
        contents = bpe({bytes([byte]): byte for byte in range(256)}, PATTERNS["gpt2"], nfc=False)
    elif kind == "char":
        contents = characters(tokenizer["chars"])
    elif kind == "huggingface":
        contents = json.loads(tokenizer["file"])
    else:
        advice = "save the model without one, and put the tokenizer's own file beside it"
        raise ValueError(f"{name}: a {kind} tokenizer has no tokenizer.json with the same ids: {advice}")

    if kind != "huggingface":
        contents["added_tokens"] = []
        put_into_vocabulary(tokens, contents["model"]["vocab"], name)
    known = {token["content"] for token in contents["added_tokens"]}
    for token, i in tokens.items():
        options = dict(single_word=False, lstrip=False, rstrip=False, normalized=token in normalized)
        if token not in known:
            contents["added_tokens"].append({"id": i, "content": token, **options, "special": token in special})
    contents["post_processor"] = before_text({token: i for token, i in tokens.items() if i in begin})

    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=eot, eos_token=eot)
    config["clean_up_tokenization_spaces"] = False  # True takes the space before a full stop out of decoded text
    ends = [tokens[token] for token in dict.fromkeys((eot, *END_OF_TEXT, *TURN_ENDS)) if token in tokens]
    return {
        "tokenizer.json": {"version": "1.0", **contents},
        "tokenizer_config.json": config,
        "generation_config.json": {"bos_token_id": tokens[eot], "eos_token_id": ends},
    }


def put_into_vocabulary(tokens, vocab, name):
    # Added tokens stand in the vocabulary too: one that does not gets the next free id, whatever the file says.
    for token, i in tokens.items():
        if vocab.setdefault(token, i) != i:
            both = f"the special token {token!r} is spelled like the token {vocab[token]} there"
            raise ValueError(f"{name} has no tokenizer.json with the same ids: {both}")


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
