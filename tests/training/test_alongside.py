"""What may run beside a plain stage: a second model that learns, parameters that wait, a scaled loss, kept steps."""

import hashlib
import json

import pytest
import torch
import torch.nn.functional as F
from toy_stage import ToyStep, micro_batches, optimizer_of

from limbeck.errors import LimbeckError
from limbeck.training import (
    Checkpoints,
    Companion,
    MetricsLog,
    load_learned,
    make_adamw,
    make_schedule,
    parameter_groups,
    read_metrics,
    train_stage,
)

TOTAL = 9


class Alongside(ToyStep):
    """A toy whose teacher learns the text too, in every second update, for six updates."""

    until, every = 6, 2

    def __init__(self):
        super().__init__()
        frozen = self.teacher
        del self.teacher
        self.__dict__["teacher"] = frozen
        self.guided = True

    def enter(self, step):
        self.guided = step < self.until
        self.__dict__["teacher"].requires_grad_((step + 1) % self.every == 0)
        if not self.guided:  # what it learned is out of the game
            for parameter in self.__dict__["teacher"].parameters():
                parameter.detach().zero_()

    def forward(self, batch):
        teacher = self.__dict__["teacher"]
        terms = super().forward(batch)
        if not self.guided:
            return terms
        hidden = self.embedding(batch["input_ids"]).detach()
        own = F.cross_entropy(
            (teacher(hidden) @ self.embedding.weight.T.detach()).flatten(0, 1), batch["labels"].flatten()
        )
        return terms | ({"teacher_loss": own} if own.requires_grad else {})


class InterruptedStageError(Exception):
    pass


def run(directory, stop_at=None, checkpoint_every=2, freeze=0, **options):
    """Run, or resume, a stage with everything; `stop_at` interrupts it before that update."""
    torch.manual_seed(5)
    module = Alongside()
    module.train()
    companion = Companion(
        module.__dict__["teacher"],
        make_adamw(
            parameter_groups(
                module.__dict__["teacher"].requires_grad_(True).named_parameters(), mixer_parameters=(), lr=1e-2
            )
        ),
        make_schedule("constant", total_steps=3, peak=1e-2, warmup=1),
        until=module.until,
        every=module.every,
        clip=1.0,
    )
    mixers = [name for name, _ in module.named_parameters() if name.startswith("mixer")]
    groups = parameter_groups(module.named_parameters(), mixer_parameters=mixers, lr=1e-2, freeze_steps=freeze)

    def batches(step):
        if step == stop_at:
            raise InterruptedStageError
        return micro_batches(step)

    with MetricsLog(directory / "metrics.jsonl") as metrics:
        train_stage(
            module,
            make_adamw(groups),
            stage="matrix",
            batches=batches,
            schedule=make_schedule("cosine", total_steps=TOTAL, peak=1e-2),
            total_steps=TOTAL,
            tokens_per_step=20,
            metrics=metrics,
            checkpoints=Checkpoints(directory / "checkpoints", stage="matrix", keep_for_good=lambda step: step == 6),
            checkpoint_every=checkpoint_every,
            enter=module.enter,
            companion=companion,
            **options,
        )
    return module, companion


def outcome(directory, module, teacher):
    lines = [
        {k: v for k, v in line.items() if not k.startswith("t") or k.startswith("teacher")}
        for line in read_metrics(directory / "metrics.jsonl")
    ]
    weights = [p.detach().clone() for p in (*module.parameters(), *teacher.parameters())]
    return lines, weights


@pytest.mark.parametrize(
    "options", [{}, {"freeze": 5}, {"autocast": torch.float16}], ids=["plain", "frozen", "float16"]
)
@pytest.mark.parametrize("stop_at", [1, 3, 4, 5, 6, 7, 8])
def test_resumed_equals_uninterrupted(tmp_path, stop_at, options):
    module, _ = run(tmp_path / "whole", **options)
    whole = outcome(tmp_path / "whole", module, module.__dict__["teacher"])
    with pytest.raises(InterruptedStageError):
        run(tmp_path / "parts", stop_at=stop_at, **options)
    module, companion = run(tmp_path / "parts", **options)
    lines, weights = outcome(tmp_path / "parts", module, module.__dict__["teacher"])
    assert lines == whole[0]
    assert all(torch.equal(found, expected) for found, expected in zip(weights, whole[1], strict=True))
    assert companion.module is companion.optimizer is None
    names = {path.name for path in (tmp_path / "parts/checkpoints").iterdir()}
    assert names == {"step-00000006", "step-00000008", "step-00000009"}
    assert not (tmp_path / "parts/checkpoints/step-00000006/companion.pt").exists()  # its time was over


def test_the_companion_learns_when_it_is_its_turn_at_its_own_rate(tmp_path):
    run(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "teacher_loss" in line] == [2, 4, 6]
    assert [line["teacher_lr"] for line in lines if "teacher_lr" in line] == [0.0, 1e-2, 1e-2]
    assert all(line["teacher_grad_norm"] > 0 for line in lines if "teacher_lr" in line)


def test_a_checkpoint_without_the_companion_is_refused(tmp_path):
    with pytest.raises(InterruptedStageError):
        run(tmp_path, stop_at=5)
    for folder in (tmp_path / "checkpoints").iterdir():
        contents, manifest = (json.loads((folder / name).read_text()) for name in ("state.json", "manifest.json"))
        (folder / "state.json").write_text(json.dumps(contents | {"companion": None}))
        sealed = (folder / "state.json").read_bytes()
        manifest["files"]["state.json"] = {"size": len(sealed), "sha256": hashlib.sha256(sealed).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LimbeckError, match=r"has no teacher that learns alongside"):
        run(tmp_path)


def test_teacher_born_weights_wait(tmp_path):
    start = ToyStep()
    for freeze, moved in ((TOTAL, False), (3, True)):
        module, _ = run(tmp_path / str(freeze), freeze=freeze)
        changed = {
            name for (name, new), (_, old) in zip(module.named_parameters(), named(start, module), strict=True)
            if not torch.equal(new, old)
        }  # fmt: skip
        born = {"embedding.weight", "norm.weight", "norm.bias"}
        assert {"mixer.weight", "mixer.bias"} <= changed
        assert bool(changed & born) == moved
    load_learned(module, tmp_path / "3/checkpoints/step-00000009")


def named(start, like):
    found = dict(start.named_parameters())
    return [(name, found[name]) for name, _ in like.named_parameters()]


def test_what_waits_is_in_the_best_weights_too(tmp_path):
    """The best step may lie before the release, and its weights are loaded after it."""
    losses = iter([3.0, 1.0, 2.0, 2.0])
    module, _ = run(tmp_path, freeze=5, evaluate=lambda: {"loss": next(losses)}, eval_every=3)
    load_learned(module, tmp_path / "checkpoints/best-00000003")


def test_a_scaled_loss_skips_what_overflows_and_changes_nothing_else(tmp_path):
    class Steep(ToyStep):
        def forward(self, batch):
            terms = super().forward(batch)
            return terms | {"loss": terms["loss"] * 4}

    module = Steep(dropout=0.0)
    start = [p.detach().clone() for p in module.parameters()]
    optimizer = optimizer_of(module)
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        train_stage(
            module,
            optimizer,
            stage="matrix",
            batches=micro_batches,
            schedule=lambda step: 1e-2,
            total_steps=6,
            tokens_per_step=20,
            metrics=metrics,
            checkpoints=Checkpoints(tmp_path / "checkpoints", stage="matrix"),
            autocast=torch.float16,
        )
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["loss_scale"] for line in lines][:3] == [65536.0, 32768.0, 16384.0]
    skipped = [line["grad_norm"] == 0.0 for line in lines]
    assert skipped[0]
    assert not all(skipped)
    assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), start, strict=True))
    saved = json.loads((tmp_path / "checkpoints/step-00000006/state.json").read_text())
    assert saved["scaler"]["scale"] == lines[-1]["loss_scale"]


def test_a_gradient_that_is_no_number_ends_the_stage(tmp_path):
    class Broken(ToyStep):
        def forward(self, batch):
            terms = super().forward(batch)
            terms["loss"].register_hook(lambda gradient: gradient * float("nan"))
            return terms

    module = Broken()
    with (
        MetricsLog(tmp_path / "metrics.jsonl") as metrics,
        pytest.raises(LimbeckError, match="overflows at a loss scale"),
    ):
        train_stage(
            module,
            optimizer_of(module),
            stage="matrix",
            batches=micro_batches,
            schedule=lambda step: 1e-2,
            total_steps=60,
            tokens_per_step=20,
            metrics=metrics,
            checkpoints=Checkpoints(tmp_path / "checkpoints", stage="matrix"),
            autocast=torch.float16,
        )
