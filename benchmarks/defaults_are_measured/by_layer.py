"""A scale for each layer: the law's common one, bounded by how far that layer alone moves what the network computes.

The law holds the RRC of the median layer, and a layer that moves ten times as far has the same rate as one that hardly
moves. Here a layer that moves far is slowed, and the calm ones need not wait for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from warmctl import AdaptiveWarmup
from warmctl.control.controller import CUT, EXCESS, FASTEST, Controller, Reading
from warmctl.control.gauges import ChangeGauge
from warmctl.loss.replay import Replay
from warmctl.rates import ScaledRates
from warmctl.stability.representation import CALLS, UNMOVED, RepresentationChange, _layers

SHARE = "share of the scale"
"""Of a parameter group: its own scale over the common one."""


class LayerChange(RepresentationChange):
    """The median over layers, as ever, and each layer's own beside it: the median over its calls, nan if not seen."""

    by_layer: Sequence[float] = ()

    def _typical(self, size: Tensor, moved: Tensor) -> Tensor:
        change = (moved / size).where(size.isfinite() & (size > 0.0), math.nan)
        seen = change.where(moved.isfinite(), math.inf).where(size.isfinite() & (size > 0.0), math.nan)
        self.by_layer = seen.where(seen > UNMOVED, math.nan).nanmedian(-1).values.tolist()
        return super()._typical(size, moved)


class OwnChange(LayerChange):
    """What a layer's own parameters do: its output now and before, on the input that it had before.

    So no layer answers for what reaches it from below. The forward pass after the update is made as ever, but each
    layer is given its old input. Memory: these inputs.
    """

    inputs: dict[tuple[int, int], Any] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        self.inputs = {}
        with self._hooks(partial(_keep, self.inputs)), super().listening():
            yield

    def before(self, replay: Replay) -> None:
        self.inputs = {}
        with self._hooks(partial(_keep, self.inputs)):
            super().before(replay)

    def after(self, replay: Replay) -> float:
        kept, self.inputs = self.inputs or {}, None
        with self._hooks(lambda place, call, given: kept.get((place, call))):
            return super().after(replay)

    @contextmanager
    def _hooks(self, hook: Callable[[int, int, Any], Any]) -> Iterator[None]:
        """`hook`, with a layer's place, its how-manieth call and its arguments, before each."""
        calls: Counter[int] = Counter()

        def called(place: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
            call, calls[place] = calls[place], calls[place] + 1
            return hook(place, call, (args, kwargs))

        with ExitStack() as stack:
            for place, layer in enumerate(_layers(self.model)):
                handle = layer.register_forward_pre_hook(partial(called, place), with_kwargs=True)
                stack.callback(handle.remove)
            yield


def _keep(inputs: dict[tuple[int, int], Any], place: int, call: int, given: Any) -> None:
    if call < CALLS:  # a copy: what follows may write into it
        inputs[place, call] = tree_map_only(Tensor, lambda t: t.detach().clone(), given)


@dataclass
class Layer:
    """What is known of a layer, its scale, and the one at which warmup ended."""

    change: ChangeGauge = field(default_factory=ChangeGauge)
    scale: float = math.inf
    settled: float = math.inf

    def move(self, bound: float, common: float) -> None:
        """Towards its own bound, by the steps in which the law obeys RRC, and never above the common scale."""
        if EXCESS * bound < self.scale:
            self.scale = max(CUT * self.scale, bound)
        elif bound > self.scale:
            self.scale = min(bound, FASTEST * self.scale)
        self.scale = min(self.scale, common)


class LayerBounds(Controller):
    """r, e and growth decide one scale; each layer has that or the scale that its own RRC allows, the smaller one.

    RRC keeps the common scale below what the calmest layer allows alone. A layer that is not seen has the law's bound.
    """

    layers: Sequence[Layer] = ()
    groups: Sequence[dict[str, Any]] = ()
    seen: Callable[[], Sequence[float]] = tuple

    def changed(self, change: float, rate: float) -> None:
        super().changed(change, rate)
        if not math.isnan(change):
            for layer, group, own in zip(self.layers, self.groups, self.seen(), strict=True):
                if not math.isnan(own):
                    layer.change.take(own, rate * group[SHARE])

    def _bearable(self, rate: float, persistence: float) -> float:
        common = super()._bearable(rate, persistence)
        return max((self._bound(layer, common, rate, persistence) for layer in self.layers), default=common)

    def _bound(self, layer: Layer, common: float, rate: float, persistence: float) -> float:
        if layer.change.known:
            common = self.slope.allowed_change(persistence) / max(layer.change.of(rate), 1e-30)
        return common if self.phase == "warmup" else min(common, layer.settled)

    def _move(self, rate: float, reading: Reading | None, persistence: float) -> str:
        reason = super()._move(rate, reading, persistence)
        common = super()._bearable(rate, persistence)
        for layer, group in zip(self.layers, self.groups, strict=True):
            layer.move(self._bound(layer, common, rate, persistence), self.state.scale)
            layer.settled = layer.scale if self.phase == "warmup" else layer.settled
            group[SHARE] = layer.scale / self.state.scale
        return reason


class LayerRates(ScaledRates):
    """Each group's rate is multiplied by its share too."""

    def scale(self, groups: list[dict[str, Any]], factors: Sequence[float]) -> None:
        super().scale(groups, [factor * group[SHARE] for factor, group in zip(factors, groups, strict=True)])


class ByLayer(AdaptiveWarmup):
    """Each layer is a parameter group of its own. With `LayerBounds`, `LayerRates` and a `LayerChange`."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, **options: Any) -> None:
        places = split(optimizer, model)
        super().__init__(optimizer, model, **options)
        law: Any = self.controller
        law.groups, law.layers = self.param_groups, [Layer() for _ in places]
        law.seen = lambda: [self._own_change(place) for place in places]

    def _own_change(self, place: int | None) -> float:
        change: Any = self.meter.prober._change
        return math.nan if place is None else float(change.by_layer[place])


def split(optimizer: Optimizer, model: nn.Module) -> list[int | None]:
    """Make each layer's part of a group a group, and return their layers' places in the model; None for the rest."""
    place_of: dict[Tensor, int] = {}
    for place, layer in enumerate(_layers(model)):
        for p in layer.parameters(recurse=False):
            place_of.setdefault(p, place)  # a shared one goes with the first
    parts: dict[tuple[int, int | None], dict[str, Any]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            part = parts.setdefault((index, place_of.get(p)), {**group, "params": [], SHARE: 1.0})
            part["params"].append(p)
    optimizer.param_groups[:] = parts.values()
    return [place for _, place in parts]
