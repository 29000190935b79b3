"""How loose the bound on the sharpness from the layers' spectral norms is, on small models.

    python -m benchmarks.spectral_bound

Beside it: the largest eigenvalue of the dense Gauss–Newton matrix, which it bounds, and of the dense Hessian, float64.
Takes some seconds; nothing is written.
"""
