"""A recipe of three stages that takes a second."""

import pytest

RECIPE = """
name = "tiny"
description = "three stages of a few updates"

[data]
sequence_length = 16
eval_fraction = 0.05

[evaluation]
every = 2
samples = 8
batch_size = 4

[stages.matrix]
objective = "matrix"
tokens = 256
tokens_per_step = 64
micro_batch = 2
lr = 3e-3
checkpoint_every = 2

[stages.hidden]
objective = "hidden"
tokens = 192
tokens_per_step = 64
micro_batch = 4
lr = 3e-3
checkpoint_every = 2

[stages.logits]
objective = "logits"
tokens = 384
tokens_per_step = 64
micro_batch = 2
lr = 3e-3
mixer_lr = 6e-3
checkpoint_every = 2
"""


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "tiny.toml"
    path.write_text(RECIPE)
    return path
