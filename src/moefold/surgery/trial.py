"""How a router will route at birth, tried on random tokens before anything is touched.

Shapes: a router is tried on random tokens, `batch tokens dim`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moefold.modes import competing, evaluating
from moefold.moe import MoEConfig
from moefold.routing import Routing, SparseRouting
from moefold.surgery.hosts import Site

TRIAL = (4, 128)
"""Sequences and tokens of the input a router is tried on; costs per token are for this length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How a router at birth routes random tokens.

    Attributes:
        rows: rows that experts compute, for each token.
        mass: smallest and largest sum of a token's combine weights.
        uncovered: share of tokens that no expert takes.
        uncovered_alike: the same where all tokens are alike, the worst case for routers by which
            tokens compete.
        mixes: whether experts see mixtures of tokens instead of tokens.
        learns: whether what the experts compute depends on the router's parameters smoothly, so
            that the task's loss has a gradient for them; True for a router without parameters.
        reach: how far the router looks.
        reach_in_training: the same in training.
        taught: whether it can route outside of training at birth; one that cannot is tried as in
            training.
        causal: whether no later token of a sequence changes an earlier one.
        weights: the combine weights themselves, zero where an expert is not chosen: of the random
            tokens, then of as many that are all alike; None where experts see mixtures of tokens.
    """

    rows: float
    mass: tuple[float, float]
    uncovered: float
    uncovered_alike: float
    mixes: bool
    learns: bool
    reach: str
    reach_in_training: str
    taught: bool
    causal: bool
    weights: Float[Tensor, "kinds tokens experts"] | None = field(
        default=None, compare=False, repr=False
    )


def try_router(moe: MoEConfig, site: Site, start: Callable[[nn.Module], None]) -> Trial:
    """Routes random tokens with a router as it will be born; the random state is put back.

    Args:
        moe: the mixture.
        site: where it will be.
        start: gives a router its first weights.

    Raises:
        ValueError: the router cannot be built for this host, or cannot route without token ids.
    """
    # On the CPU, whatever device is the default one.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        try:
            router = moe.router.build(site.dim, moe.num_experts, causal=site.causal)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
        router.site = site.name
        start(router)
        # A LayerNorm before the MLP makes about such tokens.
        x = torch.randn(*_trial_size(router), site.dim)
        with evaluating(router), competing(router, untaught_only=True):
            routing = router(x)
            alike = router(x[:, :1].expand_as(x))
            learns = _learns(router, x)
    sparse = isinstance(routing, SparseRouting)
    weights = routing.weights if sparse else routing.combine_weight.flatten(2)
    mass = weights.sum(-1)
    return Trial(
        rows=float(routing.rows_per_expert.sum()) / mass.numel(),
        mass=(float(mass.min()), float(mass.max())),
        uncovered=_uncovered(routing),
        uncovered_alike=_uncovered(alike),
        mixes=not sparse,
        learns=learns,
        reach=router.reach,
        reach_in_training=router.reach_in_training,
        taught=router.is_taught,
        causal=router.is_causal,
        weights=_weights(routing, alike),
    )


def _trial_size(router: nn.Module) -> tuple[int, int]:
    """Sequences and tokens to try a router on: the usual ones, in whole groups of its size."""
    sequences, tokens = TRIAL
    group = getattr(router, "group", None)
    return (sequences, -(-tokens // group) * group) if isinstance(group, int) else TRIAL


@torch.enable_grad()
def _learns(router: nn.Module, x: Float[Tensor, "batch tokens dim"]) -> bool:
    """Whether weights that are pulled at random pull the router's parameters."""
    parameters = list(router.parameters())
    if not parameters:
        return True
    routing = router(x)
    if isinstance(routing, SparseRouting):
        weights = [routing.weights]
    else:
        weights = [routing.combine_weight, routing.dispatch_weight]
    pulls = [weight * torch.randn_like(weight) for weight in weights]
    total = torch.stack([pull.sum() for pull in pulls]).sum()
    if not total.requires_grad:
        return False
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    strongest = max(0.0 if g is None else float(g.abs().max()) for g in gradients)
    # Of a weight that is always one, rounding leaves about 1e-7 for each token, of random sign; of
    # one that is not, the softmax of logits near zero leaves 1 / experts of the pull.
    return strongest > 1e-3 / routing.num_experts


def _weights(*routings: Routing) -> Tensor | None:
    found = [r.weights.flatten(0, 1) for r in routings if isinstance(r, SparseRouting)]
    return torch.stack(found) if found else None


def _uncovered(routing: Routing) -> float:
    if not isinstance(routing, SparseRouting):
        return 0.0  # every token mixes every slot
    return 1.0 - float(routing.chosen.any(-1).float().mean())
