"""How far an update moves what the network computes: the relative change of its layers' outputs on the step's batch.

Seen by forward hooks that exist only while the loss is evaluated again, and at steps that are looked at while the
closure is evaluated for the step itself.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from warmctl import distributed
from warmctl.loss.replay import Replay
from warmctl.loss.switches import EAGER
from warmctl.vectors import local

SAMPLE = 4096
"""Entries of an output that are looked at."""
CALLS = 16
"""Calls of one module in one evaluation that are looked at: a recurrent cell has one a position."""
UNMOVED = 1e-6
"""Relative change up to which an output counts as unmoved: kernels that add in no fixed order give as much."""

HOLDERS = nn.ParameterList, nn.ParameterDict
"""Modules that are never called."""

Call = tuple[int, int, torch.Size]
"""The layer's place in the model, its how-manieth call in this evaluation, the shape of its output."""
Samples = dict[Call, Tensor]


class RepresentationChange:
    """The relative representation change of an update: the median over layers of ‖b − a‖ / ‖a‖.

    a is the output of a layer on the step's batch before the update, b after it. A layer is any module that owns a
    parameter, frozen or not, itself or in a `ParameterList`; called several times, it is a layer each time, as an
    unrolled recurrence is. Of a tuple or mapping the first tensor with a dimension is taken. Left out are outputs that
    were exactly zero, whose change has no scale, and those that the update did not move, as in a frozen trunk below the
    layers that are trained.

    Norms are taken on a fixed random sample of `SAMPLE` entries, whole where there are no more. The relative standard
    error of one layer's change is then √((κ − 1) / 2n), κ being the entries' kurtosis: 1.6 % for normal ones, 6 % at a
    kurtosis of 30. Memory between `before` and `after`: 16 KiB for each call of a layer.

    Not seen are scripted modules, losses that go past the forward of modules, and what runs inside torch.func.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._before: Samples | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Look at the outputs of an evaluation that is made anyway, in place of `before`; `heard` then.

        Not heard is what runs compiled. Nothing that goes wrong here reaches the evaluation.
        """
        self.forget()
        sampler = _Sampler()
        with sampler.hooks(self.model, sampler.look_safely):
            yield
        self._before = sampler.samples or None

    @property
    def heard(self) -> bool:
        """Whether there is something to compare with."""
        return bool(self._before)

    @torch.no_grad()
    def before(self, replay: Replay) -> None:
        """Look at the outputs at the present parameters. Cost: one forward pass."""
        self.forget()
        with replay.on_every_rank():
            self._before = self._outputs(replay)

    @torch.no_grad()
    def after(self, replay: Replay) -> float:
        """The change since `before`, which is forgotten: that of the outputs of all ranks. Cost: one forward pass.

        Nan if no layer could be compared; inf if an output is no longer finite. To be called on every rank, also where
        `before` failed: all enter one collective, whatever happens, and all get nan where it failed on one.
        """
        before, self._before = self._before, None
        layers, device = sum(1 for _ in _layers(self.model)), local(replay.params[0]).device
        norms = torch.full((2, max(layers, 1), CALLS), math.nan, dtype=torch.float32, device=device)
        try:
            if before is not None:
                _put_norms(norms, before, self._outputs(replay))
        finally:
            if distributed.world_size() > 1:  # of parts that lie on the ranks, squares add up
                norms = distributed.average(norms.double().square()).sqrt()
        return float(self._typical(*norms))

    def _typical(self, size: Tensor, moved: Tensor) -> Tensor:
        """Over all layers of moved / size; nan if nothing has a size. Waits for no device."""
        change = moved / size
        known = size.isfinite() & (size > 0.0)
        lost = (size.isfinite() & ~moved.isfinite()).any()
        seen = known & (change > UNMOVED)
        found = self._over_layers(change.where(seen, math.nan))
        return found.masked_fill(known.any() & ~seen.any(), 0.0).masked_fill(lost, math.inf)

    @staticmethod
    def _over_layers(change: Tensor) -> Tensor:
        """Of changes by layer and call; nan stands for those left out."""
        return torch.nanquantile(change, 0.5)

    def forget(self) -> None:
        """Drop what `before` has seen."""
        self._before = None

    def _outputs(self, replay: Replay) -> Samples:
        sampler = _Sampler()
        with sampler.watching(self.model, replay):
            replay.value()
        return sampler.samples


class _Sampler:
    """Takes a sample of each layer's output while a loss is evaluated."""

    def __init__(self) -> None:
        self.samples: Samples = {}
        self._calls: Counter[int] = Counter()
        self._drawn: dict[tuple[int, torch.device], Tensor] = {}
        self._thread = threading.get_ident()

    @contextmanager
    def watching(self, model: nn.Module, replay: Replay) -> Iterator[None]:
        """Hooks, and eager modules for them to fire in; nothing is compiled again for that."""
        closure = replay.closure

        def begun_again() -> Any:
            """A replay may find out half way through that it must start anew."""
            self.samples.clear()
            self._calls.clear()
            return closure()

        with ExitStack() as stack:
            stack.enter_context(EAGER)
            stack.callback(setattr, replay, "closure", closure)
            replay.closure = begun_again
            stack.enter_context(self.hooks(model, self._look))
            yield

    @contextmanager
    def hooks(self, model: nn.Module, look: Callable[..., None]) -> Iterator[None]:
        """`look`, with the layer's place before a hook's arguments, at every layer."""
        with ExitStack() as stack:
            for place, layer in enumerate(_layers(model)):
                stack.callback(layer.register_forward_hook(partial(look, place)).remove)
            yield

    def look_safely(self, place: int, module: nn.Module, args: Any, output: Any) -> None:
        """For a forward pass of the user's: what cannot be sampled is left out; compiled code keeps no trace."""
        if torch.compiler.is_compiling():
            return
        with suppress(Exception):
            self._look(place, module, args, output)

    def _look(self, place: int, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread:  # replicas, in no fixed order
            return
        call, self._calls[place] = self._calls[place], self._calls[place] + 1
        found = _representation(output)
        if call < CALLS and found is not None:
            self.samples[place, call, found.shape] = self._sample(found)

    def _sample(self, output: Tensor) -> Tensor:
        """A float32 copy of entries that depend on the number of entries alone."""
        if output.numel() <= SAMPLE:
            return output.flatten().to(torch.float32, copy=True)
        return torch.take(output, self._places(output.numel(), output.device)).float()

    def _places(self, entries: int, device: torch.device) -> Tensor:
        if (entries, device) not in self._drawn:
            drawn = torch.randint(entries, (SAMPLE,), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
            self._drawn[entries, device] = drawn.to(device, non_blocking=True)
        return self._drawn[entries, device]


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that own a parameter, but for those that only compute a parametrised weight."""
    for name, module in model.named_modules():
        unheard = isinstance(module, (torch.jit.ScriptModule, *HOLDERS)) or "parametrizations" in name.split(".")
        if not unheard and (_owns(module) or nn.utils.parametrize.is_parametrized(module)):
            yield module


def _owns(module: nn.Module) -> bool:
    holders = [module, *(child for child in module.children() if isinstance(child, HOLDERS))]
    return any(p is not None for holder in holders for p in holder._parameters.values())


def _representation(output: Any) -> Tensor | None:
    """The first tensor in it that has a dimension, if it can be sampled: this process's part, as real numbers."""
    if isinstance(output, (Mapping, tuple, list)):
        items = output.values() if isinstance(output, Mapping) else output
        return next((found for item in items if (found := _representation(item)) is not None), None)
    if not isinstance(output, Tensor) or output.is_nested or torch._C._functorch.is_functorch_wrapped_tensor(output):
        return None
    part = local(output.detach())
    if part.layout != torch.strided or part.ndim == 0 or part.numel() == 0:
        return None
    if part.is_complex():
        return torch.view_as_real(part)
    return part if part.is_floating_point() else None


def _put_norms(norms: Tensor, before: Samples, after: Samples) -> None:
    """Into norms[0] and norms[1], by layer and call: ‖a‖ and ‖b − a‖ of outputs that both have, 0 of others.

    On several ranks of whole outputs, as far as the samples tell: one rank's may be larger than another's.
    """
    norms.zero_()
    common = [call for call in before if call in after]
    if not common:
        return
    old, new = [before[call] for call in common], [after[call] for call in common]
    places, calls, shapes = zip(*common, strict=True)
    for found, vectors in zip(norms, (old, list(torch._foreach_sub(new, old))), strict=True):
        found[places, calls] = torch.stack([norm.to(norms.device) for norm in torch._foreach_norm(vectors)])
    if distributed.world_size() > 1:
        parts = [shape.numel() / vector.numel() for shape, vector in zip(shapes, old, strict=True)]
        norms[:, places, calls] *= torch.tensor(parts, device="cpu").sqrt().to(norms)
