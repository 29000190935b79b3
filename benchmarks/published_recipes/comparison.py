"""What rows come to: scores by policy and rate, and how far warmctl is from what hand-set warmups reach."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.harness.cells import student
from benchmarks.harness.results import Row
from benchmarks.published_recipes.recipe import NONE, OURS, SHARES

LIMITS = {"loss": (0.01, 0.02)}
"""How far from the published warmup at the published rate, and from the best by hand above it."""

Cell = tuple[str, float]  # policy, multiple of the published rate


@dataclass(frozen=True)
class Comparison:
    """All runs of one recipe at one length, over the seeds that each of them has."""

    recipe: str
    steps: int
    cells: dict[Cell, list[Row]]  # one row a seed, in the same order everywhere

    @property
    def by(self) -> str:
        return str(self._any["by"])

    @property
    def seeds(self) -> int:
        return len(next(iter(self.cells.values())))

    @property
    def stated(self) -> float | None:
        """The published score, if the run is as long as the publication's."""
        return self._any["stated"]  # type: ignore[no-any-return]

    @property
    def _any(self) -> Row:
        return next(iter(self.cells.values()))[0]

    @property
    def published(self) -> str | None:
        return next((policy for (policy, _), rows in self.cells.items() if rows[0]["published"]), None)

    @property
    def multiples(self) -> list[float]:
        return sorted({multiple for _, multiple in self.cells})

    @property
    def policies(self) -> list[str]:
        """None, those by share of the run, the published one, warmctl."""
        known = (NONE, *SHARES)
        found = dict.fromkeys(policy for policy, _ in self.cells)
        return sorted(found, key=lambda p: (p == OURS, known.index(p) if p in known else len(known)))

    def scores(self, cell: Cell) -> list[float]:
        return [row["score"] for row in self.cells[cell]]

    def mean(self, cell: Cell) -> float:
        scores = self.scores(cell)
        return sum(scores) / len(scores)

    def failures(self, policy: str) -> tuple[int, int]:
        """(runs that ended at chance level, runs)"""
        rows = [row for (name, _), rows in self.cells.items() if name == policy for row in rows]
        return sum(row["failed"] for row in rows), len(rows)

    def best_by_hand(self) -> Cell | None:
        """The cell with the lowest mean over seeds; this choice, made afterwards, favours the hand."""
        return min((cell for cell in self.cells if cell[0] != OURS), key=self.mean, default=None)

    def reference(self, multiple: float) -> Cell | None:
        """What warmctl is held against: the published warmup at the published rate, the best by hand above it."""
        if multiple != 1:
            return self.best_by_hand()
        cell = (self.published or "", 1)
        return cell if cell in self.cells else None

    def gap(self, multiple: float) -> tuple[float, float]:
        """Mean over seeds of warmctl's score less the reference's, and half of its 95 % interval."""
        reference = self.reference(multiple)
        assert reference is not None
        ours, theirs = self.scores((OURS, multiple)), self.scores(reference)
        return student([a - b for a, b in zip(ours, theirs, strict=True)])

    def price(self, policy: str) -> float:
        """Gradient evaluations beyond those of the updates, as a share of them: the mean over runs."""
        rows = [row for (name, _), rows in self.cells.items() if name == policy for row in rows]
        return sum(float(row["overhead"]) for row in rows) / len(rows)


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """By recipe and length. Seeds that some cell does not have yet are left out."""
    groups: dict[tuple[str, int], dict[Cell, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        groups[row["recipe"], row["steps"]][row["policy"], row["multiple"]][row["seed"]] = row
    found = []
    for (recipe, steps), cells in sorted(groups.items(), key=lambda item: (item[0][0] == "mnist1d", item[0])):
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in cells.values())))
        if seeds:
            found.append(Comparison(recipe, steps, {c: [by[seed] for seed in seeds] for c, by in cells.items()}))
    return found
