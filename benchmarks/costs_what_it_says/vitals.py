"""What Vitals adds to a step, as a share of it: a command of its own.

    python -m benchmarks.costs_what_it_says.vitals

Processor time of this process, so that whatever else the machine does is left out. Steps of a bare optimizer, steps
with Vitals between samples, and steps that are sampled take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.models import GPT, cnn, mlp
from warmctl import Vitals
from warmctl.follow.followers import Followers

ROUNDS, EVERY = 40, 100


def text_batch() -> tuple[Tensor, Tensor]:
    text = torch.randint(256, (16, 65))
    return text[:, :-1], text[:, 1:].flatten()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "MLP, batch 128": (mlp, lambda: (torch.randn(128, 40), torch.randint(10, (128,)))),
    "convolution, batch 64": (cnn, lambda: (torch.randn(64, 1, 40), torch.randint(10, (64,)))),
    "GPT, 16 × 64 bytes": (GPT, text_batch),
}


def measure(make: Callable[[], nn.Module], batch: Callable[[], tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
    """Seconds of a bare step, and what a step between samples and a sampled one take more."""
    torch.manual_seed(0)
    model, (x, y) = make(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    followers = Followers(optimizer, control=False)
    followers.add([vitals := Vitals(model, every=10**6)], 1.0)

    def step(follow: Callable[[], Any]) -> float:
        start = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y).backward()
        follow()
        optimizer.step()
        return time.process_time() - start

    def told() -> Any:
        return followers.decided(1.0, "warmup", probed=False)

    def told_before_a_sample() -> Any:
        vitals.every = 1
        told()
        vitals.every = 10**6

    step(told)
    kinds: dict[str, list[float]] = {"bare": [], "between": [], "before": [], "sampled": []}
    for _ in range(ROUNDS):
        for kind, follow in (("bare", int), ("between", told), ("before", told_before_a_sample), ("sampled", told)):
            kinds[kind].append(step(follow))
    assert vitals.sampled == ROUNDS + 1
    bare, between, before, sampled = (statistics.median(times) for times in kinds.values())
    return bare, between - bare, before + sampled - 2 * bare


def main() -> None:
    print(f"{'':24}{'bare step':>12}{'between samples':>18}{'a sample':>12}{f'every={EVERY}':>12}")
    for name, case in CASES.items():
        bare, between, sample = measure(*case)
        average = (between + sample / EVERY) / bare
        print(f"{name:24}{1e3 * bare:9.2f} ms{between / bare:17.2%} {sample / bare:11.0%} {average:11.2%}")


if __name__ == "__main__":
    main()
