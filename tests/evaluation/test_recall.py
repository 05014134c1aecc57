"""Recall: the questions have one answer, which stands in the prompt, and only a model that finds it scores."""

import copy as copying
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

import limbeck
from limbeck import LimbeckError, load_model, load_tokenizer
from limbeck.distill import LogitsObjective, StageStep
from limbeck.evaluation import TOKEN_TASKS, Recall, RecallSettings, recall, recall_by_name
from limbeck.evaluation.recall_tasks import Haystack, mqar
from limbeck.training import make_adamw, make_schedule, parameter_groups

SYMBOLS = np.arange(10, 30)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load_model(teacher_folder)


@pytest.fixture(scope="module")
def tokenizer(teacher_folder):
    return load_tokenizer(teacher_folder)


def rng(seed=0):
    return np.random.default_rng(seed)


# --- the questions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TOKEN_TASKS)
@pytest.mark.parametrize("length", [4, 7, 16, 41, 128])
def test_questions_are_of_the_length_and_of_the_symbols(task, length):
    examples = TOKEN_TASKS[task](SYMBOLS, length, 5, rng())
    assert examples.tokens.shape == examples.known.shape
    assert examples.tokens.dtype == torch.int64
    assert length - 3 <= examples.tokens.shape[1] <= length
    assert set(examples.tokens.flatten().tolist()) <= set(SYMBOLS.tolist())
    assert torch.equal(torch.cat([examples.prompts, examples.answers], dim=1), examples.tokens)
    assert examples.known[:, -examples.answer_length :].all()
    assert 0 < examples.chance < 1


@pytest.mark.parametrize("task", TOKEN_TASKS)
def test_a_seed_asks_the_same_questions(task):
    first, same, other = (TOKEN_TASKS[task](SYMBOLS, 32, 4, rng(seed)).tokens for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("length", [16, 64])
def test_every_query_of_mqar_stands_once_among_the_pairs(length):
    examples = mqar(SYMBOLS, length, 6, rng())
    pairs = min(length // 4, 10)
    for row, known in zip(examples.tokens.tolist(), examples.known, strict=True):
        table = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(table) == pairs
        assert not set(table) & set(table.values())
        queries = dict(zip(row[-2 * pairs :: 2], row[1 - 2 * pairs :: 2], strict=True))
        assert queries == table
        assert set(row[2 * pairs : -2 * pairs]) <= {10}  # the filler
        assert known.nonzero().flatten().tolist() == list(range(len(row) + 1 - 2 * pairs, len(row), 2))
    assert examples.chance == 1 / 9


def test_copy_and_repeat_answer_with_what_stood_there():
    copied = TOKEN_TASKS["copy"](SYMBOLS, 32, 6, rng())
    assert copied.answer_length == 15
    assert torch.equal(copied.answers, copied.prompts[:, 1:16])
    assert (copied.prompts[:, [0, 16]] == 10).all()
    assert all(len(set(row)) == 15 for row in copied.answers.tolist())
    repeated = TOKEN_TASKS["repeat"](SYMBOLS, 32, 6, rng())
    assert torch.equal(repeated.answers.repeat(1, 3), repeated.prompts)


def test_a_batch_to_train_on_has_labels_where_the_prompt_tells():
    examples = TOKEN_TASKS["copy"](SYMBOLS, 8, 2, rng())
    batch = examples.batch()
    assert torch.equal(batch["input_ids"], examples.tokens[:, :-1])
    assert (batch["labels"][:, :-3] == -100).all()
    assert torch.equal(batch["labels"][:, -3:], examples.answers)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_is_at_its_depth(tokenizer, text_file, depth):
    haystack = Haystack(tokenizer, 10**6, 288, text_file, seed=0)
    prompts, keys, answer_length = haystack.questions(300, depth, 4, rng())
    assert prompts.shape == (4, 300 - answer_length)
    for row, key in zip(prompts, keys, strict=True):
        before, after = tokenizer.decode(row).split(f"\n# The pass key is {key}. Remember it. {key} is the pass key.\n")
        hay = after.removesuffix("\n# What is the pass key? The pass key is")
        assert hay != after
        assert (before == "", hay == "") == (depth == 0, depth == 1)
        assert (before + hay) in text_file.read_text()
    again, same, _ = haystack.questions(300, depth, 4, rng())
    assert torch.equal(prompts, again)
    assert keys == same


def test_a_pass_key_is_found_when_the_first_number_is_it(tokenizer, text_file):
    haystack = Haystack(tokenizer, 100, 288, text_file, seed=0)
    for text, right in (
        (" 12345.\n6", True),
        (" 123456", False),
        (" the 12345 ", True),
        (" 1 12345", False),
        ("", False),
    ):
        row = torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.int64)
        assert haystack.found(row, ["12345"]) == [right], text


@pytest.mark.slow
def test_the_standard_library_is_the_default_text(tokenizer):
    first, same, other = (Haystack(tokenizer, 500, 288, None, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.tokens, same.tokens)
    assert not np.array_equal(first.tokens[:100], other.tokens[:100])


# --- the answers ------------------------------------------------------------------------------------------------------


def test_answers_are_judged_by_what_is_generated(teacher, tokenizer, text_file):
    """A model that always says what it is told to is right exactly there."""
    settings = RecallSettings(lengths=[240], depths=[0.5], count=5, text=text_file, batch_size=2)
    model = copying.deepcopy(teacher)
    asked = []

    def oracle(prompts, attention_mask, generation_config):
        """Right for the first prompt of each batch only."""
        asked.append(len(prompts))
        rows = []
        for index, row in enumerate(prompts):
            answer = _solve(row, generation_config.max_new_tokens, tokenizer)
            rows.append(torch.cat([row, answer if index == 0 else answer.flip(0) + 1]))
        return torch.stack(rows)

    model.generate = oracle
    found = recall(model, tokenizer, settings=settings)
    assert asked == [2, 2, 1] * 4
    results = found.models[0].results
    assert [(r.task, r.length, r.depth, r.correct, r.count) for r in results] == [
        ("mqar", 240, None, 3, 5),
        ("copy", 240, None, 3, 5),
        ("needle", 240, 0.5, 3, 5),
        ("repeat", 240, None, 3, 5),
    ]


def _solve(row, length, tokenizer):
    tokens = row.tolist()
    if length == 1:
        return row[[tokens.index(tokens[-1]) + 1]]
    if len(tokens) == 3 * length:
        return row[:length]
    if tokens[0] == tokens[-1]:
        return row[1 : 1 + length]
    key = tokenizer.decode(tokens).split("# The pass key is ")[1].split(".")[0]
    ids = tokenizer(f" {key}\n")["input_ids"]
    return torch.tensor(ids + ids[-1:] * (length - len(ids)))


def test_a_batch_changes_nothing_and_generation_goes_past_the_end_token(teacher):
    """Id 0 ends texts of this model; its settings for generation, too, are put aside."""
    model = copying.deepcopy(teacher).train()
    model.generation_config.repetition_penalty = 5.0
    options = {"tasks": ["mqar", "copy"], "lengths": [16], "count": 6}
    one = recall(teacher, batch_size=1, **options)
    assert recall(model, batch_size=6, **options) == one
    assert model.training
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)  # it says token 0 every time
    found = recall(model, tasks=["repeat"], lengths=[4], count=40, token_range=(0, 4))
    assert found.models[0].results[0].correct == 0  # token 0 is the filler, never in a string


@pytest.mark.slow
def test_student_and_teacher_answer_the_same_questions(teacher, teacher_folder, tmp_path):
    limbeck.convert_folder(teacher_folder, tmp_path / "student")
    settings = RecallSettings(tasks=["mqar", "needle"], lengths=[120], depths=[0.0, 1.0], count=3)
    found = recall_by_name([tmp_path / "student"], settings, teacher=teacher_folder, device="cpu")
    assert [(model.name, model.role) for model in found.models] == [
        (str(tmp_path / "student"), "student"),
        (str(teacher_folder), "teacher"),
    ]
    assert found.models[0].results[1].depth == 0.0
    direct = recall(
        load_model(tmp_path / "student"), load_tokenizer(teacher_folder), teacher=teacher, settings=settings
    )
    assert [model.results for model in direct.models] == [model.results for model in found.models]
    plain = json.loads(json.dumps(found.as_json()))
    assert list(plain["models"][0]) == ["name", "role", "results"]
    assert list(plain["models"][0]["results"][0]) == ["task", "length", "depth", "correct", "count", "chance"]
    assert found.table().row_count == 3
    alone = recall_by_name([teacher_folder, teacher_folder], settings, device="cpu")
    assert {model.role for model in alone.models} == {"model"}
    assert isinstance(alone, Recall)


def test_a_token_in_front_of_every_text_is_in_front_of_every_prompt(teacher, tokenizer, monkeypatch):
    seen = []
    real = type(teacher).generate
    monkeypatch.setattr(
        type(teacher), "generate", lambda self, ids, **options: (seen.append(ids), real(self, ids, **options))[1]
    )
    recall(teacher, tokenizer, tasks=["repeat"], lengths=[17], count=2)
    assert seen[-1].shape == (2, 12)
    assert (seen[-1] != 0).all()  # special tokens are not drawn

    class WithFront:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __len__(self):
            return len(tokenizer)

        def __call__(self, text):
            return {"input_ids": [0, *tokenizer(text)["input_ids"]]}

    recall(teacher, WithFront(), tasks=["repeat"], lengths=[17], count=2)
    assert seen[-1].shape == (2, 13)
    assert (seen[-1][:, 0] == 0).all()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": ["mqra"]}, "unknown recall task 'mqra'"),
        ({"tasks": []}, "no tasks"),
        ({"lengths": []}, "no lengths"),
        ({"depths": [1.5]}, "depth 1.5"),
        ({"count": 0}, "count = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"tasks": ["mqar"], "lengths": [3]}, "length 3"),
        ({"tasks": ["mqar"], "lengths": [8], "token_range": (5, 400)}, "token ids from 5 to 400"),
        ({"tasks": ["mqar"], "lengths": [8], "token_range": (5, 8)}, "3 token ids to draw from"),
        ({"tasks": ["needle"], "lengths": [20]}, "length 20 for a needle"),
        ({"tasks": ["needle"], "lengths": [10**6]}, "tokens\nexpected: 9"),
    ],
)
def test_what_is_refused(teacher, tokenizer, text_file, options, words):
    with pytest.raises(LimbeckError, match=words):
        recall(teacher, tokenizer, **{"text": text_file, **options})


def test_models_that_do_not_fit_are_refused(teacher, tmp_path):
    with pytest.raises(LimbeckError, match="a needle without a tokenizer"):
        recall(teacher, tasks=["needle"])
    small = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(LimbeckError, match="the model has no more positions"):
        recall(small, tasks=["mqar"], lengths=[64])
    with pytest.raises(LimbeckError, match="vocabulary has 288 tokens"):
        recall(teacher, teacher=small, tasks=["mqar"])
    teacher.save_pretrained(tmp_path)
    with pytest.raises(LimbeckError, match="tokenizer"):
        recall_by_name([tmp_path], RecallSettings(tasks=["needle"]), device="cpu")
    settings = RecallSettings(tasks=["mqar"], lengths=[8], count=1)
    assert recall_by_name([tmp_path], settings, device="cpu").models[0].results[0].count == 1  # needs none


# --- the measure tells who recalls ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_teacher_recalls_and_a_random_student_guesses():
    """Two layers of attention learn all three tasks in seconds; benchmarks/recall.py does it at greater length."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GPTNeoXConfig(vocab_size=32, max_position_embeddings=32, rotary_pct=1.0, **sizes)
    teacher = AutoModelForCausalLM.from_config(config)
    student = limbeck.convert(teacher, init="random")
    settings = RecallSettings(tasks=tuple(TOKEN_TASKS), lengths=[32], count=200, batch_size=200, seed=1)

    step = StageStep(teacher, LogitsObjective(kl_weight=0.0, ce_weight=1.0))
    steps, lr, numbers = 600, 4e-3, rng(0)
    optimizer = make_adamw(parameter_groups(step.named_parameters(), mixer_parameters=(), lr=lr))
    schedule = make_schedule("wsd", total_steps=steps, peak=lr, warmup=0.05, decay=0.4)
    for index in range(steps):
        length = int(numbers.choice([8, 16, 32]))
        parts = [make(np.arange(32), length, 768 // length, numbers).batch() for make in TOKEN_TASKS.values()]
        for group in optimizer.param_groups:
            group["lr"] = schedule(index)
        step({name: torch.cat([part[name] for part in parts]) for name in parts[0]})["loss"].backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    guessing, recalling = recall(student, teacher=teacher, settings=settings).models
    for low, high in zip(guessing.results, recalling.results, strict=True):
        assert high.correct / high.count > 0.95, high
        assert low.correct / low.count < low.chance + 0.05, low
