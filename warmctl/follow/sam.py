"""The radius of sharpness-aware minimisation, in proportion to the rate."""

from __future__ import annotations

import math
from typing import Any

from warmctl.follow.follower import Levers
from warmctl.follow.kept import Kept, Place
from warmctl.proxy import OptimizerProxy


class SAMRadius:
    """ρ_t = ρ · s_t: the radius of the ascent follows the scale, so that it is no longer than the steps are.

    The ascent of a step comes before the decision about it, so it is made at the scale of the step before; the first at
    that of the start of warmup. Ascents may be made outside of `opt.step`: the radius therefore stays where it was put
    between steps (a checkpoint of the optimizer holds it so, beside the full one). Write `rho` to change the full one.

    >>> from types import SimpleNamespace
    >>> sam = SimpleNamespace(rho=0.05)  # a two-step closure reads its radius there
    >>> opt = AdaptiveWarmup(optimizer, model).follow(SAMRadius(sam))
    >>> train(opt)
    >>> sam.rho == 0.05 * opt.metrics["scale"]
    True

    Args:
        sam: what holds the radius: an optimizer with a `rho` in its parameter groups (as the common packages have it),
            or any object with an attribute `rho`, which a two-step closure of your own reads.

    Reading: `rho`, as put for the next ascent, of the first group.

    Raises: TypeError for an object without `rho`, ValueError for one that is not a number above 0.
    """

    def __init__(self, sam: Any) -> None:
        self.sam = sam.base if isinstance(sam, OptimizerProxy) else sam
        places = self._places()
        if not places:
            raise TypeError(
                f"sam must have a radius 'rho', in its param_groups or as an attribute; {type(sam).__name__} has none"
            )
        for place in places:
            if not (isinstance(place.value, (int, float)) and 0.0 < place.value < math.inf):
                raise ValueError(f"rho of {type(sam).__name__} must be a number above 0, got {place.value!r}")
        self._kept = Kept("rho", len(places))

    def attach(self, levers: Levers) -> None:
        self._move(levers.scale)

    def detach(self) -> None:
        self._kept.put_back(self._places())

    def follow(self, scale: float, rate: float, phase: str) -> None:
        self._move(scale)

    def readings(self) -> dict[str, float]:
        return {"rho": float(self._places()[0].value)}

    def state_dict(self) -> dict[str, float]:
        return self._kept.state_dict()

    def load_state_dict(self, values: dict[str, float]) -> None:
        self._kept.load_state_dict(values, self._places())

    def _move(self, scale: float) -> None:
        self._kept.move(self._places(), lambda full: full if scale == 1.0 else full * scale)

    def _places(self) -> list[Place]:
        """Where it stands now: loading a state replaces the groups."""
        groups = [group for group in getattr(self.sam, "param_groups", ()) if "rho" in group]
        if groups:
            return [Place(group, "rho") for group in groups]
        return [Place(self.sam, "rho")] if hasattr(self.sam, "rho") else []
