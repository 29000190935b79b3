"""What others published, held against AdaptiveWarmup: their recipes as they stand, at their rate and far above it.

    python -m benchmarks.published_recipes --quick                minutes: one seed, short runs
    python -m benchmarks.published_recipes --text shakespeare.txt the grid, 300 updates of nanoGPT; goes on after a kill
    python -m benchmarks.published_recipes --recipe nanogpt --steps 2000 --text shakespeare.txt
    python -m benchmarks.published_recipes --report               tables and figures from the rows there are

nanoGPT's recipe for CPUs (README and config/train_shakespeare_char.py) and mnist1d's convolutional network
(notebooks/mnist1d-classification.ipynb), models and loops written anew. `--text` names the text of nanoGPT; it was
published on Tiny Shakespeare. Without it the text is a part of the standard library's source.

Hand-set are the published warmup, none, and linear ones by share of the run. "warmctl" stands in the place of the
warmup: no warmup schedule, the closure clips gradients as the recipe does, and the decay is the recipe's. Each runs at
the published peak rate and at 3, 10 and 30 times it; a decay ends at a tenth of the peak, whatever it is. Each run
leaves one line in benchmarks/results/published_recipes/rows.jsonl.

Scores are the recipes' own, lower is better: validation loss in nats, test error. A run that diverged, or ended above
chance, counts as chance level. `best by hand` is the lowest mean over seeds of any hand-set warmup at any of the rates.
"""
