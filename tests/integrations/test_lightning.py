"""Lightning and Fabric: clipping, checkpoints, automatic and manual optimization, steps inside
backward.
"""

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from training import results, same_bits

from bench.harness.oracle import Options, tolerance
from fused_adam import FusedAdamW, step_in_backward

LR, CLIP, PARTS, BATCHES = 1e-2, 0.05, 2, 8  # micro-batches per step, and in an epoch
STEPS = BATCHES // PARTS
ATOL = tolerance(torch.float32, STEPS, Options(lr=LR, weight_decay=0.01), roundings=4)["param"]


class Automatic(lightning.LightningModule):
    def __init__(self, optimizer_class, options):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(6, 33), nn.GELU(), nn.Linear(33, 3))
        self.optimizer_class, self.options = optimizer_class, options

    def training_step(self, batch, index):
        return self.network(batch).square().mean()

    def configure_optimizers(self):
        optimizer = self.optimizer_class(self.parameters(), lr=LR, **self.options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        return torch.utils.data.DataLoader(
            torch.randn(2 * BATCHES, 6, generator=generator), batch_size=2
        )


class Manual(Automatic):
    """The same training, with the loop's calls made by hand."""

    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, index) / PARTS)
        if (index + 1) % PARTS == 0:
            self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


def fit(folder, options, module=Automatic, *, clip=CLIP, resume=None, cls=FusedAdamW, **settings):
    """Train; Lightning clips and accumulates under automatic optimization, the module itself under
    manual.
    """
    model = module(cls, options)
    loop = (
        {"gradient_clip_val": clip, "accumulate_grad_batches": PARTS}
        if model.automatic_optimization
        else {}
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **loop, **settings},
    )
    trainer.fit(model, ckpt_path=resume)
    return model, trainer.optimizers[0]


@pytest.mark.parametrize("module", [Automatic, Manual])
@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({}, "32-true"),
        ({"flatten": True}, "32-true"),
        ({}, "bf16-mixed"),
        ({"precision": "split32-bf16", "flatten": True}, "bf16-true"),
        ({"precision": "split24-int8", "seed": 3}, "bf16-true"),
    ],
    ids=str,
)
def test_resuming_from_a_checkpoint(options, precision, module, tmp_path):
    """Weights, moments and learning rates have the bits of a training that was never stopped."""
    _, whole = fit(tmp_path / "whole", options, module, max_epochs=2, precision=precision)
    saved = tmp_path / "whole" / "epoch=0.ckpt"
    model, rest = fit(
        tmp_path / "rest", options, module, max_epochs=2, precision=precision, resume=saved
    )
    assert same_bits(results(rest), results(whole))
    assert all(entry["step"] == 2 * STEPS for entry in results(rest))
    assert (
        rest.param_groups[0]["lr"]
        == whole.param_groups[0]["lr"]
        == pytest.approx(LR * 0.9 ** (2 * STEPS))
    )
    buffers = rest._engine.flat
    assert buffers is None or all(buffers.find(param, param.grad) for param in model.parameters())


def weights(folder, options, **how):
    return [param.detach() for param in fit(folder, options, **how)[0].parameters()]


AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def plain(precision, options=None, clip=CLIP, scaler=None):
    """The same training as a loop without Lightning."""
    model = Automatic(FusedAdamW, options or {})
    parts = model.configure_optimizers()
    optimizer, scheduler = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for index, batch in enumerate(model.train_dataloader()):
        with torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            loss = Automatic.training_step(model, batch, index)
        scaler.scale(loss / PARTS).backward()
        if (index + 1) % PARTS == 0:
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
    return results(optimizer)


@pytest.mark.parametrize("module", [Automatic, Manual])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_clips_at_our_defaults(precision, module, tmp_path):
    """It trains as the plain loop does, in bits; without a clip the loop gives other weights."""
    _, optimizer = fit(tmp_path, {}, module, precision=precision)
    assert same_bits(results(optimizer), plain(precision))
    assert not same_bits(results(optimizer), plain(precision, clip=100.0))


@pytest.mark.parametrize(
    ("options", "clip"), [({}, CLIP), ({"max_grad_norm": CLIP}, None)], ids=str
)
@pytest.mark.parametrize("flatten", [False, True])
def test_grad_scaler(options, clip, flatten, tmp_path):
    """float16, in which the first steps overflow: skipped under Lightning as in the plain loop."""
    options = {**options, "flatten": flatten}
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**17) for _ in range(2)]
    _, optimizer = fit(
        tmp_path, options, clip=clip, plugins=MixedPrecision("16-mixed", "cpu", scalers[0])
    )
    expected = plain("16-mixed", options, clip, scalers[1])
    assert same_bits(results(optimizer), expected)
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert 0 < expected[0]["step"] < STEPS


def test_near_torch(tmp_path):
    ours, theirs = (weights(tmp_path, {}, cls=cls) for cls in (FusedAdamW, torch.optim.AdamW))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL)


def test_clipping_inside_the_step_instead(tmp_path):
    inside = weights(tmp_path, {"max_grad_norm": CLIP}, clip=None)
    torch.testing.assert_close(inside, weights(tmp_path, {}), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(torch.optim.AdamW, {"fused": True}), (FusedAdamW, {"max_grad_norm": CLIP})],
    ids=str,
)
def test_both_clippings_at_once_are_refused(cls, options, tmp_path):
    """By Lightning, under mixed precision, as for torch's fused step: it would clip gradients still
    scaled.
    """
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(tmp_path, options, cls=cls, precision="bf16-mixed")


# --- What methods of the wrapped optimizer set, the optimizer itself goes by


class InBackward(Automatic):
    """Lightning runs backward in the closure that it gives to `step`."""

    def on_train_start(self):
        self.handle = step_in_backward(self, self.optimizers())

    def on_before_zero_grad(self, optimizer):
        assert all(param.grad is None for param in self.parameters())


class ManualInBackward(Manual):
    """Steps inside backward, and state that is on the host between two steps."""

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        if index == 0:
            self.handle = step_in_backward(self, optimizer)
        self.manual_backward(Automatic.training_step(self, batch, index))
        assert all(param.grad is None for param in self.parameters())
        optimizer.step()
        self.lr_schedulers().step()
        optimizer.offload()
        with pytest.raises(RuntimeError, match=r"offloaded to the host: call reload\(\)"):
            optimizer.step()
        optimizer.reload()


def each_batch_a_step(optimizer_class=FusedAdamW):
    """The loop without Lightning, with steps after backward."""
    model = Automatic(optimizer_class, {})
    parts = model.configure_optimizers()
    for index, batch in enumerate(model.train_dataloader()):
        model.training_step(batch, index).backward()
        parts["optimizer"].step()
        parts["optimizer"].zero_grad()
        parts["lr_scheduler"]["scheduler"].step()
    return results(parts["optimizer"])


@pytest.mark.parametrize("module", [InBackward, ManualInBackward])
def test_steps_inside_backward(module, tmp_path):
    settings = {} if module is ManualInBackward else {"accumulate_grad_batches": 1}
    model, optimizer = fit(tmp_path, {}, module, clip=None, **settings)
    assert same_bits(results(optimizer), each_batch_a_step())
    model.handle.remove()
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_fabric_steps_inside_backward_and_offloads():
    fabric = Fabric(accelerator="cpu", devices=1)
    plain = Automatic(FusedAdamW, {})
    parts = plain.configure_optimizers()
    model, wrapped = fabric.setup(plain.network, parts["optimizer"])
    assert isinstance(wrapped, FusedAdamW) and wrapped is not parts["optimizer"]
    handle = step_in_backward(model, wrapped)
    for index, batch in enumerate(plain.train_dataloader()):
        if index == BATCHES // 2:  # the rest with steps after backward, by the optimizer itself
            handle.remove()
        fabric.backward(model(batch).square().mean())
        assert all((param.grad is None) == (index < BATCHES // 2) for param in model.parameters())
        (wrapped if index % 2 else parts["optimizer"]).step()
        wrapped.zero_grad()
        parts["lr_scheduler"]["scheduler"].step()
        wrapped.offload()
        for either in (wrapped, parts["optimizer"]):
            with pytest.raises(RuntimeError, match=r"offloaded to the host: call reload\(\)"):
                either.step()
        wrapped.reload()
    assert same_bits(results(parts["optimizer"]), each_batch_a_step())
