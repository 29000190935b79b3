"""From a loss to products with its Hessian (`operators`), and from products to eigenvalues (`eigen`, `tracking`).

In: a loss that can be evaluated again, and its parameters. Out: an `EigenResult`, with its residual and its cost.
May import: loss/ and the ground. The three ways to a product are files of their own, found under their names.
"""
