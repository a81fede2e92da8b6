"""Triton kernels for a GPU, one file per family; `import moefold` imports none of them.

Shapes: tokens are `tokens dim`, rows `rows dim`, sorted by expert, see `routing.sparse`.

Experts:

    schedule    which tile of rows belongs to which expert, and which rows to which token
    blocks      how large a tile is
    first       gather + product + activation
    second      a product per row, for the second product and for the gradient of rows
    hidden      backward through the second product and the activation, which it makes again
    combine     weighted sum of a token's rows
    weights     gradients of matrices and biases

Routers:

    select      the best of each row, and the fused router
    radix       the best of a long row
    rows        marked pairs to a list of rows
    soft        Soft MoE's two maps

All of them run on the CPU too, where TRITON_INTERPRET=1 was set before they were imported.
"""
