"""What moves with the rate: momentum and the data follow the warmup, and vital signs are recorded.

    python examples/during.py

A convolutional net on scikit-learn's digits, with SGD at ten times the best rate. Bare, all units of a layer are dead
after the first steps, as the vital signs say. With AdaptiveWarmup they live, while momentum rises with the rate and the
data begin with the images that are nearest to the mean of their class. With `control=False` the same followers move
nothing: that run is the bare optimizer's, bit for bit.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmctl import AdaptiveWarmup, Difficulty, EasyFirst, Momentum, Vitals

PEAK_RATE, EPOCHS = 1.0, 12

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train_set, (x_test, y_test) = TensorDataset(x[:1437], y[:1437]), (x[1437:], y[1437:])
means = torch.stack([x[:1437][y[:1437] == digit].mean(0) for digit in range(10)])
unlikeness = (x[:1437] - means[y[:1437]]).flatten(1).norm(dim=1)  # higher is harder


def run(control: bool) -> tuple[float, float]:
    """Loss on held-out images, before and after training."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    sampler = EasyFirst(unlikeness)
    loader = DataLoader(train_set, batch_size=64, sampler=sampler, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_RATE, momentum=0.9)
    optimizer = AdaptiveWarmup(optimizer, model, control=control)
    optimizer.follow(Momentum(low=0.5), Difficulty(sampler, easiest=0.7), Vitals(model, every=20))
    optimizer.history.to_jsonl(f"during_{'adaptive' if control else 'bare'}.jsonl")
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
                f"epoch {epoch:2}  loss {evaluate():6.3f}  scale {now['scale']:.3f}"
                f"  momentum {now.get('momentum', 0.9):.3f}  difficulty {now.get('difficulty', 1.0):.2f}"
                f"  dead units {now['vitals/1/dead']:.2f} and {now['vitals/3/dead']:.2f}"
            )
    return start, evaluate()


if __name__ == "__main__":
    print(f"bare SGD, peak rate {PEAK_RATE}")
    start, bare = run(control=False)
    print("the same with AdaptiveWarmup")
    _, adaptive = run(control=True)
    assert adaptive < 0.5 * start and adaptive < bare
    print(f"held-out loss: {start:.3f} at the start, {bare:.3f} with bare SGD, {adaptive:.3f} with AdaptiveWarmup")
