"""MOHAWK stage 2 by hand: bring what each student layer puts out to what its teacher's layer puts out.

python examples/mohawk_stage2.py                          # a tiny random GPT-NeoX: seconds on a CPU, no network
python examples/mohawk_stage2.py path/to/teacher text.txt # your own teacher, your own text
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import limbeck
from limbeck.students import blocks, mixers

torch.manual_seed(0)
batch, length, steps = 4, 64, 20
freeze_mlp = True  # True compares the mixers' outputs, False the blocks', and then MLPs and norms learn too

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
student.requires_grad_(False)
for part in mixers(student).values() if freeze_mlp else blocks(student):
    part.requires_grad_(True)
optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)

for step in range(steps):
    input_ids = samples[torch.randint(len(samples), (batch,))]  # (b, l)
    seen = limbeck.observe(teacher, input_ids)
    loss = torch.zeros(())
    for layer_idx, signals in enumerate(seen):
        student_output = limbeck.run_layer(student, layer_idx, signals.block_input)
        if freeze_mlp:
            difference = student_output.mixer_output - signals.mixer_output  # (b, l, d)
        else:
            difference = student_output.block_output - signals.block_output
        loss = loss + torch.norm(difference, p=2, dim=-1).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step:3d}  loss {loss.item():.4f}")
