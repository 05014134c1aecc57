"""A frozen teacher, compiled where nobody looks inside."""

import torch
from transformers import PreTrainedModel

from limbeck.students import attention_of, blocks


def compile_layers(teacher: PreTrainedModel) -> None:
    """Compile what layers consist of beside their attention, in place: MLPs, and norms that are written out.

    Layers and attention stay as they are, since objectives hook them and listen to what attention is called with, of
    which compiled code knows nothing. Nor does it know what a part's own hooks do, so only its forward is compiled.
    Layers of one shape share their code. It is made at the first call, and again for inputs of another shape.

    Args:
        teacher: On any device, sharded or offloaded or neither.
    """
    for block in blocks(teacher):
        attention = attention_of(block)
        for part in block.children():
            written_out = not type(part).__module__.startswith("torch.nn.")  # torch's own layers are one kernel each
            if part is not attention and written_out:
                vars(part)["forward"] = torch.compile(part.forward)
