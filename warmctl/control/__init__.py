"""From readings and signals to one scale for all learning rates, and to when to probe next.

In: numbers. Out: numbers, and the reason in words.
May import: state.py alone; no torch, no numpy. It decides and does not measure.
"""
