"""What a user of PEFT writes: a model, an adapter, a few steps, `save_pretrained`.

python tests/peft/peft_script.py MODEL OUTPUT
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model, LoraConfig
from transformers import BertModel


torch.manual_seed(0)
model = BertModel.from_pretrained(sys.argv[1], add_pooling_layer=False)
config = LoraConfig(
    r=6,
    lora_alpha=9,
    lora_dropout=0.1,
    target_modules=["query", "value", "intermediate.dense"],
    rank_pattern={"layer.2.attention.self.query": 3},
    alpha_pattern={"value": 4},
)
model = get_peft_model(model, config)
tokens = torch.randint(0, 30_000, (3, 12))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(5):
    optimizer.zero_grad()
    model(tokens).last_hidden_state.square().mean().backward()
    optimizer.step()
model.eval()
output = Path(sys.argv[2])
model.save_pretrained(output)
with torch.no_grad():
    outputs = model(tokens).last_hidden_state
np.savez(output / "expected.npz", tokens=tokens.numpy(), outputs=outputs.numpy())
