"""The value a router returns: two linear maps, tokens to rows and rows to tokens.

Experts only ever see rows. A `SparseRouting` keeps its maps as a list of rows sorted by expert, a
`SoftRouting` as dense weights; both show themselves as matrices, which is the definition that every
fast path is tested against (Liu et al., *Routers in Vision Mixture of Experts*, 2024: the dispatch
and combine tensors).
"""

from moefold.routing.grouping import Group, Grouping
from moefold.routing.soft import SoftRouting
from moefold.routing.sparse import SparseRouting

Routing = SparseRouting | SoftRouting

__all__ = ["Group", "Grouping", "Routing", "SoftRouting", "SparseRouting"]
