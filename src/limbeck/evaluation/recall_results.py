"""What `recall` measured, as plain values and as a table."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

Role = Literal["model", "student", "teacher"]


@dataclass(frozen=True)
class RecallResult:
    """How many questions of one kind were answered.

    Attributes:
        task: ``"mqar"``, ``"copy"``, ``"needle"`` or ``"repeat"``.
        length: Tokens of prompt and answer.
        depth: Of a needle: 0 in front of the text, 1 behind it.
        correct: Questions whose whole answer was right.
        count: Questions asked.
        chance: Share that guessing gets right.
    """

    task: str
    length: int
    depth: float | None
    correct: int
    count: int
    chance: float


@dataclass(frozen=True)
class ModelRecall:
    """One model's results."""

    name: str
    role: Role
    results: tuple[RecallResult, ...]


@dataclass(frozen=True)
class Recall:
    """The results of models that were asked the same questions."""

    models: tuple[ModelRecall, ...]

    def as_json(self) -> dict[str, Any]:
        """One object of plain values: ``{"models": [{"name", "role", "results": [{"task", …}]}]}``."""
        return {"models": [{**asdict(model), "results": list(map(asdict, model.results))} for model in self.models]}

    def table(self) -> Table:
        """One row a question, one column a model."""
        table = Table(title="recall: answers that are right as a whole", title_justify="left")
        table.add_column("task")
        for column in ("length", "depth", *(model.name for model in self.models), "chance"):
            table.add_column(column, justify="right", overflow="fold")
        for row in zip(*(model.results for model in self.models), strict=True):
            first = row[0]
            depth = "" if first.depth is None else f"{first.depth:g}"
            shares = (f"{result.correct / result.count:.1%}" for result in row)
            table.add_row(first.task, f"{first.length}", depth, *shares, f"{first.chance:.1%}")
        return table
