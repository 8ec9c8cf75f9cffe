"""sentencepiece (Kudo and Richardson 2018, arXiv:1808.06226): its .model files, read and trained by its package."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.bpe import EOT

LONGEST_LINE = 10_000  # characters that are trained on as one sentence


def package():
    try:
        import sentencepiece
    except ImportError:
        raise ImportError("a sentencepiece .model needs its package: pip install sentencepiece") from None
    return sentencepiece


def load(model: bytes):
    """Returns the package's processor of what a .model file holds."""
    try:
        return package().SentencePieceProcessor(model_proto=model)
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


def train(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str = "bpe",
    user_symbols: Sequence[str] = (),
    special_tokens: Sequence[str] = (),
    workers: int = 1,
) -> bytes:
    """Returns a .model with exactly vocab_size tokens: <pad> 0, <unk> 1, <s> 2, </s> 3, then those that are named.

    user_symbols are found in every text, special_tokens in none unless they are asked for. Numbers are spelled digit
    by digit, what has no token by its bytes, and nothing is normalized: decoding gives the text back. Only `word` loses
    the spaces before words that it does not know.
    """
    sentencepiece = package()
    out = io.BytesIO()
    options = dict(pad_id=0, unk_id=1, bos_id=2, eos_id=3, split_digits=True, byte_fallback=True)
    options |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False)
    options |= dict(user_defined_symbols=list(user_symbols), control_symbols=list(special_tokens))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(texts),
            model_writer=out,
            model_type=model_type,
            vocab_size=vocab_size,
            max_sentence_length=LONGEST_LINE * 4,  # bytes: what is longer would be left out without a word
            allow_whitespace_only_pieces=True,
            num_threads=workers,
            minloglevel=2,
            **options,
        )
    except (RuntimeError, OSError) as error:
        why = str(error).rpartition("] ")[2].partition(" Increase")[0]  # between a line of its source and advice
        raise ValueError(f"sentencepiece cannot train {vocab_size} tokens of this text: {why}") from None
    model = out.getvalue()
    n_tokens = len(load(model))
    if n_tokens != vocab_size:
        raise ValueError(f"{n_tokens} tokens are all this text has: take a vocabulary of {n_tokens}, or more text")
    return model


def lines(texts):
    """Yields the lines of texts, each long one in several. What ends a document ends a line, and is no text."""
    for text in texts:
        for line in text.replace(EOT, "\n").splitlines():
            for begin in range(0, len(line), LONGEST_LINE):
                yield line[begin : begin + LONGEST_LINE]


def vocabulary(model: bytes) -> str:
    """Returns a line "token<tab>score" for each id, as the package's own command writes them into a .vocab file."""
    sp = load(model)
    return "".join(f"{sp.id_to_piece(i)}\t{sp.get_score(i):g}\n" for i in range(len(sp)))
