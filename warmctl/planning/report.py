"""A plan as it is read: the figures, and for each a line on what it is and how to use it."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Line(NamedTuple):
    """A line of the table."""

    name: str
    value: str
    advice: str


@dataclass(frozen=True, repr=False)
class Plan:
    """What a landscape allows. Rates are those of the first group; ratios are dimensionless, with the edge at 1.

    >>> found = plan(model, loss_fn, batch, optimizer)
    >>> found.ratio < 1.0 and "critical rate" in str(found)
    True
    >>> found.second_moment_steps, found.reasons["second_moment_steps"]
    (None, 'the optimizer is not known to average squared gradients')

    A figure that could not be had is None, and `reasons` says why under its name; beside a figure it qualifies it.

    Attributes:
        rate: the peak rate that is set.
        sharpness: λ_max(H) of the loss on the batch, plain, whatever the optimizer.
        threshold: τ, the largest stable rate × sharpness in the long run (in the optimizer's own coordinates).
        ratio: r₁ at the peak rate: λ_max(D^½ H D^½), rate × sharpness / threshold where nothing preconditions. For an
            optimizer without a rule, rate / critical_rate_forward.
        ratio_first_step: the same against the edge of the first step, which is lower where bias correction makes that
            step bolder (Adam: by 1/(1 − β₁)).
        critical_rate: the largest peak that is stable now, by curvature: where the ratio is 1, with the preconditioner
            held as the first gradient makes it.
        critical_rate_first_step: the same where `ratio_first_step` is 1.
        critical_rate_forward: the largest peak at which the loss does not rise along the first update that is really
            made, by forward passes only. One step of it: momentum's long-run edge does not enter.
        spectral_bound: an upper bound on λ_max of the Gauss–Newton matrix from the layers' spectral norms.
        warmup_steps: the smallest linear warmup that keeps min(1, t/W)·r₁(t) at or below `target`; 0 if none is needed.
        second_moment_steps: T_w(B), the warmup that a running second moment asks for at `batch_size`.
        scaled_rate: the reference's rate, or the peak that is set, scaled linearly to `batch_size`.
        largest_batch: B*, the batch size at which linear scaling meets the critical rate.
        optimizer, preconditioned, rows, batch_size, total_steps, target: what the plan was made for.
        reasons: by name of the field.
    """

    rate: float
    sharpness: float | None
    threshold: float | None
    ratio: float | None
    ratio_first_step: float | None
    critical_rate: float | None
    critical_rate_first_step: float | None
    critical_rate_forward: float | None
    spectral_bound: float | None
    warmup_steps: int | None
    second_moment_steps: int | None
    scaled_rate: float | None
    largest_batch: float | None
    optimizer: str
    preconditioned: bool
    rows: int | None
    batch_size: int | None
    total_steps: int | None
    target: float
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def spectral_bound_reason(self) -> str:
        """Which module stopped the bound; "" if there is one."""
        return self.reasons.get("spectral_bound", "")

    def lines(self) -> list[Line]:
        """The table, line by line."""
        return [Line(name.replace("_", " "), self._shown(name), advice) for name, advice in self._advice()]

    def __str__(self) -> str:
        lines = [Line("", "", f"{self.optimizer}, on {self.rows or '?'} rows"), *self.lines()]
        names, values = (max(len(line[i]) for line in lines) for i in (0, 1))
        return "\n".join(f"{line.name:<{names}}  {line.value:>{values}}  {line.advice}".rstrip() for line in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<tr><td>{html.escape(name)}</td><td style="text-align:right">{html.escape(value)}</td>'
            f'<td style="text-align:left">{html.escape(advice)}</td></tr>'
            for name, value, advice in self.lines()
        )
        head = f"{html.escape(self.optimizer)}, on {self.rows or '?'} rows"
        return f"<table><caption>{head}</caption><tbody>{cells}</tbody></table>"

    def _shown(self, name: str) -> str:
        value = getattr(self, name)
        if value is None:
            return "-"
        return str(value) if isinstance(value, int) else f"{value:.3g}"

    def _advice(self) -> Iterator[tuple[str, str]]:
        """Each figure with its advice, or with the reason why it is not there."""
        said = {
            "rate": "the peak that is set",
            "sharpness": "curvature of the steepest direction; a small batch overstates it",
            "threshold": self._on_threshold(),
            "ratio": self._on_ratio(),
            "ratio_first_step": "the same for the first step alone, which bias correction makes bolder",
            "critical_rate": self._on_critical_rate(),
            "critical_rate_first_step": "the largest rate to begin with",
            "critical_rate_forward": "above it the first update itself raises the loss of this batch",
            "spectral_bound": self._on_bound(),
            "warmup_steps": self._on_warmup(),
            "second_moment_steps": "the linear warmup that averaging squared gradients asks for, by rule of thumb",
            "scaled_rate": f"scaled linearly to {self.batch_size} rows",
            "largest_batch": "scale the rate with the batch up to here; beyond, keep it",
        }
        for name, advice in said.items():
            value, why = getattr(self, name), self.reasons.get(name, "")
            if name.endswith("first_step") and value in (None, getattr(self, name.removesuffix("_first_step"))):
                continue
            if name == "second_moment_steps" and value is None:
                continue
            yield name, why if value is None else f"{advice} ({why})" if why else advice

    def _on_threshold(self) -> str:
        what = "rate × preconditioned sharpness" if self.preconditioned else "rate × sharpness"
        return f"{what} has to stay below it"

    def _on_ratio(self) -> str:
        if self.ratio is None or self.ratio <= self.target:
            return "below the edge as things are now; the sharpness may rise in training"
        if self.ratio <= 1.0:
            return f"below the edge at 1, above the target of {self.target:g}"
        if self.preconditioned:
            return "over the edge at 1, as usual at the first step of such rules; it mostly falls within tens of steps"
        return "over the edge at 1: warm up while the sharpness falls, or lower the peak"

    def _on_critical_rate(self) -> str:
        if self.preconditioned:
            return "the largest peak that is stable now, with the preconditioner of the first gradient"
        return "the largest peak that is stable now; that alone does not bound the useful rate: see rate_range"

    def _on_bound(self) -> str:
        if self.spectral_bound is None or not self.sharpness or self.sharpness <= 0:
            return "no Gauss–Newton eigenvalue is above it, from the layers' norms alone"
        return f"from the layers' norms alone, {self.spectral_bound / self.sharpness:.2g} times what was measured"

    def _on_warmup(self) -> str:
        if self.warmup_steps is None or self.warmup_steps == 0:
            return "none needed as things are now; a range test or a recorded run sees the sharpness rise"
        if self.total_steps is None:
            return "the shortest linear warmup that stays below the target"
        if self.warmup_steps > self.total_steps and self.preconditioned:
            return "longer than the run if the sharpness stayed; under such rules it mostly falls within tens of steps"
        if self.warmup_steps > self.total_steps:
            share = self.total_steps / self.warmup_steps
            return f"longer than the run: the peak is never stable here, {share * self.rate:.3g} is"
        share = self.warmup_steps / self.total_steps
        return f"the shortest linear warmup that stays below the target, {share:.2g} of the run"
