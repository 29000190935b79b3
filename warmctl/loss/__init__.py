"""From a user's loop to a loss that can be evaluated again without a trace.

In: a closure, an observed batch, the model's own forward, or a live graph. Out: a `Replay`, or that graph.
May import: the ground (vectors, distributed, state, warning).
"""
