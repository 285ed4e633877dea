"""Train with Accelerate, accumulate gradients, save: `python examples/accelerate_loop.py`.

Writes checkpoint/ into the current folder.
"""

import torch
from accelerate import Accelerator

from fused_adam import FusedAdamW

accelerator = Accelerator(gradient_accumulation_steps=2)
model = torch.nn.Linear(8, 8)
optimizer = FusedAdamW(model.parameters(), lr=3e-4)
batches = torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=2)
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
for batch in batches:
    with accelerator.accumulate(model):
        loss = model(batch).square().mean()
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
accelerator.print(f"last loss {loss.item():.4f}")
accelerator.save_state("checkpoint")  # accelerator.load_state("checkpoint") continues from here
