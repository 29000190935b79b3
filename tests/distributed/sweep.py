"""Every fault at every source and place, at first and later probes, on four ranks or as many as are asked for.

    python -m tests.distributed.sweep [RANKS] [PLACE ...]

Prints the cases that were not held, and how many were. Takes some minutes a place.
"""

from __future__ import annotations

import sys

from tests.distributed.launch import launch
from tests.distributed.test_faults import check

PLACES = ("ddp", "fsdp", "hsdp")
"""The last is FSDP2 of two copies: half of the ranks share a copy, each part is reduced over both."""


def main(ranks: int, places: list[str]) -> int:
    """How many were not held."""
    bad = 0
    for place in places:
        results = launch("tests.distributed.faults", ranks, place, timeout=3600)
        names = [name for name in results if not name.startswith("bare")]
        for name in names:
            try:
                check(results, name)
            except AssertionError as error:
                bad += 1
                print(f"{name}: {error}")
        print(f"{place}, {ranks} ranks: {len(names)} cases")
    print(f"not held: {bad}")
    return bad


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    sys.exit(main(numbers[0] if numbers else 4, [w for w in sys.argv[1:] if not w.isdigit()] or list(PLACES)) > 0)
