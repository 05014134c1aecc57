"""The registry of mixers, and the weights that attention hands over."""

import pytest
import torch

from limbeck.errors import LimbeckError
from limbeck.mixers import AttentionWeights, DiscreteMamba2, get_mixer, mixer_names, register_mixer, registry


def test_a_mixer_registers_under_its_own_name(monkeypatch):
    monkeypatch.setattr(registry, "_MIXERS", dict(registry._MIXERS))

    class Own(DiscreteMamba2):
        pass

    before = mixer_names()
    register_mixer("own", Own)
    register_mixer("own", Own)
    assert get_mixer("own") is Own
    assert mixer_names() == (*before, "own")
    with pytest.raises(LimbeckError, match="taken by Own"):
        register_mixer("own", DiscreteMamba2)
    with pytest.raises(LimbeckError, match="not a mixer"):
        register_mixer("linear", torch.nn.Linear)


def test_an_unknown_mixer_is_told_its_neighbour():
    with pytest.raises(LimbeckError, match="did you mean 'discrete-mamba2'") as error:
        get_mixer("discrete-mamba")
    assert "one of discrete-mamba2, mamba, mamba2" in str(error.value)


def test_attention_weights_check_their_shapes():
    good = {
        "query": torch.zeros(8, 6),
        "key": torch.zeros(4, 6),
        "value": torch.zeros(4, 6),
        "output": torch.zeros(6, 8),
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 2,
        "scale": 0.5,
    }
    AttentionWeights(**good)
    with pytest.raises(LimbeckError, match="'key' has shape"):
        AttentionWeights(**good | {"key": torch.zeros(8, 6)})
    with pytest.raises(LimbeckError, match="'output_bias' has shape"):
        AttentionWeights(**good, output_bias=torch.zeros(8))
    with pytest.raises(LimbeckError, match="4 query heads over 3 key heads"):
        AttentionWeights(**good | {"num_kv_heads": 3})


def test_heads_are_repeated_in_order():
    weights = AttentionWeights(
        query=torch.zeros(4, 1),
        key=torch.arange(2.0)[:, None],
        value=10 + torch.arange(2.0)[:, None],
        output=torch.zeros(1, 4),
        key_bias=torch.tensor([5.0, 6.0]),
        num_heads=4,
        num_kv_heads=2,
        head_dim=1,
        scale=1.0,
    )
    key, key_bias = weights.per_head("key")
    value, value_bias = weights.per_head("value")
    assert key.flatten().tolist() == [0, 0, 1, 1]
    assert key_bias is not None
    assert key_bias.tolist() == [5, 5, 6, 6]
    assert value.flatten().tolist() == [10, 10, 11, 11]
    assert value_bias is None
