"""The defaults are what this table says: each choice in the library against the others that were possible.

    python -m benchmarks.defaults_are_measured --quick     under two minutes
    python -m benchmarks.defaults_are_measured             400 updates; goes on after a kill
    python -m benchmarks.defaults_are_measured --report    table and figure from the rows there are

Every variant differs from the default in one choice. Each trains development tasks of `benchmarks.tasks`, on which
defaults may be chosen, at the rate where a few constant updates do best and at ten times it, under cosine decay. The
figures are log(loss + f) less the default's, f being 2 % of the loss at the start, mean over cells: below 0 the variant
is better. A run that diverged or ended above its start counts as the start.

What lost is no option of the library: it is written here, as a subclass of the part that it replaces; so is the law
without each of its gauges. Two rows whose target is 2 % off the default's show how much of a difference is noise.

Left out: the lag-1 correlation of gᵀv as the reading itself. With momentum its relation to the ratio has no closed
form, so it would need a calibration for each rule; it is here as a trigger of probes.
"""
