"""Train LoRA adapters with PEFT, save and merge them: `python examples/peft_adapters.py`.

Writes adapter/ and merged.safetensors into the current folder.
"""

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_model

from fused_adam import FusedAdamW

base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"]))
optimizer = FusedAdamW(model.parameters(), lr=3e-4, flatten=True)
for _ in range(3):
    loss = model(torch.randn(4, 64)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"last loss {loss.item():.4f}")
model.save_pretrained("adapter")
save_model(model.merge_and_unload(), "merged.safetensors")
