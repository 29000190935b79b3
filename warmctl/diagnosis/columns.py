"""What the columns of a log are called: by warmctl, by the common loggers, by hand."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

NAMES: dict[str, tuple[str, ...]] = {
    "step": (
        *("step", "global_step", "trainer/global_step", "_step", "iteration", "iter", "update", "num_updates"),
        *("train_step", "train/step", "train/global_step", "training_step", "trainer/step", "optimizer_step"),
        *("current_step", "steps", "global_steps", "train_steps", "iterations", "iters", "n_iter", "n_iters"),
        *("iter_num", "train_iter", "it", "n_steps", "num_steps", "updates", "n_updates"),
    ),
    "loss": (
        *("loss", "train_loss_step", "train/loss_step", "train/loss", "loss/train", "training_loss", "lm_loss"),
        *("loss_metrics/global_avg_loss", "train_loss", "train_loss_epoch", "train/loss_epoch"),
        *("loss_step", "total_loss", "loss_epoch"),
    ),
    "lr": ("*warmup*/lr", "lr", "learning_rate", "train/learning_rate", "train/lr", "lr-*", "lr/*", "learning-rate"),
    "scheduled_lr": ("scheduled_lr",),
    "scale": ("scale", "*warmup*/scale"),
    "phase": ("phase", "*warmup*/phase"),
    "reason": ("reason",),
    "stability_ratio": ("stability_ratio", "*warmup*/stability_ratio"),
    "representation_change": ("representation_change", "*warmup*/representation_change"),
    "end_slope": ("end_slope", "*warmup*/end_slope"),
    "grad_norm": (
        *("grad_norm", "train/grad_norm", "gradient_norm", "total_grad_norm", "grad_norm_step", "gnorm"),
        "grad_*_norm_total",
    ),
    "loss_scale": ("loss_scale", "train/loss_scale", "grad_scale", "amp_scale"),
    "overflow": ("overflow", "overflows", "found_inf", "skipped"),
    "clipped": ("clipped", "clip", "clip_event", "vitals/clipped"),
    "split": ("split", "mode", "stage", "subset", "phase"),
    "clip_norm": ("clip_norm", "max_grad_norm", "gradient_clip_val"),
}
"""By what it is: the names that a column may have, the first with values is taken; `*` stands for anything."""

LAYERS: dict[str, str] = {
    "sigma": "vitals/*/sigma",
    "saturated": "vitals/*/saturated",
    "dead": "vitals/*/dead",
    "update": "vitals/*/update",
    "gradient": "vitals/*/gradient",
}
"""One column a layer: σ of a norm's input; shares of saturated and of dead units; ‖Δw‖/‖w‖; gradient norm."""

TEXT = ("phase", "reason")
TRAINING = ("train", "training")
HELD_OUT = ("val", "valid", "validation", "dev", "eval", "evaluation", "test")
"""Words of a column that says which data a row is of."""
TENSORBOARD = ("wall_time", "step", "value")
"""The columns of its export to CSV, which has one metric."""
PHASES = ("warmup", "guard", "done")
"""By their numbers, as loggers have them."""


def plain(name: str) -> str:
    """A column's name as it is compared: lower case, spaces as underscores."""
    return name.strip().lower().replace(" ", "_")


def named(kind: str, columns: Iterable[str]) -> list[str]:
    """The columns that are of a kind, best name first."""
    by_plain = {plain(column): column for column in reversed(list(columns))}
    return [by_plain[name] for name in _matching(NAMES[kind], sorted(by_plain))]


def of_layers(kind: str, columns: Iterable[str]) -> dict[str, str]:
    """Layer → its column."""
    before, after = LAYERS[kind].split("*")
    found = (c for c in columns if c.startswith(before) and c.endswith(after) and len(c) > len(before) + len(after))
    return {column[len(before) : -len(after)]: column for column in found}


def table() -> str:
    """The names as a table in Markdown."""
    lines = [f"| {kind} | {', '.join(f'`{name}`' for name in names)} |" for kind, names in NAMES.items()]
    return "\n".join(["| | names |", "|---|---|", *lines])


def _matching(patterns: tuple[str, ...], names: list[str]) -> list[str]:
    return [name for pattern in patterns for name in names if fnmatchcase(name, pattern)]
