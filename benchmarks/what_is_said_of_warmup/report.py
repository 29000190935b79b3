"""What the rows come to: a line a claim, as a table, as Markdown and as a figure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import style
from benchmarks.harness.rows import Row
from benchmarks.what_is_said_of_warmup.claim import HOLDS, NOT_HERE, REVERSE, Claim, interval, verdict
from benchmarks.what_is_said_of_warmup.collected import Job, collected

PAGE = Path(__file__).parents[2] / "docs/evidence/what-is-said.md"
TABLE = re.compile(r"(?<=<!-- table -->\n)[^<]*(?=<!-- end -->)")
COLOURS = {HOLDS: style.GREEN, NOT_HERE: style.MUTED, REVERSE: style.VERMILION}
SHOWN = 300.0
"""Margins; what lies beyond is drawn at the edge."""


def lines(rows: Mapping[Job, Row]) -> list[Row]:
    """One a claim that has rows, in the order of the numbers."""
    found = []
    for key, claims in collected().items():
        tried = [row["figures"] for job, row in sorted(rows.items()) if job[:3] == key]
        found += [line(claim, [claim.effect(figures) for figures in tried]) for claim in claims if tried]
    return sorted(found, key=lambda each: each["claim"])


def line(claim: Claim, effects: list[float]) -> Row:
    mean, low, high = interval(effects)
    words = {"title": claim.title, "source": claim.source, "setting": claim.setting, "unit": claim.unit}
    figures = {"margin": claim.margin, "mean": mean, "low": low, "high": high, "effects": effects}
    return {"claim": claim.number, **words, **figures, "verdict": verdict(effects, claim.margin)}


def number(value: float) -> str:
    """Three digits, with a sign."""
    return f"{value:+.3g}"


def span(line: Row) -> str:
    return f"{number(line['mean'])} [{number(line['low'])}, {number(line['high'])}]"


def markdown(found: Iterable[Row]) -> str:
    head = ["| | claim, and who says it | tried on | effect | mean [95 %] | margin | verdict |", "|" + "---|" * 7]
    body = [
        f"| {line['claim']} | {line['title']}; *{line['source']}* | {line['setting']} | {line['unit']} | {span(line)} "
        f"| {line['margin']:g} | {line['verdict']} |".replace("<", "&lt;")
        for line in found
    ]
    return "\n".join([*head, *body]) + "\n"


def renew(page: Path, found: Iterable[Row]) -> None:
    """Write the table into the page, between its marks."""
    text, places = TABLE.subn(lambda _: f"\n{markdown(found)}\n", page.read_text())
    if places != 1:
        raise SystemExit(f"{page} has {places} places for the table: <!-- table --> … <!-- end -->")
    page.write_text(text)


def draw(found: Sequence[Row], path: Path) -> None:
    """Effects in margins, an interval and the seeds each; linear to one margin, logarithmic beyond."""
    figure, ((ax,),) = style.panels(1, 1, (12, 0.28 * len(found) + 1.3))
    ax.axvspan(-1, 1, color=style.BLACK, alpha=0.06, lw=0, label="within the margin")
    ax.axvline(0.0, color=style.INK, lw=0.8)
    for height, line in enumerate(found):
        one(ax, height, line)
    ax.set_xscale("symlog", linthresh=1.0)
    ax.set_xlim(-SHOWN, SHOWN)
    ticks = [-100, -10, -1, 0, 1, 10, 100]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.xaxis.set_minor_locator(no_ticks())
    ax.set_yticks(range(len(found)), [f"{line['title']}  {line['claim']:>2}" for line in found])
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.grid(True, axis="x", color=style.PALE, linewidth=0.6)
    ax.set_xlabel("effect in margins; to the right: as claimed")
    style.legend_below(figure, style.by_label([ax]), columns=5)
    style.save(figure, path, dpi=130)


def one(ax: Any, height: float, line: Row) -> None:
    scale = line["margin"] or max(abs(line["low"]), abs(line["high"])) or 1.0
    mean, low, high, *seeds = (
        min(max(value / scale, -SHOWN), SHOWN) for value in (line["mean"], line["low"], line["high"], *line["effects"])
    )
    colour = COLOURS[line["verdict"]]
    ax.plot([low, high], [height, height], color=colour, lw=2.5, solid_capstyle="butt", zorder=2)
    ax.scatter(seeds, [height] * len(seeds), s=9, color=style.INK, lw=0, alpha=0.5, zorder=3, label="a seed")
    ax.scatter([mean], [height], s=34, color=colour, zorder=4, label=line["verdict"])


def no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
