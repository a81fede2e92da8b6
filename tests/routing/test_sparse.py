"""The sparse routing: a list of rows sorted by expert, and the two maps it stands for."""

import pytest
import torch
from torch import Tensor

from moefold.routing import Grouping, SparseRouting

# Six tokens in two sequences, four experts (the layout of the module's docstring):
#
#     rows:            expert 0           | expert 1      | expert 2 has none | expert 3
#     token_of_row:    0   2   5          | 2   3         |                   | 4
#     weight_of_row:   .6  .5  .9         | .5  1.        |                   | .7
#
# Token 1 has no row, token 2 has two.
TOKEN_OF_ROW = [0, 2, 5, 2, 3, 4]
WEIGHT_OF_ROW = [0.6, 0.5, 0.9, 0.5, 1.0, 0.7]
ROWS_PER_EXPERT = [3, 2, 0, 1]

# Dispatch copies, so it equals its matrix bit for bit. Combine adds at most `experts` products in
# another order than the matrix does: a few float64 roundings of numbers around 1.
SUM_ORDER = 1e-14


def example(spare: int = 0) -> SparseRouting:
    """The layout above, with so many spare rows at its end."""
    return SparseRouting(
        token_of_row=torch.tensor(TOKEN_OF_ROW + [0] * spare),
        weight_of_row=torch.tensor(WEIGHT_OF_ROW + [0.0] * spare, dtype=torch.float64),
        rows_per_expert=torch.tensor(ROWS_PER_EXPERT),
        grouping=Grouping("sequence", 2, 3),
    )


def numbered_tokens() -> Tensor:
    """Token t is the vector (t, 10 t)."""
    flat = torch.arange(6, dtype=torch.float64)
    return torch.stack([flat, 10 * flat], 1).reshape(2, 3, 2)


def random_choice(seed: int) -> tuple[Tensor, Tensor]:
    """Chosen pairs and weights: empty experts, dropped tokens, anything from 0 to E per token."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [int(torch.randint(1, top, (), generator=generator)) for top in (4, 8, 7)]
    density = torch.rand((), generator=generator)
    chosen = torch.rand(*sizes, generator=generator) < density
    chosen[..., seed % sizes[2]] = False
    weights = torch.randn(*sizes, generator=generator, dtype=torch.float64)
    return chosen, weights


# By hand


def test_the_layout_by_hand():
    routing = example()
    assert routing.num_experts == 4
    assert routing.num_tokens == 6
    assert routing.expert_of_row.tolist() == [0, 0, 0, 1, 1, 3]
    expected = [
        [[0.6, 0, 0, 0], [0, 0, 0, 0], [0.5, 0.5, 0, 0]],
        [[0, 1.0, 0, 0], [0, 0, 0, 0.7], [0.9, 0, 0, 0]],
    ]
    assert routing.weights.tolist() == expected
    assert routing.chosen.tolist() == (torch.tensor(expected) > 0).tolist()


def test_dispatch_and_combine_by_hand():
    rows = example().dispatch(numbered_tokens())
    assert rows.tolist() == [[0, 0], [2, 20], [5, 50], [2, 20], [3, 30], [4, 40]]
    # Rows of expert e come back times e + 1. Token 2: 0.5 * 1 * 2 + 0.5 * 2 * 2 = 3.
    factor = torch.tensor([1, 1, 1, 2, 2, 4], dtype=torch.float64).unsqueeze(1)
    back = example().combine(rows * factor)[..., 0].flatten()
    # Tokens 3: 1.0 * 2 * 3 = 6, 4: 0.7 * 4 * 4 = 11.2, 5: 0.9 * 1 * 5 = 4.5.
    assert back.tolist() == pytest.approx([0, 0, 3, 6, 11.2, 4.5], rel=1e-15)


def test_the_matrices_by_hand():
    dispatch, combine = example().as_matrices()
    # Six rows by six tokens: row r holds a 1 at its token.
    assert dispatch.argmax(1).tolist() == TOKEN_OF_ROW
    assert dispatch.sum(1).tolist() == [1.0] * 6
    assert combine.t().sum(1).tolist() == WEIGHT_OF_ROW
    assert torch.equal(combine.t() != 0, dispatch != 0)


def test_from_choice_sorts_by_expert_then_by_token():
    # Two sequences of two tokens, three experts; token 1 takes two, nobody takes expert 1.
    chosen = torch.tensor([[[1, 0, 0], [1, 0, 1]], [[0, 0, 0], [0, 0, 1]]], dtype=torch.bool)
    weights = torch.arange(12, dtype=torch.float64).reshape(2, 2, 3)
    routing = SparseRouting.from_choice(chosen, weights)
    assert routing.token_of_row.tolist() == [0, 1, 1, 3]
    assert routing.weight_of_row.tolist() == [0, 3, 5, 11]
    assert routing.rows_per_expert.tolist() == [2, 0, 2]
    assert routing.rows_per_expert.dtype == torch.int64


def test_a_weight_of_zero_is_still_a_choice():
    # Token 0 goes to expert 0 with weight 0 (a router may say so); it has a row and counts as load.
    chosen = torch.tensor([[[True, False]]])
    routing = SparseRouting.from_choice(chosen, torch.zeros(1, 1, 2))
    assert routing.chosen.tolist() == [[[True, False]]]
    assert routing.rows_per_expert.tolist() == [1, 0]


# Properties


@pytest.mark.parametrize("seed", range(40))
def test_dispatch_and_combine_are_their_matrices(seed):
    chosen, weights = random_choice(seed)
    weights.requires_grad_()
    routing = SparseRouting.from_choice(chosen, weights)
    x = torch.randn(*chosen.shape[:2], 3, dtype=torch.float64, requires_grad=True)
    to_rows, to_tokens = routing.as_matrices()

    rows = routing.dispatch(x)
    assert torch.equal(rows, to_rows @ x.reshape(-1, 3))

    rows = torch.randn_like(rows, requires_grad=True)
    fast, slow = routing.combine(rows), (to_tokens @ rows).reshape(x.shape)
    torch.testing.assert_close(fast, slow, rtol=0, atol=SUM_ORDER)

    back = torch.randn_like(fast)
    for path in ([x], [rows, weights]):
        of_fast = routing.dispatch(x) if path == [x] else fast
        of_slow = to_rows @ x.reshape(-1, 3) if path == [x] else slow
        seed_grad = torch.randn_like(of_fast) if path == [x] else back
        one = torch.autograd.grad(of_fast, path, seed_grad, retain_graph=True)
        two = torch.autograd.grad(of_slow, path, seed_grad, retain_graph=True)
        for left, right in zip(one, two, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=SUM_ORDER)


@pytest.mark.parametrize("seed", range(10))
def test_the_list_gives_back_the_choice_it_was_made_of(seed):
    chosen, weights = random_choice(seed)
    routing = SparseRouting.from_choice(chosen, weights)
    assert torch.equal(routing.chosen, chosen)
    assert torch.equal(routing.weights, weights * chosen)
    assert int(routing.rows_per_expert.sum()) == len(routing.token_of_row) == int(chosen.sum())
    order = routing.expert_of_row * routing.num_tokens + routing.token_of_row
    assert torch.equal(order, order.unique())  # strictly increasing: sorted, and no pair twice


def test_a_token_without_a_row_is_exactly_zero_and_gets_no_gradient():
    x = numbered_tokens().add(1).requires_grad_()
    routing = example()
    out = routing.combine(routing.dispatch(x).exp())
    assert out[0, 1].tolist() == [0.0, 0.0]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad[0, 1].tolist() == [0.0, 0.0]
    assert (x.grad.flatten(0, 1)[[0, 2, 3, 4, 5]] != 0).all()


def test_only_chosen_weights_are_read_and_get_a_gradient():
    chosen = torch.tensor([[[True, False], [False, True]]])
    weights = torch.tensor([[[2.0, float("nan")], [float("inf"), 3.0]]], requires_grad=True)
    routing = SparseRouting.from_choice(chosen, weights)
    x = torch.tensor([[[5.0], [7.0]]])
    out = routing.combine(routing.dispatch(x))
    assert out.tolist() == [[[10.0], [21.0]]]
    out.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[[5.0, 0.0], [0.0, 7.0]]]


def test_rows_keep_their_dtype():
    # A layer in bfloat16 with weights in float32 stays in bfloat16: 3 * 0.5 is exact there.
    chosen = torch.tensor([[[True]]])
    routing = SparseRouting.from_choice(chosen, torch.tensor([[[0.5]]]))
    out = routing.combine(routing.dispatch(torch.tensor([[[3.0]]], dtype=torch.bfloat16)))
    assert out.dtype == torch.bfloat16
    assert out.item() == 1.5


@pytest.mark.parametrize(
    "shape", [(2, 3, 4), (2, 0, 4), (0, 3, 4)], ids=["no rows", "no tokens", "no sequences"]
)
def test_nothing_is_routed_to_nothing(shape):
    routing = SparseRouting.from_choice(
        torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.float64)
    )
    x = torch.randn(*shape[:2], 5, dtype=torch.float64, requires_grad=True)
    rows = routing.dispatch(x)
    assert rows.shape == (0, 5)
    assert routing.rows_per_expert.tolist() == [0, 0, 0, 0]
    assert routing.expert_of_row.tolist() == []
    out = routing.combine(rows)
    assert torch.equal(out, torch.zeros(*shape[:2], 5, dtype=torch.float64))
    out.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


# Spare rows: a list that is longer than its experts' rows


def test_spare_rows_belong_to_no_expert():
    routing = example(spare=3)
    assert routing.expert_of_row.tolist() == [0, 0, 0, 1, 1, 3, 4, 4, 4]
    assert torch.equal(routing.weights, example().weights)
    assert torch.equal(routing.chosen, example().chosen)
    assert int(routing.rows_per_expert.sum()) == 6


def test_spare_rows_are_zero_in_both_matrices():
    dispatch, combine = example(spare=3).as_matrices()
    assert torch.equal(dispatch[:6], example().as_matrices()[0])
    assert torch.equal(combine[:, :6], example().as_matrices()[1])
    assert not dispatch[6:].any()
    assert not combine[:, 6:].any()


def test_spare_rows_return_nothing():
    routing = example(spare=3)
    rows = torch.randn(9, 2, dtype=torch.float64)
    assert torch.equal(routing.combine(rows), example().combine(rows[:6]))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("bounded", [False, True], ids=["every pair", "most_rows"])
def test_a_static_list_is_the_list_and_spare_rows(seed, bounded, monkeypatch):
    chosen, weights = random_choice(seed)
    short = SparseRouting.from_choice(chosen, weights)
    most = int(chosen.sum()) + seed if bounded else None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    long = SparseRouting.from_choice(chosen, weights.requires_grad_(), most_rows=most)
    rows = len(short.token_of_row)
    assert len(long.token_of_row) == (chosen.numel() if most is None else most)
    assert torch.equal(long.token_of_row[:rows], short.token_of_row)
    assert torch.equal(long.weight_of_row[:rows], short.weight_of_row)
    assert not long.token_of_row[rows:].any()
    assert not long.weight_of_row[rows:].any()
    assert torch.equal(long.rows_per_expert, short.rows_per_expert)
    assert torch.equal(long.chosen, chosen)
    (of_weights,) = torch.autograd.grad(long.weight_of_row.sum(), weights)
    assert torch.equal(of_weights, chosen.double())
