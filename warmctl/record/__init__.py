"""The record of a run: rows, files that survive a kill, and the figure drawn from them.

In: one row of plain scalars a step. Out: `History`, JSONL and CSV files, figures.
May import: nothing else of the package.
"""
