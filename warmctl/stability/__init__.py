"""From curvature and an optimizer's state to one ratio with its edge at 1, and what a step says for free.

In: an optimizer, its update rule and a loss. Out: a `Measurement` a probe; loss and gradient norm a step.
May import: curvature/, loss/ and the ground. It measures and does not decide. `rules/` has torch.optim's own rules.
"""
