"""Text from a run, a checkpoint or a Hugging Face folder, streamed as it is generated.

python sample.py out/quickstart --prompt "def main():" --num_samples 3
cat prompt.txt | python sample.py out/run --prompt_file - --temperature 0 --max_new_tokens 50
python sample.py ~/models/Qwen3-0.6B --interactive
python sample.py out/run --save_pretrained my-model        (a folder that transformers opens)
"""

import argparse
import copy
import functools
import importlib
import inspect
import json
import sys
from itertools import chain
from pathlib import Path

import torch

import checkpoint
from data.tokenizers import load_tokenizer, stream_text, tokenizer_from_dict

ROOT = Path(__file__).resolve().parent


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
    for name, low, high in (("num_samples", 1, None), ("max_new_tokens", 1, None), ("temperature", 0, None),
                            ("top_k", 0, None), ("top_p", 1e-9, 1), ("repetition_penalty", 1e-9, None)):  # fmt: skip
        value = getattr(args, name)
        if value < low or high is not None and value > high:
            parser.error(f"--{name} {value}: give a number from {low}" + (f" to {high}" if high else ""))
    return args


def load(args):
    """The model in eval mode, its tokenizer, and the tokens that every prompt begins with."""
    device, path = args.device, args.path
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}, but torch {torch.__version__} sees no CUDA device: try --device cpu")
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    dtype = getattr(torch, dtype)
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: give a run's folder, a checkpoint's, or a Hugging Face model's")
    config = json.loads((path / "config.json").read_text()) if (path / "config.json").exists() else {}
    if "model_type" in config:
        model = model_of_type(config["model_type"]).from_pretrained(path, device, dtype)
    else:
        model = checkpoint.load_model(path, device)[0].to(dtype)
    tokenizer, ours = load_tokenizer(args.tokenizer) if args.tokenizer else None, "model_type" not in config
    for file in (path / "tokenizer.json", path / "data.json", path.resolve().parent / "data.json"):
        if tokenizer is None and file.exists():
            ours = file.name == "data.json"
            meta = json.loads(file.read_text()) if ours else {}
            if meta.get("tokenizer"):
                tokenizer = tokenizer_from_dict(meta["tokenizer"])
            else:  # published shards come without a tokenizer: they are GPT-2's
                tokenizer = load_tokenizer("gpt2" if ours else str(file))
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer: name one with --tokenizer, for example --tokenizer gpt2")
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, and the model {model.config.vocab_size}"
        raise ValueError(f"the tokenizer {tokenizer.name} has {sizes}: they do not belong together")
    return model, tokenizer, [tokenizer.eot_id] if ours else []  # as our documents begin


def hide_padding(model, tokenizer):
    """Leaves out the logits of what only pads the vocabulary: no text stands behind those ids."""
    head = model.logits
    model.logits = lambda x: head(x)[..., : tokenizer.vocab_size]


class StaticStep:
    """One token through a model with shapes and addresses that never change: what a CUDA graph can replay.

    The position is a tensor, and attention runs over a whole cache under a mask. It serves every model file, whose
    cache.append(layer, k, v) keeps tensors (..., T, D) in lists of their names. What a cache of the model's own holds
    is taken over at its first token; from then on that cache counts tokens, and holds none.
    """

    def __init__(self, model, **compile_options):
        static, eot_id = copy.copy(model), model.config.eot_id

        def positions_and_mask(idx, cache):
            t, s = cache.length, torch.arange(cache.start.size(1), device=idx.device)  # (1,), (S,)
            if eot_id < 0 and not cache.padded:
                return t, (s <= t)[None]  # (1,), (1, S)
            start = torch.where(idx == eot_id, t, cache.start.index_select(1, t))  # (B, 1)
            cache.start.copy_(torch.where(s < t, cache.start, torch.maximum(cache.start, start)))
            return t - start, ((cache.start == start) & (s <= t))[:, None, None]  # (B, 1), (B, 1, 1, S)

        static.positions_and_mask = positions_and_mask
        self.new_cache, self.block_size = model.new_cache, model.config.block_size
        self.step = torch.compile(static.forward, dynamic=False, **compile_options)
        self.cache = self.counter = self.idx = None

    def __call__(self, idx, cache, **options):
        cache.check(*idx.shape)
        if cache is not self.counter:
            self.take_over(cache)
        cache.length += 1
        return self.step(self.idx.copy_(idx), cache=self.cache, **options)  # idx is a slice, of strides that grow

    def take_over(self, cache):
        B, max_len = cache.start.shape
        max_len = min(1 << (max_len - 1).bit_length(), self.block_size)  # powers of 2: few sizes are ever compiled
        if self.cache is None or self.cache.start.shape != (B, max_len) or self.cache.padded != cache.padded:
            self.cache = self.new_cache(B, max_len, cache.start[:, -1] if cache.padded else None)
            self.cache.__class__ = static_cache(type(cache))
            self.cache.length, self.idx = cache.start.new_zeros(1), cache.start.new_zeros(B, 1)
            for x in (self.idx, self.cache.length, self.cache.start, *held(self.cache)):
                torch._dynamo.mark_static_address(x)
        for ours, theirs in zip(held(self.cache), held(cache)):
            ours.narrow(-2, 0, theirs.size(-2)).copy_(theirs)
        self.cache.start.copy_(cache.start[:, -1:])
        self.cache.start[:, : cache.start.size(1)] = cache.start
        self.cache.length.fill_(cache.length)
        self.counter, cache.taken = cache, True


def held(cache):
    """The tensors of all layers, in a fixed order."""
    return [x for layers in vars(cache).values() if isinstance(layers, list) for x in layers]


@functools.cache
def static_cache(kind):
    names = list(inspect.signature(kind.append).parameters)[2:]  # after self and layer

    class StaticCache(kind):
        def check(self, B, T):
            pass

        def append(self, layer, *new):
            layers = [getattr(self, name)[layer] for name in names]
            for x, y in zip(layers, new):
                x.index_copy_(-2, self.length, y)
            return layers if len(layers) > 1 else layers[0]

    return StaticCache


def with_compiled_step(model):
    """The same model, whose forward is compiled where it gets one more token of a text; on CUDA as a CUDA graph."""
    fast, whole, cuda = copy.copy(model), model.forward, model.embed.weight.is_cuda
    step = StaticStep(model, mode="reduce-overhead" if cuda else "default")

    def forward(idx, cache=None, **options):
        one_more = idx.size(1) == 1 and cache is not None and cache.length > 0
        if getattr(cache, "taken", False) and not (one_more and cache is step.counter):
            raise RuntimeError("a compiled step continues one text, by single tokens: end it before the next")
        return (step if one_more else whole)(idx, cache=cache, **options)

    fast.forward = forward
    return fast


def model_of_type(model_type):
    types = {}
    for file in sorted(ROOT.glob("model_*.py")):
        module = importlib.import_module(file.stem)
        types[module.HF_FIXED["model_type"]] = module.GPT
    if model_type not in types:
        raise ValueError(f"no model file reads Hugging Face's {model_type!r}; these can be read: {', '.join(types)}")
    return types[model_type]


def until_stop(pieces, stops, begin):
    """The text of the pieces up to the first stop after `begin` characters, never a part of a stop."""
    text, shown, longest = "", 0, max(map(len, stops), default=1)
    for piece in pieces:
        text += piece
        found = [at for stop in stops if (at := text.find(stop, max(begin, shown - longest))) >= 0]
        end = min(found) if found else min(max(begin, len(text) - longest + 1), len(text))
        yield text[shown:end]
        shown = end
        if found:
            return
    yield text[shown:]


def say(model, tokenizer, prompt, stop_tokens, args, echo=True):
    """Prints the continuations of a prompt, the first as it comes; returns the ids of the first."""
    rows = [[] for _ in range(args.num_samples)]

    def first_row():
        for tokens in model.stream(
            [prompt], args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.repetition_penalty,
            stop_tokens, args.num_samples, crop=True, use_cache=not args.no_cache, generator=args.generator,
        ):  # fmt: skip
            for row, token in zip(rows, tokens.tolist()):
                row.extend([token] if token >= 0 else [])
            if tokens[0] >= 0:
                yield int(tokens[0])

    shown = [token for token in prompt if token != tokenizer.eot_id] if echo else []
    begin = len(tokenizer.decode(shown))
    live = first_row()
    for i in range(args.num_samples):
        if args.num_samples > 1:
            print(f"{'' if i == 0 else chr(10)}---- sample {i + 1} of {args.num_samples} ----")
        text = stream_text(tokenizer, chain(shown, live if i == 0 else rows[i]))
        for piece in until_stop(text, args.stop, begin):
            print(piece, end="", flush=True)
        if i == 0 and args.num_samples > 1:
            list(live)  # a stop ended the first one: the others go on
        print()
    return rows[0]


def interact(model, tokenizer, prefix, stop_tokens, args):
    chat = {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens.keys()
    history = list(prefix)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not chat:
            say(model, tokenizer, prefix + tokenizer.encode(line), stop_tokens, args)
            continue
        turn = f"<|im_start|>user\n{line}<|im_end|>\n<|im_start|>assistant\n"
        history += tokenizer.encode(turn, special=True)
        history += say(model, tokenizer, history, stop_tokens, args, echo=False)
        history += tokenizer.encode("<|im_end|>\n", special=True)


def main(argv=None):
    args = parse_arguments(argv)
    try:
        if args.prompt_file:
            args.prompt = sys.stdin.read() if args.prompt_file == "-" else Path(args.prompt_file).read_text("utf-8")
        model, tokenizer, prefix = load(args)
        if args.save_pretrained:
            model.save_pretrained(args.save_pretrained)
            data = {"tokenizer": tokenizer.to_dict()}  # transformers ignores it, and sample.py reads it
            (Path(args.save_pretrained) / "data.json").write_text(json.dumps(data) + "\n")
            return print(f"wrote {args.save_pretrained}: config.json, model.safetensors, data.json")
        hide_padding(model, tokenizer)
        model = with_compiled_step(model) if args.compile else model
        args.generator = torch.Generator(model.embed.weight.device).manual_seed(args.seed)
        special = tokenizer.special_tokens
        stop_tokens = {tokenizer.eot_id, *(special[t] for t in ("<|im_end|>",) if t in special)}
        if args.interactive:
            return interact(model, tokenizer, prefix, stop_tokens, args)
        prompt = prefix + tokenizer.encode(args.prompt)
        say(model, tokenizer, prompt or [tokenizer.eot_id], stop_tokens, args)
    except (OSError, ValueError, checkpoint.CheckpointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
