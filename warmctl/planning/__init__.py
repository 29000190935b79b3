"""Before the run: how far will this landscape let me go, from `plan` in figures and from `rate_range` by trying.

In: a model, its loss, a batch or batches, an optimizer. Out: a `Plan`, a `RateRange`. Neither leaves a trace.
May import: every floor below the wrapper. Nothing imports it.
"""
