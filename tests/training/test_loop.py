import pytest
import torch
from toy_stage import ToyStep, micro_batches, optimizer_of

from limbeck.errors import LimbeckError
from limbeck.training import Checkpoints, MetricsLog, load_learned, make_schedule, read_metrics, train_stage


def train(directory, module, optimizer=None, *, total=4, **options):
    """Train with everything optional left out but what `options` gives; return the result and the lines."""
    settings = {
        "stage": "matrix",
        "batches": micro_batches,
        "schedule": make_schedule("constant", total_steps=total, peak=1e-2),
        "total_steps": total,
        "tokens_per_step": 20,
        "checkpoints": Checkpoints(directory / "checkpoints", stage="matrix"),
    }
    with MetricsLog(directory / "metrics.jsonl") as metrics:
        result = train_stage(module, optimizer or optimizer_of(module), metrics=metrics, **(settings | options))
    return result, read_metrics(directory / "metrics.jsonl")


def test_accumulation_is_the_mean_over_the_whole_batch(tmp_path):
    """Four micro-batches give the update, the loss, the terms and the norm of their union."""

    def whole(step):
        parts = micro_batches(step, count=4)
        return [{key: torch.cat([part[key] for part in parts]) for key in parts[0]}]

    modules = [ToyStep(dropout=0.0, dtype=torch.float64) for _ in range(2)]
    _, split = train(tmp_path / "a", modules[0], batches=lambda step: micro_batches(step, count=4), clip=0.5)
    _, joint = train(tmp_path / "b", modules[1], batches=whole, clip=0.5)
    for one, other in zip(split, joint, strict=True):
        for name in ("loss", "distance", "ce", "grad_norm", "grad_norm_mixers", "grad_norm_teacher_born"):
            assert one[name] == pytest.approx(other[name], rel=1e-12)
    for one, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_lines_say_what_happened(tmp_path):
    result, lines = train(tmp_path, ToyStep(dropout=0.0), total=3, schedule=lambda step: 1e-3 * (step + 1))
    assert (result.steps, result.tokens, result.resumed_from, result.best_path) == (3, 60, None, None)
    assert list(lines[0]) == [
        *(
            "stage",
            "step",
            "tokens",
            "loss",
            "distance",
            "ce",
            "grad_norm",
            "skipped",
            "grad_norm_mixers",
            "grad_norm_teacher_born",
            "lr",
            "time",
            "tokens_per_second",
        )
    ]
    assert [(line["step"], line["tokens"], line["lr"]) for line in lines] == [
        (1, 20, 1e-3),
        (2, 40, 2e-3),
        (3, 60, 3e-3),
    ]
    assert all(line["loss"] == pytest.approx(line["distance"] + line["ce"], rel=1e-6) for line in lines)


def test_groups_learn_at_their_own_scale(tmp_path):
    module = ToyStep()
    optimizer = optimizer_of(module)
    train(tmp_path, module, optimizer, total=1, schedule=lambda step: 0.5)
    assert {group["name"].split(",")[0]: group["lr"] for group in optimizer.param_groups} == {
        "mixers": 1.5,
        "teacher-born": 0.5,
    }


def test_a_first_rate_of_zero_changes_nothing(tmp_path):
    module = ToyStep()
    before = module.mixer.weight.detach().clone()
    train(tmp_path, module, total=1, schedule=make_schedule("wsd", total_steps=1, peak=1.0, warmup=1, decay=0))
    assert torch.equal(module.mixer.weight, before)


def test_clipping_scales_the_gradient_to_the_norm(tmp_path):
    module = ToyStep()
    optimizer = torch.optim.SGD(
        [parameter for parameter in module.parameters() if parameter.requires_grad], lr=1.0, fused=True
    )
    before = [parameter.detach().clone() for parameter in module.parameters()]
    _, lines = train(tmp_path, module, optimizer, total=1, schedule=lambda step: 1.0, clip=1e-3)
    moved = torch.stack([(old - new).norm() for old, new in zip(before, module.parameters(), strict=True)]).norm()
    assert lines[0]["grad_norm"] > 0.1  # the norm before clipping
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_evaluation_leaves_the_training_alone(tmp_path):
    """Whatever evaluate does to modes and random numbers, the training is the same as without it."""
    plain, watched = ToyStep(), ToyStep()

    def evaluate():
        watched.eval()
        torch.rand(100)
        return {"loss": 1.0}

    _, expected = train(tmp_path / "a", plain)
    _, lines = train(tmp_path / "b", watched, evaluate=evaluate, eval_every=1)
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in expected]
    assert torch.equal(plain.mixer.weight, watched.mixer.weight)
    assert watched.training


def test_the_best_weights_are_kept(tmp_path):
    module = ToyStep()
    losses, seen = iter([float("nan"), 3.0, 1.0, 1.0, 2.0]), {}

    def evaluate():
        loss = next(losses)
        seen.setdefault(loss, module.mixer.weight.detach().clone())
        return {"loss": loss, "kl": 0.5}

    result, lines = train(tmp_path, module, evaluate=evaluate, eval_every=1)
    assert (result.best_step, result.best_loss) == (2, 1.0)  # the first of equals; not-a-number is never best
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [None, 3.0, 1.0, 1.0, 2.0]
    assert result.best_path is not None
    load_learned(module, result.best_path)
    assert torch.equal(module.mixer.weight, seen[1.0])


def test_evaluations_at_the_start_the_interval_and_the_end(tmp_path):
    _, lines = train(tmp_path, ToyStep(), total=5, evaluate=lambda: {"loss": 1.0}, eval_every=3)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 5]


def test_a_finished_stage_is_not_trained_again(tmp_path):
    module = ToyStep()
    _, lines = train(tmp_path, module)
    result, again = train(tmp_path, ToyStep(), batches=lambda step: pytest.fail("no batch is needed"))
    assert (result.steps, result.resumed_from, again) == (4, 4, lines)


def test_autocast_computes_in_bfloat16_and_keeps_the_weights(tmp_path):
    seen = []

    class Watched(ToyStep):
        def forward(self, batch):
            seen.append(self.mixer(self.embedding(batch["input_ids"])).dtype)
            return super().forward(batch)

    module = Watched()
    train(tmp_path, module, autocast=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_another_format_is_refused(tmp_path):
    with pytest.raises(LimbeckError, match=r"autocast to torch\.float64"):
        train(tmp_path, ToyStep(), autocast=torch.float64)


def test_micro_batches_of_unequal_size_are_refused(tmp_path):
    with pytest.raises(AssertionError, match="of equal size"):
        train(tmp_path, ToyStep(), batches=lambda step: [*micro_batches(step), *micro_batches(step, length=7)])


def test_weights_that_get_no_gradient_are_named(tmp_path, capsys):
    module = ToyStep()
    module.idle = torch.nn.Linear(2, 2)
    train(tmp_path, module)
    assert capsys.readouterr().err.count("2 tensors that should learn get no gradient: idle.weight, idle.bias") == 1


def test_lost_metrics_are_told_and_training_goes_on(tmp_path, capsys):
    train(tmp_path, ToyStep(), total=2)
    (tmp_path / "metrics.jsonl").unlink()
    result, lines = train(tmp_path, ToyStep(), total=4)
    assert (result.resumed_from, [line["step"] for line in lines]) == (2, [3, 4])
    assert "lines were lost" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_updates_do_not_wait_for_the_device(tmp_path):
    """Between two fetches of figures no update synchronises with the GPU; bit-equality is not promised there."""
    module = ToyStep().cuda()
    optimizer = optimizer_of(module)
    checked = []

    def batches(step):
        torch.cuda.set_sync_debug_mode("error" if step in (1, 2) else "default")  # step 3 is where they are fetched
        checked.append(step)
        return [{key: tensor.pin_memory() for key, tensor in part.items()} for part in micro_batches(step)]

    try:
        _, lines = train(
            tmp_path, module, optimizer, batches=batches, device="cuda", autocast=torch.bfloat16, log_every=4
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert checked == [0, 1, 2, 3]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_stage_begins_with_what_its_loss_lies_between(tmp_path):
    asked = []

    def perfect(batch):
        asked.append(batch)
        return 0.5

    _, lines = train(tmp_path, ToyStep(), total=2, perfect=perfect)
    assert lines[0] == {
        "stage": "matrix",
        "step": 0,
        "reference_untrained": lines[1]["loss"],
        "reference_perfect": 0.5,
    }
    assert [line["step"] for line in lines[1:]] == [1, 2]
    assert torch.equal(asked[0][1]["input_ids"], micro_batches(0)[1]["input_ids"])
    _, again = train(tmp_path, ToyStep(), total=3, perfect=perfect)
    assert again[:3] == lines  # a resumed stage has its line already
    assert len(asked) == 1
