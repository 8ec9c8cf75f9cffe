"""sentencepiece (Kudo and Richardson 2018, arXiv:1808.06226): its .model files, read and trained by its package."""

import base64
from pathlib import Path

from data.bpe import EOT


def load(model: bytes):
    """Returns the package's processor of what a .model file holds."""
    try:
        import sentencepiece
    except ImportError:
        raise ImportError("a sentencepiece .model needs its package: pip install sentencepiece") from None
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
        raise ValueError(f"not a sentencepiece model ({e}); a file of ranks must be named x.tiktoken") from None


def pieces(sp) -> dict[int, bytes]:
    """Returns what each id stands for, but for control symbols: they are no text."""
    found = {}
    for i in range(len(sp)):
        piece = sp.id_to_piece(i)
        if sp.is_control(i) or sp.is_unused(i):
            continue
        if sp.is_byte(i):  # spelled <0x41>
            found[i] = bytes([int(piece[1:-1], 16)])
        elif sp.is_unknown(i):
            found[i] = "\ufffd".encode()
        else:
            found[i] = piece.replace("\u2581", " ").encode()  # its sign for a space
    return found


def read(path: Path) -> dict:
    """Returns the tokenizer of a .model file, as Tokenizer.to_dict() in data/tokenizers.py does."""
    model = path.read_bytes()
    sp = load(model)
    control = {sp.id_to_piece(i): i for i in range(len(sp)) if sp.is_control(i)}
    tokenizer = {"kind": "sentencepiece", "name": path.name, "special_tokens": control}
    tokenizer["model"] = base64.b64encode(model).decode()
    if EOT not in control and sp.bos_id() >= 0:
        tokenizer["eot"] = sp.id_to_piece(sp.bos_id())
    return tokenizer
