"""moefold folds experts into the model people already have.

One idea carries the library: a router returns a *routing*, two linear maps, tokens to rows and rows
to tokens. Experts only ever see rows.
"""
