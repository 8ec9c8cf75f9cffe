"""Tasks with known answers, read from the files that their authors publish: questions, prompts and scores.

    hellaswag (ctx_a, ctx_b, activity_label, endings, label)      mmlu (question, choices, answer, subject; or its CSV)
    arc_easy, arc_challenge (question, choices, answerKey)        winogrande (sentence, option1, option2, answer)
    triviaqa (question, answer.aliases)    gsm8k (question, answer)    math (problem, solution)
    humaneval (prompt, test, entry_point)
    any other name: your own file, of {"context", "choices", "label"} or of {"context", "answer"}

Files: .jsonl, .json, .csv, each also .gz; .parquet (with pyarrow); or a folder of them, all of which are read. Prompts,
stops and scores are those of lm-evaluation-harness 0.4 (for math minerva_math's prompt, but the answer is the boxed
one, compared as text), so numbers can be compared with published ones.
"""

import csv
import gzip
import io
import json
import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from evals.judge import Case


class Question(NamedTuple):
    """Choice i is scored by log p(continuations[i] | contexts[i]); without continuations contexts[0] is continued."""

    contexts: list[str]
    continuations: list[str]
    gold: Any  # the index of the right choice, or what the task's grade compares an answer with
    solved: str  # the question with its answer, as an example for others
    lengths: list[int] = []  # of the choices, for acc_norm
    intro: str = ""  # before the examples; examples are given to questions with the same


class Task(NamedTuple):
    fields: str  # of a row, for error messages
    read: Callable[[dict], Question]
    grade: Callable[[Any, Question], dict]  # (log-likelihoods, text or verdict, question) -> {metric: right or wrong}
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    case: Callable[[str, Question], Case] | None = None  # of a task whose answers are programs: what is judged


# ---- files to rows --------------------------------------------------------------------------------------------------


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Every row of a file, or of all the files in a folder, with its place: ("file.jsonl line 3", row)."""
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            yield from rows(file)
        return
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise ValueError(f"{path} needs pyarrow: pip install pyarrow  (or give the data as .jsonl)") from None
        for i, row in enumerate(parquet.read_table(path).to_pylist(), 1):
            yield f"{path} row {i}", row
        return
    if kind not in ("jsonl", "json", "csv"):
        raise ValueError(f"{path}: tasks are read from .jsonl, .json, .csv (each also .gz) and .parquet")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        if kind == "csv":  # MMLU's own, a subject a file, without a header
            subject = re.sub("_(test|dev|val)$", "", path.name.partition(".")[0])
            reader = csv.reader(io.TextIOWrapper(file, "utf-8", newline=""))
            for question, *choices, letter in reader:
                where = f"{path} line {reader.line_num}"
                if letter not in list("ABCD"):
                    raise ValueError(f"{where}: the answer {letter!r} is none of A, B, C, D")
                yield where, dict(question=question, choices=choices, answer="ABCD".index(letter), subject=subject)
            return
        for i, part in enumerate(file if kind == "jsonl" else [file.read()], 1):
            try:
                held = json.loads(part)
            except ValueError as error:
                raise ValueError(f"{path} line {i}: no JSON ({error})") from None
            if kind == "jsonl":
                yield f"{path} line {i}", held
                continue
            held = held.get("Data", [held]) if isinstance(held, dict) else held  # TriviaQA's; MATH has a file a row
            yield from ((f"{path} item {i}", row) for i, row in enumerate(held, 1))


def find(spec: str, folder: str | None) -> tuple[str, Path]:
    """(name, path) of NAME=PATH, or of NAME whose file NAME.* or folder NAME lies in `folder`."""
    name, given, path = spec.partition("=")
    if given:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} not found: --tasks {name}=PATH takes a file or a folder of files")
        return name, Path(path)
    found = [path for pattern in (name, f"{name}.*") for path in Path(folder).glob(pattern)] if folder else []
    if not found and name not in TASKS:
        raise ValueError(f"unknown task {name!r}: there are {', '.join(TASKS)}, and your own as NAME=PATH")
    if len(found) != 1:
        many = f"{len(found)} files or folders in {folder} are" if folder else "which file is"
        raise ValueError(f"{many} {name}'s? Give --tasks {name}=PATH, or a --task_dir with one {name}.jsonl")
    return name, found[0]


def load_task(name: str, path: Path, num_fewshot: int = 0, limit: int = 0) -> tuple[Task, list[Question]]:
    """A task and its questions, at most `limit` (0: all). ValueError names the file and the line of a bad row.

    The first num_fewshot questions (for mmlu: of each subject) are shown solved before the others and are not asked.
    """
    task, questions = TASKS.get(name), []
    for where, row in rows(path):
        task = task or OWN["choices" in row]
        try:
            questions.append(task.read(row))
        except KeyError as error:
            raise ValueError(f"{where}: no field {error}; {name} needs {task.fields}") from None
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"{where}: {error}; {name} needs {task.fields}") from None
    examples, asked = {}, []
    for question in questions:
        known = examples.setdefault(question.intro, [])
        (known if len(known) < num_fewshot else asked).append(question)
    if not asked:
        raise ValueError(f"{path}: {len(questions)} questions, of which {num_fewshot} are examples: none is left")
    heads = {intro: intro + "".join(f"{example.solved}\n\n" for example in known) for intro, known in examples.items()}
    asked = asked[: limit or None]
    return task, [q._replace(contexts=[heads[q.intro] + context for context in q.contexts]) for q in asked]


# ---- multiple choice ------------------------------------------------------------------------------------------------


def choose(context, choices, gold, intro="", continuations=None):
    """Returns the question of which choice continues a context, or each its own; gold: the number of the right one."""
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"the choices are no list of texts, but {choices!r}")
    if isinstance(gold, str) and gold.strip().isdigit():
        gold = int(gold)
    if isinstance(gold, bool) or not isinstance(gold, int):
        raise ValueError(f"the right choice is {gold!r}, which is no number of one")
    if not 0 <= gold < len(choices):
        raise ValueError(f"the right choice is number {gold} of 0 to {len(choices) - 1}")
    if not all(choices):
        raise ValueError("a choice is empty")
    continuations = continuations or [f" {choice}" for choice in choices]
    contexts = context if isinstance(context, list) else [context] * len(choices)
    solved = contexts[gold] + continuations[gold]
    return Question(contexts, continuations, gold, solved, [len(choice) for choice in choices], intro)


def accuracy(scores, question):
    return {"acc": max(range(len(scores)), key=scores.__getitem__) == question.gold}


def accuracies(scores, question):
    """acc_norm: scores per character of the choice, the space before it not counted, as in lm-evaluation-harness."""
    per_character = [score / length for score, length in zip(scores, question.lengths)]
    return accuracy(scores, question) | {"acc_norm": accuracy(per_character, question)["acc"]}


def hellaswag(row):
    def clean(text):  # WikiHow's articles left [header], [title], [step] in the text
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choose(clean(context), [clean(ending) for ending in row["endings"]], row["label"])


def arc(row):
    question = row["question"]
    if isinstance(question, dict):  # AI2's own files, where the hub's have choices {"text": [...], "label": [...]}
        choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
        question = question["stem"]
    else:
        choices = row["choices"]
    return choose(f"Question: {question}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"]))


def winogrande(row):
    """Partial scoring (https://arxiv.org/abs/1806.02847): of both sentences only what follows the option is scored."""
    blank, options = row["sentence"].index("_"), [row["option1"], row["option2"]]
    contexts = [row["sentence"][:blank] + option for option in options]
    after = f" {row['sentence'][blank + 1 :].strip()}"
    return choose(contexts, options, ["1", "2"].index(row["answer"]), continuations=[after] * 2)


def mmlu(row):
    subject = row["subject"].replace("_", " ") if "subject" in row else ""
    intro = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return choose(f"{row['question'].strip()}\n{choices}\nAnswer:", list("ABCD"), row["answer"], intro)


# ---- answers that the model writes ----------------------------------------------------------------------------------


def plain_number(text):
    return text.replace(",", "").replace("$", "").removesuffix(".")


def grade_gsm8k(text, question):
    """exact_match: the number after the first ####; exact_match_flexible: the last number."""
    strict = (re.findall(r"#### (-?[0-9.,]+)", text) or [""])[0]
    last = (re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text) or [""])[-1]
    metrics = {"exact_match": strict, "exact_match_flexible": last}
    return {name: plain_number(number) == question.gold for name, number in metrics.items()}


def gsm8k(row):
    prompt, answer = f"Question: {row['question']}\nAnswer:", row["answer"]
    gold = plain_number(answer.rpartition("#### ")[2])
    return Question([prompt], [], gold, f"{prompt} {answer}")


def boxed(text):
    r"""What stands in the last \boxed{...} (or \fbox; braces may be nested), None where there is none."""
    found = list(re.finditer(r"\\(boxed|fbox)\s*(?=\{)|\\boxed (?P<bare>[^$]*)", text))
    if not found or found[-1]["bare"] is not None:
        return found[-1]["bare"].strip() if found else None
    begin, depth = found[-1].end(), 0
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin + 1 : i]
    return None


def plain_math(text):
    r"""An answer in TeX without what is only typography: spaces, \left, \dfrac, units in \text{}, $, 1,000's comma."""
    text = re.sub(r"\\text\{\s.*?\}", "", text)
    text = re.sub(r"\\(left|right)(?![a-zA-Z])|\\[!,;: $%]|\^\{?\\circ\}?|[\s$%]", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac([0-9a-z])([0-9a-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(,\d{3})*$)", "", text) if re.fullmatch(r"-?\d{1,3}(,\d{3})+", text) else text
    return re.sub(r"^[a-z]=", "", text).removesuffix(".")


def competition_math(row):
    prompt, gold = f"Problem:\n{row['problem']}\n\nSolution:", boxed(row["solution"])
    if gold is None:
        raise ValueError(r"no \boxed{...} in the solution")
    return Question([prompt], [], plain_math(gold), f"{prompt} {row['solution']}")


def grade_math(text, question):
    answer = boxed(text)
    return {"exact_match": answer is not None and plain_math(answer) == question.gold}


def bare(text):
    return text.strip().lower().translate(str.maketrans("", "", string.punctuation))


def triviaqa(row):
    row = {key.lower(): value for key, value in row.items()}  # the authors' own files have capitals, the hub's not
    aliases = {key.lower(): value for key, value in row["answer"].items()}["aliases"]
    prompt = f"Question: {row['question']}?\nAnswer:"
    return Question([prompt], [], {bare(alias) for alias in aliases}, f"{prompt} {aliases[0]}")


def final_answer(text):
    r"""What follows the last ####, else the last \boxed{...}, else the last number, else all of it."""
    if "####" in text:
        return plain_number(text.rpartition("####")[2].strip())
    if (answer := boxed(text)) is not None:
        return plain_math(answer)
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return plain_number(numbers[-1]) if numbers else text.strip()


def own(row):
    context = row["context"]
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"the answer is {answer!r}, and neither a text nor a number")
    answer = str(answer)
    return Question([context], [], final_answer(answer), f"{context} {answer}")


# ---- programs that the model writes ---------------------------------------------------------------------------------


def humaneval(row):
    """The test may use what the prompt imports and defines before the function that is to be written."""
    prompt = row["prompt"]
    name = row["entry_point"]
    helpers, found, _ = prompt.partition(f"def {name}(")
    test = f"{helpers if found else ''}\n{row['test']}\ncheck({name})\n"
    return Question([prompt], [], Case(prompt, test, (name,)), prompt + row.get("canonical_solution", ""))


def humaneval_case(text, question):
    return question.gold._replace(program=question.gold.program + text)


def grade_code(verdict, question):
    return {"pass@1": verdict.passed}


ARC = Task("question, choices {text, label}, answerKey", arc, accuracies)
BLANK_LINE = ("\n\n",)
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
TASKS = {
    "hellaswag": Task("activity_label, ctx_a, ctx_b, endings, label", hellaswag, accuracies),
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "winogrande": Task("sentence, option1, option2, answer (1 or 2)", winogrande, accuracy),
    "mmlu": Task("question, choices (4), answer (0 to 3), subject", mmlu, accuracy),
    "triviaqa": Task("question, answer {aliases}", triviaqa,
                     lambda text, question: {"exact_match": bare(text) in question.gold}, ("\n", ".", ",")),
    "gsm8k": Task("question, answer (ending in #### NUMBER)", gsm8k, grade_gsm8k,
                  ("Question:", "</s>", "<|im_end|>")),
    "math": Task(r"problem, solution (with \boxed{...})", competition_math, grade_math, ("Problem:",)),
    "humaneval": Task("prompt, test, entry_point", humaneval, grade_code, HUMANEVAL_STOPS, 1024, humaneval_case),
}  # fmt: skip
OWN = {
    True: Task("context, choices, label", lambda row: choose(row["context"], row["choices"], row["label"]), accuracies),
    False: Task("context, answer (or choices and label)", own,
                lambda text, question: {"exact_match": final_answer(text) == question.gold}, BLANK_LINE),
}  # fmt: skip
