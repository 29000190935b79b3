"""From readings and signals to one scale for all learning rates, and to when to probe next.

In: a `Reading` a probe, and what a step says for free. Out: a `Decision`, and why to probe now. It does not measure.
The law alone is `reference.py`: begin there, then `controller.py`, `gauges.py`, `ending.py`, `cadence.py`.
May import: state.py alone; no torch, no numpy.
"""
