"""tokenizer.json through Hugging Face's package tokenizers, for those that tiktoken's core cannot express.

Llama 2 and Gemma fall back to bytes, DeepSeek-V3 splits text three times, others normalise it or are no byte-level BPE.
The package finds the ids. It decodes only whole texts, so what one id stands for is worked out here, by the decoder
that the file names: a stream of ids and the count of bytes need that.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from data.bpe import BYTE_OF, MAX_ID


@contextmanager
def one_error(name: str, what: str) -> Iterator[None]:
    """Makes a ValueError that names the tokenizer of all that the package raises, a panic of its engine included."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{name}: the package tokenizers {what}: {error}") from None


def load(file: str, name: str):
    """Returns the package's tokenizer of what a tokenizer.json holds."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"{name} is more than tiktoken's core can express: pip install tokenizers") from None
    with one_error(name, "cannot read it"):
        return tokenizers.Tokenizer.from_str(file)


def add(core, tokens: dict[str, int], name: str) -> None:
    """Makes special tokens of those that the file does not have, each with its id."""
    in_order = sorted(tokens, key=tokens.get)
    core.add_special_tokens([token for token in in_order if core.token_to_id(token) is None])
    for token in in_order:
        found = core.token_to_id(token)
        if found != tokens[token]:
            why = f"the package tokenizers gives it {found}"
            raise ValueError(f"{name}: special token {token!r} can't have the id {tokens[token]}: {why}")


def encode(core, text: str, special: bool, name: str) -> list[int]:
    """Returns the ids of a text, in which special tokens are text unless they are asked for."""
    core.encode_special_tokens = not special
    with one_error(name, f"gave up at {text[:40]!r}"):
        return core.encode(text, add_special_tokens=False).ids


def unknown_ids(core, file: str) -> set[int]:
    """Returns the id that a file's model gives to text which has no token, in a set that is empty where none has."""
    model = json.loads(file)["model"]
    ids = {model.get("unk_id"), core.token_to_id(model.get("unk_token") or "")}
    return ids - {None}


def pieces(core, file: str, added: dict[str, int], name: str) -> dict[int, bytes]:
    """Returns what each id stands for, those of the tokens `added` included, which are spelled as in a text."""
    decoder = json.loads(file).get("decoder") or {"type": "Fuse"}
    steps = decoder.get("decoders") or [decoder]
    of_spaces = [step for step in steps if step["type"] in ("Replace", "Metaspace")]
    vocab = core.get_vocab(with_added_tokens=False)
    largest = max(vocab.values(), default=0)
    if largest > MAX_ID:
        raise ValueError(f"{name}: its largest id is {largest}, and no more than {MAX_ID} is read")
    found = {i: spell(token, steps) for token, i in vocab.items()}
    return found | {i: spell(token, of_spaces) for token, i in added.items()}


def spell(token: str, steps: Iterable[dict]) -> bytes:
    """Returns the bytes of a token that stands inside a text, by the steps of a decoder."""
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and BYTE_OF.keys() >= set(token):
            return bytes(BYTE_OF[character] for character in token)
        if kind == "ByteFallback" and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if kind == "Replace" and "String" in step["pattern"]:
            token = token.replace(step["pattern"]["String"], step["content"])
        elif kind == "Metaspace":
            token = token.replace(step["replacement"], " ")
        elif kind == "BPEDecoder":
            token = token.replace(step["suffix"], " ")
        elif kind == "WordPiece" and token.startswith(step["prefix"]):
            token = token.removeprefix(step["prefix"])
        elif kind == "WordPiece":
            token = " " + token
    return token.encode()
