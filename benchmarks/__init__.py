"""Claims about warmctl, a folder each, named after its claim, which it prints; the harness below is what they share.

`python -m benchmarks.NAME` runs one, with --quick its short form, with --report nothing but tables and figures from the
rows there are. `demo` shows one seed side by side; `same_runs` holds two versions of the code against each other.
"""
