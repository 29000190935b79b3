"""The record of a run: rows, files that survive a kill, and what is made of them, a figure or a summary.

In: one row of plain scalars a step. Out: a `History`, JSONL and CSV files, figures, a `Summary`.
May import: nothing else of the package, and no torch. `style.py` is the look of every figure, the benchmarks' too.
"""
