"""`rate_range`: Smith's range test. Train on while the rate rises exponentially, and see where the loss falls fastest.

Source: Smith 2015 (arXiv 1506.01186).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from warmctl.loss.no_trace import no_trace
from warmctl.loss.random_state import stream_put_back
from warmctl.loss.replay import Replay
from warmctl.planning import checks
from warmctl.planning.double import double_of, peak_rates, proportions, put_back, set_rates, take_step
from warmctl.planning.edge import measure_edge
from warmctl.record.history import History
from warmctl.stability.update_rules import update_rule
from warmctl.vectors import dense_gradient

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIVERGED = 5.0
"""Times the lowest smoothed loss at which the sweep stops, as in torch-lr-finder and fastai."""
PROBE_TOL, PROBE_STEPS = 3e-2, 10
WINDOW = 0.1
"""Share of the sweep over which a slope is taken."""


@dataclass(frozen=True)
class RateRange:
    """A sweep of the learning rate.

    >>> sweep = rate_range(model, loss_fn, loader, optimizer, low=1e-3, high=10.0, steps=30)
    >>> len(sweep.history), min(sweep.history["lr"])
    (30, 0.001)

    Attributes:
        history: a row a step: `lr` (first group), `loss` of the batch before the step, `smoothed_loss`, and
            `stability_ratio` where it was measured.
        suggestion: the rate at which the loss fell fastest per factor of the rate; None if it never fell.
        suggestion_by_curvature: the rate at which the stability ratio met the edge at 1, on the way up; None if it was
            not measured.
        diverged: the rate at which the sweep stopped; None if it came to its end.
    """

    history: History
    suggestion: float | None
    suggestion_by_curvature: float | None
    diverged: float | None

    def plot(self, path: str | os.PathLike[str] | None = None, axis: Axes | None = None) -> Figure:
        """Loss over the rate, with both suggestions; `path`: where to save it. ImportError without matplotlib."""
        from warmctl.planning.rate_figure import draw_range

        return draw_range(self, path, axis)


def rate_range(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    optimizer: Optimizer,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 100,
    *,
    smoothing: float = 0.05,
    probes: int = 8,
) -> RateRange:
    """Train `steps` steps while the rate rises from `low` to `high` by a constant factor; then put everything back.

    Parameters, gradients, buffers, optimizer state, random streams and modes, and the generators of a DataLoader and of
    its samplers stand afterwards where they stood. The model is used in its present mode.

    >>> sweep = rate_range(model, loss_fn, loader, optimizer, low=1e-3, high=100.0, steps=60)
    >>> 1e-3 < sweep.suggestion < sweep.diverged
    True

    Args:
        loss_fn: loss_fn(model, batch) -> scalar tensor.
        batches: a DataLoader or a list, begun again when it ends. (An iterator works too; its place is not put back.)
        optimizer: its groups keep the proportions of their rates; the first group has the rate of the sweep.
        smoothing: share of the newest loss in the running average, which begins at the first loss.
        probes: how often on the way the stability ratio is measured, for the suggestion by curvature; 0: not at all,
            nor for an optimizer without an update rule.

    The sweep stops where the loss is not finite, or its average is above five times its lowest, as in torch-lr-finder.

    Cost: `steps` training steps, and up to 10 Hessian-vector products of 2.4 gradient evaluations a probe. Memory:
    parameters, buffers and optimizer state once more.

    Raises: TypeError or ValueError for arguments that cannot work, naming the argument.
    """
    base = checks.optimizer(optimizer, model)
    checks.loss_function("rate_range(model, loss_fn, batches, optimizer)", loss_fn)
    _check_sweep(low, high, steps, smoothing, probes)
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, such as a DataLoader, got {type(batches).__name__}")
    params: list[Tensor] = [p for group in base.param_groups for p in group["params"] if p.requires_grad]
    with no_trace(params, model), put_back(params), stream_put_back(batches):
        sweep = _Sweep(model, loss_fn, double_of(base), params, proportions(peak_rates(base)))
        rates = np.geomspace(low, high, steps)
        due = set(np.linspace(0, steps - 1, probes).round().astype(int)) if update_rule(base) and probes else set()
        history = History(sweep.rows(_endless(batches, steps), rates.tolist(), due, smoothing))
    return RateRange(history, *suggestions(history, steps), sweep.diverged)


class _Sweep:
    """The training of a sweep, row by row."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        double: Optimizer,
        params: list[Tensor],
        shares: list[float],
    ) -> None:
        self.model, self.loss_fn, self.double, self.params, self.shares = model, loss_fn, double, params, shares
        self.diverged: float | None = None

    def rows(
        self, batches: Iterator[Any], rates: Sequence[float], due: set[int], smoothing: float
    ) -> Iterator[dict[str, Any]]:
        smoothed = lowest = math.nan
        for index, rate in enumerate(rates):
            batch = next(batches)
            set_rates(self.double, [rate * share for share in self.shares])

            def closure(batch: Any = batch) -> Tensor:
                self.double.zero_grad()
                loss = self.loss_fn(self.model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            loss = float(closure().detach())
            ratio = self._ratio(batch) if index in due and math.isfinite(loss) else None
            smoothed = loss if index == 0 else smoothing * loss + (1 - smoothing) * smoothed
            lowest = smoothed if index == 0 else min(smoothed, lowest)
            yield {
                "step": index + 1,
                "lr": rate,
                "loss": loss,
                "smoothed_loss": smoothed,
                "stability_ratio": ratio,
                "probed": ratio is not None,
            }
            if not math.isfinite(smoothed) or smoothed > DIVERGED * lowest:
                self.diverged = rate
                return
            take_step(self.double, closure)

    def _ratio(self, batch: Any) -> float | None:
        """r₁ of the coming step, on its batch; None if it could not be measured."""
        replay = Replay.of_loss(lambda: self.loss_fn(self.model, batch), self.params, module=self.model)
        gradient = [dense_gradient(p).clone() for p in self.params]
        edge = measure_edge(replay, gradient, self.double, tol=PROBE_TOL, steps=PROBE_STEPS, raw=False)
        return edge.ratio if math.isfinite(edge.ratio) else None


def suggestions(history: History, steps: int) -> tuple[float | None, float | None]:
    """Of a sweep of `steps` steps, by steepest descent and by curvature. Both look at rates up to the lowest loss only.

    Means and slopes are those of a window of a tenth of the sweep, centred: they do not lag as a running average does.
    """
    losses, rates = np.array(history["loss"], dtype=np.float64), np.array(history["lr"], dtype=np.float64)
    finite = np.isfinite(losses)
    x, y = np.log(rates[finite]), losses[finite]
    width = max(round(WINDOW * steps), 3)
    if len(x) < width:
        return None, None
    at, values = (np.lib.stride_tricks.sliding_window_view(a, width) for a in (x, y))
    centre, mean = at.mean(1), values.mean(1)
    lowest = int(mean.argmin())
    distance = at - centre[:, None]
    slopes = (distance * (values - mean[:, None])).sum(1) / (distance**2).sum(1)
    steepest = int(slopes[: lowest + 1].argmin())
    fell = lowest > 0 and slopes[steepest] < 0
    readings = [
        (rate, ratio)
        for rate, ratio in zip(history["lr"], history["stability_ratio"], strict=True)
        if ratio is not None and ratio > 0 and (rate <= math.exp(centre[lowest]) or rate == rates[0])
    ]
    return math.exp(centre[steepest]) if fell else None, _meets_the_edge(readings)


def _meets_the_edge(readings: Sequence[tuple[float, float]]) -> float | None:
    """The first rate at which the ratio is 1: between readings by a power law, before and after them in proportion."""
    for (rate, ratio), (after, then) in itertools.pairwise(readings):
        if ratio >= 1.0:
            return rate / ratio
        if then >= 1.0:
            return float(rate * (after / rate) ** (math.log(1 / ratio) / math.log(then / ratio)))
    return readings[-1][0] / readings[-1][1] if readings else None


def _check_sweep(low: Any, high: Any, steps: Any, smoothing: Any, probes: Any) -> None:
    checks.rate("low", low)
    checks.rate("high", high)
    if not low < high:
        raise ValueError(f"low must be below high, got low={low!r} and high={high!r}")
    checks.count("steps", steps, 2)
    checks.count("probes", probes, 0)
    if not (isinstance(smoothing, float | int) and 0 < smoothing <= 1):
        raise ValueError(f"smoothing must be in (0, 1], the share of the newest loss, got {smoothing!r}")


def _endless(batches: Iterable[Any], wanted: int) -> Iterator[Any]:
    """Batches without end: begun again where they run out, as epochs are.

    Raises: ValueError where there are none, or where an iterator, which cannot be begun again, ends early.
    """
    seen = 0
    while True:
        before = seen
        for batch in batches:
            seen += 1
            yield batch
        if seen == before:
            held = f"ended after {seen}" if seen else "are empty"
            raise ValueError(
                f"batches {held}, and {wanted} are needed: give a DataLoader or a list, which can be begun again, "
                "or fewer steps"
            )
