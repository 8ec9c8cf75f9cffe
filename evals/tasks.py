"""Tasks with known answers, read from the files that their authors publish: questions, prompts and scores.

    hellaswag (ctx_a, ctx_b, activity_label, endings, label)      mmlu (question, choices, answer, subject; or its CSV)
    arc_easy, arc_challenge (question, choices, answerKey)        winogrande (sentence, option1, option2, answer)
    triviaqa (question, answer.aliases)    gsm8k (question, answer)    math (problem, solution)
    humaneval (prompt, test, entry_point)
    any other name: your own file, of {"context", "choices", "label"} or of {"context", "answer"}

Files: .jsonl, .json, .csv, each also .gz or .zst; .parquet (with pyarrow); or a folder of them, which are all read. A
row that is not what its task says is an error that names the file and the line: scores of other questions would be
none.
Prompts, stops and scores are those of lm-evaluation-harness 0.4 (for math minerva_math's prompt, but the answer is the
boxed one, compared as text), so numbers can be compared with published ones.
"""

import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.sources import find_files
from data.text import boxed, csv_rows, name_inside
from data.text import rows as rows_of_file
from evals.answers import is_same, plain_math, stated_answer
from evals.judge import Case

KINDS = (".jsonl", ".json", ".csv", ".parquet")


class Question(NamedTuple):
    """Choice i is scored by log p(continuations[i] | contexts[i]); without continuations contexts[0] is continued."""

    contexts: list[str]
    continuations: list[str]
    gold: Any  # the index of the right choice, or what the task's grade compares an answer with
    solved: str  # the question with its answer, as an example for others
    lengths: list[int] = []  # of the choices, for acc_norm
    intro: str = ""  # before the examples; examples are given to questions with the same
    asked: str = ""  # the question alone, as it is asked in a chat; "" where it cannot be


class Task(NamedTuple):
    fields: str  # of a row, for error messages
    read: Callable[[dict], Question]
    grade: Callable[[Any, Question], dict]  # (log-likelihoods, text or verdict, question) -> {metric: right or wrong}
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    case: Callable[[str, Question], Case] | None = None  # of a task whose answers are programs: what is judged


# ---- files to rows --------------------------------------------------------------------------------------------------


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields every row of a file, or of all the files in a folder, with its place: ("file.jsonl line 3", row)."""
    for file in find_files([str(path)], KINDS, {}):
        if name_inside(file).endswith(".csv"):
            yield from rows_of_mmlu(file)
        else:
            yield from rows_of_file(file)


def rows_of_mmlu(path):
    """Yields MMLU's own tables, a subject a file: the question, four choices, a letter; they have no header."""
    subject = re.sub("_(test|dev|val)$", "", path.name.partition(".")[0])
    for place, row in csv_rows(path, lambda row: len(row) == 6):
        if len(row) != 6:
            raise ValueError(f"{place}: a table of MMLU has 6 columns, and this one {len(row)}")
        question, *choices, letter = row
        if letter not in list("ABCD"):
            raise ValueError(f"{place}: the answer {letter!r} is none of A, B, C, D")
        yield place, dict(question=question, choices=choices, answer="ABCD".index(letter), subject=subject)


def find(spec: str, folder: str | None) -> tuple[str, Path]:
    """Returns (name, path) of NAME=PATH, or of NAME whose file NAME.* or folder NAME lies in `folder`."""
    name, given, path = spec.partition("=")
    if given:
        if not path or not Path(path).exists():
            raise FileNotFoundError(f"{path} not found: --tasks {name}=PATH takes a file or a folder of files")
        return name, Path(path)
    found = []
    if folder:
        found = [*Path(folder).glob(name), *Path(folder).glob(f"{name}.*")]
    if not found and name not in TASKS:
        raise ValueError(f"unknown task {name!r}: there are {', '.join(TASKS)}, and your own as NAME=PATH")
    if len(found) != 1:
        many = f"{len(found)} files or folders in {folder} are" if folder else "which file is"
        raise ValueError(f"{many} {name}'s? Give --tasks {name}=PATH, or a --task_dir with one {name}.jsonl")
    return name, found[0]


def load_task(name: str, path: Path, num_fewshot: int = 0, limit: int = 0) -> tuple[Task, list[Question]]:
    """Returns a task and its questions, at most `limit` (0: all). ValueError names the file and line of a bad row.

    The first num_fewshot questions (for mmlu: of each subject) are shown solved before the others and are not asked.
    """
    # 1. read all of the questions
    task = TASKS.get(name)
    questions = []
    for place, row in rows(path):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a row has fields, and this one is {row!r:.40}")
        if task is None:
            task = OWN_CHOICES if "choices" in row else OWN_ANSWER
        try:
            questions.append(task.read(row))
        except KeyError as error:
            raise ValueError(f"{place}: no field {error}; {name} needs {task.fields}") from None
        except ValueError as error:
            raise ValueError(f"{place}: {error}; {name} needs {task.fields}") from None

    # 2. those that are examples
    examples = {}
    asked = []
    for question in questions:
        solved = examples.setdefault(question.intro, [])
        if len(solved) < num_fewshot:
            solved.append(question.solved)
        else:
            asked.append(question)
    if not asked:
        raise ValueError(f"{path}: {len(questions)} questions, of which {num_fewshot} are examples: none is left")

    # 3. put the examples before the others
    with_examples = []
    for question in asked[: limit or None]:
        head = question.intro + "".join(f"{solved}\n\n" for solved in examples[question.intro])
        with_examples.append(question._replace(contexts=[head + context for context in question.contexts]))
    return task, with_examples


def text_of(row, field):
    """Returns a field that must be a text: a number or a null would become one in silence, and a list many."""
    if not isinstance(row[field], str):
        raise ValueError(f"{field} is {row[field]!r:.60}, and no text")
    return row[field]


def fields_of(row, field):
    """Returns a field that must be an object with fields of its own."""
    if not isinstance(row[field], dict):
        raise ValueError(f"{field} is {row[field]!r:.60}, and has no fields")
    return row[field]


def texts_of(row, field):
    """Returns a field that must be a list of texts."""
    texts = row[field]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{field} is no list of texts, but {texts!r:.60}")
    return texts


# ---- multiple choice ------------------------------------------------------------------------------------------------


def choose(context, choices, gold, intro=""):
    """Returns the question of which choice continues a context; gold: the number of the right one."""
    if len(choices) < 2:
        raise ValueError(f"there is nothing to choose from: {choices}")
    if not all(choices):
        raise ValueError("a choice is empty")
    contexts = [context] * len(choices)
    continuations = [f" {choice}" for choice in choices]
    gold = number_of_choice(gold, len(choices))
    solved = contexts[gold] + continuations[gold]
    return Question(contexts, continuations, gold, solved, [len(choice) for choice in choices], intro)


def number_of_choice(gold, n_choices):
    """Returns the number of the right choice, which a file may also spell as a text."""
    if isinstance(gold, str) and gold.strip().isdecimal():
        gold = int(gold)
    if isinstance(gold, bool) or not isinstance(gold, int):
        raise ValueError(f"the right choice is {gold!r:.60}, which is no number of one")
    if not 0 <= gold < n_choices:
        raise ValueError(f"the right choice is number {gold} of 0 to {n_choices - 1}")
    return gold


def accuracy(scores, question):
    return {"acc": max(range(len(scores)), key=scores.__getitem__) == question.gold}


def accuracies(scores, question):
    """acc_norm: scores per character of the choice, the space before it not counted, as in lm-evaluation-harness."""
    per_character = [score / length for score, length in zip(scores, question.lengths)]
    return accuracy(scores, question) | {"acc_norm": accuracy(per_character, question)["acc"]}


def hellaswag(row):
    def clean(text):  # WikiHow's articles left [header], [title], [step] in the text
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    begin = text_of(row, "ctx_b").capitalize()
    context = f"{text_of(row, 'activity_label')}: {text_of(row, 'ctx_a')} {begin}"
    return choose(clean(context), [clean(ending) for ending in texts_of(row, "endings")], row["label"])


def arc(row):
    # The hub's rows have choices {"text": [...], "label": [...]}; in AI2's own files each choice is an object.
    if isinstance(row["question"], dict):
        question = text_of(row["question"], "stem")
        choices = row["question"]["choices"]
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise ValueError(f"choices is no list of objects, but {choices!r:.60}")
        labels = [text_of(choice, "label") for choice in choices]
        texts = [text_of(choice, "text") for choice in choices]
    else:
        question = text_of(row, "question")
        labels = texts_of(fields_of(row, "choices"), "label")
        texts = texts_of(row["choices"], "text")
    if len(labels) != len(texts):
        raise ValueError(f"{len(texts)} choices have {len(labels)} labels")
    answer = text_of(row, "answerKey")
    if answer not in labels:
        raise ValueError(f"the answer {answer!r} is none of {', '.join(labels)}")
    return choose(f"Question: {question}\nAnswer:", texts, labels.index(answer))


def winogrande(row):
    """Partial scoring (https://arxiv.org/abs/1806.02847): of both sentences only what follows the option is scored."""
    before, blank, after = text_of(row, "sentence").partition("_")
    answer = text_of(row, "answer")
    if not blank:
        raise ValueError("the sentence has no _ for the options")
    if answer not in ("1", "2"):
        raise ValueError(f"the answer {answer!r} is neither 1 nor 2")
    contexts = [before + text_of(row, "option1"), before + text_of(row, "option2")]
    continuation = f" {after.strip()}"
    gold = int(answer) - 1
    return Question(contexts, [continuation] * 2, gold, contexts[gold] + continuation)


def mmlu(row):
    intro = ""
    if "subject" in row:
        subject = text_of(row, "subject").replace("_", " ")
        intro = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    texts = texts_of(row, "choices")
    if len(texts) != 4:
        raise ValueError(f"there are {len(texts)} choices")
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", texts))
    return choose(f"{text_of(row, 'question').strip()}\n{choices}\nAnswer:", list("ABCD"), row["answer"], intro)


# ---- answers that the model writes ----------------------------------------------------------------------------------


def plain_number(text):
    return text.replace(",", "").replace("$", "").removesuffix(".")


def grade_gsm8k(text, question):
    """exact_match: the number after the first ####; exact_match_flexible: the last number."""
    after_sign = re.findall(r"#### (-?[0-9.,]+)", text)
    numbers = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return {
        "exact_match": bool(after_sign) and plain_number(after_sign[0]) == question.gold,
        "exact_match_flexible": bool(numbers) and plain_number(numbers[-1]) == question.gold,
    }


def gsm8k(row):
    prompt = f"Question: {text_of(row, 'question')}\nAnswer:"
    answer = text_of(row, "answer")
    _, _, result = answer.rpartition("#### ")
    gold = plain_number(result)
    if result == answer or not gold:
        raise ValueError("no #### with a result in the answer")
    return Question([prompt], [], gold, f"{prompt} {answer}", asked=row["question"])


def competition_math(row):
    prompt = f"Problem:\n{text_of(row, 'problem')}\n\nSolution:"
    solution = text_of(row, "solution")
    gold = boxed(solution)
    if gold is None:
        raise ValueError(r"no \boxed{...} in the solution")
    return Question([prompt], [], plain_math(gold), f"{prompt} {solution}", asked=row["problem"])


def grade_math(text, question):
    answer = boxed(text)
    return {"exact_match": answer is not None and plain_math(answer) == question.gold}


def bare(text):
    """Returns a text as the harness compares it: small letters, without punctuation."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def triviaqa(row):
    row = in_small_letters(row)
    aliases = texts_of(in_small_letters(fields_of(row, "answer")), "aliases")
    if not aliases:
        raise ValueError("the answer has no aliases")
    prompt = f"Question: {text_of(row, 'question')}?\nAnswer:"
    return Question([prompt], [], {bare(alias) for alias in aliases}, f"{prompt} {aliases[0]}")


def in_small_letters(row):
    """Returns the fields by names in small letters: the authors' own files have capitals, the hub's not."""
    return {key.lower(): value for key, value in row.items()}


def grade_triviaqa(text, question):
    """The space about an answer does not count (that at its end counts to the harness before 0.4.9.2)."""
    return {"exact_match": bare(text.strip()) in question.gold}


def own_choices(row):
    return choose(text_of(row, "context"), texts_of(row, "choices"), row["label"])


def own_answer(row):
    context = text_of(row, "context")
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"the answer is {answer!r}, and neither a text nor a number")
    answer = str(answer)
    gold = stated_answer(answer)
    if not gold:
        raise ValueError("the answer is empty")
    return Question([context], [], gold, f"{context} {answer}", asked=context)


def grade_answer(text, question):
    return {"exact_match": is_same(stated_answer(text), question.gold)}


# ---- programs that the model writes ---------------------------------------------------------------------------------


def humaneval(row):
    """The test may use what the prompt imports and defines before the function that is to be written."""
    prompt = text_of(row, "prompt")
    name = text_of(row, "entry_point")
    helpers, found, _ = prompt.partition(f"def {name}(")
    test = f"{helpers if found else ''}\n{text_of(row, 'test')}\ncheck({name})\n"
    solved = prompt
    if "canonical_solution" in row:
        solved += text_of(row, "canonical_solution")
    return Question([prompt], [], Case(prompt, test, (name,)), solved)


def humaneval_case(text, question):
    return question.gold._replace(program=question.gold.program + text)


def grade_code(verdict, question):
    return {"pass@1": verdict.passed}


ARC = Task("question, choices {text, label}, answerKey", arc, accuracies)
GSM8K_STOPS = ("Question:", "</s>", "<|im_end|>")
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
TASKS = {
    "hellaswag": Task("activity_label, ctx_a, ctx_b, endings, label", hellaswag, accuracies),
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "winogrande": Task("sentence, option1, option2, answer (1 or 2)", winogrande, accuracy),
    "mmlu": Task("question, choices (4), answer (0 to 3), subject", mmlu, accuracy),
    "triviaqa": Task("question, answer {aliases}", triviaqa, grade_triviaqa, ("\n", ".", ",")),
    "gsm8k": Task("question, answer (ending in #### NUMBER)", gsm8k, grade_gsm8k, GSM8K_STOPS),
    "math": Task(r"problem, solution (with \boxed{...})", competition_math, grade_math, ("Problem:",)),
    "humaneval": Task("prompt, test, entry_point", humaneval, grade_code, HUMANEVAL_STOPS, 1024, humaneval_case),
}
OWN_CHOICES = Task("context, choices, label", own_choices, accuracies)
OWN_ANSWER = Task("context, answer (or choices and label)", own_answer, grade_answer, ("\n\n",))
