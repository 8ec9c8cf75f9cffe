"""Text from a run, a checkpoint or a Hugging Face folder, streamed as it is generated.

python sample.py out/quickstart --prompt "def main():" --num_samples 3
cat prompt.txt | python sample.py out/run --prompt_file - --temperature 0 --max_new_tokens 50
python sample.py ~/models/Qwen3-0.6B --interactive
python sample.py out/run --save_pretrained my-model        (a folder that transformers opens)
"""

import argparse
import json
import math
import sys
from itertools import chain
from pathlib import Path

import torch

import checkpoint
import generate
import hf
from data.tokenizer_json import ids_before_text
from data.tokenizers import load_tokenizer, stream_text, tokenizer_from_dict

LIMITS = {
    "num_samples": (1, math.inf),
    "max_new_tokens": (1, math.inf),
    "temperature": (0, math.inf),
    "top_k": (0, math.inf),
    "top_p": (1e-9, 1),
    "repetition_penalty": (1e-9, math.inf),
}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("path", type=Path, help="a run's folder, a checkpoint's (out/run/best), or one with a Hugging Face model")
    add("--prompt", default="", help="what to continue (default: the beginning of a document)")
    add("--prompt_file", help="a file with the prompt; - is standard input")
    add("--num_samples", type=int, default=1, help="continuations of the prompt, from one prefill")
    add("--max_new_tokens", type=int, default=256)
    add("--temperature", type=float, default=0.8, help="0: always the most likely token")
    add("--top_k", type=int, default=0, help="only among the k most likely tokens; 0: off")
    add("--top_p", type=float, default=1.0, help="only among the likeliest tokens that reach probability p together")
    add("--repetition_penalty", type=float, default=1.0, help="over 1: what was said becomes less likely")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be given again)")
    add("--seed", type=int, default=1)
    add("--device", default="auto", help="cuda, mps, cpu or auto")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="auto: bfloat16 on CUDA, else float32")
    add("--tokenizer", help="for a folder without one: gpt2, or a path (see data/tokenizers.py)")
    add("--no_cache", action="store_true", help="compute all tokens again for each new one: slow, to check the cache")
    add("--compile", action="store_true", help="compile the decoding step: a minute first, then faster (results/)")
    add("--interactive", action="store_true", help="chat (a continuation of each line where there are no chat tokens)")
    add("--save_pretrained", metavar="FOLDER", help="write the model there for transformers, and end")
    args = parser.parse_args(argv)
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if not low <= value <= high:
            range_ = f"from {low}" if high == math.inf else f"from {low} to {high}"
            parser.error(f"--{name} {value}: give a number {range_}")
    return args


# ---- the model and its tokenizer -------------------------------------------------------------------------------------


def load(args):
    """Returns the model in eval mode, its tokenizer, and the tokens that every prompt begins with."""
    # 1. the model
    path = args.path
    device = find_device(args.device)
    dtype = torch.float32
    if args.dtype != "auto":
        dtype = getattr(torch, args.dtype)
    elif device.startswith("cuda"):
        dtype = torch.bfloat16
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: give a run's folder, a checkpoint's, or a Hugging Face model's")
    if is_from_hugging_face(path):
        model = hf.load(path, device, dtype)
    else:
        model, _ = checkpoint.load_model(path, device)
        model = model.to(dtype)

    # 2. the tokenizer, and how our documents, or those of a Hugging Face model, begin
    tokenizer, prefix = find_tokenizer(path, args.tokenizer)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, and the model {model.config.vocab_size}"
        raise ValueError(f"the tokenizer {tokenizer.name} has {sizes}: they do not belong together")
    return model, tokenizer, prefix


def find_device(name):
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        if torch.backends.mps.is_available():
            return "mps"
        return "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}, but torch {torch.__version__} sees no CUDA device: try --device cpu")
    return name


def is_from_hugging_face(path):
    """Returns whether a folder has a config.json that names a model_type, which those of our runs do not."""
    file = path / "config.json"
    return file.exists() and "model_type" in json.loads(file.read_text())


def find_tokenizer(path, name):
    """Returns the tokenizer of this name, or else that of the folder; and the tokens that its documents begin with."""
    if name:
        tokenizer = load_tokenizer(name)
        prefix = [] if is_from_hugging_face(path) else [tokenizer.eot_id]
        return tokenizer, prefix
    file = path / "tokenizer.json"
    if file.exists():
        tokenizer = load_tokenizer(str(file))
        return tokenizer, ids_before_text(json.loads(file.read_text("utf-8")))
    for folder in (path, path.resolve().parent):  # of a run, and of a checkpoint in it
        file = folder / "data.json"
        if not file.exists():
            continue
        meta = json.loads(file.read_text())
        if meta.get("tokenizer"):
            tokenizer = tokenizer_from_dict(meta["tokenizer"])
        else:
            tokenizer = load_tokenizer("gpt2")  # published shards come without a tokenizer: they are GPT-2's
        return tokenizer, [tokenizer.eot_id]
    raise ValueError(f"{path} has no tokenizer: name one with --tokenizer, for example --tokenizer gpt2")


def hide_padding(model, tokenizer):
    """Leaves out the logits of what only pads the vocabulary: no text stands behind those ids."""
    logits = model.logits
    model.logits = lambda x: logits(x)[..., : tokenizer.vocab_size]


def stop_tokens(tokenizer):
    """Returns the ids that end a text: that of the next document, and that of the end of a turn in a chat."""
    ids = {tokenizer.eot_id}
    if "<|im_end|>" in tokenizer.special_tokens:
        ids.add(tokenizer.special_tokens["<|im_end|>"])
    return ids


def save_pretrained(model, tokenizer, prefix, folder):
    hf.save(model, folder, tokenizer.to_hf(prefix))
    names = ", ".join(sorted(file.name for file in Path(folder).iterdir()))
    print(f"wrote {folder}: {names}")


# ---- text ------------------------------------------------------------------------------------------------------------


def until_stop(pieces, stops, begin):
    """Yields the text of the pieces up to the first stop behind `begin` characters, and never a part of a stop."""
    longest = max((len(stop) for stop in stops), default=1)
    text = ""
    shown = 0
    for piece in pieces:
        text += piece
        found = [text.find(stop, max(begin, shown)) for stop in stops]
        found = [place for place in found if place >= 0]
        if found:
            yield text[shown : min(found)]
            return
        # The last longest - 1 characters may be the beginning of a stop: they wait for the next piece.
        end = min(max(len(text) - longest + 1, begin), len(text))
        yield text[shown:end]
        shown = end
    yield text[shown:]


def say(model, tokenizer, prompt, options, stops=(), echo=True):
    """Prints the continuations of a prompt up to a text of stops, the first as it comes; returns the ids of the first.

    options: those of generate.stream. echo: print the prompt before each.
    """
    rows = [[] for _ in range(options["num_samples"])]

    def first_row():
        """Yields the ids of the first row as they come, and notes those of all rows."""
        for tokens in generate.stream(model, [prompt], **options):
            for row, token in zip(rows, tokens.tolist()):
                if token >= 0:
                    row.append(token)
            if tokens[0] >= 0:
                yield tokens[0].item()

    shown = []
    if echo:
        shown = [token for token in prompt if token != tokenizer.eot_id]
    begin = len(tokenizer.decode(shown))
    live = first_row()
    for i, row in enumerate(rows):
        if len(rows) > 1:
            gap = "\n" if i > 0 else ""
            print(f"{gap}---- sample {i + 1} of {len(rows)} ----")
        ids = live if i == 0 else row
        text = stream_text(tokenizer, chain(shown, ids))
        for piece in until_stop(text, stops, begin):
            print(piece, end="", flush=True)
        if i == 0 and len(rows) > 1:
            list(live)  # a stop text ends the first one alone: the others go on
        print()
    return rows[0]


def interact(model, tokenizer, prefix, options, stops):
    """Answers one line after the other: with the whole conversation before it where the tokenizer knows chats."""
    is_chat = {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens.keys()
    history = list(prefix)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not is_chat:
            say(model, tokenizer, prefix + tokenizer.encode(line), options, stops)
            continue
        turn = f"<|im_start|>user\n{line}<|im_end|>\n<|im_start|>assistant\n"
        history += tokenizer.encode(turn, special=True)
        history += say(model, tokenizer, history, options, stops, echo=False)
        history += tokenizer.encode("<|im_end|>\n", special=True)


def run(args):
    # 1. the prompt, before the minutes that a large model may take to load
    text = args.prompt
    if args.prompt_file == "-":
        text = sys.stdin.read()
    elif args.prompt_file:
        text = Path(args.prompt_file).read_text("utf-8")

    # 2. the model
    model, tokenizer, prefix = load(args)
    if args.save_pretrained:
        save_pretrained(model, tokenizer, prefix, args.save_pretrained)
        return
    hide_padding(model, tokenizer)

    # 3. the text
    options = dict(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        stop=stop_tokens(tokenizer),
        num_samples=args.num_samples,
        crop=True,
        use_cache=not args.no_cache,
        generator=torch.Generator(model.embed.weight.device).manual_seed(args.seed),
    )
    if args.compile:
        options["step"] = generate.CompiledStep(model)
    if args.interactive:
        interact(model, tokenizer, prefix, options, args.stop)
        return
    prompt = prefix + tokenizer.encode(text)
    if not prompt:
        prompt = [tokenizer.eot_id]
    say(model, tokenizer, prompt, options, args.stop)


def main(argv=None):
    args = parse_arguments(argv)
    try:
        run(args)
    except (OSError, ValueError, checkpoint.CheckpointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
