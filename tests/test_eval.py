"""eval.py and the tasks: every number against one that is computed here in another way."""

import gzip
import hashlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
import generate as generate_module
import hf
import training.load as load_module
from data.bpe import CHAT_TOKENS
from data.shards import PUBLISHED, write_shard
from data.tokenizers import load_tokenizer
from evals.answers import plain_math
from evals.scorer import ChatOptions, Request, Scorer, evaluate_task, windows
from evals.tasks import TASKS, Question, accuracies, boxed, load_task
from generate import generate
from tests.test_sample import make_run
from tests.tiny import MODELS, ROOT, build
from training.load import stop_tokens
from training.loss import bytes_of_tokens, loss_report, loss_sums

BYTE = load_tokenizer("byte")
EOT = BYTE.eot_id
TEXTS = {"train": ["one two, buckle my shoe " * 9, "née"], "val": ["three four", "knock at the döör " * 5, "five six"]}


def write_data(folder, tokenizer=BYTE, texts=TEXTS):
    folder.mkdir()
    for split, documents in texts.items():
        ids = [i for text in documents for i in (tokenizer.eot_id, *tokenizer.encode(text))]
        write_shard(folder / f"{split}_000000.bin", np.array(ids), tokenizer.vocab_size)
    meta = {"tokenizer": tokenizer.to_dict(), "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("eval") / "data")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def results_of(tmp_path, *arguments):
    evaluation.main([*map(str, arguments), "--json", str(tmp_path / "out.json")])
    return json.loads((tmp_path / "out.json").read_text())


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        evaluation.main([*map(str, arguments)])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message.splitlines()[-1]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["baseline", "moe"])  # moe: a loss with auxiliary terms would differ
def test_perplexity_and_bits_per_byte_equal_brute_force_over_the_tokens(name, data, tmp_path):
    folder, model, _ = make_run(tmp_path / "run", name=name)
    for limit in (100, 0):
        report = results_of(tmp_path, folder, "--data", data, "--eval_tokens", limit, "--batch_size", 3)["loss"]
        for split, documents in TEXTS.items():
            ids = [i for text in documents for i in (EOT, *text.encode())]
            count = limit or len(ids) - 1
            nats = []
            for t in range(1, count + 1):
                begin = (t - 1) // 64 * 64  # where its window of block_size begins
                with torch.no_grad():
                    nats.append(-model(torch.tensor([ids[begin:t]]))[0, -1].log_softmax(-1)[ids[t]].item())
            text = [nat for nat, i in zip(nats, ids[1:]) if i != EOT]
            got = report[split]
            assert got["tokens"] == count and got["bytes"] == len(text) == count - ids[1 : count + 1].count(EOT)
            assert got["loss"] == pytest.approx(sum(nats) / count, rel=1e-5)
            assert got["perplexity"] == pytest.approx(math.exp(sum(nats) / count), rel=1e-4)
            assert got["bits_per_byte"] == pytest.approx(sum(text) / math.log(2) / len(text), rel=1e-5)


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    """Two models of the same distribution over texts of a and é: one by characters, one by bytes."""
    text = "aéaaéa"
    by_char, logits = load_tokenizer("char", chars="aé"), {}
    a, e_acute = by_char.encode("aé")
    logits["char"] = torch.full((3, 3), -math.inf)
    logits["char"][:, a], logits["char"][:, e_acute] = math.log(0.25), math.log(0.75)
    first, second = "é".encode()
    logits["byte"] = torch.full((257, 257), -math.inf)
    logits["byte"][:, ord("a")], logits["byte"][:, first] = math.log(0.25), math.log(0.75)
    logits["byte"][first] = -math.inf
    logits["byte"][first, second] = 0.0
    reports = {}
    for kind, tokenizer in (("char", by_char), ("byte", BYTE)):
        ids = torch.tensor([[tokenizer.eot_id, *tokenizer.encode(text)]])
        model = logits[kind].__getitem__
        sums = loss_sums(model, [(ids[:, :-1], ids[:, 1:])], bytes_of_tokens(tokenizer, len(logits[kind])))
        reports[kind] = loss_report(sums)
    want = -(4 * math.log(0.25) + 2 * math.log(0.75)) / math.log(2) / 8
    assert reports["char"]["tokens"] == 6 and reports["byte"]["tokens"] == 8
    assert reports["char"]["bytes"] == reports["byte"]["bytes"] == 8
    assert reports["char"]["bits_per_byte"] == pytest.approx(want) == reports["byte"]["bits_per_byte"]
    assert reports["char"]["loss"] != pytest.approx(reports["byte"]["loss"])


def test_a_hugging_face_folder_has_the_loss_of_the_run_it_was_made_of(run, data, tmp_path, capsys):
    folder, model, _ = run
    hf.save(model, tmp_path / "hf")
    assert "--tokenizer" in error_of(capsys, tmp_path / "hf", "--data", data)
    theirs = results_of(tmp_path, tmp_path / "hf", "--data", data, "--tokenizer", "byte", "--block_size", 32)["loss"]
    assert theirs == results_of(tmp_path, folder, "--data", data, "--block_size", 32)["loss"]
    assert theirs != results_of(tmp_path, folder, "--data", data)["loss"]


def test_without_bytes_of_text_there_are_no_bits_per_byte():
    assert loss_report([8.0, 4.0, 0.0, 0.0])["bits_per_byte"] is None
    assert loss_report([8000.0, 4.0, 0.0, 0.0])["perplexity"] == math.inf
    assert bytes_of_tokens(None, 5).tolist() == [0] * 5


def test_nothing_in_the_folders_that_are_read_changes(run, data, tmp_path, monkeypatch):
    def state(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [(str(path), path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]

    folder, monkeypatch = run[0], monkeypatch.chdir(tmp_path)
    task = jsonl(tmp_path / "mine.jsonl", [{"context": "a", "choices": ["b", "c"], "label": 0}])
    before = state(folder), state(data)
    for path in (folder, folder / "best"):
        results_of(tmp_path, path, "--data", data, "--tasks", f"mine={task}")
    assert (state(folder), state(data)) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "out.json"]


def test_the_runs_own_data_is_the_default_and_the_table_is_printed(run, data, tmp_path, capsys):
    folder, model, _ = make_run(tmp_path / "run")
    (folder / "config.json").write_text(json.dumps({"model": "baseline", "knobs": {"data": str(data)}}))
    report = results_of(tmp_path, folder, "--split", "val")
    assert report["loss"].keys() == {"val"}
    assert f"{report['loss']['val']['loss']:.4f}" in capsys.readouterr().out
    assert "give --data" in error_of(capsys, run[0])
    task = jsonl(tmp_path / "mine.jsonl", [{"context": "a", "choices": ["b", "c"], "label": 0}])
    assert "loss" not in results_of(tmp_path, folder, "--tasks", f"mine={task}")


def test_bits_per_byte_are_of_the_text_where_a_tokenizer_lost_some(run, data, tmp_path):
    """Of two folders with the same tokens one was made of a text of three times as many bytes."""
    meta = json.loads((data / "meta.json").read_text())
    sizes = {split: sum(len(text.encode()) for text in texts) for split, texts in TEXTS.items()}
    lossy = write_data(tmp_path / "lossy")
    more = {"bytes": sizes, "text_bytes": {"train": 2 * sizes["train"], "val": 3 * sizes["val"]}}
    (lossy / "meta.json").write_text(json.dumps(meta | more))
    plain = results_of(tmp_path, run[0], "--data", data)["loss"]
    corrected = results_of(tmp_path, run[0], "--data", lossy)["loss"]
    for split, factor in (("train", 2), ("val", 3)):
        assert corrected[split]["loss"] == plain[split]["loss"]
        assert corrected[split]["bytes"] == factor * plain[split]["bytes"]
        assert corrected[split]["bits_per_byte"] == pytest.approx(plain[split]["bits_per_byte"] / factor)

    # And so train.py, which evaluates the same tokens at its end.
    sizes = "--n_layer=1 --n_head=2 --n_kv_head=1 --head_dim=8 --n_embd=16 --n_inner=16 --block_size=16"
    steps = "--batch_tokens=32 --micro_batch=2 --max_steps=1 --warmup_steps=0 --device=cpu"
    command = [
        sys.executable,
        "train.py",
        f"--data={lossy}",
        f"--out_dir={tmp_path}/run",
        *sizes.split(),
        *steps.split(),
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = results_of(tmp_path, tmp_path / "run", "--split", "val")["loss"]["val"]
    assert rows[-1]["val_bits_per_byte"] == pytest.approx(trained["bits_per_byte"], rel=1e-4)


def test_a_run_on_shards_without_a_tokenizer_has_a_loss_and_no_text(run, tmp_path, capsys, monkeypatch):
    """As on the shards of Llama 3's tokens that are published: no file says which tokenizer they are of."""
    folder, model, _ = make_run(tmp_path / "run")
    (tmp_path / "data").mkdir()
    ids = np.arange(200) * 7 % 300
    write_shard(tmp_path / "data" / "edu_val_000000.bin", ids, 70_000)  # 32 bits a token
    meta = json.dumps({"tokenizer": None, "vocab_size": 300, "eot_id": 0})
    for path in (tmp_path / "data" / "meta.json", folder / "data.json"):
        path.write_text(meta)
    got = results_of(tmp_path, folder, "--data", tmp_path / "data", "--split", "val")["loss"]["val"]
    assert got["tokens"] == 199 and got["bits_per_byte"] is None
    x = torch.tensor(ids[None, :64])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(x)[0], torch.tensor(ids[1:65])).item()
    first = results_of(tmp_path, folder, "--data", tmp_path / "data", "--split", "val", "--eval_tokens", 64)["loss"][
        "val"
    ]
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    task = jsonl(tmp_path / "mine.jsonl", [{"context": "a", "choices": ["b", "c"], "label": 0}])
    assert "300 tokens and no tokenizer: name its own with --tokenizer" in error_of(
        capsys, folder, "--tasks", f"m={task}"
    )

    def download(name):
        raise OSError("no network")

    monkeypatch.setattr(load_module, "load_tokenizer", download)
    monkeypatch.setitem(PUBLISHED, 2, (300, 0))  # as if they were GPT-2's, whose tokenizer is downloaded
    got = results_of(tmp_path, folder, "--data", tmp_path / "data", "--split", "val")["loss"]["val"]
    assert got["tokens"] == 199 and got["bits_per_byte"] is None
    for option in (["--tokenizer", "gpt2"], ["--tasks", f"m={task}"]):
        assert "no network" in error_of(capsys, folder, "--data", tmp_path / "data", *option)
    (tmp_path / "data" / "meta.json").unlink()  # then they are Llama 3's
    assert "128256 tokens, and the model 320" in error_of(capsys, folder, "--data", tmp_path / "data", "--split", "val")


# ---- questions to the model -----------------------------------------------------------------------------------------


def scorer_of(model, rows=8, prefix=(EOT,)):
    return Scorer(model, BYTE, list(prefix), stop_tokens(BYTE), rows)


def test_windows_score_every_token_once_with_as_much_context_as_fits():
    for length in range(1, 14):
        for first in range(1, length + 1):
            for block_size in (1, 2, 5, 20):
                tokens, scored = list(range(length)), []
                for window, n in windows(tokens, first, block_size):
                    assert 1 <= n < len(window) <= block_size + 1
                    assert len(window) == min(block_size, window[-1]) + 1  # it is full, or begins where the text does
                    scored += window[-n:]
                assert scored == tokens[first:]
    assert list(windows(list(range(11)), 1, 4)) == [([0, 1, 2, 3, 4], 4), ([4, 5, 6, 7, 8], 4), ([6, 7, 8, 9, 10], 2)]


PAIRS = [("a", " bc"), ("Where is it? ", "here"), ("", "no context"), ("xy", "z" * 40), ("ab", "!"), ("ab", "?")]
PAIRS += [("w" * 62, " x")]  # with eot 65 tokens: block_size = 64 to read, and the last to predict
PAIRS += [("long " * 20, "end"), ("k" * 70, "m" * 80)]  # too long


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_log_likelihoods_equal_brute_force_in_every_batch_size(name, eot_id):
    model = build(name, vocab_size=320, eot_id=eot_id)
    requests = [Request(pair) for pair in PAIRS]
    scorer = scorer_of(model)
    got = scorer.loglikelihood(requests)
    assert scorer.cut == 2
    for rows in (1, 3):
        for (score, greedy), want in zip(scorer_of(model, rows).loglikelihood(requests), got):
            assert (score, greedy) == (pytest.approx(want[0], rel=1e-4), want[1])
    for (context, continuation), (score, _) in zip(PAIRS[:-1], got):
        ids = [EOT, *(context + continuation).encode()]
        total = 0.0
        for t in range(1 + len(context.rstrip()), len(ids)):  # a space before the continuation is part of it
            row = ids[max(len(ids) - 65, 0) : t]  # the last block_size tokens before the last
            total += model(torch.tensor([row]))[0, -1].log_softmax(-1)[ids[t]].item()
        assert score == pytest.approx(total, rel=1e-4), context


def test_greedy_is_true_only_for_the_continuation_that_the_model_writes():
    model = build("baseline", vocab_size=257)
    ids = generate(model, [[EOT, *b"ab"]], 3, temperature=0)[0]
    scorer = scorer_of(model)
    scorer.tokenizer = ByIds()
    right, wrong = "".join(map(chr, ids)), "".join(map(chr, [*ids[:2], (ids[2] + 1) % 256]))
    got = scorer.loglikelihood([Request(("ab", right)), Request(("ab", wrong))])
    assert [greedy for _, greedy in got] == [True, False]


class ByIds:
    """A character is the token of its number: any ids can be written as text."""

    eot_id, special_tokens, stop_ids = EOT, {}, {EOT}

    def encode(self, text):
        return list(map(ord, text))

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_rolling_log_likelihoods_cover_all_of_a_long_text():
    model, text = build("baseline", vocab_size=257), "the quick brown fox " * 8
    ids = [EOT, *text.encode()]  # 161: windows of 64, 64 and 32 targets, the last with all the context that fits
    total = 0.0
    for begin, first in ((0, 1), (64, 65), (96, 129)):
        logp = model(torch.tensor([ids[begin : begin + 64]]))[0].log_softmax(-1)
        total += sum(logp[t - 1 - begin, ids[t]].item() for t in range(first, min(first + 64, 161)))
    for rows in (1, 8):
        scorer = scorer_of(model, rows)
        got = scorer.loglikelihood_rolling([Request((text,)), Request(("short",)), Request(("",))])
        assert got[0] == pytest.approx(total, rel=1e-5) and got[2] == 0.0
        assert got[1] == pytest.approx(scorer.loglikelihood([Request(("", "short"))])[0][0], rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_answers_equal_generate_in_every_batch_size_and_end_before_a_stop(name):
    model = build(name, vocab_size=256 + 64)
    head = model.logits
    model.logits = lambda x: head(x)[..., 32:127]  # it writes text: token i is character 32 + i
    tokenizer = type("Shifted", (ByIds,), {"decode": lambda self, ids: "".join(chr(32 + i) for i in ids)})()
    contexts = ["ab", "hello world", "a" * 45, "x" * 44, "some more text"]  # room for eot and 44: 65 - 20
    free = [generate(model, [[EOT, *map(ord, c)][-(65 - 20) :]], 20, temperature=0)[0] for c in contexts]
    free = [tokenizer.decode(ids) for ids in free]
    stops = [free[0][7:9], free[1][12]]
    cut = [min([text.find(stop) for stop in stops if stop in text], default=20) for text in free]
    assert min(cut) < 20
    for rows in (1, 2, 8):
        scorer = Scorer(model, tokenizer, [EOT], stop_tokens(tokenizer), rows)
        requests = [Request((c, {"until": stops, "max_gen_toks": 20})) for c in contexts]
        requests += [Request((c, {"until": [], "max_gen_toks": 20})) for c in contexts]
        got = scorer.generate_until(requests)
        assert got[:5] == [text[:n] for text, n in zip(free, cut)] and got[5:] == free
        assert scorer.cut == 2
    alone = scorer.generate_until([Request((contexts[0], {"until": stops[0], "max_gen_toks": 20}))])
    assert alone == [free[0].partition(stops[0])[0]] and alone[0].startswith(free[0][:2])


def test_an_answer_ends_where_it_does_alone_however_long_the_others_of_its_batch_are(monkeypatch):
    texts = ["xabcd", "12345"]

    def stream(model, prompts, n, **options):
        for i in range(5):
            yield torch.tensor([ord(texts[int(chr(prompt[-1]))][i]) for prompt in prompts])

    monkeypatch.setattr(generate_module, "stream", stream)
    requests = [Request((number, {"until": ["abcd", "b"]})) for number in "01"]
    for rows in (1, 2):  # alone the first ends with its b; together abcd, which begins before that, is written, too
        scorer = scorer_of(build("baseline", vocab_size=257), rows)
        scorer.tokenizer = ByIds()
        assert scorer.generate_until(requests) == ["xa", "12345"]


def test_what_a_task_spells_out_is_text_in_questions_choices_examples_and_chats(tmp_path, monkeypatch):
    tokenizer = load_tokenizer("byte", CHAT_TOKENS)
    scorer = Scorer(build("baseline", vocab_size=320), tokenizer, [], {EOT}, 8)
    spelled = "".join(tokenizer.special_tokens)
    row = {"context": spelled, "choices": [spelled, "x"], "label": 0}
    task, questions = load_task("mine", jsonl(tmp_path / "mine.jsonl", [row] * 2), num_fewshot=1)
    seen = []
    monkeypatch.setattr(scorer, "score", lambda sequences: seen.extend(sequences) or [(0.0, True)] * len(sequences))
    evaluate_task(scorer, task, questions)
    assert seen[0][0] == list(f"{spelled} {spelled}\n\n{spelled} {spelled}".encode())
    assert scorer.prompt_of(spelled) == list(spelled.encode())
    scorer.chat_options = ChatOptions()
    ids = scorer.prompt_of(spelled)
    assert ids.count(tokenizer.special_tokens["<|im_end|>"]) == 1 and tokenizer.special_tokens["<think>"] not in ids


def test_an_answer_gets_at_most_half_of_the_window_and_sampling_is_refused():
    scorer = scorer_of(build("baseline", vocab_size=257))
    scorer.tokenizer, scorer.stop = ByIds(), set()
    assert len(scorer.generate_until([Request(("a" * 90, {"max_gen_toks": 500}))])[0]) == 32
    with pytest.raises(ValueError, match="greedy"):
        scorer.generate_until([Request(("a", {"do_sample": True}))])


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_acc_norm_divides_by_the_characters_of_the_choice(tmp_path):
    row = {"context": "q", "choices": ["éé", "abcdefgh", "abcd"], "label": 1}
    question = load_task("mine", jsonl(tmp_path / "mine.jsonl", [row]))[1][0]
    assert question == Question(["q"] * 3, [" éé", " abcdefgh", " abcd"], 1, "q abcdefgh", [2, 8, 4])
    assert accuracies([-3.0, -8.0, -6.0], question) == {"acc": False, "acc_norm": True}  # -1.5, -1, -1.5
    assert accuracies([-2.1, -2.0, -0.9], question) == {"acc": False, "acc_norm": False}  # -1.05, -0.25, -0.225
    assert accuracies([-3.5, -8.0, -6.0], question._replace(gold=0)) == {"acc": True, "acc_norm": False}
    assert accuracies([-1.0, -1.0, -2.0], question._replace(gold=0))["acc"], "the first of equals, as argmax"


def test_answers_in_boxes_and_numbers_are_found():
    assert boxed(r"so \boxed{1}, no: $\boxed{\frac{1}{\sqrt{2}}}$.") == r"\frac{1}{\sqrt{2}}"
    assert boxed(r"$\boxed 5$ it is") == "5" and boxed(r"\fbox{x}") == "x"
    assert boxed("no box") is boxed(r"\boxed{never closed") is None
    same = [(r"\dfrac{1}{2}", r"\frac12"), (r"\left( 3, 4 \right)", "(3,4)"), ("1,234", "1234"), (r"90^\circ", "90")]
    same += [("x=5", "5"), (r"5\text{ cm}", "5"), (r"\$3.50", "3.50"), (r"12\%", "12")]
    for one, other in same:
        assert plain_math(one) == plain_math(other), one
    for one, other in [("(1,2)", "12"), ("1,23", "123"), (r"\frac12", r"\frac21"), ("-1", "1"), (r"\text{east}", "")]:
        assert plain_math(one) != plain_math(other), one


@pytest.mark.parametrize(
    "answer, right, wrong",
    [
        ("2 + 2 = 4\n#### 1,000", "first 7, then 1,000.", "1,000, then 7"),
        (1000, " #### 1000\nThat is 3.", "#### 100"),
        (0.5, r"\boxed{\frac{1}{2}}", "2"),
        (r"12 is \boxed{x^2}", r"so \boxed{ x^2 }, of 3", "x^2"),
        (" Paris\n", " Paris", "It is Paris"),
    ],
)
def test_the_answer_of_ones_own_question_is_the_number_or_the_text_that_is_stated(tmp_path, answer, right, wrong):
    task, (question,) = load_task("own", jsonl(tmp_path / "own.jsonl", [{"context": "Q", "answer": answer}]))
    assert task.grade(right, question)["exact_match"] and not task.grade(wrong, question)["exact_match"]
    assert not task.grade("", question)["exact_match"]


class Oracle:
    """In the place of a Scorer: it is right about the rows that are in `right`."""

    def __init__(self, questions, right, wrong=None):
        self.cut, self.asked, self.right, self.wrong, self.questions = 0, [], right, wrong, questions
        self.chat_options = None

    def loglikelihood(self, requests):
        self.asked, scores = [request.args for request in requests], []
        for i, q in enumerate(self.questions):
            choice = (i + (i not in self.right)) % len(q.contexts)  # choice_rows has the right one at i % n
            scores += [(0.0 if j == choice else -1000.0, False) for j in range(len(q.contexts))]
        return scores

    def generate_until(self, requests):
        self.asked = [request.args for request in requests]
        return [(self.right[i] if i in self.right else self.wrong) for i in range(len(requests))]


def choice_rows(name, i):
    """Row i of a task's file with the index of the right choice, in the form in which the hub has it."""
    letters, gold = "ABCD", i % 4
    return {
        "hellaswag": dict(ind=i, activity_label="Baking", ctx_a=f"A man number {i} [step] mixes.", ctx_b="he THEN",
                          endings=[f"bakes [title] {n}" for n in range(4)], label=str(gold), source_id="x"),
        "arc_easy": dict(id=str(i), question=f"What is {i}?", answerKey=letters[gold],
                         choices={"text": [f"t{n}" for n in range(4)], "label": list(letters)}),
        "arc_challenge": dict(id=str(i), question=f"What is {i}?", answerKey=str(gold + 1),
                              choices={"text": [f"t{n}" for n in range(4)], "label": list("1234")}),
        "winogrande": dict(sentence=f"The cup {i} broke the table as _ was hard.", option1="the cup",
                           option2="the table", answer=str(i % 2 + 1)),
        "mmlu": dict(question=f" Which is {i}? ", subject=["high_school_biology", "anatomy"][i // 10],
                     choices=[f"c{n}" for n in range(4)], answer=gold),
    }[name]  # fmt: skip


MMLU_INTRO = "The following are multiple choice questions (with answers) about anatomy.\n\n"
ASKED = {  # what is asked of row 19, whose right choice is the last
    "hellaswag": ("Baking: A man number 19 mixes. He then", " bakes. 3"),
    "arc_easy": ("Question: What is 19?\nAnswer:", " t3"),
    "arc_challenge": ("Question: What is 19?\nAnswer:", " t3"),
    "winogrande": ("The cup 19 broke the table as the table", " was hard."),
    "mmlu": (f"{MMLU_INTRO}Which is 19?\nA. c0\nB. c1\nC. c2\nD. c3\nAnswer:", " D"),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_multiple_choice_file_is_scored_to_a_known_value(name, tmp_path):
    path = jsonl(tmp_path / f"{name}.jsonl", [choice_rows(name, i) for i in range(20)])
    task, questions = load_task(name, path)
    oracle = Oracle(questions, range(13))
    results = evaluate_task(oracle, task, questions)
    assert (results["questions"], results["acc"], "acc_norm" in results) == (20, 13 / 20, name[0] in "ha")
    assert results["acc_stderr"] == pytest.approx(np.std([1] * 13 + [0] * 7, ddof=1) / math.sqrt(20))
    assert oracle.asked[-1] == ASKED[name]
    with_examples = load_task(name, path, num_fewshot=2)[1]
    assert len(with_examples) == (16 if name == "mmlu" else 18)  # two of each subject
    i = 11 if name == "mmlu" else 1
    solved, last = choice_rows(name, i), with_examples[-1].contexts[-1]
    answer = {"hellaswag": "bakes. 1", "winogrande": "the table was hard.", "mmlu": "\nAnswer: D"}.get(name, " t1")
    assert f"{answer}\n\n" in last and str(i) in last and last.endswith(ASKED[name][0].removeprefix(MMLU_INTRO))
    assert last.count("multiple choice") == (name == "mmlu"), solved


def test_the_authors_own_files_read_like_the_hubs(tmp_path):
    def contexts(name, path):
        return [(q.contexts, q.continuations, q.gold, q.intro) for q in load_task(name, path)[1]]

    rows = [choice_rows("arc_easy", i) for i in range(20)]
    stems = []
    for row in rows:
        choices = [{"text": text, "label": label} for text, label in zip(*row["choices"].values())]
        stems.append({"question": {"stem": row["question"], "choices": choices}, "answerKey": row["answerKey"]})
    hub = contexts("arc_easy", jsonl(tmp_path / "a.jsonl", rows))
    assert hub == contexts("arc_easy", jsonl(tmp_path / "b.jsonl", stems))

    rows = [choice_rows("mmlu", i) for i in range(20)]
    (tmp_path / "mmlu").mkdir()
    for subject in ("anatomy", "high_school_biology"):
        lines = [
            f"{r['question']},{','.join(r['choices'])},{'ABCD'[r['answer']]}\n" for r in rows if r["subject"] == subject
        ]
        (tmp_path / "mmlu" / f"{subject}_test.csv").write_text("".join(lines))
    hub = contexts("mmlu", jsonl(tmp_path / "m.jsonl", rows))
    assert hub[10:] + hub[:10] == contexts("mmlu", tmp_path / "mmlu")

    hub = [{"question": f"Who is {i}", "answer": {"value": "x", "aliases": [f"No. {i}", "x"]}} for i in range(20)]
    data = {"Data": [{"Question": r["question"], "Answer": {"Aliases": r["answer"]["aliases"]}} for r in hub]}
    (tmp_path / "trivia.json.gz").write_bytes(gzip.compress(json.dumps(data).encode()))
    assert contexts("triviaqa", tmp_path / "trivia.json.gz") == contexts("triviaqa", jsonl(tmp_path / "t.jsonl", hub))

    (tmp_path / "MATH" / "algebra").mkdir(parents=True)
    for i in range(20):
        row = {"problem": f"p{i}", "level": "Level 1", "type": "Algebra", "solution": rf"$\boxed{{{i}}}$"}
        (tmp_path / "MATH" / "algebra" / f"{i:02}.json").write_text(json.dumps(row, indent=1))
    assert [gold for *_, gold, _ in contexts("math", tmp_path / "MATH")] == [str(i) for i in range(20)]


MMLU_ROW = '"Which of these, if any, is right?",one,two,three,four,C\r\n'
MMLU_PROMPT = "Which of these, if any, is right?\nA. one\nB. two\nC. three\nD. four\nAnswer:"


@pytest.mark.parametrize(
    "table",
    [
        MMLU_ROW.encode(),
        MMLU_ROW.encode("utf-8-sig"),  # as Excel saves
        MMLU_ROW.encode("utf-16"),
        (MMLU_ROW + "\r\n").encode(),
        ("\r\n" + MMLU_ROW + ",,,,,\r\n").encode(),
        b"Which of these, if any, is right?;one;two;three;four;C\n",  # Excel where the comma is decimal
        b"Which of these, if any, is right?\tone\ttwo\tthree\tfour\tC\n",
    ],
)
def test_a_table_of_mmlu_is_read_as_it_was_saved(tmp_path, table):
    (tmp_path / "law_test.csv").write_bytes(table)
    ((contexts, _, gold, *_),) = load_task("mmlu", tmp_path / "law_test.csv")[1]
    assert gold == 2 and contexts[0].endswith(f"about law.\n\n{MMLU_PROMPT}")


@pytest.mark.parametrize(
    "row, message",
    [
        ("q,one,two,three,four,c", "the answer 'c' is none of A, B, C, D"),
        ("q,one,two,three,four, C", "the answer ' C' is none of"),
        ("q,one,two,three,four,CD", "the answer 'CD' is none of"),
        ("q,one,two,three,four,", "the answer '' is none of"),
        ("q,one,two,three,C", "the first row has 6 columns, and this one 5"),
        ('"q,one,two,three,four,C', "no CSV: unexpected end of data"),
    ],
)
def test_a_bad_row_of_a_table_is_named_with_its_line(tmp_path, row, message):
    (tmp_path / "law_test.csv").write_text(f"{MMLU_ROW}{row}\n")
    with pytest.raises(ValueError, match=f"law_test.csv(, after line 1| line 2): {message}"):
        load_task("mmlu", tmp_path / "law_test.csv")


OWN_ROW = {"context": "a", "choices": ["b", "c"], "label": 1}


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("mine", ["a"], r"a row has fields, and this one is \['a'\]"),
        ("mine", 7, "a row has fields, and this one is 7"),
        ("mine", OWN_ROW | {"context": 7}, "context is 7, and no text"),
        ("mine", OWN_ROW | {"context": None}, "context is None, and no text"),
        (
            "mine",
            OWN_ROW | {"context": ["a"]},
            r"context is \['a'\], and no text",
        ),  # of two choices one would be scored
        ("mine", {"context": 7, "answer": "x"}, "context is 7, and no text"),
        ("hellaswag", choice_rows("hellaswag", 0) | {"endings": "wxyz"}, "endings is no list of texts, but 'wxyz'"),
        ("hellaswag", choice_rows("hellaswag", 0) | {"ctx_a": None}, "ctx_a is None, and no text"),
        ("mmlu", choice_rows("mmlu", 0) | {"choices": "wxyz"}, "choices is no list of texts, but 'wxyz'"),
        ("mmlu", choice_rows("mmlu", 0) | {"choices": ["w", "x"]}, "there are 2 choices"),
        ("arc_easy", choice_rows("arc_easy", 0) | {"answerKey": "E"}, "the answer 'E' is none of A, B, C, D"),
        (
            "arc_easy",
            choice_rows("arc_easy", 0) | {"choices": {"text": ["x"], "label": ["A", "B"]}},
            "1 choices have 2",
        ),
        ("winogrande", choice_rows("winogrande", 0) | {"answer": "0"}, "the answer '0' is neither 1 nor 2"),
        ("gsm8k", {"question": "q", "answer": "it is 5"}, "no #### with a result in the answer"),
        ("gsm8k", {"question": "q", "answer": "it is 5\n#### "}, "no #### with a result in the answer"),
        ("gsm8k", {"question": None, "answer": "#### 5"}, "question is None, and no text"),
        ("triviaqa", {"question": "q", "answer": {"aliases": "Paris"}}, "aliases is no list of texts, but 'Paris'"),
        ("triviaqa", {"question": "q", "answer": {"aliases": []}}, "the answer has no aliases"),
        ("triviaqa", {"question": "q", "answer": "Paris"}, "answer is 'Paris', and has no fields"),
        ("arc_easy", choice_rows("arc_easy", 0) | {"choices": "ab"}, "choices is 'ab', and has no fields"),
        ("arc_easy", {"question": {"stem": "q", "choices": "ab"}}, "choices is no list of objects, but 'ab'"),
        ("arc_easy", {"question": {"stem": "q", "choices": [{"text": 7, "label": "A"}]}}, "text is 7, and no text"),
        ("humaneval", {"prompt": "def f(x):", "entry_point": "f", "test": None}, "test is None, and no text"),
        ("humaneval", {"prompt": ["def f(x):"]}, "prompt is .*, and no text"),
        ("mine", OWN_ROW | {"choices": ["only"], "label": 0}, "there is nothing to choose from"),
        ("mine", OWN_ROW | {"choices": [], "label": 0}, "there is nothing to choose from"),
        ("mine", {"context": "a", "answer": " "}, "the answer is empty"),
        ("mine", {"context": "a", "answer": "it is\n####"}, "the answer is empty"),
    ],
)
def test_a_row_that_is_not_what_its_task_says_is_named_with_its_line(tmp_path, name, row, message):
    path = jsonl(tmp_path / "bad.jsonl", [row])
    with pytest.raises(ValueError, match=f"bad.jsonl line 1: {message}"):
        load_task(name, path)


def test_answers_of_triviaqa_are_compared_as_the_harness_compares_them(tmp_path):
    row = {"question": "Who", "answer": {"aliases": ["The V.", "U S A "]}}
    task, (question,) = load_task("triviaqa", jsonl(tmp_path / "t.jsonl", [row]))
    answers = {"  the v": True, "THE V ": True, "The  V": False, "usa": False, " u.s a": False, "u S a": False}
    assert {text: task.grade(text, question)["exact_match"] for text in answers} == answers


def test_of_a_folder_as_it_is_downloaded_the_files_of_rows_are_read_and_the_others_counted(tmp_path, capsys):
    rows = [choice_rows("hellaswag", i) for i in range(20)]
    (tmp_path / ".cache").mkdir()
    jsonl(tmp_path / ".cache" / "old.jsonl", rows[:1])
    (tmp_path / "README.md").write_text("about it")
    jsonl(tmp_path / "a.jsonl", rows[:10])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(tmp_path / "b", rows[10:]).read_bytes()))
    (tmp_path / "b").unlink()
    assert len(load_task("hellaswag", tmp_path)[1]) == 20
    left_out = f"left out of {tmp_path}: 1 hidden folder, 1 .md (read are .jsonl, .json, .csv, .parquet and"
    assert left_out in capsys.readouterr().err
    (tmp_path / "notes.docx").touch()
    with pytest.raises(ValueError, match="notes.docx: can read .jsonl, .json, .csv, .parquet and .gz or .zst of them"):
        load_task("hellaswag", tmp_path / "notes.docx")


def test_parquet_files_are_read(tmp_path):
    parquet, rows = pytest.importorskip("pyarrow.parquet"), [choice_rows("hellaswag", i) for i in range(20)]
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "h.parquet")
    got, want = (load_task("hellaswag", p)[1] for p in (tmp_path / "h.parquet", jsonl(tmp_path / "h.jsonl", rows)))
    assert got == want


def answer_rows(name, i):
    """(row, a right answer)"""
    return {
        "triviaqa": (dict(question=f"Who is {i}", answer=dict(value="v", aliases=["The V.", f"Number {i}"])),
                     [" the v", f"  NUMBER {i}"][i // 4 % 2]),
        "gsm8k": (dict(question=f"{i}+1000?", answer=f"{i}+1000=<<{i}+1000={i + 1000}>>{i + 1000}\n#### 1,{i:03}"),
                  f" It is {i}.\n#### {i + 1000}.\n\n#### 5"),
        "math": (dict(problem=f"Half of {i}?", level="Level 1", solution=rf"So $\boxed{{\frac{{{i}}}{{2}}}}$."),
                 rf" \boxed{{0}}, no \boxed{{\dfrac{{{i}}}{{2}} }}"),
        "humaneval": (dict(task_id=f"HumanEval/{i}", prompt=f"def add{i}(a):\n", entry_point=f"add{i}",
                           canonical_solution=f"    return a + {i}\n", test=f"def check(f): assert f(1) == {i + 1}\n"),
                      f"    return {i} + a"),
        "own": (dict(context=f"Q{i}:", answer=f"{i}"), f" That is {i}.00".removesuffix(".00")),
    }[name]  # fmt: skip


WRITTEN = {
    "triviaqa": ("Question: Who is 19?\nAnswer:", " somebody", ["\n", ".", ","]),
    "gsm8k": ("Question: 19+1000?\nAnswer:", " #### 7", ["Question:", "</s>", "<|im_end|>"]),
    "math": ("Problem:\nHalf of 19?\n\nSolution:", r" \boxed{-1}", ["Problem:"]),
    "humaneval": ("def add19(a):\n", "    exit(0)", ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]),
    "own": ("Q19:", " 77", ["\n\n"]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_questions_with_written_answers_is_scored_to_a_known_value(name, tmp_path):
    path = jsonl(tmp_path / f"{name}.jsonl", [answer_rows(name, i)[0] for i in range(20)])
    task, questions = load_task(name, path)
    context, wrong, until = WRITTEN[name]
    oracle = Oracle(questions, {i: answer_rows(name, i)[1] for i in range(0, 20, 4)}, wrong)
    results = evaluate_task(oracle, task, questions, weak_sandbox=True)
    assert results["pass@1" if name == "humaneval" else "exact_match"] == 5 / 20
    assert oracle.asked[-1] == (context, {"until": until, "max_gen_toks": 1024 if name == "humaneval" else 256})
    if name == "gsm8k":
        assert results["exact_match_flexible"] == 0.0, "5 is the last number"
        assert task.grade("so 1,003 of them.", questions[3]) == {"exact_match": False, "exact_match_flexible": True}


def test_every_named_task_has_a_fixture():
    assert set(ASKED) | set(WRITTEN) == {*TASKS, "own"}


def test_a_real_model_answers_a_file_alike_in_every_batch_size(run, tmp_path):
    rows = [{"context": f"q {i}", "choices": ["yes", "no way", "maybe"], "label": i % 3} for i in range(20)]
    task = jsonl(tmp_path / "mine.jsonl", rows)
    one, eight = (results_of(tmp_path, run[0], "--tasks", f"mine={task}", "--batch_size", n)["tasks"] for n in (1, 8))
    assert one == eight
    got, choices = {"acc": 0, "acc_norm": 0}, rows[0]["choices"]
    for row in rows:
        logp = []
        for choice in choices:
            ids = torch.tensor([[EOT, *f"{row['context']} {choice}".encode()]])
            table = run[1](ids[:, :-1])[0, :, :257].log_softmax(-1)
            logp.append(sum(table[t - 1, ids[0, t]].item() for t in range(ids.size(1) - len(choice) - 1, ids.size(1))))
        got["acc"] += np.argmax(logp) == row["label"]
        got["acc_norm"] += np.argmax(np.array(logp) / [3, 6, 5]) == row["label"]
    assert {key: one["mine"][key] * 20 for key in got} == pytest.approx(got)
    limited = results_of(tmp_path, run[0], "--task_dir", tmp_path, "--tasks", "mine", "--limit", 7)
    assert limited["tasks"]["mine"]["questions"] == 7


# ---- chats ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("chatty"), CHAT_TOKENS, block_size=256)


def gsm8k_file(folder):
    return jsonl(folder / "gsm8k.jsonl", [{"question": f"{i} and 1?", "answer": f"#### {i + 1}"} for i in range(4)])


@pytest.mark.parametrize(
    "switch, begin", [([], ""), (["--think"], "<think>\n"), (["--no_think"], "<think>\n\n</think>\n\n")]
)
def test_a_question_is_a_turn_of_a_chat_and_what_follows_the_thinking_is_scored(
    chatty, tmp_path, monkeypatch, switch, begin
):
    folder, _, tokenizer = chatty
    answers = [
        "It is 7.\n\nQuestion: 5\n</think>\n\n#### 1",
        "It is 7.\n</think>\n\nIt is 2",
        "It is 3.\n</think>\n\n#### 5",
        "It must be #### 4" if switch == ["--think"] else "<think>\nIt must be #### 4",
    ]
    prompts = []

    def stream(model, batch, n, **options):
        prompts.extend(tokenizer.decode(ids) for ids in batch)
        texts = [answers[int(prompt.split("user\n")[1][0])] for prompt in prompts[-len(batch) :]]
        rows = [tokenizer.encode(text, special=True) for text in texts]
        for i in range(max(map(len, rows))):
            yield torch.tensor([row[i] if i < len(row) else -1 for row in rows])

    monkeypatch.setattr(generate_module, "stream", stream)
    arguments = ("--tasks", f"gsm8k={gsm8k_file(tmp_path)}", "--chat", *switch)
    scores = results_of(tmp_path, folder, *arguments)["tasks"]["gsm8k"]
    asked = "<|endoftext|><|im_start|>user\n{} and 1?<|im_end|>\n<|im_start|>assistant\n"
    assert sorted(prompts) == [asked.format(i) + begin for i in range(4)]
    assert scores["exact_match"] == 0.25 and scores["exact_match_flexible"] == 0.5


def test_answers_of_a_chat_have_a_length_and_a_budget_of_thinking(chatty, tmp_path, monkeypatch):
    folder, model, tokenizer = chatty
    rows = []
    original = generate_module.stream

    def stream(model, batch, n, **options):
        assert n == 8
        tokens = list(original(model, batch, n, **options))
        rows.extend(tokenizer.decode([step[i].item() for step in tokens if step[i] >= 0]) for i in range(len(batch)))
        yield from tokens

    monkeypatch.setattr(generate_module, "stream", stream)
    arguments = (folder, "--tasks", f"gsm8k={gsm8k_file(tmp_path)}", "--chat", "--think", "--max_new_tokens", 8)
    results_of(tmp_path, *arguments)
    assert len(rows) == 4 and not any(row.startswith("\n</think>") for row in rows)
    results_of(tmp_path, *arguments, "--think_budget", 1)
    assert len(rows) == 8 and all(row.startswith("\n</think>\n\n") for row in rows[4:])


def test_what_cannot_be_asked_in_a_chat_is_refused(run, chatty, tmp_path, capsys):
    task = f"gsm8k={gsm8k_file(tmp_path)}"
    assert "has no token <|im_start|>" in error_of(capsys, run[0], "--tasks", task, "--chat")
    for arguments, message in [
        (["--tasks", task, "--think"], "of a chat: give --chat"),
        (["--tasks", task, "--think_budget", "4"], "of a chat: give --chat"),
        (["--tasks", task, "--chat", "--num_fewshot", "1"], "without examples"),
        (["--harness", "piqa", "--chat"], "without --harness"),
        (["--chat"], "the questions of --tasks"),
    ]:
        assert message in error_of(capsys, chatty[0], *arguments)
    choices = jsonl(tmp_path / "mine.jsonl", [{"context": "q", "choices": ["a", "b"], "label": 0}])
    assert "no question of a chat" in error_of(capsys, chatty[0], "--tasks", f"mine={choices}", "--chat")


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_evaluated_is_one_line_that_says_what_to_do(run, data, tmp_path, capsys):
    folder = run[0]
    good = {"context": "a", "choices": ["b", "c"], "label": 1}

    def task_error(*rows, name="mine"):
        return error_of(capsys, folder, "--tasks", f"{name}={jsonl(tmp_path / 'bad.jsonl', rows)}")

    missing = {key: value for key, value in good.items() if key != "label"}
    assert "bad.jsonl line 2: no field 'label'; mine needs context, choices, label" in task_error(good, missing)
    assert "bad.jsonl line 1: no field 'endings'; hellaswag needs" in task_error(
        {"activity_label": "x", "ctx_a": "", "ctx_b": ""}, name="hellaswag")  # fmt: skip
    assert "line 3: the right choice is number 2 of 0 to 1" in task_error(good, good, {**good, "label": 2})
    for label in (1.7, True, None, "one"):
        assert f"line 1: the right choice is {label!r}, which is no number" in task_error({**good, "label": label})
    assert "line 1: choices is no list of texts, but 'xy'" in task_error({**good, "choices": "xy"})
    assert "line 1: the answer is None, and neither" in task_error({"context": "a", "answer": None})
    assert "line 1: a choice is empty" in task_error({**good, "choices": ["", "x"]})
    assert "none is left" in task_error()
    (tmp_path / "cut.jsonl").write_text('{"context": "a", "answer": "b"}\n{"context": ')
    assert "cut.jsonl line 2: not JSON" in error_of(capsys, folder, "--tasks", f"mine={tmp_path / 'cut.jsonl'}")
    unknown = error_of(capsys, folder, "--tasks", "hellaswog")
    assert "unknown task 'hellaswog': there are hellaswag, arc_easy" in unknown and "NAME=PATH" in unknown
    assert "--task_dir" in error_of(capsys, folder, "--tasks", "hellaswag")
    assert "not found" in error_of(capsys, folder, "--tasks", "hellaswag=nowhere.jsonl")
    program = jsonl(tmp_path / "he.jsonl", [answer_rows("humaneval", 0)[0]])
    assert "--allow_code_execution" in error_of(capsys, folder, "--tasks", f"humaneval={program}")
    assert "no model in" in error_of(capsys, tmp_path / "nowhere", "--data", data)
    other = write_data(tmp_path / "char", load_tokenizer("char", chars="".join(map(chr, range(256)))))
    assert "another tokenizer" in error_of(capsys, folder, "--data", other)
    assert "no folder" in error_of(capsys, folder, "--json", tmp_path / "no" / "x.json")
    for size in (65, 10**400):
        message = error_of(capsys, folder, "--data", data, "--block_size", size)
        assert message.endswith("the model has 64 at most") and len(message) < 150
    assert "is a folder: give a file in it" in error_of(capsys, folder, "--json", tmp_path)
    task = jsonl(tmp_path / "mine.jsonl", [good, good])
    assert "asks mine twice" in error_of(capsys, folder, "--tasks", f"mine={task},mine={task}")
    assert "not found" in error_of(capsys, folder, "--tasks", "mine=")


@pytest.mark.parametrize("option, values", [
    ("--limit", ["-1", "1.5", "9" * 5000]),
    ("--num_fewshot", ["-1", "nan"]),
    ("--batch_size", ["0", "-1"]),
    ("--max_new_tokens", ["-1"]),
    ("--eval_tokens", ["-1"]),
    ("--block_size", ["-1"]),
    ("--think_budget", ["-1", "9" * 400]),
    ("--data", [""]),
    ("--task_dir", [""]),
])  # fmt: skip
def test_a_number_that_cannot_be_meant_is_refused_in_one_short_line(run, capsys, option, values):
    for value in values:
        with pytest.raises(SystemExit) as caught:
            evaluation.main([str(run[0]), f"{option}={value}"])
        (line,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and line.startswith(f"error: argument {option}: {value[:60]}") and len(line) < 200


@pytest.mark.parametrize("given, passed_on", [([], None), (["--num_fewshot", 0], 0), (["--num_fewshot", 2], 2)])
def test_no_examples_are_another_wish_than_none_which_leaves_them_to_the_harness(
    run, tmp_path, monkeypatch, given, passed_on
):
    seen = []
    monkeypatch.setattr(evaluation, "find_spec", lambda name: True)
    monkeypatch.setattr(evaluation, "evaluate_harness", lambda *args: seen.append(args[-1]) or {})
    results_of(tmp_path, run[0], "--harness", "piqa", *given)
    assert seen == [{"num_fewshot": passed_on, "limit": None}]


def test_a_mistake_of_ours_keeps_its_traceback(run, tmp_path, monkeypatch):
    def evaluate(*args):
        raise TypeError("of a model")

    monkeypatch.setattr(evaluation, "evaluate_task", evaluate)
    task = jsonl(tmp_path / "mine.jsonl", [OWN_ROW])
    with pytest.raises(TypeError, match="of a model"):
        evaluation.main([str(run[0]), "--tasks", f"mine={task}"])


# ---- programs -------------------------------------------------------------------------------------------------------


def test_humaneval_runs_the_models_programs_when_it_may(run, tmp_path):
    rows = jsonl(tmp_path / "humaneval.jsonl", [answer_rows("humaneval", i)[0] for i in range(2)])
    rows = results_of(tmp_path, run[0], "--task_dir", rows.parent, "--tasks", "humaneval", "--allow_code_execution",
                      "--sandbox", "weak")  # fmt: skip
    assert rows["tasks"]["humaneval"]["pass@1"] == 0.0  # of a model that writes noise


POLYNOMIAL = """import math


def value_at(coefficients, x):
    return sum(c * x**i for i, c in enumerate(coefficients))


def find_zero(coefficients):
    \"\"\"Returns an x at which the value is 0.\"\"\"
"""


def test_a_humaneval_test_uses_the_prompts_own_functions_and_says_what_could_be_forged(tmp_path):
    test = "def check(find): assert math.isclose(value_at([-4, 0, 1], list(find([-4, 0, 1]))[0]), 0, abs_tol=1e-9)"
    row = dict(prompt=POLYNOMIAL, test=test, entry_point="find_zero")
    task, (question,) = load_task("humaneval", jsonl(tmp_path / "humaneval.jsonl", [row]))
    answers = {
        "    return [2]\n": (1.0, 0),
        "    return [3]\n": (0.0, 0),
        "    return [3]\n\nvalue_at = lambda coefficients, x: 0\n": (0.0, 0),
        "    yield 2\n": (1.0, 1),  # a generator is no literal
    }
    for text, expected in answers.items():
        results = evaluate_task(Oracle([question], {0: text}, ""), task, [question], weak_sandbox=True)
        assert (results["pass@1"], results["forgeable"]) == expected


# ---- lm-evaluation-harness ------------------------------------------------------------------------------------------

HARNESS_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def test_lm_evaluation_harness_gives_the_same_scores(run, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    choices = [["yes", "no way", "maybe ä"], ["one", "twentyfive", "x"]]
    rows = [{"context": f"q {i} " * (1 + i % 9), "choices": choices[i % 2], "label": i % 3} for i in range(20)]
    path = jsonl(tmp_path / "mine.jsonl", rows)
    (tmp_path / "mine.yaml").write_text(HARNESS_TASK.format(name="nano_mine", path=path))
    ours = results_of(tmp_path, run[0], "--tasks", f"mine={path}")["tasks"]["mine"]
    for size in (1, 8):
        arguments = (run[0], "--harness", "nano_mine", "--task_dir", tmp_path, "--batch_size", size)
        theirs = results_of(tmp_path, *arguments)["harness"]["nano_mine"]
        assert (theirs["acc,none"], theirs["acc_norm,none"]) == (ours["acc"], ours["acc_norm"])
        assert theirs["acc_stderr,none"] == pytest.approx(ours["acc_stderr"])


def test_without_the_package_harness_says_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    assert "pip install lm-eval" in error_of(capsys, run[0], "--harness", "piqa")
