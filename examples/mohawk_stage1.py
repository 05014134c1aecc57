"""MOHAWK stage 1 by hand: turn each mixer's matrix towards the attention matrix of its layer.

python examples/mohawk_stage1.py                          # a tiny random GPT-NeoX: seconds on a CPU, no network
python examples/mohawk_stage1.py path/to/teacher text.txt # your own teacher, your own text
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import limbeck
from limbeck.students import mixers

torch.manual_seed(0)
batch, length, steps = 4, 64, 20

if len(sys.argv) > 1:
    teacher = limbeck.load_model(sys.argv[1])
else:
    config = GPTNeoXConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    teacher = AutoModelForCausalLM.from_config(config).eval()
teacher.requires_grad_(False)

if len(sys.argv) > 2:
    tokens = limbeck.load_tokenizer(sys.argv[1])(Path(sys.argv[2]).read_text(), return_tensors="pt").input_ids[0]
else:
    tokens = torch.randint(teacher.config.vocab_size, (steps * batch * length,))
samples = tokens[: len(tokens) // length * length].view(-1, length)  # (number of samples, l)

student = limbeck.convert(teacher, mixer="discrete-mamba2", init="identity")
optimizer = torch.optim.AdamW([p for mixer in mixers(student).values() for p in mixer.parameters()], lr=1e-2)

for step in range(steps):
    input_ids = samples[torch.randint(len(samples), (batch,))]  # (b, l)
    seen = limbeck.observe(teacher, input_ids)
    loss = torch.zeros(())
    for layer_idx, signals in enumerate(seen):
        student_output = limbeck.run_layer(student, layer_idx, signals.block_input)
        transfer_matrix = student_output.mixing_matrix  # (b, h, l, l)
        attn_matrix = signals.attention_matrix()  # (b, h, l, l)
        loss = loss + torch.linalg.matrix_norm(transfer_matrix - attn_matrix, ord="fro").mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step:3d}  loss {loss.item():.4f}")
