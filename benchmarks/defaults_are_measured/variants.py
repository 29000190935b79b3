"""The list: every choice in the library against the others that were possible."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from benchmarks.defaults_are_measured import by_layer, decisions
from benchmarks.defaults_are_measured.readings import (
    BatchAware,
    BatchSharpness,
    Fresh,
    Krylov,
    Raw,
    RitzAndBatch,
    RitzAndFresh,
)
from benchmarks.defaults_are_measured.returns import Returns
from benchmarks.harness.results import Row
from benchmarks.harness.source import bare, digest
from warmctl import AdaptiveWarmup

DEFAULT = "default"


@dataclass(frozen=True)
class Variant:
    """One choice that differs from the default.

    Attributes:
        parts: attribute of the wrapper, its controller or its meter -> the subclass that takes its place.
        quick: part of the quick run.
    """

    group: str
    options: Row = field(default_factory=dict)
    parts: dict[str, type] = field(default_factory=dict)
    wrapper: type[AdaptiveWarmup] = AdaptiveWarmup
    quick: bool = False

    def __call__(self, optimizer: Optimizer, model: nn.Module, updates: int | None = None) -> AdaptiveWarmup:
        """Args: updates: how many there will be, for the variant that may know it."""
        wrapped = self.wrapper(optimizer, model, **self.options)
        for name, part in self.parts.items():
            owners = {"estimator": wrapped.meter, "slope": wrapped.controller, "_change": wrapped.meter.prober}
            getattr(owners.get(name, wrapped), name).__class__ = part
        if isinstance(wrapped.controller, decisions.Planned):
            wrapped.controller.updates = updates
        return wrapped

    def code(self) -> str:
        """Of what differs: rows of an older version are measured again."""
        bases = {base for part in (self.wrapper, *self.parts.values()) for base in part.__mro__}
        own = sorted(
            (base for base in bases if base.__module__.startswith(f"{__package__}.")), key=lambda base: base.__name__
        )
        sources = [bare(textwrap.dedent(inspect.getsource(base))) for base in own]
        return digest(f"{sorted(self.options.items())} {sorted(self.parts)} {sources}")


def read(part: type, **options: Any) -> Variant:
    return Variant("estimator", parts={"estimator": part}, **options)


def law(part: type, **options: Any) -> Variant:
    return Variant("law", parts={"controller": part}, **options)


def scales(part: type, **options: Any) -> Variant:
    parts = {"controller": by_layer.LayerBounds, "_rates": by_layer.LayerRates, "_change": part}
    return Variant("law", parts=parts, wrapper=by_layer.ByLayer, **options)


def layers(part: type, **options: Any) -> Variant:
    return Variant("law", parts={"_change": part}, **options)


VARIANTS = {
    DEFAULT: Variant("", quick=True),
    "Krylov space of the batch, 2 products": read(Krylov, quick=True),
    "fresh quotient vᵀAv, 2 products": read(Fresh),
    "batch sharpness": read(BatchSharpness, quick=True),
    "√(Ritz · batch quotient)": read(RitzAndBatch),
    "√(Ritz · fresh quotient)": read(RitzAndFresh),
    "realised ratio": Variant("estimator", wrapper=decisions.Realised, quick=True),
    "default + lag-1 trigger": Variant("estimator", wrapper=decisions.LagOne, quick=True),
    "without r": law(decisions.NoStability, quick=True),
    "without RRC": law(decisions.NoChange, quick=True),
    "RRC whatever the momentum": law(decisions.AnyMomentum, quick=True),
    "RRC not lifted by e": Variant("law", parts={"slope": decisions.FlatChange}),
    "RRC alone": law(decisions.ChangeAlone),
    "RRC as a set point": law(decisions.SetPoint),
    "RRC of the mean layer": layers(decisions.MeanLayer),
    "RRC of the worst layer": layers(decisions.WorstLayer),
    "RRC of the last layer": layers(decisions.LastLayer),
    "a scale by layer, of its own RRC": scales(by_layer.OwnChange),
    "a scale by layer, of its output's RRC": scales(by_layer.LayerChange),
    "e never asked": Variant("law", parts={"slope": decisions.Unasked}, quick=True),
    "e always agrees": Variant("law", parts={"slope": decisions.Agrees}, quick=True),
    "no fall where e is surely against": law(decisions.NoFall),
    "growth with age at most": law(decisions.Aged),
    "growth with age at least": law(decisions.AgedAnyway),
    "growth by a known horizon at least": law(decisions.Planned),
    "growth beyond the evidence": law(decisions.NoEvidence),
    "a fall of r counts in distress": law(decisions.Trusting),
    "no return from a cut": law(decisions.NoReturn),
    "return from a death": Variant("law", wrapper=Returns),
    "target .3": Variant("target", {"target": 0.3}),
    "target .5": Variant("target", {"target": 0.5}, quick=True),
    "target .784 (noise)": Variant("target", {"target": 0.784}),
    "target .816 (noise)": Variant("target", {"target": 0.816}),
    "target 1": Variant("target", {"target": 1.0}),
    "target 1.2": Variant("target", {"target": 1.2}, quick=True),
    "every 20": Variant("cadence", {"every": 20}, quick=True),
    "every 5": Variant("cadence", {"every": 5}),
    "every step": Variant("cadence", {"every": 1}),
    "probes in a burst": Variant("cadence", parts={"cadence": decisions.AtOnce}),
    "no shocks": Variant("cadence", parts={"cadence": decisions.NoShocks}, quick=True),
    "shocks are looked at, not probed": Variant("cadence", parts={"cadence": decisions.LooksAlone}),
    "shocks do not shorten": Variant("cadence", parts={"cadence": decisions.NoShortening}, quick=True),
    "no probes in distress": Variant("cadence", parts={"cadence": decisions.Composed}),
    "double backward": Variant("products", {"hvp": "double_backward"}, quick=True),
    "1 product (fresh quotient)": Variant("products", {"probe_steps": 1}, quick=True),
    "3 products (Krylov)": Variant("products", {"probe_steps": 3}),
    "5 products (Krylov)": Variant("products", {"probe_steps": 5}),
    "raw: one P for all": Variant("coordinates", parts={"estimator": Raw}, quick=True),
    "guard only cuts": Variant("after", parts={"controller": decisions.OnlyCuts}),
    "hold": Variant("after", {"after": "hold"}),
    "release": Variant("after", {"after": "release"}),
    "absolute cap": Variant("after", parts={"controller": decisions.Cap}, quick=True),
    "target · √(ρ/λ)": Variant("batch-aware", parts={"estimator": BatchAware}, quick=True),
}
NOISE = ("target .784 (noise)", "target .816 (noise)")
