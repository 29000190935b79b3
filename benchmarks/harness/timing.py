"""Times that can be compared on a machine whose speed changes: calls alternate, and ratios are taken within a round."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness.results import median


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; the order rotates, the first round is thrown away."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds + 1):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            elapsed = seconds(calls[name])
            if index:
                times[name].append(elapsed)
    return times


def relative(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the ratio within a round."""
    return median([a / b for a, b in zip(times[name], times[base], strict=True)])
