"""Measures speed and writes results/NAME_cpu.json (or _cuda.json) and the table drawn from it, NAME_cpu.md.

    python bench.py shakespeare    how soon two configs reach validation loss 1.88, in steps and in seconds
    python bench.py train          training tokens/s, against gpt2 and transformers (train config/x.py: of a config)
    python bench.py decode         prefill and decoding, against transformers (decode config/x.py: of a config)
    python bench.py variants       what a mixture of experts, latent attention and delta layers cost and save
    python bench.py attention      what a token costs as texts get longer, and what choosing keys saves
    python bench.py kernels        each Triton kernel against PyTorch, torch.compile and other libraries, on a GPU
    python bench.py parallel       FSDP beside DDP, a save beside writing its bytes, how soon a resumed run goes on
    python bench.py loader         the loader's share of a step, and its memory over a large shard
    python bench.py rollout        what a cache gains where answers are sampled for reinforcement learning
    python bench.py posttrain      all stages from nothing to a model that thinks when told to: what each one is worth

Machines differ and get busy, so nothing is said in absolute times alone: what is compared runs in turn, round by round,
and the median of the rounds' ratios counts. What each command does is a file of benchmarks/.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import (
    attention,
    decoding,
    kernels,
    loader,
    parallel,
    posttrain,
    rollout,
    shakespeare,
    training,
    variants,
    workload,
)
from data.text import print_any_text
from training import output
from training.arguments import SEED, Parser, number
from training.knobs import find_device

ROOT = Path(__file__).resolve().parent
# Each has RESULT, the name of its files; measure(arguments) -> results; markdown(result) -> its tables; and where there
# is a picture, plot(result, path).
BENCHMARKS = {
    "shakespeare": shakespeare,
    "train": training,
    "decode": decoding,
    "variants": variants,
    "attention": attention,
    "kernels": kernels,
    "parallel": parallel,
    "loader": loader,
    "rollout": rollout,
    "posttrain": posttrain,
}
SIZE = number("[1, 1e9]")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", default=str(ROOT / "results"), help="where the results go")
    parser.add_argument("--data", default=str(ROOT / "data/shakespeare"), help="a folder that data/prepare.py made")
    parser.add_argument("--device", default="auto", help="cuda or cpu; auto: cuda if it is there")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name, text):
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    command = add_command("shakespeare", "steps and seconds to a validation loss")
    command.add_argument("--seeds", type=SEED, nargs="+", default=[1, 2, 3])

    command = add_command("train", "training tokens/s, MFU and memory")
    add_rounds(command, 9)
    add_config(command)
    command.add_argument("--tokens", type=SIZE, default=4096, help="at least so many in each turn")

    command = add_command("decode", "tokens/s of prefill and decoding, bandwidth and memory")
    add_rounds(command, 9)
    add_config(command)
    command.add_argument("--batch", type=SIZE, default=1, help="sequences at once")
    command.add_argument("--prompt", type=SIZE, default=128, help="tokens")
    command.add_argument("--new", type=number("[2, 1e9]"), default=64, help="tokens to generate")
    command.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    command.add_argument("--compile", action="store_true", help="measure a compiled step too (always on a GPU)")

    add_rounds(add_command("variants", "costs and savings of ideas"), 5)
    add_rounds(add_command("attention", "longer texts, and attention to chosen keys"), 3)
    add_rounds(add_command("kernels", "each Triton kernel"), 5)

    command = add_command("parallel", "processes and checkpoints")
    add_rounds(command, 3)
    command.set_defaults(data="data/stdlib")

    command = add_command("loader", "the loader's share of a step, and its memory")
    command.add_argument("--steps", type=SIZE, default=200)

    add_rounds(add_command("rollout", "sampling for reinforcement learning, with a cache and without"), 5)

    command = add_command("posttrain", "from nothing to a model that thinks when told to")
    command.add_argument("--seeds", type=SEED, nargs="+", default=[1], help="of all that follows pretraining")
    return parser


def add_rounds(command, rounds):
    command.add_argument("--rounds", type=SIZE, default=rounds, help="times that all which is compared takes its turn")


def add_config(command):
    text = "config files, and --key=value of any knob of train.py or its model: measure that model"
    command.add_argument("config", nargs="*", help=text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args, knobs = parser.parse_known_args(argv)
    if "config" in args:
        args.config += knobs
    elif knobs:
        parser.error(f"unknown arguments: {' '.join(knobs)}")
    return args


def save(benchmark: ModuleType, result: dict, label: str, folder: Path) -> None:
    """Writes a result and its tables. label: what else than the defaults was measured: its files are others."""
    words = [benchmark.RESULT, label, "cuda" if "gpu" in result["machine"] else "cpu"]
    name = "_".join(word for word in words if word)
    table = benchmark.markdown(result)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)
    if hasattr(benchmark, "plot"):
        benchmark.plot(result, folder / f"{name}.png")
    print(table)


def main(argv: list[str] | None = None) -> None:
    print_any_text()
    args = parse_arguments(argv)
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")  # as train.py
    benchmark = BENCHMARKS[args.command]
    try:
        with output.errors_in_one_line():
            find_device(args.device)
            label = workload.label_of(getattr(args, "config", []))
            for result in benchmark.measure(args):
                save(benchmark, result, label, Path(args.out))
    except subprocess.CalledProcessError as error:  # a run of train.py, which has said why
        sys.exit(error.returncode)


if __name__ == "__main__":
    output.outlast_readers()
    main()
