"""Transport plans: marginals, worked examples, and the best of all answers on tiny sizes."""

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from moefold.ops.transport import (
    assign_balanced,
    project_sparse_simplex,
    sinkhorn,
    sparse_transport,
)

ROUNDING = 1e-12  # float64: a handful of additions and one exponential of numbers around 1


def logits(groups: int, members: int, experts: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(groups, members, experts, dtype=torch.float64)


def some_real(groups: int, members: int) -> Tensor:
    """Two tokens in three are real; group 0 has none."""
    valid = torch.rand(groups, members) < 0.66
    valid[1:, 0] = True
    valid[0] = False
    return valid


# Entropic transport


def test_sinkhorn_by_hand():
    # Logits log 3 on the diagonal, 0 elsewhere, two tokens and two experts (b = 1). The matrix of
    # 3 and 1 has equal row and column sums of 4, so dividing by 4 is the plan.
    by_hand = torch.tensor([[[3.0, 1.0], [1.0, 3.0]]], dtype=torch.float64)
    plan = sinkhorn(by_hand.log(), iterations=1)
    torch.testing.assert_close(plan, by_hand / 4, rtol=0, atol=ROUNDING)
    # epsilon = 1/2 doubles the logits: 9 and 1, sums of 10.
    plan = sinkhorn(by_hand.log(), iterations=1, epsilon=0.5)
    torch.testing.assert_close(plan, by_hand**2 / 10, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("members", "experts"), [(5, 3), (2, 7), (1, 4), (6, 1)])
def test_what_depends_on_token_or_expert_alone_is_levelled(members, experts):
    # Constant logits, and any sum of a term for the token and a term for the expert: the marginals
    # undo both, and what remains is the uniform plan, 1 / experts everywhere.
    for values in (
        torch.full((2, members, experts), -7.0, dtype=torch.float64),
        logits(2, members, 1) + logits(2, 1, experts),
    ):
        uniform = torch.full_like(values, 1 / experts)
        torch.testing.assert_close(sinkhorn(values), uniform, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("iterations", [1, 20])
def test_rows_are_exact_after_any_number_of_iterations(iterations):
    plan = sinkhorn(logits(3, 7, 4), iterations=iterations)
    ones = torch.ones(3, 7, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(2), ones, rtol=0, atol=ROUNDING)


def test_columns_come_closer_until_they_are_exact():
    values = logits(3, 7, 4)

    def error(iterations: int) -> float:
        return (sinkhorn(values, iterations=iterations).sum(1) - 7 / 4).abs().max().item()

    assert error(1) > error(5) > error(20)
    assert error(2000) < 1e-9  # linear convergence; float64 stops it at some 1e-15


def test_the_plan_differs_from_the_logits_by_rows_and_columns_only():
    # Optimality: log P - L is a term for the token plus a term for the expert, so its double
    # difference vanishes.
    values = logits(2, 6, 4)
    rest = sinkhorn(values).log() - values
    double = rest - rest[:, :1] - rest[:, :, :1] + rest[:, :1, :1]
    torch.testing.assert_close(double, torch.zeros_like(double), rtol=0, atol=ROUNDING)


def test_sinkhorn_leaves_padding_out():
    values, valid = logits(4, 9, 3), some_real(4, 9)
    values[~valid] = 50.0
    plan = sinkhorn(values, valid)
    assert not plan[~valid].any()
    for group in range(1, 4):
        alone = sinkhorn(values[group : group + 1, valid[group]])
        torch.testing.assert_close(plan[group, valid[group]], alone[0], rtol=0, atol=ROUNDING)


def test_large_logits_stay_finite():
    # float32 near 1000 has steps of 6e-5, which the exponential turns into relative errors of the
    # same size; 20 iterations and 8 experts add them up.
    plan = sinkhorn(1e3 * torch.randn(2, 16, 8))
    assert torch.isfinite(plan).all()
    torch.testing.assert_close(plan.sum(2), torch.ones(2, 16), rtol=0, atol=1e-3)


# Projection on sparse simplex points


@pytest.mark.parametrize(
    ("x", "count", "expected"),
    [
        # Keep .9 and .6: their excess over 1 is .5, shared by two.
        ((0.9, 0.6, 0.1), 2, (0.65, 0.35, 0)),
        # Allowed three, it still keeps two: .1 would become negative.
        ((0.9, 0.6, 0.1), 3, (0.65, 0.35, 0)),
        ((0.9, 0.6, 0.1), 1, (1, 0, 0)),
        # Missing mass is given in equal parts: .1 + .1 + .1 lacks .7.
        ((0.1, 0.1, 0.1), 3, (1 / 3, 1 / 3, 1 / 3)),
        # A tie at the last one kept goes to the lowest index.
        ((0.5, 0.5, 0.5), 2, (0.5, 0.5, 0)),
        ((-5.0, -6.0, -5.5), 2, (0.75, 0, 0.25)),
        ((0.9, 0.6, 0.1), 9, (0.65, 0.35, 0)),
    ],
    ids=str,
)
def test_projection_by_hand(x, count, expected):
    column = torch.tensor([[x]], dtype=torch.float64)
    for given in (count, torch.tensor([count])):
        got = project_sparse_simplex(column, given)
        torch.testing.assert_close(
            got, torch.tensor([[expected]], dtype=torch.float64), rtol=0, atol=ROUNDING
        )


def project_on_simplex(x: Tensor) -> Tensor:
    """Nearest point with non-negative entries that sum to 1, its level found by bisection."""
    low, high = x.min() - 1, x.max()
    for _ in range(60):
        level = (low + high) / 2
        low, high = (level, high) if (x - level).clamp_min(0).sum() > 1 else (low, level)
    return (x - low).clamp_min(0)


def nearest_sparse_point(x: Tensor, count: int, valid: Tensor) -> float:
    """Distance of the nearest simplex point with `count` non-zeros, over all possible supports."""
    places = [i for i in range(len(x)) if valid[i]]
    distances = []
    for support in combinations(places, min(count, len(places))):
        point = torch.zeros_like(x)
        point[list(support)] = project_on_simplex(x[list(support)])
        distances.append(float((point - x)[valid].norm()))
    return min(distances)


@pytest.mark.parametrize("seed", range(6))
def test_projection_is_the_nearest_sparse_point(seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    valid = torch.rand(2, 3, 6) < 0.8
    valid[..., seed % 6] = True
    counts = torch.randint(1, 7, (2,))
    got = project_sparse_simplex(x, counts, valid, int(counts.max()))
    assert not got[~valid].any()
    for g, row in product(range(2), range(3)):
        here, real, count = x[g, row], valid[g, row], int(counts[g])
        assert int((got[g, row] > 0).sum()) <= count
        assert got[g, row].min() >= 0
        assert float(got[g, row].sum()) == pytest.approx(1, abs=ROUNDING)
        distance = float((got[g, row] - here)[real].norm())
        assert distance == pytest.approx(nearest_sparse_point(here, count, real), abs=1e-9)


def test_a_row_without_valid_entries_is_zero():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[1, 2] = False
    got = project_sparse_simplex(x, 2, valid)
    assert not got[1, 2].any()
    assert torch.equal(got[0], project_sparse_simplex(x, 2)[0])


# Sparse transport


@pytest.mark.parametrize("capacity", [1, 3, torch.tensor([2, 5])], ids=str)
def test_columns_are_exact_and_sparse(capacity):
    plan = sparse_transport(logits(2, 8, 4).softmax(-1), capacity)
    share = torch.full((2, 4), 8 / 4, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(1), share, rtol=0, atol=ROUNDING)
    assert plan.min() >= 0
    assert ((plan > 0).sum(1) <= torch.as_tensor(capacity).reshape(-1, 1)).all()


def test_before_the_first_step_columns_are_projected_by_themselves():
    # alpha = 0: column j is b * projection(similarity_j / (gamma b)). Two tokens, one expert with
    # b = 2 and gamma 1/4: (.9, .5) / .5 = (1.8, 1.0), projected (.9, .1), times 2.
    similarity = torch.tensor([[[0.9], [0.5]]], dtype=torch.float64)
    plan = sparse_transport(similarity, 2, iterations=0, gamma=0.25)
    expected = torch.tensor([[[1.8], [0.2]]], dtype=torch.float64)
    torch.testing.assert_close(plan, expected, rtol=0, atol=ROUNDING)


def test_the_first_step_of_adam_moves_every_token_by_the_learning_rate():
    # The example above: rows sum to 1.8 and .2, so the slope is +.8 and -.8, and Adam's first step
    # is the learning rate against its sign: alpha = (-.1, +.1). Then ((.8, .6) / .5) = (1.6, 1.2),
    # projected (.7, .3), times 2. Adam's epsilon of 1e-8 against .8 moves alpha by some 1e-9.
    similarity = torch.tensor([[[0.9], [0.5]]], dtype=torch.float64)
    plan = sparse_transport(similarity, 2, iterations=1, learning_rate=0.1, gamma=0.25)
    expected = torch.tensor([[[1.4], [0.6]]], dtype=torch.float64)
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-7)


def test_without_sparsity_the_plan_becomes_feasible():
    # With room for every token this is quadratic transport, which is feasible: rows sum to 1 once
    # Adam has settled, up to its step size.
    similarity = logits(2, 6, 3).softmax(-1)

    def error(iterations: int) -> float:
        plan = sparse_transport(similarity, 6, iterations=iterations, learning_rate=1e-2)
        return (plan.sum(2) - 1).abs().max().item()

    assert error(1500) < 1e-2 < error(0)


def test_sparse_transport_leaves_fewer_tokens_out():
    # What it is for: with little room, plain columns take the same tokens, the plan spreads them.
    similarity = logits(1, 40, 4).softmax(-1)

    def left_out(iterations: int) -> int:
        plan = sparse_transport(similarity, 10, iterations=iterations)
        return int((plan.sum(2) == 0).sum())

    assert left_out(200) < left_out(0)


def test_sparse_transport_leaves_padding_out():
    similarity, valid = logits(4, 9, 3).softmax(-1), some_real(4, 9)
    similarity[~valid] = 1.0
    counts = (valid.sum(1) + 1) // 2
    plan = sparse_transport(similarity, counts, valid, most=int(counts.max()), iterations=5)
    assert torch.isfinite(plan).all()
    assert not plan[~valid].any()
    for group in range(1, 4):
        real = valid[group]
        alone = sparse_transport(
            similarity[group : group + 1, real], int(counts[group]), iterations=5
        )
        # Adam divides rounding by at least its epsilon: 1e-16 / 1e-8 for each of five steps.
        torch.testing.assert_close(plan[group, real], alone[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)], ids=["no groups", "no tokens"])
def test_nothing_is_transported(shape):
    empty = torch.zeros(shape, dtype=torch.float64)
    assert sinkhorn(empty).shape == shape
    assert sparse_transport(empty, 2).shape == shape
    assert assign_balanced(empty).shape == shape


# Balanced assignment


def best_total(scores: Tensor) -> float:
    """Largest total of all assignments in which no expert has more than its share."""
    members, experts = scores.shape
    room = -(-members // experts)
    totals = [
        sum(float(scores[token, expert]) for token, expert in enumerate(choice))
        for choice in product(range(experts), repeat=members)
        if all(choice.count(expert) <= room for expert in range(experts))
    ]
    return max(totals)


def test_assignment_by_hand():
    # Both tokens prefer expert 0. Token 0 loses 1 by stepping back, token 1 loses 4.
    scores = torch.tensor([[[5.0, 4.0], [5.0, 1.0]]])
    assert assign_balanced(scores)[0].int().tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(("members", "experts"), [(1, 3), (4, 2), (6, 3), (5, 3), (4, 4), (7, 2)])
def test_assignment_is_the_best_balanced_one(members, experts):
    for _ in range(5):
        scores = logits(2, members, experts)
        chosen = assign_balanced(scores)
        assert (chosen.sum(2) == 1).all()
        assert (chosen.sum(1) <= -(-members // experts)).all()
        if members % experts == 0:
            assert (chosen.sum(1) == members // experts).all()
        for group in range(2):
            total = float((scores[group] * chosen[group]).sum())
            assert total == pytest.approx(best_total(scores[group]), abs=ROUNDING)


def test_assignment_leaves_padding_out():
    scores, valid = logits(4, 6, 3), some_real(4, 6)
    scores[~valid] = float("nan")
    chosen = assign_balanced(scores, valid)
    assert not chosen[~valid].any()
    for group in range(1, 4):
        alone = assign_balanced(scores[group : group + 1, valid[group]])
        assert torch.equal(chosen[group, valid[group]], alone[0])
