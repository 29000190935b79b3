"""A small regression, its batches shared out over ranks, and what one process alone knows of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from warmctl import AdaptiveWarmup, sharpness

ROWS, WIDTH, STEPS = 32, 8, 6


class Regressor(nn.Module):
    """Returns its own loss, as Hugging Face's models do."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)
        )
        self.spare = nn.Linear(3, 3) if unused else None

    def forward(self, x: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        if y is None:
            return {"prediction": self.body(x)}
        return {"loss": nn.functional.mse_loss(self.body(x), y)}


def build(seed: int = 0, unused: bool = False) -> Regressor:
    """The same weights on every rank; in float64, where finite differences are good to 1e-7."""
    torch.manual_seed(seed)
    return Regressor(unused).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The whole batch of a step, the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)


def own(step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's rows of a batch, or one of its micro-batches."""
    index = dist.get_rank() * parts + part
    rows = ROWS // (dist.get_world_size() * parts)
    return tuple(t[index * rows : (index + 1) * rows] for t in batch(step))  # type: ignore[return-value]


def wrap(model: nn.Module, known: nn.Module, **options: Any) -> AdaptiveWarmup:
    base = torch.optim.SGD(model.parameters(), lr=8.0, momentum=0.9)
    return AdaptiveWarmup(base, known, **{"every": 1, "probe_steps": 14, **options})


def train(model: nn.Module, opt: AdaptiveWarmup, source: str, steps: range = range(STEPS)) -> None:
    """`steps` steps from a closure, from the model's captured loss, or from `opt.backward`."""
    for step in steps:
        x, y = own(step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss: Tensor = model(x, y)["loss"]
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        if source == "closure":
            opt.step(closure)
        elif source == "captured":
            closure()
            opt.step()
        else:
            opt.zero_grad()
            opt.backward(nn.functional.mse_loss(model(x), y))
            opt.step()


def truth(model: nn.Module, step: int = 0) -> float:
    """λ_max on the whole batch, by one process alone, in float64 by double backward."""

    def loss(m: nn.Module, b: Any) -> Tensor:
        out = m(*b)["loss"] if isinstance(m, Regressor) else nn.functional.mse_loss(m(b[0]), b[1])
        return out

    return sharpness(model, loss, batch(step), tol=1e-8).eigenvalue


def full_weights(model: nn.Module) -> list[float]:
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([w.detach().flatten() for w in whole]).tolist()


def seen(model: nn.Module, opt: AdaptiveWarmup, expected: float) -> dict[str, Any]:
    """Decisions, final weights and failures of a rank, and λ at its first probe beside the truth."""
    rows: list[dict[str, Any]] = list(opt.history)
    return {
        "decisions": [(row["scale"], row["stability_ratio"], row["phase"]) for row in rows],
        "weights": full_weights(model),
        "probes": opt.metrics["probes"],
        "failures": [row["reason"] for row in rows if "failed" in row["reason"]],
        "sharpness": next(row["sharpness"] for row in rows if row["probed"]),
        "expected": expected,
        "method": opt.meter.estimator.method,
    }
