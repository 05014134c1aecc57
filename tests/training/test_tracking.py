import json

import pytest
import torch

from limbeck.errors import LimbeckError
from limbeck.progress import PlainProgress
from limbeck.training import MetricsLog, read_metrics
from limbeck.training.tracking import Recorder


def test_cut_restores_exactly_what_was_synced(tmp_path):
    with MetricsLog(tmp_path / "new" / "metrics.jsonl") as log:
        log.write([{"stage": "matrix", "step": 1}])
        length = log.sync()
        log.write([{"stage": "matrix", "step": 2}])
        assert log.cut(length)
        log.write([{"stage": "matrix", "step": 3}])
    assert [line["step"] for line in read_metrics(log.path)] == [1, 3]
    with MetricsLog(log.path) as again:
        assert not again.cut(10_000)
        assert len(read_metrics(again.path)) == 2


def test_start_of_a_stage(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        assert log.start_of("matrix") == 0
        log.write([{"stage": "matrix"}])
        end = log.sync()
        assert log.start_of("hidden") == end
        log.write([{"stage": "hidden"}, {"stage": "hidden"}])
        assert log.start_of("hidden") == end
        log.cut(end + 5)  # a torn line
        assert log.start_of("logits") == log.start_of("hidden") == end
        assert read_metrics(log.path) == [{"stage": "matrix"}]


def test_a_foreign_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a"}\nhello\n')
    with MetricsLog(path) as log, pytest.raises(LimbeckError, match="line 2: 'hello"):
        log.start_of("matrix")


def test_what_is_not_finite_is_still_json(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write([{"stage": "a", "eval_perplexity": float("inf"), "eval_loss": float("nan")}])
    text = log.path.read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "stage": "a",
        "eval_perplexity": None,
        "eval_loss": None,
    }


def test_recorder_writes_every_step_at_one_flush(tmp_path, capsys):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        recorder = Recorder("matrix", log, tokens_per_step=8, progress=PlainProgress("matrix", 3))
        for step in (1, 2, 3):
            recorder.record(step, 8 * step, 0.1 * step, {"loss": torch.tensor(step / 3), "ce": torch.tensor(0.1)})
        assert read_metrics(log.path) == []
        recorder.flush()
        recorder.flush()
    lines = read_metrics(log.path)
    assert list(lines[0]) == ["stage", "step", "tokens", "loss", "ce", "lr", "time", "tokens_per_second"]
    assert [(line["step"], line["tokens"], line["lr"]) for line in lines] == [
        (1, 8, 0.1),
        (2, 16, 0.2),
        (3, 24, 0.1 * 3),
    ]
    assert [line["loss"] for line in lines] == [torch.tensor(step / 3).item() for step in (1, 2, 3)]
    assert "matrix 3/3  loss 1  ce 0.1" in capsys.readouterr().err
