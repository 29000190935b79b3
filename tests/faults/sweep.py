"""Random faults at random operations of the probes of random trainings.

    python -m tests.faults.sweep [FIRST] [LAST]

Prints the cases, by their seeds from FIRST to LAST, that were not held, and how many faults were made. A thousand cases
take some ten minutes.
"""

from __future__ import annotations

import logging
import sys
import traceback

import torch

from tests.faults.harness import check
from tests.faults.random_cases import drawn


def main(first: int, last: int) -> int:
    """How many were not held."""
    made = interrupts = bad = 0
    for seed in range(first, last):
        case = drawn(seed)
        try:
            events, _ = check(case)
        except Exception:
            bad += 1
            print(f"{case}\n{traceback.format_exc(limit=-8)}", flush=True)
        else:
            made += sum(bool(event.fault) for event in events)
            interrupts += sum(bool(event.interrupt) for event in events)
    print(f"{last - first} cases, {made} faults, {interrupts} of them interrupts; not held: {bad}")
    return bad


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    bounds = [int(word) for word in sys.argv[1:]]
    first = bounds[0] if bounds else 0
    sys.exit(main(first, bounds[1] if len(bounds) > 1 else first + 1000) > 0)
