"""A plain PyTorch loop: a convolutional net on scikit-learn's digits, SGD with momentum, cosine decay, no warmup.

    python examples/plain_loop.py

The peak rate is ten times too high. Bare, the loss goes to where every class is as likely (2.30) and stays there; with
AdaptiveWarmup the same script learns. `control=False` only measures: that run is the bare optimizer's, bit for bit.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmctl import AdaptiveWarmup

PEAK_RATE, EPOCHS = 1.0, 12

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train_set, (x_test, y_test) = TensorDataset(x[:1437], y[:1437]), (x[1437:], y[1437:])


def run(control: bool) -> tuple[float, float]:
    """Loss on held-out images, before and after training."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    loader = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_RATE, momentum=0.9)
    optimizer = AdaptiveWarmup(optimizer, model, control=control)  # the only new line
    optimizer.history.to_jsonl(f"plain_loop_{'adaptive' if control else 'bare'}.jsonl")
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))

    @torch.no_grad()
    def evaluate() -> float:
        return F.cross_entropy(model(x_test), y_test).item()

    start = evaluate()
    for epoch in range(EPOCHS):
        for inputs, targets in loader:

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), targets)
                loss.backward()
                return loss

            optimizer.step(closure)
            decay.step()
        if epoch % 2 == 0:
            now = optimizer.metrics
            print(
                f"epoch {epoch:2}  loss {evaluate():6.3f}  {now['phase']:6}  scale {now['scale']:.3f}"
                f"  ratio {now['stability_ratio']:6.2f}  rate {now['lr']:.4f}"
            )
    return start, evaluate()


if __name__ == "__main__":
    print(f"bare SGD, peak rate {PEAK_RATE}")
    start, bare = run(control=False)
    print("the same with AdaptiveWarmup")
    _, adaptive = run(control=True)
    assert adaptive < 0.5 * start and adaptive < bare
    print(f"held-out loss: {start:.3f} at the start, {bare:.3f} with bare SGD, {adaptive:.3f} with AdaptiveWarmup")
