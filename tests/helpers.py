"""A tiny training run, and bitwise comparison of everything that it touches; for the tests of the wrapper."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warmctl import AdaptiveWarmup

Batch = tuple[Tensor, Tensor]
FORWARD_COST = 1.0 / 3.0
"""Of a forward pass, in gradient evaluations. A look at the representations is two, after a closure one."""
METRICS = (
    "step", "phase", "scale", "lr", "sharpness", "threshold", "stability_ratio", "representation_change",
    "end_slope", "target", "residual", "hvps", "probes", "overhead", "reason",
)  # fmt: skip


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def noisy_net(seed: int = 0) -> nn.Sequential:
    """Keeps buffers and draws random numbers: batch norm and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def batch_of(step: int, size: int = 16) -> Batch:
    """The mini-batch of a step: the same whoever asks, and the global random streams are not touched."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 6, generator=generator)
    return x, (x[:, :3] > 0).to(x.dtype)


def loss_fn(model: nn.Module, batch: Batch) -> Any:
    return F.mse_loss(model(batch[0]), batch[1])


class OwnLoss(nn.Module):
    """Returns its own loss, as Hugging Face's models do."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or mlp()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": loss_fn(self.net, batch)}


def own_loss(model: nn.Module, batch: Batch) -> Any:
    return model(batch)["loss"]


def sgd(model: nn.Module, rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9)


def monitor(model: nn.Module, base: torch.optim.Optimizer | None = None, **options: Any) -> AdaptiveWarmup:
    """A wrapper that measures at every step and leaves the rate alone."""
    return AdaptiveWarmup(base or sgd(model), model, **({"every": 1, "control": False} | options))


def closure_of(opt: Any, loss: Callable[[], Any]) -> Callable[[], Any]:
    """The closure of the PyTorch documentation round this loss."""

    def closure() -> Any:
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def closure_for(opt: Any, model: Any, batch: Any, loss: Callable[[Any, Any], Any] = loss_fn) -> Callable[[], Any]:
    return closure_of(opt, lambda: loss(model, batch))


def train(opt: Any, model: Any, steps: Iterable[int]) -> list[dict[str, Any]]:
    """Train with closures on the batches of these steps; the wrapper's metrics after each one."""
    rows = []
    for step in steps:
        opt.step(closure_for(opt, model, batch_of(step)))
        rows.append(dict(getattr(opt, "metrics", {})))
    return rows


def weights(model: nn.Module) -> Tensor:
    """A copy of all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def random_streams() -> dict[str, Any]:
    _, words, gauss = random.getstate()
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": (np.array(words), gauss)}


def everything(model: nn.Module, opt: Any) -> dict[str, Any]:
    """All that a probe could leave a trace in, copied."""
    base = opt.base if isinstance(opt, AdaptiveWarmup) else opt
    params = [p for group in base.param_groups for p in group["params"]]
    trace = {
        "weights and buffers": model.state_dict(),
        "all buffers": dict(model.named_buffers()),
        "trained": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in params],
        "state": [{k: v for k, v in base.state.get(p, {}).items() if not k.startswith("warmctl_")} for p in params],
        "lr": [group["lr"] for group in base.param_groups],
        "random": random_streams(),
        "modes": [module.training for module in model.modules()],
        "grad mode": torch.is_grad_enabled(),
    }
    return dict(_copied(trace))


def _copied(tree: Any) -> Any:
    if isinstance(tree, (Tensor, np.ndarray)):
        return torch.as_tensor(tree).detach().clone()
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_copied(value) for value in tree]
    return tree


def _without_nan(tensor: Tensor) -> Tensor:
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    return (torch.view_as_real(dense) if dense.is_complex() else dense).nan_to_num(7.7e7)


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Bit for bit, through any nesting; NaN equals NaN."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor) and found.dtype == expected.dtype, where
        assert torch.equal(_without_nan(found), _without_nan(expected)), where
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}/{index}")
    else:
        both_nan = isinstance(expected, float) and math.isnan(expected) and math.isnan(found)
        assert both_nan or found == expected, f"{where}: {found!r} instead of {expected!r}"
