"""What warmctl costs: products, memory, training steps, and how all of it grows.

    python -m benchmarks.costs_what_it_says [--quick]

Times are ratios of calls that alternate in one process, in an order that rotates; medians are taken of the ratios, so
that a slow second of the machine meets all of them alike. Models have about 1e6 parameters where not said otherwise.
Memory is counted in storages alive, one by one, not in what the allocator holds.
"""
