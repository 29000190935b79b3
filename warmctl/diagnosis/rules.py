"""What is taken as a sign of what: every threshold of a diagnosis, in one table. The docs print it."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    sign: str
    """What is seen, in words; `{}` stands for the threshold."""
    threshold: float
    columns: str
    """What it is read from."""
    verdict: str
    """"" where it is told beside any verdict."""


LOST, UNDER, CAPPED, UNSEEN, OVER, WELL = (
    "lost",
    "under-warmed",
    "capped below the schedule",
    "not judged",
    "over-warmed",
    "well warmed",
)
VERDICTS = (LOST, UNDER, CAPPED, UNSEEN, OVER, WELL)
"""The first one whose sign is there is given."""

RULES: dict[str, Rule] = {
    "not finite": Rule("the losses at the end are not finite", 1, "loss", LOST),
    "dead": Rule("the loss ends less than {:.0%} below that of the start", 0.1, "loss", LOST),
    "fallen back": Rule("the loss ends with {:.0%} of what it had gained (in log) lost again", 0.7, "loss", LOST),
    "silent": Rule(
        "gradients have shrunk by a factor of {:g} while the loss fell by less than 40 %", 2.7, "grad_norm, loss", LOST
    ),
    "rise": Rule("in warmup or soon after the loss rises {:.0%} above that of the start", 0.35, "loss, lr", UNDER),
    "setback": Rule(
        "in warmup or soon after the loss rises by {:.0%} of what the whole run gains (in log)", 0.7, "loss, lr", UNDER
    ),
    "capped": Rule(
        "the applied rate stays below {:.0%} of the schedule's in the last tenth",
        0.8,
        "scale, or lr and scheduled_lr",
        CAPPED,
    ),
    "late": Rule(
        "the log begins after step {:g} and two intervals of its rows, or its steps begin again and no rate rises then",
        10,
        "step, lr",
        UNSEEN,
    ),
    "long": Rule("warmup takes more than {:.0%} of the record", 0.35, "lr", OVER),
    "spike": Rule("later, the loss rises to {:g} times its level and comes back", 1.6, "loss", ""),
    "overflow": Rule(
        "float16 overflows: more than {:.0%} of the steps after the first 20 are skipped",
        0.02,
        "overflow or loss_scale",
        "",
    ),
    "clipped": Rule(
        "more than {:.0%} of the steps after warmup are clipped", 0.9, "clipped, or grad_norm, clip_norm", ""
    ),
    "sigma": Rule("σ before a norm falls to {:.0%} of what it was", 0.1, "vitals/<layer>/sigma", ""),
    "saturated": Rule("more than {:.0%} of a layer's units are saturated", 0.5, "vitals/<layer>/saturated", ""),
    "dead units": Rule("more than {:.0%} of a layer's units are dead", 0.5, "vitals/<layer>/dead", ""),
    "moved": Rule(
        "a column that moved by {:g} of its usual deviations, and twofold, before a rise explains it",
        8.0,
        "any of these",
        "",
    ),
}
SHORTEST = 8
"""Rows with a loss that a diagnosis needs."""


def limit(name: str) -> float:
    return RULES[name].threshold


def words(name: str) -> str:
    rule = RULES[name]
    return rule.sign.format(rule.threshold)


def table() -> str:
    """The rules as a table in Markdown."""
    lines = ["| verdict | sign | read from |", "|---|---|---|"]
    for name, rule in RULES.items():
        lines.append(f"| {rule.verdict or 'beside any'} | {words(name)} | {_code(rule.columns)} |")
    return "\n".join(lines)


def _code(columns: str) -> str:
    plain = ("or", "and", "any", "of", "these")
    return " ".join(
        word if word.strip(",") in plain else f"`{word.strip(',')}`" + "," * word.endswith(",")
        for word in columns.split()
    )
