"""Evaluation: how well a model predicts held-out text, and how close a student is to its teacher."""

from limbeck.evaluation.bench import Bench, BenchModel, BenchPoint, bench
from limbeck.evaluation.harness import evaluate_tasks
from limbeck.evaluation.inspect import Inspection, inspect_folder, inspect_matrices
from limbeck.evaluation.layers import LayerScore, auto_count, choose_layers, score_folder, score_layers
from limbeck.evaluation.perplexity import (
    Agreement,
    Perplexity,
    Position,
    agreement,
    by_position,
    evaluate_on_text,
    perplexity,
    sliding_windows,
)
from limbeck.evaluation.recall import RecallSettings, recall, recall_by_name
from limbeck.evaluation.recall_results import Recall
from limbeck.evaluation.recall_tasks import TOKEN_TASKS
from limbeck.evaluation.results import TaskResults, show_results
from limbeck.evaluation.tasks import TASK_SETS

__all__ = [
    "TASK_SETS",
    "TOKEN_TASKS",
    "Agreement",
    "Bench",
    "BenchModel",
    "BenchPoint",
    "Inspection",
    "LayerScore",
    "Perplexity",
    "Position",
    "Recall",
    "RecallSettings",
    "TaskResults",
    "agreement",
    "auto_count",
    "bench",
    "by_position",
    "choose_layers",
    "evaluate_on_text",
    "evaluate_tasks",
    "inspect_folder",
    "inspect_matrices",
    "perplexity",
    "recall",
    "recall_by_name",
    "score_folder",
    "score_layers",
    "show_results",
    "sliding_windows",
]
