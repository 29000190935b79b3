"""Why did it fail? Three runs on scikit-learn's digits, logged to CSV as anyone would, and what is said of each.

    python examples/diagnose_runs.py

No run uses the wrapper. The first has a rate that is too high, the second spends most of its steps on warmup.
"""

import csv
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import warmctl

STEPS = 300
RUNS = {"dead": (3.0, 0), "slow": (0.1, 240), "well": (0.1, 30)}

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def run(name: str, peak: float, warmup: int) -> None:
    """Train with a linear warmup and cosine decay, and write NAME.csv."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9)
    with open(f"{name}.csv", "w", newline="") as stream:
        log = csv.writer(stream)
        log.writerow(["step", "train_loss", "learning_rate", "grad_norm"])
        for step in range(1, STEPS + 1):
            done = (step - warmup) / (STEPS - warmup)
            rate = peak * (step / warmup if step <= warmup else 0.5 * (1 + math.cos(math.pi * done)))
            optimizer.param_groups[0]["lr"] = rate
            batch = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
            optimizer.step()
            log.writerow([step, loss.item(), rate, norm.item()])


if __name__ == "__main__":
    for name, (peak, warmup) in RUNS.items():
        run(name, peak, warmup)
        print(f"{name}.csv: {warmctl.diagnose(f'{name}.csv')}\n")
