"""The training steps of others, for `benchmarks/training.py`.

Nobody's code is copied: the Phi-Mamba reference repository is imported from a checkout whose folder the environment
variable PHI_MAMBA names (it needs mamba_ssm's Triton kernels and einops), and its students are driven as
goombalab/mohawk drives them. The GPT-NeoX students of CALD are put together from transformers' own modules.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM, MambaConfig, PhiForCausalLM
from transformers.models.mamba.modeling_mamba import MambaMixer

Batch = dict[str, Tensor]
Update = Callable[[], None]


def updates(learning: list[nn.Parameter], backward: Callable[[], None]) -> Update:
    """One update: gradients in bfloat16 autocast, clip, fused AdamW."""
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)

    def update() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def on_text(model: nn.Module, batch: Batch) -> Update:
    """A language model that learns from text; its logits stand whole in memory, as they do there."""

    def backward() -> None:
        logits = model(batch["input_ids"]).logits
        F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten()).backward()

    return updates(list(model.parameters()), backward)


def phi_mamba() -> nn.Module:
    """The reference student in float32."""
    folder = Path(os.environ["PHI_MAMBA"])
    sys.path.insert(0, str(folder))
    from modules.lm_head import LMHeadModel  # pyright: ignore[reportMissingImports]
    from utils.config import Config  # pyright: ignore[reportMissingImports]

    return LMHeadModel(Config.from_json(str(folder / "assets/sample_config.json"))).cuda()


def mohawk_stage1(teacher: PhiForCausalLM, batch: Batch, *, at_once: bool) -> Update:
    """Both matrices of every layer in memory; one backward for all layers (goombalab/mohawk), or one for each."""
    student = phi_mamba()
    teacher.set_attn_implementation("eager")

    def backward() -> None:
        with torch.no_grad():
            seen = teacher(batch["input_ids"], output_hidden_states=True, output_attentions=True, use_cache=False)
        losses = []
        for layer, hidden, attention in zip(student.backbone.layers, seen.hidden_states, seen.attentions, strict=False):
            found = layer(hidden_states=hidden, run_mlp_component=False, return_mixer_matrix=True)
            losses.append(torch.linalg.matrix_norm(found["transfer_matrix"] - attention).mean())
            if not at_once:
                losses.pop().backward()
        if at_once:
            torch.stack(losses).sum().backward()

    return updates([p for layer in student.backbone.layers for p in layer.mixer.parameters()], backward)


def mohawk_stage2(teacher: PhiForCausalLM, batch: Batch) -> Update:
    """Whole blocks given the teacher's inputs, one backward."""
    student = phi_mamba()

    def backward() -> None:
        with torch.no_grad():
            seen = teacher(batch["input_ids"], output_hidden_states=True, use_cache=False)
        losses = []
        for layer, hidden, target in zip(
            student.backbone.layers, seen.hidden_states, seen.hidden_states[1:], strict=False
        ):
            found = layer(hidden_states=hidden)["hidden_states"]
            losses.append(torch.norm(found - target, p=2, dim=-1, dtype=torch.float32).mean())
        torch.stack(losses).sum().backward()

    return updates(list(student.backbone.layers.parameters()), backward)


def mohawk_stage3(teacher: PhiForCausalLM, batch: Batch) -> Update:
    """Cross entropy against the teacher's distribution, over whole logits."""
    student = phi_mamba()

    def backward() -> None:
        with torch.no_grad():
            target = teacher(batch["input_ids"], use_cache=False).logits.flatten(0, 1)
        logits = student(batch["input_ids"]).logits.flatten(0, 1)
        F.cross_entropy(logits.float(), target.float().softmax(dim=-1)).backward()

    return updates(list(student.parameters()), backward)


class MambaAttention(nn.Module):
    """transformers' Mamba where GPT-NeoX has attention, of the sizes CALD's runs had."""

    def __init__(self, scan: Callable[..., Tensor] | None):
        super().__init__()
        config = MambaConfig(hidden_size=2048, intermediate_size=5120, time_step_rank=160, state_size=16, conv_kernel=4)
        config.intermediate_size = 5120
        self.mamba, self.scan = MambaMixer(config, layer_idx=0), scan

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        mixer = self.mamba
        if self.scan is None:
            return mixer.slow_forward(hidden_states), None
        x, z = mixer.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)  # (b, c, l) each
        x = mixer.act(mixer.conv1d(x)[..., : x.shape[-1]])
        low, B, C = mixer.x_proj(x.transpose(1, 2)).split([160, 16, 16], dim=-1)
        delta = (low @ mixer.dt_proj.weight.to(low.dtype).T).transpose(1, 2)
        B, C = B.transpose(1, 2).contiguous(), C.transpose(1, 2).contiguous()
        A, bias = -mixer.A_log.float().exp(), mixer.dt_proj.bias.float()
        y = self.scan(x, delta, A, B, C, mixer.D.float(), z=z, delta_bias=bias, delta_softplus=True)
        return mixer.out_proj(y.transpose(1, 2)), None


def cald(teacher: GPTNeoXForCausalLM, batch: Batch, *, kernels: bool) -> Update:
    """Cross entropy + 15 · MSE of layer-normalised hidden states, with mamba_ssm's scan or transformers' fallback."""
    scan = None
    if kernels:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as scan
    with torch.device("cuda"):
        student = GPTNeoXForCausalLM(teacher.config).train()
        for layer in student.gpt_neox.layers:
            layer.attention = MambaAttention(scan)
    width = (teacher.config.hidden_size,)

    def backward() -> None:
        with torch.no_grad():
            seen = teacher(batch["input_ids"], output_hidden_states=True, use_cache=False)
        found = student(batch["input_ids"], output_hidden_states=True, use_cache=False)
        loss = F.cross_entropy(found.logits.float().flatten(0, 1), batch["labels"].flatten())
        pairs = list(zip(found.hidden_states[1:-1], seen.hidden_states[1:-1], strict=True))
        layers = [F.mse_loss(F.layer_norm(ours, width), F.layer_norm(theirs, width)) for ours, theirs in pairs]
        (loss + 15 * torch.stack(layers).mean()).backward()

    return updates(list(student.parameters()), backward)
