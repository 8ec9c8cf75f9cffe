"""The commands of the README and of docs/, in a copy of the repository at a tiny size; tables and links are fresh.

`make test` runs one command of each script, and all of a script that begins without torch. The others are read by their
script's own parser, which refuses a wrong flag and a missing config. `make test-all` runs every one. The commands of
docs/your_own_variant.md need variants that the reader writes: tests/test_docs.py runs them.
"""

import json
import re
import shlex
import shutil

import matplotlib.image
import numpy as np
import pytest
import torch.distributed.run as torchrun

import bench
import compare
import eval as evaluation
import sample
from benchmarks import workload
from configurator import resolve
from docs import gallery, sees
from tests import differences
from tests.readme import PARTS, fresh
from tests.tiny import ROOT
from tests.tree import copy_of_the_project, run
from training import knobs

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md"] + sorted((ROOT / "docs").glob("*.md"))


def commands_of(text):
    """Returns the lines of a page's sh blocks; one that ends with a backslash goes on in the next."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def all_commands():
    """Returns the commands of all pages in order, each once."""
    found = []
    for page in PAGES:
        if page.name != "your_own_variant.md":
            found += commands_of(page.read_text())
    return list(dict.fromkeys(found))


COMMANDS = all_commands()
ANY = "--n_layer=1 --n_embd=32 --block_size=32 --batch_tokens=128 --micro_batch=2 --max_steps=2 --eval_tokens=256"
ANY += " --device=cpu --dtype=float32"
TINY = ANY + " --n_inner=32 --head_dim=8"
ONE_STEP = "--block_size=128 --max_steps=1 --micro_batch=2"
POST = {
    "grpo.py": f"{ONE_STEP} --max_new_tokens=8 --group_size=2 --problems_per_step=2",
    "dpo.py": f"{ONE_STEP} --max_new_tokens=8 --group_size=2 --problems_per_round=2 --pairs_per_step=2",
    "reward.py": f"{ONE_STEP} --pairs_per_step=2",
}
STDLIB = "python data/prepare.py stdlib --tokenizer bpe:300 --max_tokens 200000"
CHATS = "--tokenizer data/stdlib/meta.json --add_tokens chat --out data/chats"
COPIED = "cd ../my_project && python model_moe.py"
INSTALL = [command for command in COMMANDS if command.split()[0] in ("python3", "pip")]  # make does it, and needs a net
CHANGED = {  # how a command is made small where the general rule below does not do
    "make quickstart": "make -n quickstart",  # its three commands run below
    "make test": "make -n test",  # it runs this
    "make posttrain": "make -n posttrain",  # a quarter of an hour; tests/test_posttrain.py runs it small
    "make posttrain SEEDS=3": "make -n posttrain SEEDS=3",
    "git diff --no-index model_gpt2.py model_baseline.py": "git diff --no-index model_gpt2.py model_gpt2.py",
    "git diff --no-index model_baseline.py model_mla.py": "git diff --no-index model_gpt2.py model_gpt2.py",
    "python data/prepare.py stdlib --tokenizer bpe:4096": STDLIB,
    "python data/prepare.py shakespeare": "{} --input notes.txt",  # without it, it downloads
    "python data/prepare.py mqar": "{} --documents 100",
    COPIED: COPIED.replace("python model_moe.py", "python -c 'import model_moe, muon, generate'"),
    "python bench.py train": "python bench.py train --help",  # takes many minutes, as the others
    "python bench.py decode --compile": "python bench.py decode --help",
    "python bench.py variants": "python bench.py variants --help",
    "python bench.py kernels": "python bench.py kernels --help",
    "python bench.py loader": "python bench.py loader --help",
    "python bench.py parallel": "python bench.py parallel --help",
    "python bench.py rollout": "python bench.py rollout --help",
    "python bench.py shakespeare": "python bench.py shakespeare --help",
}
FEW = "--seeds 1 --lrs 1 --rounds 0 --warmup_steps=0 --jobs 1"
SHORT = f"{FEW} config/compare_cpu.py --n_layer=1 --block_size=32 --batch_tokens=128 --micro_batch=2 --eval_tokens=256"
SMALLER = {  # a part of a command that is left out, and what is added to it
    "python compare.py --models baseline,gpt2": (",gpt2,moe,mla,hybrid", f"{SHORT} --budget 3e9"),
    "python compare.py --models baseline,baseline": (",baseline:optimizer=adamw", f"{SHORT} --budget 3e9"),
    "python compare.py --budgets": ("n_embd=96:n_inner=256,n_embd=144:n_inner=384,", f"{SHORT} --budgets 3e9"),
    "python compare.py config/mqar.py": (",hybrid:layer_pattern=d:init_std=0.02", f"{FEW} --budget 4e9 --rounds 1"),
}


def tiny(command):
    if command in CHANGED:
        return CHANGED[command].format(command)
    for begin, (without, more) in SMALLER.items():
        if command.startswith(begin):
            return f"{command.replace(without, '')} {more}"
    if script_of(command) in POST:
        command = command.replace("--nproc_per_node=8", "--nproc_per_node=2")
        command = command.replace(
            "config/grpo_gsm8k.py", "--init_from=out/chat --data=problems.jsonl --out_dir=out/two"
        )
        return f"{command} {POST[script_of(command)]}"
    if "--init_from" in command:  # the sizes are those of the weights
        return f"{command} --batch_tokens=128 --micro_batch=2 --max_steps=2 --eval_tokens=256 --device=cpu"
    if "train.py" in command and "--help" not in command:
        command = re.sub(r" --minutes=\S+", "", command)  # two steps are enough
        command = re.sub(r"--nnodes=2 --nproc_per_node=8 --rdzv\S+ --rdzv\S+ --rdzv\S+", "--nproc_per_node=2", command)
        command = command.replace("config/train_baseline.py", "config/quickstart.py")  # its data is 2.5B tokens
        return f"{command} {ANY if '--model=gpt2' in command else TINY}"
    return command + (" --max_new_tokens 8" if "sample.py" in command and "--save" not in command else "")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's files in an empty folder, with the quickstart made at a tiny size and the files it talks of."""
    folder = tmp_path_factory.mktemp("copy") / "nanollm"
    copy_of_the_project(folder)
    shutil.copy(folder / "train.py", folder / "notes.txt")
    documents = [path.read_text() for path in sorted(folder.glob("*.py"))]
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "prompt.txt").write_text("import os")
    (folder / "questions.jsonl").write_text('{"context": "def", "choices": [" main", " 1"], "label": 0}\n')
    chats = [{"question": f"{i}+1?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(50)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    shutil.copy(folder / "chats.jsonl", folder / "problems.jsonl")
    pairs = [{"prompt": f"{i}+1?", "chosen": str(i + 1), "rejected": str(i)} for i in range(50)]
    for name in ("pairs.jsonl", "other_pairs.jsonl"):
        (folder / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run("gzip more.jsonl", folder)
    run(STDLIB, folder)
    run(f"python train.py config/quickstart.py {TINY}", folder)
    run(f"python data/prepare.py chats.jsonl --chat {CHATS}", folder)
    run(
        tiny("python train.py --init_from=out/quickstart --data=data/chats --pack=documents --out_dir=out/chat"), folder
    )
    return folder


def test_every_changed_command_is_in_a_page():
    assert set(CHANGED) <= set(COMMANDS)


# ---- what runs -------------------------------------------------------------------------------------------------------
def script_of(command):
    """The Python file that a command runs, or the program where it runs none."""
    program, *words = shlex.split(command)
    if program in ("python", "torchrun"):
        return next(word for word in words if word.endswith(".py"))
    return program


QUICK = (
    "make",
    "git",
    "mkdir",
    "cp",
    "cd",
    "data/prepare.py",
    "data/chat.py",
    "data/tokenizers.py",
    "flops.py",
)  # in seconds
FIRST = {script_of(command): command for command in reversed(COMMANDS)}
ONCE = [
    FIRST[script] for script in ("sample.py", "eval.py", "compare.py", *POST)
]  # train.py: see `copy`; bench.py takes minutes
RUN = [command for command in COMMANDS if script_of(command) in QUICK or command in ONCE]


@pytest.mark.parametrize("command", RUN)
def test_a_command_of_each_script_runs(copy, command):
    run(tiny(command), copy, input="hello\n")


@pytest.mark.slow
def test_every_command_of_every_page_runs(copy):
    for command in COMMANDS:
        if command not in INSTALL:
            run(tiny(command), copy, input="hello\n")


def test_the_quickstart_draws_its_loss(copy):
    assert (copy / "out" / "quickstart" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_the_python_of_a_page_runs_after_its_commands(copy):
    page = (ROOT / "docs" / "sampling.md").read_text()
    (command,) = (command for command in COMMANDS if "--save_pretrained" in command)
    run(command, copy)
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.S))
    (copy / "snippet.py").write_text(code + "print(len(tokens[0]))\n")
    assert run("python snippet.py", copy).strip().endswith("11")  # 3 + 8


# ---- what is only read -----------------------------------------------------------------------------------------------
def read_by_train(argv, processes=1):
    knobs.check(resolve(ROOT / "train.py", [word for word in argv if word != "--help"]), processes)


def read_by_compare(argv):
    """Plans all that the command would train, on the data that there is."""
    compare.plan_all(compare.parse_arguments([*argv, "--data=data/stdlib"]))


def read_by_bench(argv):
    """As bench.py reads it, up to the measurement."""
    given = []
    with pytest.MonkeyPatch.context() as patch:
        for benchmark in bench.BENCHMARKS.values():
            patch.setattr(benchmark, "measure", lambda args: given.append(args) or [])
        bench.main(argv)
    (arguments,) = given
    if getattr(arguments, "config", []):
        workload.read_config(arguments.config)


def read_by(script):
    return lambda argv: knobs.check_run(resolve(ROOT / script, argv))


READ = {
    "train.py": read_by_train,
    **{script: read_by(script) for script in POST},
    "sample.py": sample.parse_arguments,
    "eval.py": evaluation.parse_arguments,
    "compare.py": read_by_compare,
    "bench.py": read_by_bench,
}


def read(command):
    """Has a command's script read its arguments and config files; nothing is trained or written."""
    program, *words = shlex.split(command)
    if program == "torchrun":
        arguments = torchrun.parse_args(words)
        script = arguments.training_script
        more = [int(arguments.nproc_per_node)] if script == "train.py" else []  # of one machine
        READ[script](arguments.training_script_args, *more)
    else:
        script, *argv = words
        READ[script](argv)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in RUN + INSTALL])
def test_the_script_of_a_command_takes_its_arguments(copy, monkeypatch, command):
    monkeypatch.chdir(copy)
    monkeypatch.setenv("RANK", "0")  # as torchrun sets it
    read(command)


@pytest.mark.parametrize("command", [
    "python train.py config/quickstart.py --n_layers=6",
    "python train.py config/quickstrat.py",
    "python train.py config/quickstart.py --schedule=linear",
    "torchrun --standalone --nproc_per_node=2 train.py config/quickstart.py --parallel=none",
    "torchrun --standalone --nprocs=2 train.py config/quickstart.py",
    "python sample.py out/quickstart --promt x",
    "python eval.py out/quickstart --split test",
    "python compare.py --models baseline,gpt3",
    "python compare.py config/nowhere.py --models baseline",
    "python compare.py --models baseline,baseline:optimiser=adamw",
    "python bench.py varients",
    "python bench.py shakespeare --data data/shakespeare",
    "python bench.py variants --compile",
    "python bench.py decode --n_hed=3",
])  # fmt: skip
def test_a_mistake_in_a_command_is_seen_without_running_it(copy, monkeypatch, command):
    monkeypatch.chdir(copy)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises((SystemExit, ValueError)):
        read(command)


def test_the_commands_of_make_quickstart_are_those_that_the_test_runs_small(copy):
    commands = run("make -n quickstart", copy)
    for part in (
        "data/prepare.py stdlib --tokenizer bpe:4096",
        "train.py config/quickstart.py",
        "sample.py out/quickstart",
    ):
        assert part in commands


def test_the_job_for_slurm_is_a_command_that_torchrun_and_train_take(monkeypatch):
    page = (ROOT / "docs" / "many_devices.md").read_text()
    job = re.search(r"```bash\n(.*?)```", page, flags=re.S)[1].replace("\\\n", "")
    (command,) = re.findall(r"^srun (torchrun .*)", job, flags=re.M)
    monkeypatch.setenv("RANK", "0")
    read(command.replace("$SLURM_NNODES", "2"))


def test_what_the_readme_installs_is_what_make_installs():
    versions = re.findall(r"torch==[\d.]+", " ".join(INSTALL))
    assert versions and set(versions) <= set((ROOT / "requirements.txt").read_text().splitlines())
    assert "pip install -r requirements.txt" in INSTALL


def test_without_make_the_quickstart_is_the_same_commands(copy):
    by_make = run("make -n quickstart", copy)
    (block,) = (block for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S) if "pip install" in block)
    ours = [line.removeprefix("python ") for line in block.splitlines() if line.startswith("python ")]
    assert len(ours) == 3 and all(line in by_make for line in ours)


# ---- the pages -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PARTS)
def test_the_tables_of_a_page_are_fresh(page):
    assert fresh(page) == (ROOT / page).read_text(), "python -m tests.readme writes them"


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    inside = [link.partition("#")[0] for link in links if not re.match(r"https?:|#", link)]
    assert [link for link in inside if not (page.parent / link).exists()] == []


def test_the_readme_leads_to_every_page():
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name})" not in README] == []


def test_the_gallery_shows_every_model_file_as_it_was_last_drawn(tmp_path):
    assert {f"model_{name}.py" for name in gallery.DIAGRAMS} == differences.tracked()
    gallery.draw(tmp_path / "gallery.png")
    drawn = matplotlib.image.imread(tmp_path / "gallery.png")
    committed = matplotlib.image.imread(ROOT / "docs" / "gallery.png")
    assert drawn.shape == committed.shape
    pixels = (np.abs(drawn - committed) > 0.25).any(axis=2).sum()  # edges of letters may differ a little elsewhere
    assert pixels < 20, "python docs/gallery.py draws it"


def test_what_a_query_sees_is_asked_of_the_models():
    """Here for two panels whose rule is short; the picture has more of them."""
    t, s = np.indices((sees.T, sees.T))
    rules = {"baseline": s <= t, "sliding": (s <= t) & ((s > t - 12) | (s < 2))}
    for _, name, options in sees.PANELS:
        if name in rules:
            assert np.array_equal(sees.influence(name, options).numpy() > 0, rules[name])


@pytest.mark.slow
def test_what_queries_see_is_as_it_was_last_drawn(tmp_path):
    sees.draw(tmp_path / "sees.png")
    drawn = matplotlib.image.imread(tmp_path / "sees.png")
    committed = matplotlib.image.imread(ROOT / "docs" / "sees.png")
    assert drawn.shape == committed.shape
    assert (np.abs(drawn - committed) > 0.25).any(axis=2).mean() < 0.01, "python docs/sees.py draws it"
