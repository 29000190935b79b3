"""DistributedDataParallel: two processes, each with its half of scikit-learn's digits, on the CPU by gloo.

    torchrun --nproc-per-node 2 examples/ddp.py         (python examples/ddp.py is one process)

Probes are reduced over the processes as gradients are, so all take the same decision. The peak rate is far too high:
bare, the loss ends where every class is as likely (2.30). `control=False` only measures: that run is the bare
optimizer's, bit for bit.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from warmctl import AdaptiveWarmup

PEAK_RATE, EPOCHS = 1.0, 8

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train_set, (x_test, y_test) = TensorDataset(x[:1437], y[:1437]), (x[1437:], y[1437:])


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def run(control: bool) -> tuple[float, float]:
    """Loss on held-out images, before and after training."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    model = DistributedDataParallel(body)
    sampler = DistributedSampler(train_set)
    loader = DataLoader(train_set, batch_size=64 // dist.get_world_size(), sampler=sampler, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_RATE, momentum=0.9)
    optimizer = AdaptiveWarmup(optimizer, model, control=control)  # the only new line
    if dist.get_rank() == 0:
        optimizer.history.to_jsonl(f"ddp_{'adaptive' if control else 'bare'}.jsonl")
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))

    @torch.no_grad()
    def evaluate() -> float:
        return F.cross_entropy(body(x_test), y_test).item()

    start = evaluate()
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
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
            ratio, rate = now["stability_ratio"], now["lr"]
            say(f"epoch {epoch}  loss {evaluate():6.3f}  scale {now['scale']:.3f}  ratio {ratio:.2f}  rate {rate:.4f}")
    return start, evaluate()


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        print("one process; for two: torchrun --nproc-per-node 2 examples/ddp.py")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    say(f"bare SGD, peak rate {PEAK_RATE}")
    start, bare = run(control=False)
    say("the same with AdaptiveWarmup")
    _, adaptive = run(control=True)
    assert adaptive < 0.5 * start and adaptive < bare
    say(f"held-out loss: {start:.3f} at the start, {bare:.3f} with bare SGD, {adaptive:.3f} with AdaptiveWarmup")
    dist.destroy_process_group()
