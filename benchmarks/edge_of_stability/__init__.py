"""Published results on the edge of stability, each reproduced with warmctl measuring; or, said plainly, not reproduced.

    python -m benchmarks.edge_of_stability [--quick] [--report]

The training problem was chosen once, on these grounds, before anything was measured, and is the same for every claim
but the heatmap's: tanh MLP with two hidden layers as wide as its input, PyTorch's own initialisation (40-40-40-10, 3690
parameters for 256 × 10 targets: it can fit them all); 256 signals of mnist1d's
generator, one-hot targets; the square loss of Cohen et al. 2021, half the squared error summed over outputs, mean over
examples; full batch, constant rate, float32. Expected figures were measured elsewhere on a problem that is only partly
known: tolerances, fixed beforehand, are narrow where theory names the figure and wide where the problem decides it.

What does not reproduce is asked again, with one thing changed: ten times the width, cross-entropy, twice the layers, or
rates that hold the target exactly (CDAT's own law among them). The cause is what was changed where that reproduces the
claim, and the claim itself where nothing does.

The oracle of a measurement is the same eigenvalue in float64 by plain autograd and ARPACK, scaled by hand; the tests
hold it against dense Hessians. The heatmap is of the shared problem `gpt-post` at half the width and context, and needs
no measurement but the loss.
"""
