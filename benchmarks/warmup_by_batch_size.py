"""Does the warmup that T_w(B) asks for at a batch size end lower than a shorter or a longer one?

    python -m benchmarks.warmup_by_batch_size

Adam with β₂ = 0.95 on a tanh MLP with noisy labels, 300 steps and a cosine decay, at four batch sizes; the peak rate is
scaled linearly from 0.001 at 16. Each is trained with linear warmups of 0 to 4 T_w(B), in eight seeds that share their
batches over warmups. The figure is the loss on held-out rows. Takes a minute; nothing is written.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.harness.results import table
from warmctl.planning.batch_size import scaled_rate, second_moment_steps

SIZES, TIMES = (16, 64, 256, 1024), (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
RATE, BETA2, STEPS, SEEDS = 1e-3, 0.95, 300, 8
STUDENT = 2.36
"""Of the 95 % interval of a mean of eight."""
WIDTHS = 16, 48, 48, 8


def rows(generator: torch.Generator, teacher: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of every seed: inputs, and classes by a noisy linear teacher."""
    x = torch.randn(SEEDS, size, WIDTHS[0], generator=generator)
    scores = x @ teacher
    return x, (scores + torch.randn(scores.shape, generator=generator)).argmax(-1)


def losses(params: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """One a seed; the nets of all seeds are trained side by side."""
    for place, (weight, bias) in enumerate(zip(params[::2], params[1::2], strict=True)):
        x = torch.baddbmm(bias, torch.tanh(x) if place else x, weight)
    return F.cross_entropy(x.transpose(1, 2), y, reduction="none").mean(1)


def trained(size: int, warmup: int) -> Tensor:
    """Held-out losses of the seeds."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(SEEDS, WIDTHS[0], WIDTHS[-1], generator=generator)
    params = []
    for into, out in pairwise(WIDTHS):
        bound = 1 / math.sqrt(into)
        params += [torch.empty(SEEDS, n, out).uniform_(-bound, bound, generator=generator) for n in (into, 1)]
    held_out = rows(generator, teacher, 2048)
    optimizer = torch.optim.Adam([p.requires_grad_() for p in params], scaled_rate(RATE, SIZES[0], size), (0.9, BETA2))
    scheduler = LambdaLR(
        optimizer,
        lambda t: min(1.0, (t + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * t / STEPS)),
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses(params, *rows(generator, teacher, size)).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return losses(params, *held_out)


def main() -> None:
    """Print, for each batch size, the loss at T_w(B) and by how much each other warmup ends above it."""
    torch.set_num_threads(1)
    found = []
    for size in SIZES:
        steps = second_moment_steps(BETA2, SIZES[0], size)
        ends = {times: trained(size, round(times * steps)) for times in TIMES}
        row = {"B": size, "rate": scaled_rate(RATE, SIZES[0], size), "T_w(B)": steps, "loss": float(ends[1.0].mean())}
        for times in TIMES:
            if times != 1.0:
                above = ends[times] - ends[1.0]
                half = STUDENT * float(above.std()) / math.sqrt(SEEDS)
                row[f"{times:g} T_w"] = f"{float(above.mean()):+.3f} ± {half:.3f}"
        found.append(row)
    columns = {"B": "{:d}", "rate": "{:.3g}", "T_w(B)": "{:d}", "loss": "{:.3f}"}
    others = {f"{times:g} T_w": "{}" for times in TIMES if times != 1.0}
    table("Held-out loss with a warmup of T_w(B), and above it with others", found, {**columns, **others})


if __name__ == "__main__":
    main()
