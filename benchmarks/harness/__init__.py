"""What the benchmarks share: problems, policies, runs that survive a kill, results, tables and the style of figures."""
