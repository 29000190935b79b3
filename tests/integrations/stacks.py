"""A small classification, and the stacks in which a plain loop trains it: optimizers, groups, a compiled module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from tests.integrations.test_parameter_groups import Net, X, Y, by_pattern, layerwise
from warmctl import AdaptiveWarmup


def _as_it_is(model: nn.Module) -> Any:
    return model


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="aot_eager")


def _muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=2e-2), AdamW(rest, lr=5e-3)]


def _lion(model: nn.Module) -> Any:
    from lion_pytorch import Lion

    return Lion(model.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Stack:
    """`base`: the optimizer of a model, or several, at a rate that suits it; `called`: the module that is called."""

    base: Callable[[nn.Module], Any]
    called: Callable[[nn.Module], Any] = _as_it_is


STACKS = {
    "plain PyTorch": Stack(lambda model: AdamW(model.parameters(), lr=5e-3)),
    "torch.compile": Stack(lambda model: AdamW(model.parameters(), lr=5e-3), _compiled),
    "two optimizers": Stack(_muon_and_adamw),
    "other packages' optimizers": Stack(_lion),
    "timm-style groups": Stack(lambda model: AdamW(layerwise(model), lr=5e-3)),
    "torchtitan-style groups": Stack(lambda model: AdamW(by_pattern(model), lr=5e-3)),
}


class Script:
    """A training in one of the stacks, bare or wrapped. `outer` is DDP; each rank then takes its share of a batch."""

    def __init__(
        self,
        name: str,
        *,
        wrapped: bool = True,
        dtype: torch.dtype = torch.float32,
        outer: Callable[[Any], Any] = _as_it_is,
        **options: Any,
    ) -> None:
        self.rank, self.ranks = (0, 1) if outer is _as_it_is else (dist.get_rank(), dist.get_world_size())
        self.model = Net().to(dtype)
        self.called = outer(STACKS[name].called(self.model))
        base = STACKS[name].base(self.model)
        self.opt: Any = AdaptiveWarmup(base, self.model, **options) if wrapped else base
        self.x = X.to(dtype)

    def train(self, steps: Iterable[int], *, accumulation: int = 1, autocast: bool = False) -> Script:
        optimizers = self.opt if isinstance(self.opt, list) else [self.opt]
        for step in steps:
            rows = torch.randint(len(X), (64,), generator=torch.Generator().manual_seed(step))
            rows = rows.chunk(self.ranks)[self.rank]

            def closure(rows: Tensor = rows) -> Tensor:
                for opt in optimizers:
                    opt.zero_grad()
                total = torch.zeros(())
                for part in rows.chunk(accumulation):
                    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                        loss = cross_entropy(self.called(self.x[part]), Y[part]) / accumulation
                    loss.backward()  # type: ignore[no-untyped-call]
                    total = total + loss.detach()
                return total

            if self.opt in optimizers:
                self.opt.step(closure)
            else:
                closure()
                for opt in optimizers:
                    opt.step()
        return self

    @property
    def loss(self) -> float:
        with torch.no_grad():
            return float(cross_entropy(self.model(self.x), Y))
