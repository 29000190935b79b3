"""Claims 1 to 5."""

from benchmarks.what_is_said_of_warmup.claim import Claim

CLAIMS: tuple[Claim, ...] = ()
