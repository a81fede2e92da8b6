"""Transport plans between tokens and experts, used to choose, never to weigh.

Shapes: `groups members experts`. Every real token holds mass 1, every expert takes the same share
of its group's mass, `b = real tokens / experts`. Padding holds no mass and gets none.

Both solvers run without gradient: the routers that use them read only the order of the plan's
entries and weigh with a softmax.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moefold.ops.select import Count, last_taken, mark, per_group


def _mass(scores: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens take part `[groups, members, 1]`, and each expert's share `[groups, 1, 1]`."""
    groups, members, experts = scores.shape
    if valid is None:
        valid = scores.new_ones(groups, members, dtype=torch.bool)
    # A group without real tokens moves nothing; a mass of 1 keeps its arithmetic finite.
    share = valid.sum(1).clamp_min(1).to(scores.dtype) / experts
    return valid.unsqueeze(-1), share.reshape(-1, 1, 1)


@torch.no_grad()
def sinkhorn(
    logits: Float[Tensor, "groups members experts"],
    valid: Bool[Tensor, "groups members"] | None = None,
    *,
    iterations: int = 20,
    epsilon: float = 1.0,
) -> Float[Tensor, "groups members experts"]:
    """Entropic transport plan: rows sum to 1 exactly, columns to `b` approximately.

    `argmin_P <P, -L> + epsilon <P, log P>` by Sinkhorn's iteration in the log domain. It ends on
    the row update, so rows are exact and columns as close as `iterations` brings them.

    Source: Liu et al., *Routers in Vision Mixture of Experts*, 2024; settings of the router
    `KLProjectionNoisyTopExpertsPerItemRouter` of google-research/vmoe.
    """
    real, share = _mass(logits, valid)
    kernel = logits.masked_fill(~real, 0.0) / epsilon
    of_token = kernel.new_zeros(kernel.shape[0], kernel.shape[1], 1)
    of_expert = kernel.new_zeros(kernel.shape[0], 1, kernel.shape[2])
    for _ in range(iterations):
        column = (kernel + of_token).masked_fill(~real, -torch.inf)
        of_expert = share.log() - column.logsumexp(1, keepdim=True)
        of_token = -(kernel + of_expert).logsumexp(2, keepdim=True)
    return (kernel + of_token + of_expert).exp().masked_fill(~real, 0.0)


def project_sparse_simplex(
    x: Float[Tensor, "groups experts members"],
    count: Count,
    valid: Bool[Tensor, "groups experts members"] | None = None,
    most: int | None = None,
) -> Float[Tensor, "groups experts members"]:
    """Project every row on the simplex points with at most `count` non-zeros.

    Keep the `count` largest entries and project those on the unit simplex (Kyrillidis et al.,
    *Sparse projections onto the simplex*, 2013). Rows without a valid entry come back as zero.

    Args:
        x: entries; a tie at the last one kept goes to the lowest index.
        count: non-zeros, one number or one for each group.
        valid: which entries take part, all if None.
        most: no count is larger; saves sorting the rest.
    """
    if valid is not None:
        x = x.masked_fill(~valid, -torch.inf)
    size = x.shape[-1]
    if isinstance(count, int):
        most = count
        count = torch.full(x.shape[:1], count, device=x.device)
    count = per_group(count, x)
    ordered = x.topk(size if most is None else min(max(most, 1), size), -1).values
    place = torch.arange(1, ordered.shape[-1] + 1, device=x.device)
    taken = (place <= count) & (ordered > -torch.inf)
    total = ordered.masked_fill(~taken, 0.0).cumsum(-1)
    positive = taken & (1 + place * ordered > total)
    last = positive.sum(-1, keepdim=True).clamp_min(1)
    level = (total.gather(-1, last - 1) - 1) / last
    support = mark(x, last_taken(ordered, count, -1), count, -1)
    if valid is not None:
        support = support & valid
    return (x - level).clamp_min(0.0).masked_fill(~support, 0.0)


@torch.no_grad()
def sparse_transport(
    similarity: Float[Tensor, "groups members experts"],
    capacity: Count,
    valid: Bool[Tensor, "groups members"] | None = None,
    *,
    most: int | None = None,
    iterations: int = 20,
    learning_rate: float = 1e-2,
    gamma: float = 1.0,
) -> Float[Tensor, "groups members experts"]:
    """Quadratic transport plan whose columns have at most `capacity` non-zeros.

    Minimises the semi-dual over one variable a token with Adam, from zero. Columns sum to `b`
    exactly; rows do not sum to 1 after few iterations and need not: the plan is a selection that
    leaves few tokens out, not a feasible transport.

    Source: Liu, Puigcerver, Blondel, *Sparsity-Constrained Optimal Transport*, 2023; settings of
    the router `KSparseProjectionTransportTopItemsPerExpertRouter` of google-research/vmoe (Adam
    with learning rate 1e-2, 20 iterations, gamma 1).

    Args:
        similarity: how well pairs fit; a softmax over experts in the paper's routers.
        capacity: non-zeros of a column, one number or one for each group.
        valid: which tokens are real, all if None.
        most: no capacity is larger; saves sorting the rest.
        iterations: steps of Adam.
        learning_rate: its step size.
        gamma: strength of the quadratic regularisation.
    """
    if similarity.numel() == 0:
        return torch.zeros_like(similarity)
    real, share = _mass(similarity, valid)
    fit = similarity.masked_fill(~real, 0.0).transpose(1, 2).contiguous()  # members last: faster
    of_real = real.transpose(1, 2)
    takes_part = None if valid is None else of_real.expand_as(fit)

    def plan(of_token: Tensor) -> Tensor:
        scaled = (of_token + fit) / (gamma * share)
        return share * project_sparse_simplex(scaled, capacity, takes_part, most)

    of_token = fit.new_zeros(fit.shape[0], 1, fit.shape[2])
    first, second = torch.zeros_like(of_token), torch.zeros_like(of_token)
    for step in range(1, iterations + 1):
        slope = (plan(of_token).sum(1, keepdim=True) - 1.0).masked_fill(~of_real, 0.0)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope.square()
        scale = (second / (1 - 0.999**step)).sqrt() + 1e-8
        of_token = of_token - learning_rate * (first / (1 - 0.9**step)) / scale
    return plan(of_token).transpose(1, 2)


def assign_balanced(
    scores: Float[Tensor, "groups members experts"],
    valid: Bool[Tensor, "groups members"] | None = None,
) -> Bool[Tensor, "groups members experts"]:
    """One expert for every real token, loads balanced, at the largest total score.

    An expert takes at most `ceil(real tokens / experts)` tokens. Solved exactly on the host with
    SciPy, which is slow beyond a few thousand tokens in a group.

    Source: Lewis et al., *BASE Layers*, 2021, section 3.1.
    """
    from scipy.optimize import linear_sum_assignment  # a guest: only this router needs SciPy

    chosen = torch.zeros_like(scores, dtype=torch.bool)
    groups, members, experts = scores.shape
    for group in range(groups):
        tokens = torch.arange(members, device=scores.device)
        if valid is not None:
            tokens = tokens[valid[group]]
        room = -(-len(tokens) // experts)
        benefit = scores[group, tokens].detach().double().cpu().repeat_interleave(room, dim=1)
        token, place = linear_sum_assignment(benefit.numpy(), maximize=True)
        expert = torch.as_tensor(place // max(room, 1), device=scores.device)
        chosen[group, tokens[torch.as_tensor(token, device=scores.device)], expert] = True
    return chosen
