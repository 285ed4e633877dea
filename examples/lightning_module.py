"""Train with Lightning: `python examples/lightning_module.py`.

Writes lightning_logs/, with checkpoints, into the current folder.
"""

import lightning
import torch

from fused_adam import FusedAdamW


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def training_step(self, batch, index):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return FusedAdamW(self.parameters(), lr=3e-4, flatten=True)


batches = torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=2)
trainer = lightning.Trainer(max_epochs=2, gradient_clip_val=1.0)
trainer.fit(Model(), batches)  # fit(..., ckpt_path=...) resumes
