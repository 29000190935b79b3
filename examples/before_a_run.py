"""Before a run: what `plan` says of a peak rate, and whether training agrees. No training framework.

    python examples/before_a_run.py

A convolutional net on scikit-learn's digits. At the initialisation the landscape is flat and `plan` finds the peak rate
below the edge; `rate_range`, which trains while the rate rises, sees the sharpness rise and suggests far less. Training
agrees with it. Neither leaves a trace: the weights are compared bit for bit.
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmctl import plan, rate_range

PEAK_RATE = 1.0

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def build() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    loader = DataLoader(TensorDataset(x, y), 64, shuffle=True, generator=torch.Generator().manual_seed(0))
    return model, torch.optim.SGD(model.parameters(), lr=PEAK_RATE, momentum=0.9), loader


def train(rate: float, steps: int = 150) -> float:
    """Loss on all images after some steps at a constant rate."""
    model, optimizer, loader = build()
    optimizer.param_groups[0]["lr"] = rate
    done = 0
    while done < steps:
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            done += 1
    with torch.no_grad():
        return loss_fn(model, (x, y)).item()


if __name__ == "__main__":
    model, optimizer, loader = build()
    before = copy.deepcopy(model.state_dict())
    planned = plan(model, loss_fn, (x[:512], y[:512]), optimizer, total_steps=1000, reference=(0.05, 64))
    print(planned)
    sweep = rate_range(model, loss_fn, loader, optimizer, low=1e-4, high=10.0, steps=100)
    print(f"range test: steepest descent at {sweep.suggestion:.3g}, edge at {sweep.suggestion_by_curvature:.3g}")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    suggested, as_set = train(sweep.suggestion), train(PEAK_RATE)
    assert planned.ratio < 1 and suggested < 0.5 * as_set
    print(f"loss: {suggested:.3f} at the suggested rate, {as_set:.3f} at the peak that was set")
