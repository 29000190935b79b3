"""Accelerate: the loop of its own tutorials, with gradient accumulation and a loss outside of the model.

    python examples/accelerate_loop.py                 (or: accelerate launch examples/accelerate_loop.py)

Wrap the optimizer, then prepare it. As the model does not return its loss, the wrapper is given a `loss_fn` and shown
each batch by `observe`. The peak rate is far too high: bare, the loss ends where every class is as likely (2.30).
`control=False` only measures: that run is AdamW's own, bit for bit.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmctl import AdaptiveWarmup
from warmctl.integrations import scalars, unwrap

PEAK_RATE, EPOCHS = 1.0, 8

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train_set, (x_test, y_test) = TensorDataset(x[:1437], y[:1437]), (x[1437:], y[1437:])


def loss_fn(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


def run(control: bool) -> tuple[float, float]:
    """Loss on held-out images, before and after training."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE)
    optimizer = AdaptiveWarmup(optimizer, model, loss_fn=loss_fn, control=control)  # new
    optimizer.history.to_jsonl(f"accelerate_loop_{'adaptive' if control else 'bare'}.jsonl")
    loader = DataLoader(train_set, batch_size=32, shuffle=True, drop_last=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader) // 2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    @torch.no_grad()
    def evaluate() -> float:
        return F.cross_entropy(model(x_test), y_test).item()

    start = evaluate()
    for epoch in range(EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model, batch)
                accelerator.backward(loss)
                unwrap(optimizer).observe(batch)  # new
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if epoch % 2 == 0:
            now = scalars(optimizer, prefix="")
            print(
                f"epoch {epoch:2}  loss {evaluate():6.3f}  scale {now['scale']:.3f}"
                f"  ratio {now['stability_ratio']:6.2f}  rate {now['lr']:.4f}"
            )
    return start, evaluate()


if __name__ == "__main__":
    print(f"bare AdamW, peak rate {PEAK_RATE}")
    start, bare = run(control=False)
    print("the same with AdaptiveWarmup")
    _, adaptive = run(control=True)
    assert adaptive < 0.5 * start and adaptive < bare
    print(f"held-out loss: {start:.3f} at the start, {bare:.3f} with bare AdamW, {adaptive:.3f} with AdaptiveWarmup")
