"""Mixers on a GPU, where kernels do their work, against the same mixers in float64 on a CPU."""

import copy

import pytest
import torch

from limbeck.mixers import DiscreteMamba2, Mamba, Mamba2

pytestmark = pytest.mark.gpu
WIDTH, LENGTH = 128, 70
MIXERS = {
    "discrete Mamba-2": lambda: DiscreteMamba2(WIDTH, d_state=32, n_qk_heads=4, n_v_heads=4),
    "grouped, silu, biases": lambda: DiscreteMamba2(
        WIDTH, d_state=48, n_qk_heads=2, n_v_heads=4, activation="silu", bias=True
    ),
    "Mamba": lambda: Mamba(WIDTH),
    "Mamba-2": lambda: Mamba2(WIDTH, d_state=32, headdim=32),
}


@pytest.fixture(params=MIXERS)
def pair(request):
    """A mixer with every parameter shaken, in float64 on the CPU and in float32 on the GPU."""
    mixer = MIXERS[request.param]()
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return copy.deepcopy(mixer).double(), mixer.cuda()


def options_of(name):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :9] = 0
    seq_idx = (torch.arange(LENGTH) // 25).expand(2, -1)
    return {"plain": {}, "padding": {"attention_mask": mask}, "documents": {"seq_idx": seq_idx}}[name]


def on(device, options):
    return {name: tensor.to(device) for name, tensor in options.items()}


def error(ours, theirs):
    return ((ours.cpu().double() - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", ["plain", "padding", "documents"])
def test_outputs_states_and_gradients(pair, name):
    exact, mixer = pair
    inputs, options = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64), options_of(name)
    tokens = options.get("attention_mask", torch.ones(2, LENGTH)).bool()
    results = []
    for module in (exact, mixer):
        weight = next(module.parameters())
        hidden = inputs.to(weight.device, weight.dtype).requires_grad_()
        out, state = module(hidden, return_state=True, **on(weight.device, options))
        loss = out[tokens.to(out.device)].square().sum() + state.recurrent.square().sum()
        gradients = torch.autograd.grad(loss, [hidden, *module.parameters()])
        alone = module(hidden, **on(weight.device, options))
        results.append([out[tokens.to(out.device)], alone[tokens.to(out.device)], *state, *gradients])
    for i, (theirs, ours) in enumerate(zip(*results, strict=True)):
        assert error(ours, theirs) < 1e-4, f"result {i}"


def test_steps_and_autocast(pair):
    exact, mixer = pair
    inputs = torch.randn(3, 12, WIDTH, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1])
    with torch.no_grad():
        whole = exact(inputs)
        for autocast, tolerance in ((False, 1e-4), (True, 3e-2)):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                hidden = inputs.float().cuda()
                assert error(mixer(hidden), whole) < tolerance
                out, state = mixer(hidden[:, :8], return_state=True)
                for t in range(8, 12):
                    out, state = mixer.step(hidden[:, t], state)
                    assert error(out, whole[:, t]) < tolerance
                _, after = mixer.step(hidden[:, 0], state, mask.cuda())
                assert torch.equal(after.recurrent[1], state.recurrent[1])
                assert not torch.equal(after.recurrent[0], state.recurrent[0])


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch 2.11's own use
def test_one_graph_with_the_kernels_inside(pair):
    _, mixer = pair
    torch.compiler.reset()
    fast = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    hidden, options = torch.randn(2, LENGTH, WIDTH, device="cuda"), on("cuda", options_of("padding"))
    found = []
    for call in (fast, mixer):
        mixer.zero_grad()
        out = call(hidden, **options)
        out.square().sum().backward()
        found.append([out.detach(), *(parameter.grad.clone() for parameter in mixer.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        _, state = mixer(hidden, return_state=True)
        step = {"state": state, "return_state": True}
        torch.testing.assert_close(fast(hidden[:, :1], **step), mixer(hidden[:, :1], **step), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
