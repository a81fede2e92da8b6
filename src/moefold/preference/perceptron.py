"""The averaged perceptron: comparison training of a linear scorer without gradients.

For each group in turn, with S the candidates that score at least what the chosen one does:

    w <- w + (1 / |S|) sum over i in S of (x_chosen - x_i)

and the scorer is the mean of w over all steps, which forgets the accidents of the last ones. Where
groups have weights, steps are as much longer.

Source: Tseng, Chen, Wu and Wei, *Comparison Training for Computer Chinese Chess*, IEEE T-CIAIG;
Collins, *Discriminative Training Methods for Hidden Markov Models*, 2002, for the average.

Shapes: `candidates features`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moefold.preference.comparators import ConsistentComparator
from moefold.preference.groups import Groups
from moefold.preference.scorers import LinearScorer


@torch.no_grad()
def averaged_perceptron(groups: Groups, *, passes: int = 1, seed: int = 0) -> ConsistentComparator:
    """A linear comparator, learnt group by group.

    Args:
        groups: with a choice, ranks or utilities; candidates are tensors, without context.
        passes: over the groups, each in an order of its own.
        seed: of the orders.

    Raises:
        ValueError: texts, a context, or no pass.
    """
    if isinstance(groups.candidates, list) or groups.context is not None:
        raise ValueError(
            "the perceptron takes candidates of numbers without context; use an encoder's features "
            "for texts, and put the context into the features"
        )
    if passes < 1:
        raise ValueError(f"passes is {passes}; it must be 1 or more")
    x = groups.candidates.double().flatten(1)
    weight, summed = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    best, starts, ends = groups.best, groups.starts.tolist(), groups.lengths.cumsum(0).tolist()
    size = [1.0] * len(groups) if groups.weights is None else groups.weights.tolist()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        for n in torch.randperm(len(groups), generator=generator).tolist():
            own = slice(starts[n], ends[n])
            weight = weight + size[n] * _step(x[own], best[own], weight)
            summed += weight
    scorer = LinearScorer(x.shape[1])
    scorer.out.weight.copy_(summed / (passes * len(groups)))
    return ConsistentComparator(scorer)


def _step(
    x: Float[Tensor, "candidates features"], best: Tensor, weight: Float[Tensor, " features"]
) -> Float[Tensor, " features"]:
    chosen = x[best].mean(0)
    above = x[~best & (x @ weight >= chosen @ weight)]
    return (chosen - above).mean(0) if len(above) else torch.zeros_like(weight)
