"""Cases drawn at random, each by its seed."""

from __future__ import annotations

import random

from tests.faults.faults import ERRORS, FACTORS, INTERRUPTS, AtOperation
from tests.faults.harness import SOURCES, Case
from tests.faults.models import ALONG, MODELS, OF_SPARSE, OPTIMIZERS

STEPS = 7
SCRIPTED = ("noisy", "frozen", "half in eval mode")
"""With batch norm, whose forward derivative torch runs in TorchScript: an interrupt there becomes a RuntimeError, which
is torch's own doing."""


def drawn(seed: int) -> Case:
    choose = random.Random(seed)
    model = choose.choice(list(MODELS))
    optimizer = choose.choice(OF_SPARSE if model == "sparse" else list(OPTIMIZERS))
    source = choose.choice([s for s in SOURCES if optimizer not in ALONG or "backward" not in s])
    options = {
        "every": choose.choice([1, 1, 2, "auto"]),
        "hvp": choose.choice(["auto", "auto", "finite_difference", "double_backward", "forward_over_reverse"]),
        "estimator": choose.choice(["lanczos", "lanczos", "power"]),
        "probe_steps": choose.choice([1, 2, 3]),
    }
    interrupts = model not in SCRIPTED or options["hvp"] != "forward_over_reverse"
    return Case(
        model,
        optimizer,
        source,
        {step: _fault(choose, interrupts) for step in range(STEPS) if choose.random() < 0.45},
        options,
        STEPS,
        seed,
        own_loss=source in ("captured", "scaled", "accumulated")
        or ("backward" not in source and choose.random() < 0.5),
        clip=model != "sparse" and choose.random() < 0.3,
        autocast=choose.random() < 0.12,
        set_to_none=choose.random() < 0.7,
        warnings_are_errors=choose.random() < 0.1,
    )


def _fault(choose: random.Random, interrupts: bool) -> AtOperation:
    kinds = list(INTERRUPTS) if interrupts and choose.random() < 0.15 else list(choose.choice([ERRORS, FACTORS]))
    return AtOperation(choose.choice(kinds), choose.randrange(choose.choice([12, 80, 400, 1200])))
