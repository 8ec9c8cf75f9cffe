"""Text from a run, a checkpoint or a Hugging Face folder, streamed as it is generated.

python sample.py out/quickstart --prompt "def main():" --num_samples 3
cat prompt.txt | python sample.py out/run --prompt_file - --temperature 0 --max_new_tokens 50
python sample.py ~/models/Qwen3-0.6B --interactive --think --think_budget 500
python sample.py out/sft --prompt "What is 12 + 30?" --chat --no_think
python sample.py out/run --save_pretrained my-model        (a folder that transformers opens)
"""

import sys
from itertools import chain
from pathlib import Path

import torch

import generate
import hf
from data import chat
from data.text import end_with_reader, print_any_text, read_text
from data.tokenizers import stream_text
from training import output
from training.arguments import SEED, Parser, not_empty, number
from training.load import add_thinking, hide_padding, load, stop_tokens, think_budget, warn_of_template
from training.run_folder import is_from_hugging_face


def parse_arguments(argv):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("path", type=Path, help="a run's folder, a checkpoint's (out/run/best), or one with a Hugging Face model")
    prompt = parser.add_mutually_exclusive_group().add_argument
    prompt("--prompt", default="", help="what to continue (default: the beginning of a document)")
    prompt("--prompt_file", type=not_empty, help="a file with the prompt; - is standard input")
    in_turns = "chat (a continuation of each line where there are no chat tokens)"
    prompt("--interactive", action="store_true", help=in_turns)
    add("--num_samples", type=number("[1, 10000]"), default=1, help="continuations of the prompt, from one prefill")
    add("--max_new_tokens", type=number("[1, inf)"), default=256)
    add("--temperature", type=number("[0, 1000]", float), default=0.8, help="0: always the most likely token")
    add("--top_k", type=number("[0, inf)"), default=0, help="only among the k most likely tokens; 0: off")
    about_top_p = "only among the likeliest tokens that reach probability p together"
    add("--top_p", type=number("[1e-6, 1]", float), default=1.0, help=about_top_p)
    about_penalty = "over 1: what was said becomes less likely"
    add("--repetition_penalty", type=number("[0.01, 100]", float), default=1.0, help=about_penalty)
    about_stop = "end before this text (may be given again)"
    add("--stop", type=not_empty, action="append", default=[], metavar="TEXT", help=about_stop)
    add("--seed", type=SEED, default=1)
    add("--device", default="auto", help="cuda, mps, cpu or auto")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="auto: bfloat16 on CUDA, else float32")
    add("--tokenizer", type=not_empty, help="for a folder without one: gpt2, or a path (see data/tokenizers.py)")
    add("--no_average", action="store_true", help="the weights themselves, where a run has their average, too (ema)")
    add("--no_cache", action="store_true", help="compute all tokens again for each new one: slow, to check the cache")
    add("--compile", action="store_true", help="compile the decoding step: a minute first, then faster (results/)")
    add("--chat", action="store_true", help="ask the prompt as a chat's question")
    add("--system", metavar="TEXT", help="what a chat begins with: how to answer")
    add_thinking(parser)
    add("--save_pretrained", type=not_empty, metavar="FOLDER", help="write the model there for transformers, and end")
    args = parser.parse_args(argv)
    if is_about_chat(args) and not args.interactive and not args.chat:
        parser.error("--system, --think, --no_think and --think_budget are of a chat: give --chat or --interactive")
    return args


def is_about_chat(args):
    return args.system is not None or args.think is not None or args.think_budget is not None


# ---- text ------------------------------------------------------------------------------------------------------------
def say(model, tokenizer, prompt, options, stops=(), echo=True, opening=""):
    """Prints the continuations of a prompt up to a text of stops, the first as it comes; returns the ids of the first.

    options: those of generate.stream. echo: print the prompt before each. opening: print this before each; it is what
    of an answer stands in the prompt.
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
        shown = [token for token in prompt if token not in tokenizer.special_tokens.values()]
    begin = len(tokenizer.decode(shown))
    live = first_row()
    for i, row in enumerate(rows):
        if len(rows) > 1:
            gap = "\n" if i > 0 else ""
            print(f"{gap}---- sample {i + 1} of {len(rows)} ----")
        ids = live if i == 0 else row
        print(opening, end="", flush=True)
        text = stream_text(tokenizer, chain(shown, ids))
        for piece in generate.until_stop(text, stops, begin):
            print(piece, end="", flush=True)
        if i == 0 and len(rows) > 1:
            list(live)  # a stop text ends the first one alone: the others go on
        print()
    return rows[0]


def answer(model, tokenizer, prefix, messages, think, options, stops):
    """Prints the answer to the messages of a chat; returns it (the first sample) as a message without its thinking."""
    prompt = prefix + chat.prompt(tokenizer, messages, think)[1:]  # a document begins as the model's own do
    opening = chat.opening(think)
    text = opening + tokenizer.decode(say(model, tokenizer, prompt, options, stops, echo=False, opening=opening))
    _, content = chat.split_thinking(text)
    return {"role": "assistant", "content": content}


def interact(model, tokenizer, prefix, messages, think, options, stops):
    """Answers one line after the other, as the next question of the chat that begins with messages."""
    for line in typed_lines(tokenizer):
        messages.append({"role": "user", "content": line})
        messages.append(answer(model, tokenizer, prefix, messages, think, options, stops))


def continue_lines(model, tokenizer, prefix, options, stops):
    """Goes on with one line after the other, each by itself: for a tokenizer that knows no chats."""
    for line in typed_lines(tokenizer):
        say(model, tokenizer, prefix + tokenizer.encode(line), options, stops)


def typed_lines(tokenizer):
    """Yields the lines that a person types, until Ctrl-D; one that the tokenizer cannot have is said, and left out."""
    while True:
        try:
            line = input("> ")
            tokenizer.encode(line)
        except EOFError:
            print()  # a terminal stays in the line of the Ctrl-D
            return
        except ValueError as error:  # a character that is not among those of a tokenizer by characters
            print(f"error: {error}")
        else:
            yield line


def knows_chats(tokenizer):
    try:
        chat.check(tokenizer)
    except ValueError:
        return False
    return True


def save_pretrained(model, tokenizer, prefix, args):
    folder = args.save_pretrained
    if is_from_hugging_face(args.path) and not args.tokenizer:
        hf.save(model, folder, args.path)
    else:
        hf.save(model, folder, tokenizer.to_hf(prefix))
    names = ", ".join(sorted(file.name for file in Path(folder).iterdir()))
    print(f"wrote {folder}: {names}")


def run(args):
    # 1. the prompt, before the minutes that a large model may take to load
    text = args.prompt
    if args.prompt_file == "-":
        text = read_text(sys.stdin.buffer.read(), "standard input")
    elif args.prompt_file:
        text = read_text(args.prompt_file)

    # 2. the model
    model, tokenizer, prefix = load(args.path, args.device, args.dtype, args.tokenizer, average=not args.no_average)
    if args.save_pretrained:
        save_pretrained(model, tokenizer, prefix, args)
        return
    hide_padding(model, tokenizer)
    if args.chat or is_about_chat(args):
        chat.check(tokenizer)
    is_chat = args.chat or (args.interactive and knows_chats(tokenizer))
    if is_chat:
        warn_of_template(args.path)

    # 3. the text
    options = dict(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        stop=stop_tokens(tokenizer, args.path),
        num_samples=args.num_samples,
        crop=True,
        use_cache=not args.no_cache,
        generator=torch.Generator(model.embed.weight.device).manual_seed(args.seed),
    )
    if args.compile:
        options["step"] = generate.CompiledStep(model)
    if args.think_budget is not None:
        options["think_budget"] = think_budget(tokenizer, args.think_budget)
    messages = []
    if args.system is not None:
        messages.append({"role": "system", "content": args.system})
    if args.interactive and is_chat:
        interact(model, tokenizer, prefix, messages, args.think, options, args.stop)
        return
    if args.interactive:
        continue_lines(model, tokenizer, prefix, options, args.stop)
        return
    if args.chat:
        messages.append({"role": "user", "content": text})
        answer(model, tokenizer, prefix, messages, args.think, options, args.stop)
        return
    prompt = prefix + tokenizer.encode(text)
    if not prompt:
        prompt = [tokenizer.eot_id]
    say(model, tokenizer, prompt, options, args.stop)


def main(argv=None):
    args = parse_arguments(argv)
    print_any_text()
    with output.errors_in_one_line():
        run(args)


if __name__ == "__main__":
    end_with_reader()
    main()
