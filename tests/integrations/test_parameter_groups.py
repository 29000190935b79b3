"""Parameter groups as timm and torchtitan build them: no decay for some, a rate for each layer or pattern."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from warmctl import AdaptiveWarmup, stability_threshold

STEPS = 120
Groups = list[dict[str, Any]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


def layerwise(model: nn.Module, weight_decay: float = 0.3, layer_decay: float = 0.6) -> Groups:
    """As `timm.optim.param_groups_layer_decay`: by depth and by decay, with `lr_scale` for timm's schedulers."""
    depth = {"embed": 0, "blocks.0": 1, "blocks.1": 2, "head": 3}
    groups: dict[str, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        layer = next(number for prefix, number in depth.items() if name.startswith(prefix))
        decay = weight_decay if p.ndim > 1 else 0.0
        settings = {"lr_scale": layer_decay ** (3 - layer), "weight_decay": decay, "params": []}
        groups.setdefault(f"layer_{layer}_{decay}", settings)["params"].append(p)
    return list(groups.values())


def by_pattern(model: nn.Module) -> Groups:
    """As torchtitan's `OptimizersContainer`: the first pattern that matches a parameter's name has it."""
    settings = {
        r"\.bias$|\.0\.weight$": {"lr": 1e-2, "weight_decay": 0.0},
        r"^embed\.": {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.95)},
        r".*": {"lr": 6e-3, "weight_decay": 0.1},
    }
    groups: Groups = [{"params": [], **options} for options in settings.values()]
    for name, p in model.named_parameters():
        groups[next(i for i, pattern in enumerate(settings) if re.search(pattern, name))]["params"].append(p)
    return groups


def timm_schedule(opt: Optimizer, step: int) -> None:
    """timm's schedulers write the rate of each group in this way, at each step."""
    for group in opt.param_groups:
        group["lr"] = 1e-2 * (1 - 0.5 * step / STEPS) * group["lr_scale"]


def linear_schedule(opt: Optimizer, step: int) -> None:
    for group in opt.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - 0.5 * step / STEPS)


generator = torch.Generator().manual_seed(1)
X = torch.randn(1024, 16, generator=generator)
Y = (X @ torch.randn(16, 8, generator=generator)).argmax(-1)


def train(model: nn.Module, opt: Any, schedule: Callable[[Optimizer, int], None]) -> float:
    for step in range(STEPS):
        rows = torch.randint(len(X), (64,), generator=torch.Generator().manual_seed(step))

        def closure(rows: Tensor = rows) -> Tensor:
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(X[rows]), Y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        schedule(opt, step)
        opt.step(closure)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(X), Y))


@pytest.mark.stack("timm-style groups", "one line changed")
@pytest.mark.stack("timm-style groups", "level with bare")
@pytest.mark.stack("torchtitan-style groups", "one line changed")
@pytest.mark.stack("torchtitan-style groups", "level with bare")
@pytest.mark.parametrize(
    ("build", "schedule", "count"), [(layerwise, timm_schedule, 8), (by_pattern, linear_schedule, 3)]
)
def test_every_group_has_its_own_rate_times_the_scale(
    build: Callable[[nn.Module], Groups], schedule: Callable[[Optimizer, int], None], count: int
) -> None:
    bare = Net()
    start = float(nn.functional.cross_entropy(bare(X), Y).detach())
    reached = train(bare, AdamW(build(bare), lr=1e-2), schedule)

    model = Net()
    opt = AdaptiveWarmup(AdamW(build(model), lr=1e-2), model)
    rates: list[tuple[list[float], list[float]]] = []

    def scheduled(opt: Optimizer, step: int) -> None:
        schedule(opt, step)
        rates.append(([group["lr"] for group in opt.param_groups], []))

    opt.register_step_post_hook(lambda base, *_: rates[-1][1].extend(group["lr"] for group in base.param_groups))
    ours = train(model, opt, scheduled)

    assert len(opt.param_groups) == count and len(set(rates[0][0])) > 2
    for (written, applied), scale in zip(rates, opt.history["scale"], strict=True):
        assert applied == pytest.approx([rate * scale for rate in written], rel=1e-12)
    assert min(opt.history["scale"]) < 0.5 and opt.phase != "warmup"
    assert [group["lr"] for group in opt.param_groups] == rates[-1][0]
    decays = [group["lr"] * group["weight_decay"] for group in opt.param_groups]
    edges = [
        2 * (1 + g["betas"][0]) / (1 - g["betas"][0]) * (1 - d / 2)
        for g, d in zip(opt.param_groups, decays, strict=True)
    ]
    assert stability_threshold(opt) == pytest.approx(edges)
    assert not [row["reason"] for row in opt.history if "failed" in row["reason"]]
    assert start - ours > 0.95 * (start - reached), (start, reached, ours)
