"""What a recipe will do and take, before any of it is spent: no weights are loaded, and no network is needed.

::

    plan(recipe)                                # steps, tokens, rates, checkpoints of every stage
    estimate(recipe, gpu="H200", gpus=2)        # memory, arithmetic, hours
"""

from limbeck.plan.cards import CARDS, MeasuredCard
from limbeck.plan.memory import Memory
from limbeck.plan.resources import estimate
from limbeck.plan.schedule import plan
from limbeck.plan.tables import plan_table

__all__ = ["CARDS", "MeasuredCard", "Memory", "estimate", "plan", "plan_table"]
