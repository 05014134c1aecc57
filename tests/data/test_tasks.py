"""Examples of a task: what is learned of them, how they fill samples, and every bad line named."""

import json
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data import Task, TaskDataset, TokenDataset, collate, open_samples, read_tasks
from limbeck.data.samples import CONTEXT, LEARNED, PADDING
from limbeck.data.tasks import is_task_file
from limbeck.errors import LimbeckError


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="tasks.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    return write


def test_lines_are_examples(write):
    path = write({"prompt": "a still", "completion": " is old"}, "", {"text": "all of it", "id": 7})
    assert list(read_tasks(path)) == [Task("a still", " is old", f"{path}:1"), Task("", "all of it", f"{path}:3")]


def test_only_completions_are_learned(tokenizer):
    """By hand: prompt | completion | end, the next example, and padding."""
    tasks = [Task("the ", "still", "1"), Task("", "old", "2")]
    samples = TaskDataset(tasks, tokenizer, 15, 0)
    prompt, completion, text = (tokenizer.encode(words).ids for words in ("the ", "still", "old"))
    row = [*prompt, *completion, 0, *text, 0]
    rest = 16 - len(row)
    roles = [CONTEXT] * len(prompt) + [LEARNED] * (len(completion) + 1 + len(text) + 1)
    assert len(samples) == 1
    assert samples[0].tolist() == [row + [0] * rest, roles + [PADDING] * rest]
    batch = collate(samples, [0])
    learned = [*completion, 0, *text, 0]
    assert batch["input_ids"].tolist() == [(row + [0] * rest)[:-1]]
    assert batch["labels"].tolist() == [[-100] * (len(prompt) - 1) + learned + [-100] * rest]
    assert batch["attention_mask"].tolist() == [[1] * len(row) + [0] * (rest - 1)]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@given(sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1), packed=st.booleans())
def test_every_example_is_in_one_sample_whole_and_in_order(tokenizer, sizes, packed):
    tasks = [Task("ab" * prompt, "cd" * completion, str(place)) for place, (prompt, completion) in enumerate(sizes)]
    examples = [[*tokenizer.encode(t.prompt).ids, *tokenizer.encode(t.completion).ids, 0] for t in tasks]
    samples = TaskDataset(tasks, tokenizer, 26, 0, packed=packed)
    found = [tokens[roles != PADDING].tolist() for tokens, roles in (samples[i] for i in range(len(samples)))]
    assert list(chain(*found)) == list(chain(*examples))
    ends = np.cumsum([len(example) for example in examples])
    starts = np.cumsum([0, *map(len, found)])
    assert set(starts[1:]) <= set(ends)  # no sample ends amid an example
    if packed:
        for start, stop in zip(starts[:-2], starts[1:-1], strict=True):
            assert ends[ends > stop][0] - start > 27  # one more would not have fitted
    else:
        assert len(found) == len(examples)


def test_long_examples_are_refused_or_cut(tokenizer):
    long = [Task("the old word", " for a still", "tasks.jsonl:7")]
    with pytest.raises(LimbeckError, match=r"tasks\.jsonl:7 has \d+ tokens, \d+ of them the prompt's\n.*= 5"):
        TaskDataset(long, tokenizer, 4, 0)
    prompt = len(tokenizer.encode("the old word").ids)
    cut = TaskDataset(long, tokenizer, prompt, 0, truncate=True)[0]
    assert cut[1].tolist() == [CONTEXT] * prompt + [LEARNED]
    with pytest.raises(LimbeckError, match="of them the prompt's"):  # nothing would be left to learn
        TaskDataset(long, tokenizer, prompt - 1, 0, truncate=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', "tasks.jsonl:2 is no JSON"),
        ('["a"]', "tasks.jsonl:2 holds a list"),
        ({"prompt": "a"}, 'tasks.jsonl:2 has no "completion" that is a string; its keys: prompt'),
        ({"prompt": 3, "completion": "b"}, 'tasks.jsonl:2 has no "prompt" that is a string'),
        ({"question": "a"}, 'tasks.jsonl:2 has no "text" that is a string; its keys: question'),
        ({"prompt": "a", "completion": ""}, 'tasks.jsonl:2: its "completion" is empty'),
        ('{"text": "\\ud800"}', "tasks.jsonl:2 has half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named(write, line, words):
    path = write({"prompt": "a", "completion": "b"}, line)
    with pytest.raises(LimbeckError) as caught:
        list(read_tasks(path))
    assert words in str(caught.value)


def test_files_that_hold_nothing_or_too_large_tokens(write, tokenizer, tmp_path):
    with pytest.raises(LimbeckError, match="no file"):
        list(read_tasks(tmp_path / "nowhere.jsonl"))
    with pytest.raises(LimbeckError, match="no examples"):
        TaskDataset(read_tasks(write("", "")), tokenizer, 8, 0)
    path = write({"prompt": "the", "completion": " still"})
    with pytest.raises(LimbeckError, match=r"tasks\.jsonl:1 has token \d+, beyond the vocabulary"):
        TaskDataset(read_tasks(path), tokenizer, 8, 0, vocab_size=257)


def test_a_file_is_a_task_file_by_its_first_line(write, tokenizer, tmp_path):
    tasks = write("", {"prompt": "a", "completion": "b"})
    plain = write({"text": "the old word for a still" * 3}, name="plain.jsonl")
    torn = write("{", name="torn.jsonl")
    assert [is_task_file(path) for path in (tasks, plain, torn, tmp_path)] == [True, False, False, False]
    opened = [open_samples(path, 8, vocab_size=300, tokenizer=lambda: _Wrapped(tokenizer)) for path in (tasks, plain)]
    assert [type(samples) for samples in opened] == [TaskDataset, TokenDataset]
    assert np.asarray(opened[0][0]).shape == (2, 9)


class _Wrapped:
    """What `open_samples` asks of a tokenizer of transformers."""

    eos_token_id = 0

    def __init__(self, tokenizer):
        self.backend_tokenizer = tokenizer
