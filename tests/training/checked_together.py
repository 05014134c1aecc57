"""What two processes of torchrun check together; each check says its name when all is well with it."""

import copy
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from limbeck import LimbeckError, convert
from limbeck.distill import StageStep, make_objective, matrix
from limbeck.mixers import mamba2
from limbeck.training import World, settle, shard, shard_step, whole_weights
from limbeck.training.guards import keep_batch
from limbeck.training.parallel import Replicas
from limbeck.training.update import accumulate, apply
from tiny import tiny_teacher

LENGTH = 16


def batch_of(rank, count=2):
    generator = torch.Generator().manual_seed(7 + rank)
    ids = torch.randint(0, 61, (count, 2, LENGTH + 1), generator=generator)
    return [{"input_ids": part[:, :-1], "labels": part[:, 1:]} for part in ids]


def models(mixer="mamba2", **options):
    torch.manual_seed(3)
    teacher = tiny_teacher("gpt_neox", **options)
    return convert(copy.deepcopy(teacher), mixer=mixer, init="random").train(), teacher


def gradients(step, world, batches, autocast=None, mesh=None):
    replicas = Replicas(step, world)
    replicas.prepare()
    if mesh is not None:
        shard_step(step, mesh)
    figures = accumulate(replicas, batches, torch.device("cpu"), autocast)
    found = {name: weight.grad for name, weight in step.named_parameters() if weight.grad is not None}
    found = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad.clone() for name, grad in found.items()}
    return world.mean(figures["loss"]), found


def check_words(world):
    assert world.agree([world.rank, -world.rank]) == [1, 0]
    assert world.share(f"of rank {world.rank}") == "of rank 0"
    assert world.gather(world.rank) == [0, 1]
    assert world.mean(torch.tensor([float(world.rank)])).item() == 0.5
    done = []
    assert world.in_turn(lambda: done.append(1) or world.rank) == world.rank
    assert world.first(lambda: done.append(2) or 5) == 5
    assert done == [1, 2] if world.main else [1]
    with pytest.raises(LimbeckError, match="broken"):
        world.first(broken)
    with pytest.raises(LimbeckError, match="rank 1 has another recipe than rank 0"):
        world.same("recipe", str(world.rank))


def broken():
    raise LimbeckError("broken")


def check_gradients(world):
    """Those of both processes' batches, copied and sharded: as in one process; also where matrices are recomputed."""
    matrix.STORED_LENGTH = LENGTH // 2
    everything = batch_of(0) + batch_of(1)
    for name in ("matrix", "hidden", "logits"):
        student, teacher = models("discrete-mamba2", tie_word_embeddings=name == "logits")

        def step(name=name, student=student, teacher=teacher):
            return StageStep(copy.deepcopy(student), make_objective(name), teacher)

        expected_loss, expected = gradients(step(), World.alone(), everything)
        for mesh in (None, world.mesh(), world.mesh(1)):
            loss, found = gradients(step(), world, batch_of(world.rank), mesh=mesh)
            torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
            assert found.keys() == expected.keys()
            for key, gradient in expected.items():
                torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: key + m)


def check_precision(world):
    """Decays and the skip reach the scan in float32 under bfloat16, and what learns stays float32."""
    seen = []
    forward = mamba2.Mamba2.forward

    def watched(self, *arguments, **options):
        seen.extend((name, type(getattr(self, name)), getattr(self, name).dtype) for name in ("A_log", "dt_bias", "D"))
        return forward(self, *arguments, **options)

    mamba2.Mamba2.forward = watched
    for mesh in (None, world.mesh()):
        student, teacher = models()
        step = StageStep(student, make_objective("logits"), teacher)
        gradients(step, world, batch_of(world.rank), torch.bfloat16, mesh)
        assert {weight.dtype for weight in step.parameters()} == {torch.float32}
        assert {(name, dtype) for name, _, dtype in seen} == {
            (name, torch.float32) for name in ("A_log", "dt_bias", "D")
        }
        assert not any(issubclass(kind, DTensor) for _, kind, _ in seen)
        seen.clear()
    mamba2.Mamba2.forward = forward


def check_what_is_not_finite(world):
    """One process meets an infinite gradient, or loss: all leave the update out, moments and weights stay."""
    for mesh in (None, world.mesh()):
        student, teacher = models()
        step = StageStep(student, make_objective("logits"), teacher)
        if mesh is not None:
            shard_step(step, mesh)
        optimizer = torch.optim.AdamW(step.parameters(), lr=1e-2, fused=True)
        replicas = Replicas(step, world)
        replicas.prepare()
        before = None
        for times, plus in ((1.0, 0.0), (float("inf"), 0.0), (1.0, float("inf")), (1.0, 0.0)):
            spoiled = times + plus > 1.0
            own = (times, plus) if world.rank == 1 else (1.0, 0.0)
            handle = step.register_forward_hook(lambda _m, _a, out, own=own: {"loss": out["loss"] * own[0] + own[1]})
            accumulate(replicas, batch_of(world.rank), torch.device("cpu"), None)
            handle.remove()
            skipped = apply(optimizer, 1e-2, 1.0)["skipped"]
            assert skipped.item() == float(spoiled)
            settle(step)
            after = [w.full_tensor() if isinstance(w, DTensor) else w.detach().clone() for w in step.parameters()]
            same = before is not None and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert same == spoiled
            before = after


def check_kept_batch(world):
    """The batch that is kept for inspection is that of all processes, in their order."""
    folder = Path(world.share(tempfile.mkdtemp()))
    told = keep_batch(folder, "logits", 3, batch_of(world.rank), world)
    assert str(folder / "nonfinite-logits-3.safetensors") in told
    if world.main:
        found = load_file(folder / "nonfinite-logits-3.safetensors")
        expected = [part["input_ids"] for rank in range(world.size) for part in batch_of(rank)]
        assert torch.equal(found["input_ids"], torch.cat(expected))


def check_export(world):
    """The weights gathered from the parts are those of the whole, tied ones tied."""
    student, _ = models(tie_word_embeddings=True)
    expected = copy.deepcopy(student.state_dict())
    shard(student, make_objective("logits").units(student), world.mesh())
    found = whole_weights(student)
    assert found.keys() == (expected.keys() if world.main else set())
    assert all(torch.equal(found[name], expected[name]) for name in found)


if __name__ == "__main__":
    with World.join("cpu") as world:
        for name in sys.argv[1:]:
            globals()[f"check_{name}"](world)
            if world.main:
                print(name, "is well", flush=True)
