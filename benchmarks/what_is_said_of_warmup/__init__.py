"""What is said of warmup, one line each, tried in a setting small enough for two CPU cores.

    python -m benchmarks.what_is_said_of_warmup              all claims, five seeds; goes on after a kill
    python -m benchmarks.what_is_said_of_warmup --quick      under three minutes: shorter runs, three seeds
    python -m benchmarks.what_is_said_of_warmup --claim 4    one claim
    python -m benchmarks.what_is_said_of_warmup --report     table, figure and docs page from the rows there are

A claim is a trial of one seed, an effect that it foretells, and a margin: both were written down before the trial was
run on the seeds that are reported; the rate of claim 6 was lowered after two of them, see `detection.py`. It *holds*
where the 95 % interval of the mean effect lies above the margin, *the reverse* holds where it lies below minus the
margin, and else the claim *does not* show *at this size*, which is no proof against it.

With and without warmup have one initialisation, one order of data and one peak rate; that rate is picked once for a
setting by a rule stated with it, and for all seeds.

Claims are in the modules beside this file that have `CLAIMS`; a row is measured again when its module has changed.
"""
