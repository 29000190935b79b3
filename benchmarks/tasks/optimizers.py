"""The optimizers of the tasks, with their constants drawn; two of them have no update rule that warmctl knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RMSprop

from benchmarks.tasks.families import Draw

Rule = Callable[..., Optimizer]


class Lion(Optimizer):
    """The sign of an average of gradients (Chen et al. 2023, arXiv 2302.06675), with decoupled decay."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(average.lerp(p.grad, 1 - beta1).sign_(), alpha=-group["lr"])
                average.lerp_(p.grad, 1 - beta2)
        return loss


class Muon(Optimizer):
    """Orthogonalised momentum for matrices, the momentum's sign for the rest (after Jordan et al. 2024)."""

    def __init__(self, params: Iterable[Any], lr: float, momentum: float, steps: int = 4) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                p.add_(_direction(buffer, group["steps"]), alpha=-group["lr"])
        return loss


def _direction(momentum: Tensor, steps: int) -> Tensor:
    """Of root mean square near 1/5 for matrices, as an update by Adam has it, by Newton–Schulz; else the sign."""
    if momentum.dim() < 2:
        return 0.2 * momentum.sign()
    matrix = momentum.flatten(1)
    x = matrix / (matrix.norm() + 1e-12)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    return x.reshape(momentum.shape) * (0.2 * max(matrix.shape) ** 0.5)


def _sgd(draw: Draw) -> Rule:
    return partial(SGD, weight_decay=draw.one_of("weight decay", (0.0, 0.0, 1e-4, 1e-3)))


def _momentum(draw: Draw) -> Rule:
    return partial(_sgd(draw), momentum=draw.one_of("momentum", (0.8, 0.9, 0.9, 0.95)))


def _nesterov(draw: Draw) -> Rule:
    return partial(_momentum(draw), nesterov=True)


def _betas(draw: Draw) -> tuple[float, float]:
    return draw.one_of("beta1", (0.8, 0.9, 0.9, 0.95)), draw.one_of("beta2", (0.95, 0.99, 0.999, 0.999))


def _adam(draw: Draw) -> Rule:
    eps, amsgrad = draw.one_of("eps", (1e-8, 1e-8, 1e-6)), draw.one_of("amsgrad", (False, False, False, True))
    return partial(Adam, betas=_betas(draw), eps=eps, amsgrad=amsgrad)


def _adamw(draw: Draw) -> Rule:
    return partial(AdamW, betas=_betas(draw), weight_decay=draw.one_of("weight decay", (0.01, 0.1, 0.3)))


def _nadam(draw: Draw) -> Rule:
    return partial(NAdam, betas=_betas(draw))


def _rmsprop(draw: Draw) -> Rule:
    alpha, momentum = draw.one_of("alpha", (0.9, 0.99)), draw.one_of("momentum", (0.0, 0.0, 0.9))
    return partial(RMSprop, alpha=alpha, momentum=momentum, centered=draw.one_of("centered", (False, False, True)))


def _adagrad(draw: Draw) -> Rule:
    return partial(Adagrad, initial_accumulator_value=draw.one_of("initial", (0.0, 0.0, 0.1)))


def _adamax(draw: Draw) -> Rule:
    return partial(Adamax, betas=_betas(draw))


def _adafactor(draw: Draw) -> Rule:
    return partial(Adafactor, weight_decay=draw.one_of("weight decay", (0.0, 0.01)))


def _lion(draw: Draw) -> Rule:
    betas = (0.9, draw.one_of("beta2", (0.98, 0.99)))
    return partial(Lion, betas=betas, weight_decay=draw.one_of("weight decay", (0.0, 0.1, 1.0)))


def _muon(draw: Draw) -> Rule:
    return partial(Muon, momentum=draw.one_of("momentum", (0.9, 0.95)))


OPTIMIZERS: dict[str, Callable[[Draw], Rule]] = {
    "SGD": _sgd,
    "momentum": _momentum,
    "Nesterov": _nesterov,
    "Adam": _adam,
    "AdamW": _adamw,
    "NAdam": _nadam,
    "RMSprop": _rmsprop,
    "Adagrad": _adagrad,
    "Adamax": _adamax,
    "Adafactor": _adafactor,
    "Lion": _lion,
    "Muon": _muon,
}
ORDER = (
    "momentum", "AdamW", "Adam", "SGD", "RMSprop", "AdamW", "Nesterov", "Adam", "Lion", "momentum", "NAdam", "Adagrad",
    "AdamW", "momentum", "Muon", "Adamax", "Adafactor",
)  # fmt: skip
"""The turns of the optimizers; 17, so that in 14 families each meets each."""
GROUPS = {
    "SGD, momentum, Nesterov": ("SGD", "momentum", "Nesterov"),
    "Adam, AdamW, NAdam, Adamax": ("Adam", "AdamW", "NAdam", "Adamax"),
    "RMSprop, Adagrad": ("RMSprop", "Adagrad"),
    "Adafactor, Lion, Muon": ("Adafactor", "Lion", "Muon"),
}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
