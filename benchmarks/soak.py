"""A long run: memory stays flat and the record complete.

    python -m benchmarks.soak --steps 20000

Prints resident memory after each tenth; exits with 1 if the second half added more than `MOST` MiB beyond the record's
own rows, or if a row is missing.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
from torch import nn

from warmctl import AdaptiveWarmup

MOST = 32.0
"""MiB that the second half may add."""


def resident() -> float:
    """MiB of this process; Linux alone."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    opt = AdaptiveWarmup(torch.optim.AdamW(model.parameters(), 0.01), model)
    seen = []
    for step in range(1, steps + 1):
        x = torch.randn(32, 8)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            opt.zero_grad()
            loss = nn.functional.mse_loss(model(x), x[:, :1].sin())
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        opt.step(closure)
        if step % max(steps // 10, 1) == 0:
            gc.collect()
            seen.append(resident())
            print(f"step {step}: {seen[-1]:.1f} MiB, phase {opt.phase}, {opt.metrics['probes']} probes", flush=True)
    rows = [int(row["step"]) for row in opt.history]
    complete, added = rows == list(range(1, steps + 1)), seen[-1] - seen[len(seen) // 2]
    print(f"rows {len(rows)} of {steps}, complete: {complete}; the second half added {added:.1f} MiB")
    return 0 if complete and added <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
