"""Vital signs of a network in training: what its activations, gradients and updates look like, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from warmctl import distributed
from warmctl.follow.activations import Activations, spread
from warmctl.follow.backward_pass import BackwardPass
from warmctl.follow.follower import Levers
from warmctl.follow.kept import whole
from warmctl.follow.sampling import Sample
from warmctl.numeric import is_count
from warmctl.vectors import local, squares, strided
from warmctl.warning import warn

WEIGHTS = 4096
"""Entries of a layer's weight that its relative update is read from."""


class Vitals:
    """Readings of one step in `every`, and of steps after a probe; it moves nothing, so it also follows with
    `control=False`.

    Readings, columns of the history in the rows of sampled steps, which `plot` draws; `opt.metrics` has the latest. By
    layer:

    - `vitals/LAYER/sigma`: of a LayerNorm, RMSNorm or GroupNorm, the standard deviation of its input (root mean square
      for RMSNorm), mean over rows: gradients are multiplied by 1/σ there.
    - `vitals/LAYER/saturated`: share of outputs beyond ±.97 of a Tanh, outside of [.03, .97] of a Sigmoid.
    - `vitals/LAYER/dead`: share of a ReLU's units (channels, features) that are 0 on the whole batch.
    - `vitals/LAYER/gradient`: norm of the weight's gradient, as the update will use it.
    - `vitals/LAYER/update`: ‖Δw‖/‖w‖ of the update before this step.

    And of the whole model:

    - `vitals/gradient_ratio`: first layer's gradient norm over the last's; vanishing where small.
    - `vitals/clipped`: 1 if the gradient was shortened between backward pass and step, else 0, whatever power of two a
      gradient scaler has multiplied it by. Nan with several ranks, which average it between the two.
    - `vitals/float16_headroom`: 65504 over the largest entry of the gradient as the backward pass left it, so with the
      scaler's scale in it; below 1 float16 overflows. `vitals/float16_underflow`: share of its nonzero entries below
      2⁻²⁴, which float16 has no number for.

    Only modules are seen: `F.relu` has no name. Activations are those of the first forward pass of the step. Inside
    compiled modules they are not seen at all; of a sharded model gradients and updates are those of this process's
    part. Both are said once, in a warning.

    Cost: hooks are there only in the sampled step, see docs/during.md for figures. Memory: 16 KiB a layer from the step
    before a sample to the sample; nothing else is kept.

    >>> opt = AdaptiveWarmup(optimizer, model).follow(Vitals(model, every=10))
    >>> train(opt)
    >>> opt.metrics["vitals/1/saturated"] < 0.5, opt.metrics["vitals/clipped"]
    (True, 0.0)

    Args:
        model: to look at.
        every: steps from sample to sample; after a probe a fifth of them will do.
        layers: how many of each kind are looked at, evenly over the depth, the first and the last among them.

    Attributes:
        sampled: steps that were.

    Raises: TypeError unless given a module, ValueError for one without trainable weights, or for numbers below 1.
    """

    moves = False

    def __init__(self, model: nn.Module, every: int = 100, layers: int = 8) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, value in (("every", every), ("layers", layers)):
            if not is_count(value):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.every, self.sampled = every, 0
        weights = _weights(model)
        if not weights:
            raise ValueError(f"{type(model).__name__} has no trainable weight: there is nothing for Vitals to look at")
        self.weights = dict(spread(list(weights.items()), layers))
        matrices = list(weights.values())
        self._ends = matrices[0], matrices[-1]
        self._samples = {name: Sample([weight], WEIGHTS) for name, weight in self.weights.items()}
        self._activations = Activations(model, layers)
        self._backward = BackwardPass([p for p in model.parameters() if p.requires_grad])
        self._levers: Levers | None = None
        self._since, self._before = 0, {}  # type: int, dict[str, Tensor]
        self._row: dict[str, float] = {}
        self._said = False
        if distributed.is_sharded(matrices):
            warn("warmctl: of a sharded model Vitals sees this process's part of gradients and updates")
        if self._activations.hidden:
            warn("warmctl: Vitals does not see activations inside of compiled modules, only gradients and updates")

    def attach(self, levers: Levers) -> None:
        self._levers = levers
        self._watch()

    def detach(self) -> None:
        self._activations.stop()
        self._backward.stop()
        self._before = {}

    def follow(self, scale: float, rate: float, phase: str) -> None:
        assert self._levers is not None
        self._row = self._sample() if self._backward.watching else {}
        self._since = 0 if self._row else self._since + 1
        soon = self.every // 5 if self._levers.probed else self.every
        if self._since + 1 >= soon:  # the coming step
            self._before = {name: self._samples[name].take([weight]) for name, weight in self.weights.items()}
            self._watch()

    def readings(self) -> dict[str, float]:
        return self._row

    def state_dict(self) -> dict[str, float]:
        return {"since": float(self._since), "watching": float(self._backward.watching)}

    def load_state_dict(self, values: dict[str, float]) -> None:
        """The relative update of a sample that a checkpoint falls before is nan: the weights of before are gone."""
        self._since = whole("since", values["since"])
        self.detach()
        if values["watching"]:
            self._watch()

    def _watch(self) -> None:
        self._activations.watch()
        self._backward.watch()

    @torch.no_grad()
    def _sample(self) -> dict[str, float]:
        row = self._activations.take()
        if self._activations.columns and not row and not self._said:
            self._said = True
            warn("warmctl: no forward pass went through the modules that Vitals looks at; are they compiled?")
        gradients = _norms([weight.grad for weight in self.weights.values()])
        for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True):
            row[f"vitals/{name}/gradient"] = gradient
            now, before = self._samples[name].take([weight]), self._before.get(name)
            moved = math.nan if before is None else float((now - before).norm() / before.norm())
            row[f"vitals/{name}/update"] = moved
        first, last = _norms([weight.grad for weight in self._ends])
        row["vitals/gradient_ratio"] = first / last if last > 0.0 else math.nan
        row |= self._backward.take()
        self._before = {}
        self.sampled += 1
        return row


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Trainable matrices by layer, in the order of definition; vectors where a model has no others."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.numel()]
    chosen = [(n, p) for n, p in named if p.ndim >= 2] or named
    names = [name.removesuffix(".weight") for name, _ in chosen]
    return dict(zip(names, (p for _, p in chosen), strict=True))


def _norms(gradients: Sequence[Tensor | None]) -> list[float]:
    """Nan where there is none."""
    held = [strided(local(g)) for g in gradients if g is not None]
    found = iter(squares(held).sqrt().tolist() if held else [])
    return [math.nan if g is None else next(found) for g in gradients]
