"""Evaluation: how well a model predicts held-out text, and how close a student is to its teacher."""

from limbeck.evaluation.perplexity import Agreement, Perplexity, agreement, evaluate_on_text, perplexity

__all__ = ["Agreement", "Perplexity", "agreement", "evaluate_on_text", "perplexity"]
