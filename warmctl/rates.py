"""Learning rates of the groups: scaled for the length of one step, then the schedule's own again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def learning_rate(group: Mapping[str, Any]) -> float:
    """The scheduled rate of a group as a float; waits for the device if it is a tensor there."""
    return float(group["lr"])


def trains(group: Mapping[str, Any]) -> bool:
    """Whether a parameter of the group requires a gradient: the rate of one that is frozen says nothing."""
    return any(p.requires_grad for p in group["params"])


def shown(groups: Sequence[Mapping[str, Any]]) -> int:
    """The place of the group whose rate stands for all in rows and readings: the first that trains, or the first."""
    return next((place for place, group in enumerate(groups) if trains(group)), 0)


class ScaledRates:
    """Tensor rates are filled in place and never read, which would make a device wait."""

    def __init__(self) -> None:
        self._full: list[Any] | None = None
        self._written: list[tuple[Any, int]] = []

    def scale(self, groups: list[dict[str, Any]], factors: Sequence[float]) -> None:
        """Multiply the rate of each group by its own. A tensor that several share takes the smallest of theirs."""
        if all(factor == 1.0 for factor in factors):  # bitwise the bare optimizer
            return
        rates = [group["lr"] for group in groups]
        self._full = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        for tensor in {id(rate): rate for rate in rates if isinstance(rate, Tensor)}.values():
            tensor.mul_(min(factor for rate, factor in zip(rates, factors, strict=True) if rate is tensor))
        for group, rate, factor in zip(groups, rates, factors, strict=True):
            if not isinstance(rate, Tensor):
                group["lr"] = rate * factor
        self._written = [(g["lr"], g["lr"]._version if isinstance(g["lr"], Tensor) else 0) for g in groups]

    def restore(self, groups: list[dict[str, Any]]) -> None:
        """Put back every rate that is still as `scale` left it: one that a step hook has written since stays."""
        if self._full is None:
            return
        restored: dict[int, tuple[Tensor, Tensor]] = {}  # groups may share one tensor
        for group, full, written in zip(groups, self._full, self._written, strict=False):
            if not _is_as_written(group["lr"], *written):
                continue
            if isinstance(full, Tensor):
                restored[id(group["lr"])] = group["lr"], full
            else:
                group["lr"] = full
        for rate, full in restored.values():
            rate.copy_(full)
        self._full = None

    def unscaled(self, saved: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
        """`saved`, a state dict of these groups, with every rate as `restore` will put it back."""
        if self._full is not None:
            for kept, group, full, written in zip(
                saved["param_groups"], groups, self._full, self._written, strict=False
            ):
                kept["lr"] = full if _is_as_written(group["lr"], *written) else kept["lr"]
        return saved

    def __reduce__(self) -> Any:
        return ScaledRates, ()

    def scheduled(self, groups: list[dict[str, Any]]) -> float:
        """The rate that is shown, without the scale."""
        place = shown(groups)
        return learning_rate(groups[place]) if self._full is None else float(self._full[place])


def _is_as_written(rate: Any, written: Any, version: int) -> bool:
    if isinstance(written, Tensor):
        return rate is written and rate._version == version
    return not isinstance(rate, Tensor) and bool(rate == written)
