"""AdaptiveWarmup replaces the best hand-tuned warmup, at a known price: the experiment that could refute it.

    python -m benchmarks.replaces_tuned_warmup --quick           under two minutes
    python -m benchmarks.replaces_tuned_warmup                   the grid, 400 updates; goes on after a kill
    python -m benchmarks.replaces_tuned_warmup --long            2000 updates, three problems, around the best rate
    python -m benchmarks.replaces_tuned_warmup --report [--long] tables and figure from the rows there are

Each run trains one problem at one peak rate with one policy and one seed, under cosine decay to 10 %, and leaves
one line in benchmarks/results/replaces_tuned_warmup.jsonl. A line of older code is run again and replaced: of
warmctl's own code for the policy "warmctl", of the problem's for all. The *oracle* is the best of no warmup and
six linear ones, chosen afterwards for each peak rate by its mean over seeds; this choice favours the oracle.

Losses are final evaluation losses in nats, counted as chance level where a run diverged or ended above it. A run
has failed if it diverged or ended within 2 % of chance.
"""
