"""Lightning: a LightningModule on scikit-learn's digits, Adam, cosine decay by the step.

    python examples/lightning_module.py

`configure_optimizers` returns the wrapped optimizer; Lightning hands `step` a closure of its own, so nothing else
changes. The callback WarmupLogger logs the wrapper's numbers and keeps probes out of what training_step logs. The peak
rate is far too high: bare Adam ends where every class is as likely (2.30). `control=False` only measures: that run is
Adam's own, bit for bit.
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmctl import AdaptiveWarmup
from warmctl.integrations.lightning import WarmupLogger

PEAK_RATE, EPOCHS = 1.0, 6

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
train_set, val_set = TensorDataset(x[:1437], y[:1437]), TensorDataset(x[1437:], y[1437:])


class Digits(pl.LightningModule):
    def __init__(self, control: bool):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.control = control

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs), targets)

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        self.log("val_loss", F.cross_entropy(self.net(inputs), targets))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=PEAK_RATE)
        optimizer = AdaptiveWarmup(optimizer, self, control=self.control)  # the only new line
        optimizer.history.to_jsonl(f"lightning_module_{'adaptive' if self.control else 'bare'}.jsonl")
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


class Print(pl.Callback):
    def on_validation_end(self, trainer, module):
        m = trainer.callback_metrics
        if "warmup/scale" in m:
            print(f"epoch {trainer.current_epoch}  loss {m['val_loss']:6.3f}  scale {m['warmup/scale']:.3f}", end="")
            print(f"  ratio {m['warmup/stability_ratio']:.2f}")


def run(control: bool) -> tuple[float, float]:
    """Loss on held-out images, before and after training."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[WarmupLogger(), Print()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, val = Digits(control), DataLoader(val_set, batch_size=len(val_set))
    start = trainer.validate(model, val, verbose=False)[0]["val_loss"]
    trainer.fit(model, DataLoader(train_set, batch_size=64, shuffle=True), val)
    return start, float(trainer.callback_metrics["val_loss"])


if __name__ == "__main__":
    print(f"bare Adam, peak rate {PEAK_RATE}")
    start, bare = run(control=False)
    print("the same with AdaptiveWarmup")
    _, adaptive = run(control=True)
    assert adaptive < 0.5 * start and adaptive < bare
    print(f"held-out loss: {start:.3f} at the start, {bare:.3f} with bare Adam, {adaptive:.3f} with AdaptiveWarmup")
