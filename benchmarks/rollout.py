"""`python bench.py rollout`: what a cache, filled by one prefill a prompt, gains where answers are sampled for RL."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.timing import (
    build,
    count_parameters,
    describe,
    device_and_dtype,
    in_turn,
    median_and_range,
    new_result,
    ratios,
    table_head,
    table_row,
)
from generate import draws, rollout

RESULT = "rollout"
GROUP = 8  # samples of a prompt
PROMPT = 12  # tokens
SIZES = {  # the model of the demonstration (config/arithmetic), and that of config/quickstart.py on a CPU
    "demonstration": dict(
        fields=dict(n_layer=3, n_head=4, n_kv_head=4, head_dim=24, n_embd=96, n_inner=256, vocab_size=64,
                    block_size=128, eot_id=0),
        rows=(64, 384),
        new=(8, 25),
    ),
    "quickstart": dict(
        fields=dict(n_layer=4, n_head=4, n_kv_head=4, head_dim=48, n_embd=192, n_inner=512, vocab_size=4096,
                    block_size=256, tie_embeddings=False, eot_id=0),
        rows=(64,),
        new=(64,),
    ),
}  # fmt: skip


def measure(args: Namespace) -> Iterator[dict]:
    """Yields the result so far after each size, so that a stop loses no finished one."""
    device, _ = device_and_dtype(args.device)
    result = new_result(["rollout"], args.rounds, device)
    result |= {"group": GROUP, "prompt": PROMPT, "rows": []}
    for size, given in SIZES.items():
        print(f"{size}...", file=sys.stderr)
        model = build("baseline", given["fields"], device).eval()
        about = {"size": size, "parameters": count_parameters(model)}
        for n_rows in given["rows"]:
            for new in given["new"]:
                result["rows"].append(about | measured_row(model, n_rows, new, args.rounds, device))
        yield result


def measured_row(model, n_rows, new, rounds, device):
    """Returns how many times as fast rollout is, in each round, and whether the others sample the same tokens.

    Nothing stops a row, and so the same number of tokens is sampled each time.
    """
    n_prompts = n_rows // GROUP
    prompts = random_prompts(n_prompts, model.config, device)
    repeated = prompts.repeat_interleave(GROUP, dim=0)
    uniforms = draws(1, 0, range(n_prompts), GROUP, new)
    functions = [
        partial(rollout, model, prompts, new, GROUP, uniforms),
        partial(rollout, model, prompts, new, GROUP, uniforms, use_cache=False),
        partial(rollout, model, repeated, new, 1, uniforms, use_cache=False),
    ]
    cached, uncached, one_by_one = in_turn(functions, (), rounds, device=device)
    tokens = [function().tokens for function in functions]
    return {
        "n_rows": n_rows,
        "new": new,
        "same": tokens[0] == tokens[1] == tokens[2],
        "over_no_cache": [round(ratio, 2) for ratio in ratios(uncached, cached)],
        "over_repeated": [round(ratio, 2) for ratio in ratios(one_by_one, cached)],
    }


def random_prompts(n, config, device):
    """Returns prompts (n, PROMPT), each a document of random tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, config.vocab_size, (n, PROMPT), generator=generator)
    prompts[:, 0] = config.eot_id
    return prompts.to(device)


# ---- the table ------------------------------------------------------------------------------------------------------
def markdown(result: dict) -> str:
    """Returns the table of a result."""
    lines = [
        "# Sampling for reinforcement learning\n",
        describe(result),
        f"How many times as many tokens/s `generate.rollout` samples with its cache as it does without: "
        f"{result['group']} samples of each prompt of {result['prompt']} tokens, in float32; {result['rounds']} rounds "
        "in which all take turns; the median of the rounds' ratios, and their range. "
        "Prompts repeated: each sample has a prompt of its own to read.\n",
        *table_head(["model", "parameters", "rows", "new tokens", "x no cache", "x no cache, prompts repeated"]),
    ]
    for row in result["rows"]:
        cells = [row["size"], f"{row['parameters']:,}", str(row["n_rows"]), str(row["new"])]
        cells += [median_and_range(row["over_no_cache"]), median_and_range(row["over_repeated"])]
        lines.append(table_row(cells))
    others = [f"{row['size']}, {row['n_rows']} rows, {row['new']} tokens" for row in result["rows"] if not row["same"]]
    if others:
        note = f"Not all tokens are the same with the cache and without: {'; '.join(others)}."
    else:
        note = "With the cache and without, the same tokens are sampled."
    return "\n".join([*lines, "", note]) + "\n"
