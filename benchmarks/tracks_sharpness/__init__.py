"""warmctl tracks sharpness at a known price: λ_max against dense Hessians, and from cold against other libraries.

    python -m benchmarks.tracks_sharpness [--quick] [--report]

1. Warm tracking. Three models of 532 to 1450 parameters train with SGD (H) and Adam (P^-½HP^-½), on one batch and on
   mini-batches. At each step the true λ_max is that of the dense Hessian of the step's batch, in float64 by double
   backward. `AdaptiveWarmup(control=False)` goes along; that the trajectory stays the same is checked.
2. Cold start. Three models of a million parameters, each library at its cheapest setting, of those tried, whose error
   is at most 1 % for every seed against float64 Lanczos to 1e-6. All look for the algebraically largest eigenvalue of
   the same float32 model in eval mode, on one batch, with attention by its twice differentiable kernel. Calls alternate
   in one process. Peak memory is that of a process of its own, which returns what it frees at once.

A library that is not installed is left out, and said so. curvlinops is no part of the `bench` extra, because a library
it depends on, without needing it here, asks for torchvision; it goes in by hand:

    pip install --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 einconv==0.1.0 einops==0.8.2 \
        linear_operator==0.6.1 unfoldNd==0.2.3 opt_einsum==3.4.0
"""
