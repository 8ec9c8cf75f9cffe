"""What grpo.py, dpo.py and reward.py are made of, called directly: rows, problems of a step, samples, gradients."""

import json
import shutil
from collections import Counter
from dataclasses import asdict

import pytest
import torch

import dpo
import grpo
import reward
from data import arithmetic, chat
from data.tokenizers import tokenizer_from_dict
from evals.rewards import Reward
from tests import tiny
from tests.test_posttraining import execute, refusal, rows_of, run, save_start, words
from training import pairs
from training.answers import Answer, Problem, Problems, Sampler, evaluate, score
from training.load import hide_padding, stop_tokens
from training.machine import Machine
from training.pairs import Pair
from training.policy import build, frozen, load_like, logprobs, pad
from training.reward_model import RewardModel, scores_of
from training.signals import DIVERGED

TOKENIZER = tokenizer_from_dict(arithmetic.tokenizer_fields())
EOT = TOKENIZER.eot_id
END = TOKENIZER.special_tokens[chat.END]
VOCAB = 40  # more than the tokenizer has


def machine(rank=0, world_size=1):
    return Machine(rank, world_size, "cpu", "float32", "none", False, "a CPU", None)


HERE = machine()


def policy_of(temperature=1.0, name="baseline", **options):
    """A tiny model that writes what TOKENIZER knows."""
    model = tiny.build(name, vocab_size=VOCAB, eot_id=EOT, **options)
    hide_padding(model, TOKENIZER, temperature)
    return model


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Problems with prompts of different lengths."""
    rows = [{"question": f"{10**i}+1", "answer": str(10**i + 1)} for i in range(7)]
    return write_rows(tmp_path_factory.mktemp("data") / "problems.jsonl", rows)


def problems_of(source, here=HERE, think=None):
    return Problems(source, TOKENIZER, think, room=40, here=here)


def sampler_of(model, **options):
    options = dict(max_new_tokens=8, seed=1, autocast=HERE.autocast()) | options
    return Sampler(model, TOKENIZER, stop_tokens(TOKENIZER), **options)


# ---- rows ------------------------------------------------------------------------------------------------------------
def test_a_row_learns_its_completion_and_neither_its_prompt_nor_what_fills_it_up():
    x, y = pad([[EOT, 5, 6], [EOT, 7]], [[1, 2], [3, 4, 8, 9]], [[True, True], [True, False, True, True]], EOT, "cpu")
    assert x.tolist() == [[EOT, 5, 6, 1, EOT], [EOT, 7, 3, 4, 8]]
    assert y.tolist() == [[-1, -1, 1, 2, -1], [-1, 3, -1, 8, 9]]


def test_log_probabilities_are_of_the_temperature_and_of_known_tokens_whatever_fills_up_the_rows():
    plain = tiny.build("baseline", vocab_size=VOCAB, eot_id=EOT)
    prompts = [[EOT, 5, 6], [EOT, 7]]
    completions = [[1, 2], [3, 4, 8, 9]]
    x, y = pad(prompts, completions, [[True] * 2, [True] * 4], EOT, "cpu")
    found, _ = logprobs(policy_of(temperature=0.7), x, y)
    for row, prompt, completion in zip(found, prompts, completions):
        text = torch.tensor([prompt + completion])
        logits = plain(text)[0, len(prompt) - 1 : -1, : TOKENIZER.vocab_size]
        expected = (logits / 0.7).log_softmax(-1)[range(len(completion)), completion]
        first = len(prompt) - 1
        torch.testing.assert_close(row[first : first + len(completion)], expected)
        assert (row[:first] == 0).all() and (row[first + len(completion) :] == 0).all()


def test_a_reference_stays_what_the_policy_was():
    policy = tiny.build("baseline", vocab_size=VOCAB, eot_id=EOT)
    reference = frozen(policy)
    x, y = pad([[EOT, 5, 6]], [[1, 2]], [[True, True]], EOT, "cpu")
    before, _ = logprobs(reference, x, y)
    for model in (policy, reference):
        hide_padding(model, TOKENIZER, 0.7)
    sharper, _ = logprobs(reference, x, y)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.5)
    after, _ = logprobs(reference, x, y)
    assert not torch.equal(before, sharper) and torch.equal(sharper, after)
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in policy.parameters())


# ---- problems and samples --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_problems_of_a_step_and_their_numbers(source, world_size):
    whole = problems_of(source)
    shares = [problems_of(source, machine(rank, world_size)) for rank in range(world_size)]
    seen = []
    for step in range(7):
        expected = whole.of_step(step, 5, seed=1)
        assert [problem.number for problem in expected] == [0, 1, 2, 3, 4]
        assert sum((share.of_step(step, 5, seed=1) for share in shares), []) == expected
        seen += [problem.row["question"] for problem in expected]
    for epoch in range(5):  # 7 steps of 5 are 5 epochs of 7
        assert len(set(seen[7 * epoch : 7 * epoch + 7])) == 7
    assert len({tuple(seen[7 * epoch : 7 * epoch + 7]) for epoch in range(5)}) > 1


def test_what_is_sampled_depends_on_no_process_no_batch_and_on_the_step(source):
    sampler = sampler_of(policy_of())
    expected = sampler.sample(problems_of(source).of_step(0, 4, seed=1), 0, 3)
    texts = [answer.ids for answer in expected]
    assert [answer.problem.number for answer in expected] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len({tuple(ids) for ids in texts}) > 8
    for world_size in (2, 3):
        found = []
        for rank in range(world_size):
            own = problems_of(source, machine(rank, world_size)).of_step(0, 4, seed=1)
            found += [answer.ids for answer in sampler.sample(own, 0, 3)]
        assert found == texts
    few_at_once = sampler_of(policy_of(), rows=3)
    assert [answer.ids for answer in few_at_once.sample(problems_of(source).of_step(0, 4, 1), 0, 3)] == texts
    assert [answer.ids for answer in sampler.sample(problems_of(source).of_step(0, 4, 1), 1, 3)] != texts
    other_seed = sampler_of(policy_of(), seed=2)
    assert [answer.ids for answer in other_seed.sample(problems_of(source).of_step(0, 4, 1), 0, 3)] != texts


def test_a_model_samples_in_eval_mode_and_goes_on_to_train(source):
    model = policy_of()
    modes = set()
    model.register_forward_pre_hook(lambda module, args: modes.add(module.training))
    for is_training in (True, False):
        model.train(is_training)
        sampler_of(model).sample(problems_of(source).all[:1], 0, 2)
        assert model.training == is_training
    assert modes == {False}


def test_the_text_of_an_answer_has_neither_its_end_nor_its_prompt_and_the_end_is_learned(source):
    answers = sampler_of(policy_of(), max_new_tokens=16).sample(problems_of(source).all, 0, 8)
    ended = [answer for answer in answers if not answer.is_truncated]
    assert 0 < len(ended) < len(answers)
    for answer in answers:
        ids = answer.ids if answer.is_truncated else answer.ids[:-1]
        assert answer.text == TOKENIZER.decode(ids)
        assert answer.is_target == [True] * len(answer.ids)
    assert {answer.ids[-1] for answer in ended} <= stop_tokens(TOKENIZER) == {EOT, END}


def test_thoughts_that_the_prompt_begins_belong_to_the_answer_and_what_a_budget_forces_is_not_learned(source):
    problems = problems_of(source, think=True).all
    answers = sampler_of(policy_of(), max_new_tokens=12, think_budget=3).sample(problems, 0, 4)
    forced = TOKENIZER.encode("\n") + [TOKENIZER.special_tokens["</think>"], *TOKENIZER.encode("\n\n")]
    n_forced = 0
    for answer in answers:
        assert answer.text.startswith("<think>\n")
        not_learned = [token for token, is_target in zip(answer.ids, answer.is_target) if not is_target]
        assert not_learned == (4 * forced)[: len(not_learned)]  # a model may begin to think again
        n_forced += bool(not_learned)
    assert n_forced > len(answers) / 2


def test_a_reward_is_given_what_was_written_and_not_the_prompt():
    answer = Answer(Problem(0, [EOT, 5, 6], "", {"gold": "4"}), [7, END], [0.0] * 2, [0.0] * 2, [True] * 2, False, "5")
    given = []

    def look(completions, rows):
        given.extend([completions, rows])
        return [0.5] * len(completions)

    assert score([Reward("look", 2.0, look)], [answer]).totals == [1.0]
    assert given == [["5"], [{"gold": "4", "tokens": [EOT, 5, 6, 7, END]}]]


def test_an_evaluation_is_greedy_and_passes_where_one_of_k_samples_is_right(source):
    def begins_with_a_digit(completions, rows):
        return [float(text[:1].isdigit()) for text in completions]

    graders = [Reward("digit", 0.5, begins_with_a_digit)]
    some = problems_of(source).all
    sampler = sampler_of(policy_of())
    report = evaluate(sampler, some, graders, 4, HERE)
    greedy = [sampler.sample([problem], 9, 1, temperature=0.0)[0].text for problem in some]
    assert report["eval_reward_digit"] == pytest.approx(sum(begins_with_a_digit(greedy, [])) / 7)
    groups = [[answer.text for answer in sampler.sample([problem], 0, 4)] for problem in some]
    passed = [begins_with_a_digit(group, []) for group in groups]
    assert report["pass_at_1"] == pytest.approx(sum(map(sum, passed)) / 28)
    assert report["pass_at_4"] == pytest.approx(sum(map(any, passed)) / 7)
    assert 0 < report["pass_at_1"] < report["pass_at_4"]


# ---- gradients of GRPO -----------------------------------------------------------------------------------------------
@pytest.fixture
def knobs(monkeypatch):
    """Sets the knobs of a script for the time of a test."""

    def set_knobs(script, **values):
        for name, value in values.items():
            assert hasattr(script, name)
            monkeypatch.setattr(script, name, value)

    return set_knobs


def answers_of(*lengths):
    """Answers of so many tokens, to prompts of two and of three."""
    found = []
    for i, n in enumerate(lengths):
        ids = [(3 * i + j) % 20 for j in range(n)]
        problem = Problem(i, [EOT, 5, 6][: 2 + i % 2], "", {})
        found.append(Answer(problem, ids, [-2.0] * n, [1.0] * n, [True] * n, False, ""))
    return found


def test_groups_whose_rewards_are_all_the_same_teach_nothing_but_the_kl_divergence(knobs):
    knobs(grpo, group_size=2)
    totals = [1.0, 1.0, 0.0, 1.0, 0.3, 0.3]
    answers = answers_of(2, 2, 2, 2, 2, 2)
    answers[3] = answers[3].without_targets()
    lessons, is_flat = grpo.lessons_of(answers, totals)
    assert is_flat == [True, False, True]
    assert [answer for answer, _ in lessons] == [answers[2]] and lessons[0][1] < 0
    knobs(grpo, beta=0.1)
    lessons, _ = grpo.lessons_of(answers, totals)
    assert [answer for answer, _ in lessons] == [answers[i] for i in (0, 1, 2, 4, 5)]


def test_what_the_sampler_noted_stands_where_the_trainer_computes_it(source):
    for temperature in (1.0, 0.7):
        model = policy_of(temperature)
        sampler = sampler_of(model, think_budget=3)
        answers = sampler.sample(problems_of(source, think=True).all, 0, 4)
        batch = grpo.Batch([(answer, 1.0) for answer in answers], EOT, "cpu")
        with torch.no_grad():
            batch.note_first(logprobs(model, batch.x, batch.y)[0], None)
        assert grpo.logprob_difference([batch]) < 1e-4
        assert batch.is_target.sum() == sum(sum(answer.is_target) for answer in answers)
        assert (batch.sampled_logp[batch.is_target] < 0).all()
        assert batch.n_inputs == sum(len(answer.problem.prompt) + len(answer.ids) - 1 for answer in answers)
        batch.sampled_logp[0, len(answers[0].problem.prompt) - 1] -= 1
        assert grpo.logprob_difference([batch]) == pytest.approx(1, abs=1e-4)


ADVANTAGES = [1.2, -0.7, 0.4, -1.1, 0.9, -0.3, 0.5, -0.9]
LESSONS = list(zip(answers_of(6, 1, 3, 5, 2, 4, 7, 2), ADVANTAGES))
N_ANSWERS = 8
N_TOKENS = sum(len(answer.ids) for answer, _ in LESSONS)
N_INPUTS = sum(answer.n_inputs for answer, _ in LESSONS)


def grpo_gradients(rows, world_size=1):
    """The gradients of two updates on LESSONS in batches of so many rows, each with the sums that are logged.

    The last of them is that of an auxiliary loss. Before the second update the policy moves, by the same step for all.
    """
    policy = policy_of(n_layer=1).double()
    reference = policy_of(n_layer=1, seed=3).double()
    auxiliary = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def net(x, y, per_token):
        losses, _ = policy(x, y, per_token=True)
        return losses, 3 * auxiliary.sum()

    batches = []  # of each process
    for rank in range(world_size):
        own = machine(rank, world_size).share(LESSONS)
        batches.append([grpo.Batch(own[i : i + rows], EOT, "cpu") for i in range(0, len(own), rows)])
    learned = [*policy.parameters(), auxiliary]
    found = []
    for _ in range(2):
        sums = Counter()
        for rank, own in enumerate(batches):
            here = machine(rank, world_size)
            own_sums = grpo.add_gradients(net, reference, own, N_ANSWERS, N_TOKENS, N_INPUTS, here)
            for name, value in own_sums.items():
                sums[name] += value
        found.append(([p.grad / world_size for p in learned], sums))  # as DDP averages them
        for p in learned:
            p.grad = None
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for p in policy.parameters():
                p.add_(0.03 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return found


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_grpos_gradient_is_the_same_in_any_micro_batches_and_processes(knobs, loss_type):
    knobs(grpo, loss_type=loss_type, beta=0.05, max_new_tokens=8)
    expected = grpo_gradients(rows=8)
    assert expected[0][1]["clipped_high"] == 0 < expected[1][1]["clipped_high"]
    for rows, world_size in ((1, 1), (3, 1), (2, 2), (8, 3)):
        for (gradients, sums), (wanted, wanted_sums) in zip(grpo_gradients(rows, world_size), expected):
            for gradient, want in zip(gradients, wanted):
                torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)
            assert gradients[-1].item() == pytest.approx(3.0)  # of an auxiliary loss: once a step
            assert sums == pytest.approx(wanted_sums)


def test_the_first_update_begins_at_a_ratio_of_1_whatever_the_sampler_thought(knobs):
    """In bfloat16 the sampler is some hundredths off. Its tokens are nonetheless not clipped, nor their weights other
    than 1."""
    knobs(grpo, loss_type="cispo", max_new_tokens=8)
    gradients = []
    for noted in (-2.0, -0.5):
        policy = policy_of(n_layer=1)
        lessons = [(answer._replace(logprobs=[noted] * len(answer.ids)), advantage) for answer, advantage in LESSONS]
        batch = grpo.Batch(lessons, EOT, "cpu")
        sums = grpo.add_gradients(policy, None, [batch], N_ANSWERS, N_TOKENS, N_INPUTS, HERE)
        assert sums["clipped_high"] == sums["clipped_low"] == 0
        gradients.append(policy.embed.weight.grad)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def test_the_kl_divergence_pulls_a_policy_to_its_reference(knobs):
    knobs(grpo, beta=1.0, max_new_tokens=8)
    policy = policy_of(n_layer=1)
    reference = frozen(policy_of(n_layer=1, seed=3))
    lessons = [(answer, 0.0) for answer, _ in LESSONS]
    divergences = []
    for _ in range(3):
        batch = grpo.Batch(lessons, EOT, "cpu")
        sums = grpo.add_gradients(policy, reference, [batch], N_ANSWERS, N_TOKENS, N_INPUTS, HERE)
        divergences.append(sums["kl"])
        with torch.no_grad():
            for p in policy.parameters():
                p -= 1e-4 * p.grad / p.grad.norm()
                p.grad = None
    assert divergences[0] > divergences[1] > divergences[2] > 0


def test_a_teacher_praises_the_tokens_that_it_would_rather_have_written(knobs):
    knobs(grpo, teacher="a run", max_new_tokens=8)
    policy = policy_of(n_layer=1)
    teacher = frozen(policy_of(n_layer=1, seed=3))
    batch = grpo.Batch(LESSONS, EOT, "cpu")
    grpo.add_gradients(policy, teacher, [batch], N_ANSWERS, N_TOKENS, N_INPUTS, HERE)
    with torch.no_grad():
        is_likelier = logprobs(teacher, batch.x, batch.y)[0] > logprobs(policy, batch.x, batch.y)[0]
    assert torch.equal(batch.advantage[batch.is_target] > 0, is_likelier[batch.is_target])
    assert set(is_likelier[batch.is_target].tolist()) == {True, False}


# ---- pairs -----------------------------------------------------------------------------------------------------------
PAIRS = [Pair([EOT, 5, 6][: 2 + i % 2], [7, 8, i, END][i % 3 :], [i, 9, END][i % 2 :]) for i in range(5)]


def test_pairs_are_answers_with_their_ends_behind_one_prompt(tmp_path):
    rows = [{"prompt": "1+2", "chosen": "<think>\n1+2=3\n</think>\n\n3", "rejected": "4"}]
    rows.append({"prompt": "1" * 40, "chosen": "1", "rejected": "2"})
    (pair,) = pairs.read(write_rows(tmp_path / "pairs.jsonl", rows), TOKENIZER, 30, HERE)
    written = [TOKENIZER.decode(ids) for ids in pair]
    assert written[0] == "<|endoftext|><|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n"
    assert written[1:] == ["<think>\n1+2=3\n</think>\n\n3<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"]
    assert pair.n_inputs == sum(map(len, (pair.prompt, pair.chosen, pair.prompt, pair.rejected))) - 2


def test_all_pairs_are_learned_from_once_before_any_comes_again():
    seen = sum((pairs.of_step(list(range(7)), step, 5, seed=1) for step in range(7)), [])
    epochs = [seen[begin : begin + 7] for begin in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]


def test_a_gain_is_the_sum_over_an_answer_and_its_mean_with_ipo(knobs):
    policy = policy_of(n_layer=1)
    reference = frozen(policy_of(n_layer=1, seed=3))
    answers = [pair.chosen for pair in PAIRS] + [pair.rejected for pair in PAIRS]
    for loss_type in ("sigmoid", "ipo"):
        knobs(dpo, loss_type=loss_type)
        gains, logp, _ = dpo.gains_and_logprobs(policy, reference, PAIRS, EOT, HERE)
        for i, answer in enumerate(answers):
            x, y = pad([PAIRS[i % 5].prompt], [answer], [[True] * len(answer)], EOT, "cpu")
            alone = logprobs(policy, x, y)[0].sum()
            gain = alone - logprobs(reference, x, y)[0].sum()
            torch.testing.assert_close(logp[i], alone)
            torch.testing.assert_close(gains[i], gain / len(answer) if loss_type == "ipo" else gain)


def pair_gradients(script, world_size):
    """The gradients on PAIRS on so many processes, the last that of an auxiliary loss, and the sums that are logged."""
    policy = policy_of(n_layer=1).double()
    reference = frozen(policy_of(n_layer=1, seed=3).double())
    auxiliary = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    scorer = RewardModel(tiny.build("baseline", vocab_size=VOCAB, eot_id=EOT, n_layer=1)).double()
    torch.nn.init.ones_(scorer.head.weight)

    def net(x, y, per_token):
        losses, _ = policy(x, y, per_token=True)
        return losses, 3 * auxiliary.sum()

    sums = Counter()
    for rank in range(world_size):
        here = machine(rank, world_size)
        own = here.share(PAIRS)
        if script is dpo:
            n_tokens = sum(len(pair.chosen) for pair in PAIRS)
            n_inputs = sum(pair.n_inputs for pair in PAIRS)
            own_sums = dpo.add_gradients(net, reference, own, len(PAIRS), n_tokens, n_inputs, EOT, here)
        else:
            own_sums = reward.add_gradients(scorer, own, len(PAIRS), EOT, here)
        for name, value in own_sums.items():
            sums[name] += value
    learned = [*policy.parameters(), auxiliary] if script is dpo else list(scorer.parameters())
    return [p.grad / world_size for p in learned], sums


@pytest.mark.parametrize("script", [dpo, reward], ids=["dpo", "reward"])
def test_the_gradient_of_pairs_is_the_same_in_any_micro_batches_and_processes(knobs, script):
    knobs(dpo, nll_coef=0.5)
    knobs(script, micro_batch=5)
    expected, expected_sums = pair_gradients(script, 1)
    for rows, world_size in ((1, 1), (2, 1), (2, 2), (1, 3)):
        knobs(script, micro_batch=rows)
        gradients, sums = pair_gradients(script, world_size)
        for gradient, want in zip(gradients, expected):
            torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)
        assert sums == pytest.approx(expected_sums)
    if script is dpo:
        assert expected[-1].item() == pytest.approx(3.0)  # of an auxiliary loss: once a step


def test_a_new_reward_model_tells_no_pair_apart():
    scorer = RewardModel(tiny.build("baseline", vocab_size=VOCAB, eot_id=EOT))
    sums = reward.add_gradients(scorer, PAIRS, len(PAIRS), EOT, HERE)
    assert sums["accuracy"] == sums["margin"] == 0


def test_pairs_that_a_policy_is_evaluated_on_enter_no_count_of_its_experts():
    policy = policy_of(name="moe", bias_rate=0.01)
    policy.train()
    dpo.evaluate_pairs(policy, frozen(policy), PAIRS, EOT, HERE)
    counts = [x for name, x in policy.named_buffers() if name.endswith("step_load")]
    assert policy.training and counts and not any(x.any() for x in counts)


def test_the_best_of_n_is_the_answer_that_the_reward_model_likes_best(source, knobs):
    knobs(reward, best_of=4)
    scorer = RewardModel(tiny.build("baseline", vocab_size=VOCAB, eot_id=EOT))
    torch.nn.init.normal_(scorer.head.weight)
    sampler = sampler_of(policy_of())
    graders = [Reward("length", 1.0, lambda completions, rows: [float(len(text)) for text in completions])]
    some = problems_of(source).all
    report = reward.best_of_n(scorer, sampler, some, graders, HERE)
    best = []
    every = []
    for problem in some:
        answers = sampler.sample([problem], 0, 4)
        scores = [scores_of(scorer, [problem.prompt + answer.ids], HERE)[0] for answer in answers]
        best.append(len(answers[scores.index(max(scores))].text))
        every += [len(answer.text) for answer in answers]
    assert report == pytest.approx({"eval_reward": sum(every) / 28, "eval_reward_best_of_4": sum(best) / 7})
    assert sum(best) / 7 != sum(every) / 28


# ---- what a policy is built from -------------------------------------------------------------------------------------
@pytest.fixture
def start(tmp_path):
    """The folder of a run of experts that knows no documents, and whose probabilities depend on chance."""
    options = dict(vocab_size=VOCAB, eot_id=-1, dropout=0.1, router_jitter=0.1, capacity_factor=1.0)
    save_start(tmp_path / "start", tiny.build("switch", **options), TOKENIZER)
    return tmp_path


def knobs_of(model):
    return {"model": "switch", "kernels": False, **asdict(model.config)}


def test_a_policy_has_documents_and_nothing_that_depends_on_chance_or_on_what_else_is_in_the_batch(start):
    config = knobs_of(tiny.build("switch", vocab_size=VOCAB, dropout=0.1, router_jitter=0.1, capacity_factor=1.0))
    policy, _ = build(config | {"init_from": str(start / "start")}, HERE)
    assert policy.config.eot_id == EOT
    teacher = load_like(str(start / "start"), TOKENIZER, 64, "cpu")
    assert (teacher.config.dropout, teacher.config.router_jitter, teacher.config.capacity_factor) == (0, 0, 0)
    hide_padding(policy, TOKENIZER)
    policy.train()
    rows = [[1, 2], [3, 4, 8, 9, 1, 2, 3], [5, 6, 7]]
    prompts = [[EOT, 5, 6], [EOT, 7], [EOT, 8]]
    x, y = pad(prompts, rows, [[True] * len(row) for row in rows], EOT, "cpu")
    together, _ = logprobs(policy, x, y)
    expected = tiny.build("switch", vocab_size=VOCAB, eot_id=EOT, capacity_factor=0.0)
    hide_padding(expected, TOKENIZER)
    for i, row in enumerate(rows):
        alone, _ = logprobs(expected, *pad(prompts[i : i + 1], [row], [[True] * len(row)], EOT, "cpu"))
        torch.testing.assert_close(together[i, : alone.size(1)], alone[0], rtol=1e-4, atol=1e-4)


def test_what_fills_up_rows_enters_no_count_of_the_experts():
    """A router's counts over the rows of a batch are those of the same texts one by one."""
    texts = [answer for answer, _ in LESSONS]
    counts = []
    for rows in (8, 1):
        policy = policy_of(name="moe", bias_rate=0.01)
        policy.train()
        for i in range(0, 8, rows):
            batch = grpo.Batch([(answer, 1.0) for answer in texts[i : i + rows]], EOT, "cpu")
            logprobs(policy, batch.x, batch.y)
        counts.append({name: x for name, x in policy.named_buffers() if name.endswith("step_load")})
    assert counts[0]
    for name, expected in counts[1].items():
        torch.testing.assert_close(counts[0][name], expected)


# ---- what knobs do in a run ------------------------------------------------------------------------------------------
COMMON = dict(init_from="start", data="problems.jsonl", max_steps=1, learning_rate=1e-3, max_new_tokens=8,
              rewards="of_length:length", eval_every=100, save_every=1, keep_last=0)  # fmt: skip
GRPO = COMMON | dict(group_size=3, problems_per_step=4, log_samples=100)
ONLINE = COMMON | dict(online=2, problems_per_round=4, group_size=3, pairs_per_step=4, max_steps=3)


OF_LENGTH = """
def length(completions, rows):
    return [float(len(text)) for text in completions]


def length_of_some(completions, rows):
    return [len(text) * float(len(row["answer"]) % 2) for text, row in zip(completions, rows)]
"""


def rewards_of(name, answers):
    """What a reward of OF_LENGTH says of answers."""
    functions = {}
    exec(OF_LENGTH, functions)
    return functions[name]([answer.text for answer in answers], [answer.problem.row for answer in answers])


@pytest.fixture(scope="module")
def work(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("policy")
    save_start(folder / "start", tiny.build("baseline", vocab_size=VOCAB, eot_id=EOT), TOKENIZER)
    (folder / "problems.jsonl").write_text(open(source).read())
    (folder / "of_length.py").write_text(OF_LENGTH)
    rows = [{"prompt": f"{i}+1", "chosen": f"{i + 1}", "rejected": f"{i}1"} for i in range(6)]
    write_rows(folder / "pairs.jsonl", rows)
    return folder


def test_a_run_samples_as_its_knobs_say(work, source):
    knobs = GRPO | dict(temperature=0.7, seed=5, think="always", think_budget=3)
    result = run(work, "grpo.py", "sampled", **knobs)
    sampler = sampler_of(policy_of(temperature=0.7), seed=5, think_budget=3)
    expected = sampler.sample(problems_of(source, think=True).of_step(0, 4, seed=5), 0, 3)
    assert [row["answer"] for row in rows_of(result.folder / "samples.jsonl")] == [answer.text for answer in expected]
    (step,) = result.steps
    assert step["logprob_difference"] < 1e-4
    assert step["length"] == pytest.approx(sum(len(answer.ids) for answer in expected) / 12)


def test_an_evaluation_takes_the_first_problems(work, source):
    knobs = GRPO | dict(eval_data="problems.jsonl", eval_problems=3)
    begun, *_ = run(work, "grpo.py", "evaluated", **knobs).rows
    greedy = sampler_of(policy_of()).sample(problems_of(source).all[:3], 0, 1, temperature=0.0)
    assert begun["eval_length"] == pytest.approx(sum(len(answer.ids) for answer in greedy) / 3)


def test_answers_that_were_cut_are_learned_from_unless_they_are_masked(work):
    for is_masked in (False, True):
        knobs = GRPO | dict(max_new_tokens=1, mask_truncated=is_masked)
        (step,) = run(work, "grpo.py", f"masked_{is_masked}", **knobs).steps
        assert step["truncated"] == 1 and step["flat_groups"] < 1
        assert (step["grad_norm"] == 0) == is_masked


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_loss_is_a_mean_over_all_answers_of_flat_groups_too(work, source, loss_type):
    knobs = GRPO | dict(rewards="of_length:length_of_some", loss_type=loss_type)
    (step,) = run(work, "grpo.py", f"mean_{loss_type}", **knobs).steps
    assert 0 < step["flat_groups"] < 1

    answers = sampler_of(policy_of()).sample(problems_of(source).of_step(0, 4, seed=1), 0, 3)
    rewards = torch.tensor(rewards_of("length_of_some", answers)).view(4, 3)
    advantage = grpo.advantages(rewards, "group").flatten()
    lengths = torch.tensor([len(answer.ids) for answer in answers])
    if loss_type == "grpo":
        expected = -advantage.mean()
    elif loss_type == "dapo":
        expected = -(advantage * lengths).sum() / lengths.sum()
    else:
        expected = -(advantage * lengths).sum() / (12 * 8)
    assert step["loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_the_second_update_of_a_step_is_clipped(work):
    for n in (1, 2):
        knobs = GRPO | dict(updates_per_batch=n, learning_rate=1e-2)
        (step,) = run(work, "grpo.py", f"updates_{n}", **knobs).steps
        assert (step["clipped_low"] + step["clipped_high"] > 0) == (n == 2)


def test_pairs_are_sampled_at_the_temperature_in_rounds(work, source):
    result = run(work, "dpo.py", "rounds", **ONLINE | dict(temperature=0.7, warmup_steps=2, learning_rate=1e-2))
    states = [json.loads((result.folder / f"step-{i:08d}" / "trainer.json").read_text())["state"] for i in (1, 2, 3)]
    assert states[0] == states[1] != states[2]
    answers = sampler_of(policy_of(temperature=0.7)).sample(problems_of(source).of_step(0, 4, seed=1), 0, 3)
    expected = dpo.best_against_worst(answers, rewards_of("length", answers), 3)
    assert [Pair(*pair) for pair in states[0]["pairs"]] == expected
    prompts = [problem.prompt for problem in problems_of(source).of_step(1, 4, seed=1)]
    assert all(prompt in prompts for prompt, _, _ in states[2]["pairs"])
    assert [row["lr"] for row in result.steps] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])


def test_without_a_reference_a_gain_is_a_log_probability(work):
    knobs = COMMON | dict(data="pairs.jsonl", pairs_per_step=4, rewards=None, max_new_tokens=None)
    for free in (False, True):
        (step,) = run(work, "dpo.py", f"free_{free}", **knobs | dict(reference_free=free)).steps
        assert step["gain_chosen"] == pytest.approx(step["logp_chosen"] if free else 0.0, abs=1e-4)


def test_a_run_goes_on_with_the_reference_that_it_began_with_and_with_no_other(work):
    knobs = GRPO | dict(beta=0.1)
    began = run(work, "grpo.py", "began", **knobs).folder
    shutil.copytree(began, work / "moved", symlinks=True)  # this process holds the lock of the other to its end
    save_start(work / "other", tiny.build("baseline", vocab_size=VOCAB, eot_id=EOT, seed=3), TOKENIZER)
    message = refusal(work, "grpo.py", "moved", "--resume", **knobs | dict(init_from="other", max_steps=2))
    assert "the reference changed since moved/step-00000001 was written: give the init_from" in message


def test_a_student_without_rewards_has_no_samples_that_pass(work):
    """Nothing says which of them are right, and a run would only notice that at its first evaluation."""
    knobs = GRPO | dict(teacher="start", eval_samples=2, eval_data="problems.jsonl", eval_problems=2)
    message = refusal(work, "grpo.py", "taught", "--rewards=", **knobs | dict(rewards=None))
    assert "eval_samples=2 does nothing while rewards=: change that" in message


def test_a_run_ends_after_ten_steps_whose_gradients_are_not_finite(work):
    """With a beta of 1e30 the squares of gradients are infinite."""
    knobs = COMMON | dict(data="pairs.jsonl", rewards=None, max_new_tokens=None, beta=1e30, max_steps=30)
    result = execute(work, "dpo.py", words("wild", [], knobs | dict(warmup_steps=0, save_every=100)))
    assert result.code == DIVERGED and "10 updates in a row without a finite gradient" in result.err
    steps = rows_of(work / "wild" / "metrics.jsonl")
    assert [row["skipped"] for row in steps] == list(range(1, 11))
    assert json.loads((work / "wild" / "state.json").read_text())["state"] == "diverged"
