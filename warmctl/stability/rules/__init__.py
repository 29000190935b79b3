"""The rules of torch.optim's own optimizers: where each goes unstable, and what it divides its steps by.

In: parameters, gradients and state as the coming step will find them. Out: an `UpdateRule` a class of optimizer.
May import: rates.py alone.
"""
