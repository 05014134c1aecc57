"""A tiny run of two stages, with all that a resume could get wrong: dropout, a counting buffer, a frozen teacher."""

import os
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from limbeck.training import Checkpoints, MetricsLog, load_learned, make_adamw, make_schedule, parameter_groups
from limbeck.training import train_stage as train_stage_of_limbeck
from limbeck.training.checkpoint import learned_tensors

STAGES = {"matrix": 7, "logits": 6}
WIDTH, VOCABULARY = 8, 16


class ToyStep(nn.Module):
    def __init__(self, dropout: float = 0.25, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(11)
        self.teacher = nn.Linear(WIDTH, WIDTH, dtype=dtype).requires_grad_(False)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.mixer = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.seen = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.scratch = nn.Buffer(torch.zeros(3), persistent=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.seen += 1
        hidden = self.embedding(batch["input_ids"])  # (b, l, d)
        student = self.norm(self.mixer(self.dropout(hidden)))
        distance = F.mse_loss(student, self.teacher(hidden).detach())
        ce = F.cross_entropy((student @ self.embedding.weight.T).flatten(0, 1), batch["labels"].flatten())
        loss = distance + ce * (1 + self.dropout.p * self.seen / 100)  # a resume that forgets the buffer shows
        return {"loss": loss, "distance": distance.detach(), "ce": ce.detach()}


def micro_batches(step: int, count: int = 2, b: int = 2, length: int = 5) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCABULARY, (count, b, length + 1), generator=generator)
    return [{"input_ids": part[:, :-1], "labels": part[:, 1:]} for part in ids]


def optimizer_of(module: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    mixers = [name for name, _ in module.named_parameters() if name.startswith("mixer")]
    return make_adamw(parameter_groups(module.named_parameters(), mixer_parameters=mixers, lr=lr, mixer_lr=3 * lr))


def held_out_loss(module: nn.Module) -> float:
    """Noisy on purpose, so that the best is neither the first nor the last; it draws from the random generator."""
    module.eval()
    with torch.no_grad():
        loss = module(micro_batches(777, count=1)[0])["loss"].item()
    module.seen -= 1
    return loss + 0.3 * torch.rand(()).item()


def run(directory: Path, kill: str = "", asynchronous: bool = False) -> None:
    """Run, or resume, both stages; `kill` names the moment to die at (see `arm`)."""
    torch.set_num_threads(1)
    batches = arm(kill)
    module = ToyStep()
    with MetricsLog(directory / "metrics.jsonl") as metrics:
        for stage, total in STAGES.items():
            finished = directory / f"{stage}.safetensors"
            if not finished.exists():
                result = train_stage_of_limbeck(
                    module,
                    optimizer_of(module),
                    stage=stage,
                    batches=lambda step, stage=stage: batches(stage, step),
                    schedule=make_schedule("wsd", total_steps=total, peak=1e-2, warmup=2, decay=2),
                    total_steps=total,
                    tokens_per_step=20,
                    metrics=metrics,
                    checkpoints=Checkpoints(
                        directory / stage, stage=stage, fingerprint="toy", asynchronous=asynchronous
                    ),
                    checkpoint_every=2,
                    evaluate=lambda: {"loss": held_out_loss(module), "perplexity": 3.0},
                    eval_every=3,
                )
                assert result.best_path is not None
                load_learned(module, result.best_path)
                temporary = finished.with_suffix(".tmp")
                save_file(learned_tensors(module), temporary)
                temporary.rename(finished)
            tensors = load_file(finished)
            module.load_state_dict(tensors, strict=False)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill: str):
    """Patch the process so that it is killed, or signalled, at a moment; returns the function that makes batches.

    ``batch STAGE STEP`` before an update; ``update N`` after the N-th update of the process, before it is recorded;
    ``metrics N`` amid the N-th line; ``write FOLDER`` amid its tensors; ``rename FOLDER`` just before it
    gets its name and ``renamed FOLDER`` just after; ``prune FOLDER`` amid its removal; ``SIGTERM|SIGINT N TIMES`` at a
    step, so many times.
    """
    from limbeck.training import shards, store, tracking

    what, *rest = kill.split() or [""]
    if what == "SIGINT":  # a shell starts what runs in the background with this signal ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def batches(stage: str, step: int):
        if what == "batch" and rest == [stage, str(step)]:
            die()
        if what.startswith("SIG") and stage == "matrix" and step == int(rest[0]):
            for _ in range(int(rest[1])):
                os.kill(os.getpid(), getattr(signal, what))
        return micro_batches(step)

    if what == "update":
        stepped, counted = torch.optim.AdamW.step, []

        def step(self, *arguments):
            stepped(self, *arguments)
            counted.append(1)
            if len(counted) == int(rest[0]):
                die()

        torch.optim.AdamW.step = step
    if what == "metrics":
        written, lines = tracking.MetricsLog.write, []

        def write(self, new):
            lines.extend(new)
            if len(lines) >= int(rest[0]):
                os.write(self._file.fileno(), b'{"stage": "matr')
                die()
            written(self, new)

        tracking.MetricsLog.write = write
    if what == "write":
        written_whole = shards.save_file

        def save(tensors, path, metadata):
            written_whole(tensors, path, metadata)
            if path.parent.name == f".writing-{rest[0]}":
                os.truncate(path, path.stat().st_size // 2)
                die()

        shards.save_file = save
    if what in ("rename", "renamed"):
        renamed = Path.rename

        def rename(self, target):
            if what == "rename" and Path(target).name == rest[0]:
                die()
            result = renamed(self, target)
            if what == "renamed" and Path(target).name == rest[0]:
                die()
            return result

        Path.rename = rename
    if what == "prune":
        removed = store.shutil.rmtree

        def rmtree(path):
            if path.name == f".old-{rest[0]}":
                (path / "manifest.json").unlink()
                die()
            removed(path)

        store.shutil.rmtree = rmtree
    return batches
