"""What a diagnosis says, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Evidence:
    """One sign: what was seen, in which column, at which steps, with which values."""

    says: str
    column: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __str__(self) -> str:
        return self.says


@dataclass(frozen=True)
class Diagnosis:
    """What became of warmup in a run, why that is thought, and what to change. Print it.

    >>> print(diagnose("metrics.csv"))
    over-warmed
      - lr: warmup took 40 of 60 steps...
      What to do: ...
    """

    verdict: str
    """One of "lost", "under-warmed", "capped below the schedule", "not judged", "over-warmed", "well warmed"."""
    evidence: tuple[Evidence, ...]
    """The sign of the verdict first; then what moved before it, spikes, overflows, clipping, layers, and how the log
    was read."""
    advice: str
    """What to change, one sentence or more, in the names of settings."""

    def __str__(self) -> str:
        return "\n".join([self.verdict, *(f"  - {item}" for item in self.evidence), f"  What to do: {self.advice}"])

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{escape(str(item))}</li>" for item in self.evidence)
        return f"<b>{escape(self.verdict)}</b><ul>{items}</ul><p>What to do: {escape(self.advice)}</p>"
