"""Training tasks drawn by seed from a distribution, runs of them under every warmup policy, and what they come to."""
