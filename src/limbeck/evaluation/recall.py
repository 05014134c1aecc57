"""Recall: does a model find again what stands in its prompt? By what it generates, not by likelihood."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from limbeck.devices import choose_device, choose_dtype
from limbeck.distill import check_vocabularies
from limbeck.errors import LimbeckError, unknown
from limbeck.evaluation.recall_results import ModelRecall, Recall, RecallResult, Role
from limbeck.evaluation.recall_tasks import PASS_KEYS, TOKEN_TASKS, Haystack
from limbeck.progress import make_progress
from limbeck.students import load_config, load_model, load_tokenizer

TASKS = ("mqar", "copy", "needle", "repeat")
MOST_PIECES = 16
"""Needles are hidden in pieces of a text that is so many times the length, or shorter if there are few needles."""


@dataclass(frozen=True)
class RecallSettings:
    """What to ask.

    Attributes:
        tasks: Some of ``"mqar"``, ``"copy"``, ``"needle"``, ``"repeat"``.
        lengths: Tokens of prompt and answer.
        depths: Where needles are: 0 in front of the text, 1 behind it.
        count: Questions of each kind.
        token_range: First token id and the one after the last, for the tasks made of tokens; by default the vocabulary.
        text: Files to hide needles in; by default the standard library's source.
        seed: The same seed asks the same questions.
        batch_size: Questions that are generated for together.

    Raises:
        LimbeckError: A task is unknown, or a value out of range.
    """

    tasks: Sequence[str] = TASKS
    lengths: Sequence[int] = (256, 1024)
    depths: Sequence[float] = (0.0, 0.5, 1.0)
    count: int = 32
    token_range: tuple[int, int] | None = None
    text: str | Path | None = None
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Check the values."""
        for task in self.tasks:
            if task not in TASKS:
                raise unknown("recall task", task, TASKS)
        for name, values in (("tasks", self.tasks), ("lengths", self.lengths), ("depths", self.depths)):
            if not values:
                raise LimbeckError(f"no {name}", expected="at least one")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise LimbeckError(f"depth {depth}", expected="between 0 and 1")
        for name, value, least in (
            ("count", self.count, 1),
            ("batch_size", self.batch_size, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise LimbeckError(f"{name} = {value}", expected=f"{least} or more")

    def kinds(self) -> Iterator[tuple[str, int, float | None]]:
        """Task, length and depth of each kind of question."""
        for task in dict.fromkeys(self.tasks):
            for length in self.lengths:
                for depth in self.depths if task == "needle" else (None,):
                    yield task, length, depth


def recall(
    model: PreTrainedModel,
    tokenizer: Any = None,
    *,
    teacher: PreTrainedModel | None = None,
    settings: RecallSettings | None = None,
    **options: Any,
) -> Recall:
    """Ask a model, and its teacher beside it, for what stands in the prompt.

    An answer counts when all of it is what greedy generation, with the cache, puts out.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer. The needle needs it; the other tasks leave its special tokens out. A first token that
            it puts in front of every text is put in front of every prompt.
        teacher: Another model of the same vocabulary.
        settings: What to ask.
        **options: Fields of `RecallSettings`, in place of `settings`, such as ``tasks=["mqar"], lengths=[64]``.

    Returns:
        The model's results, then the teacher's.

    Raises:
        LimbeckError: A value is out of range, a model too short, the text too small, a tokenizer is missing.
    """
    settings = settings or RecallSettings(**options)
    if teacher is None:
        return Recall((_answer(model, tokenizer, "model", "model", settings, model.config.vocab_size),))
    check_vocabularies(model.config, teacher.config)
    size = min(model.config.vocab_size, teacher.config.vocab_size)
    student = _answer(model, tokenizer, "student", "student", settings, size)
    return Recall((student, _answer(teacher, tokenizer, "teacher", "teacher", settings, size)))


def recall_by_name(
    models: Sequence[str | Path],
    settings: RecallSettings,
    *,
    teacher: str | Path | None = None,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Recall:
    """Ask models by name, one after the other; see `recall`.

    Args:
        models: Folders or hub ids.
        settings: What to ask.
        teacher: Folder or hub id of the model to run beside.
        tokenizer: Folder or hub id; by default each model's own, which is not needed without the needle.
        device: Where to run; by default a GPU if there is one.
        dtype: Number format; by default the checkpoints'.

    Raises:
        LimbeckError: Something is not there or does not fit.
    """
    place, number_format = choose_device(device), choose_dtype(dtype)
    names = [*models] if teacher is None else [*models, teacher]
    configs = [load_config(name) for name in names]
    if teacher is not None:
        for config in configs:
            check_vocabularies(config, configs[-1])
    size = min(config.vocab_size for config in configs)
    answered = []
    for index, name in enumerate(names):
        role: Role = "model" if teacher is None else "student" if index < len(models) else "teacher"
        words = _tokenizer(tokenizer or name, needed=tokenizer is not None or "needle" in settings.tasks)
        model = load_model(name, dtype=number_format, device=place)
        answered.append(_answer(model, words, str(name), role, settings, size))
        del model
    return Recall(tuple(answered))


def _tokenizer(name: str | Path, needed: bool) -> Any:
    try:
        return load_tokenizer(name)
    except LimbeckError:
        if needed:
            raise
        return None


def _answer(
    model: PreTrainedModel, tokenizer: Any, name: str, role: Role, settings: RecallSettings, vocab_size: int
) -> ModelRecall:
    """Ask one model everything."""
    kinds = list(settings.kinds())
    for _, length, _ in kinds:
        _check_reach(model, length)
    symbols, front = _symbols(settings.token_range, vocab_size, tokenizer), _front(tokenizer)
    haystack = _haystack(tokenizer, settings, vocab_size) if "needle" in settings.tasks else None
    results = []
    batches = -(-settings.count // settings.batch_size)
    with make_progress(f"recall of {name}", total=batches * len(kinds)) as progress:
        progress.begin(0)
        for number, (task, length, depth) in enumerate(kinds):
            rng = np.random.default_rng([settings.seed, TASKS.index(task), length])  # at every depth the same needles
            asked = _ask(task, symbols, haystack, length - len(front), depth, settings.count, rng)
            prompts = torch.cat([front.expand(settings.count, -1), asked.prompts], dim=1)  # (n, l - a)

            def report(done: int, before: int = number * batches) -> None:
                progress.update(before + done)

            right = asked.judge(_generate(model, prompts, asked.answer_length, settings.batch_size, report))
            results.append(RecallResult(task, length, depth, sum(right), settings.count, asked.chance))
    return ModelRecall(name, role, tuple(results))


class _Asked(NamedTuple):
    """Prompts (n, p), how many tokens to generate, what says of those (n, a) whether they are right, and chance."""

    prompts: Tensor
    answer_length: int
    judge: Callable[[Tensor], list[bool]]
    chance: float


def _ask(
    task: str,
    symbols: np.ndarray,
    haystack: Haystack | None,
    length: int,
    depth: float | None,
    count: int,
    rng: np.random.Generator,
) -> _Asked:
    """Make the questions of one kind."""
    if haystack is not None and depth is not None:
        prompts, keys, answer_length = haystack.questions(length, depth, count, rng)
        return _Asked(
            prompts, answer_length, lambda found: haystack.found(found, keys), 1 / (PASS_KEYS[1] - PASS_KEYS[0])
        )
    examples = TOKEN_TASKS[task](symbols, length, count, rng)
    return _Asked(
        examples.prompts,
        examples.answer_length,
        lambda found: (found == examples.answers).all(-1).tolist(),
        examples.chance,
    )


def _haystack(tokenizer: Any, settings: RecallSettings, vocab_size: int) -> Haystack:
    if tokenizer is None:
        raise LimbeckError("a needle without a tokenizer", hint="give the model's tokenizer, or leave the needle out")
    least = max(settings.lengths) * min(settings.count, MOST_PIECES)
    return Haystack(tokenizer, least, vocab_size, settings.text, settings.seed)


def _check_reach(model: PreTrainedModel, length: int) -> None:
    """Refuse what a model with learned positions has no position for; others may be asked beyond their training."""
    positions = getattr(model.config, "n_positions", None)
    if positions is not None and length > positions:
        raise LimbeckError(
            f"length {length}",
            expected=f"{positions} tokens or fewer: the model has no more positions",
            hint=f"--lengths {positions}",
        )


def _symbols(token_range: tuple[int, int] | None, vocab_size: int, tokenizer: Any) -> np.ndarray:
    """(s,) int64, the token ids to draw from: a range without the special tokens."""
    low, high = token_range or (0, vocab_size if tokenizer is None else min(vocab_size, len(tokenizer)))
    if not 0 <= low < high <= vocab_size:
        raise LimbeckError(f"token ids from {low} to {high}", expected=f"a range within 0 to {vocab_size}")
    special = [] if tokenizer is None else tokenizer.all_special_ids
    return np.setdiff1d(np.arange(low, high), special)


def _front(tokenizer: Any) -> Tensor:
    """(0,) or (1,) int64: the token that the tokenizer puts in front of every text."""
    put = [] if tokenizer is None else [id for id in tokenizer("")["input_ids"][:1] if id == tokenizer.bos_token_id]
    return torch.tensor(put, dtype=torch.int64)


@torch.no_grad()
def _generate(
    model: PreTrainedModel, prompts: Tensor, length: int, batch_size: int, report: Callable[[int], None]
) -> Tensor:
    """Greedy continuations (n, length) of prompts (n, p), whatever the checkpoint's generation settings say."""
    settings = GenerationConfig(
        max_new_tokens=length,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        # No token ends an answer: this one is beyond the vocabulary. Left out, the checkpoint's own would end it.
        eos_token_id=model.config.vocab_size,
        pad_token_id=0,
        bos_token_id=0,
        use_cache=True,
    )
    training = model.training
    model.eval()
    generating: Any = model
    rows = []
    try:
        for index, prompt in enumerate(prompts.split(batch_size)):
            prompt = prompt.to(model.device)
            output = generating.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
            rows.append(output[:, prompt.shape[1] :].cpu())
            report(index + 1)
    finally:
        model.train(training)
    return torch.cat(rows)
