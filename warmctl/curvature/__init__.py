"""From a loss to products with its Hessian, and from products to eigenvalues.

In: a loss that can be evaluated again, and its parameters. Out: `EigenResult`, with residual and cost.
May import: loss/ and the ground.
"""
