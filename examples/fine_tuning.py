"""Fine-tuning: a new head first, then thawing the layers beneath it.

    python examples/fine_tuning.py

A convolutional net learns the digits 0 to 4, and is then fine-tuned to tell 5 to 9 apart: first its new head alone,
then, layer by layer from the top, the rest. Thawed parameters have never been measured: the wrapper notices them by
itself and begins warmup again. The rate is far too high: bare, the first steps throw the new head far off and it
hardly comes back. `control=False` only measures: that run is the bare optimizer's, bit for bit.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from warmctl import AdaptiveWarmup

PEAK_RATE, STEPS_A_STAGE = 0.1, 60

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def batch(low: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Random images of the digits low to low + 4 among the first 1437, and their classes 0 to 4."""
    rows = ((y[:1437] >= low) & (y[:1437] < low + 5)).nonzero().flatten()
    rows = rows[torch.randint(len(rows), (size,))]
    return x[rows], y[rows] - low


@torch.no_grad()
def held_out(model: nn.Module) -> float:
    rows = 1437 + (y[1437:] >= 5).nonzero().flatten()
    return F.cross_entropy(model(x[rows]), y[rows] - 5).item()


def pretrained() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(128, 5))
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        inputs, targets = batch(low=0)
        adam.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        adam.step()
    return model


def fine_tune(control: bool) -> tuple[float, float]:
    """Loss on held-out images of 5 to 9, with the new head as it was made and at the end."""
    model = pretrained()
    model[6] = nn.Linear(128, 5)  # the new head
    model[:6].requires_grad_(False)
    start = held_out(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_RATE, momentum=0.9)
    optimizer = AdaptiveWarmup(optimizer, model, control=control)  # the only new line
    optimizer.history.to_jsonl(f"fine_tuning_{'adaptive' if control else 'bare'}.jsonl")
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * STEPS_A_STAGE)
    for name, layer in {"new head": model[6], "second layer": model[2], "first layer": model[0]}.items():
        layer.requires_grad_(True)
        for step in range(STEPS_A_STAGE):
            inputs, targets = batch(low=5)

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), targets)
                loss.backward()
                return loss

            optimizer.step(closure)
            decay.step()
            if step in (0, 10, STEPS_A_STAGE - 1):
                now = optimizer.metrics
                print(f"{name:12}  step {step:3}  loss {held_out(model):7.3f}  {now['phase']:6}", end="")
                print(f"  scale {now['scale']:.3f}  ratio {now['stability_ratio']:.2f}")
    began = [row["step"] for row in optimizer.history if str(row["reason"]).startswith("started")]
    print(f"warmup began at steps {began}")
    return start, held_out(model)


if __name__ == "__main__":
    print(f"bare SGD, rate {PEAK_RATE}")
    start, bare = fine_tune(control=False)
    print("the same with AdaptiveWarmup")
    _, adaptive = fine_tune(control=True)
    assert adaptive < 0.5 * start and adaptive < bare
    print(f"held-out loss: {start:.3f} at the start, {bare:.3f} with bare SGD, {adaptive:.3f} with AdaptiveWarmup")
