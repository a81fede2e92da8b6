"""Losses of what experts computed: by hand, against plain definitions, and what they teach.

Letters: u unit vectors; K, L kernels; H = I - 1/n the centring matrix.
"""

import pytest
import torch
from torch import Tensor

from moefold import MoEConfig, record_routing, routers, set_loss_scale
from moefold.output_losses import SharedTokensCKA, cka, output_losses
from moefold.routing import Grouping, SoftRouting, SparseRouting
from moefold.testing.probe import untyped

ROUNDING = 1e-12  # float64: sums of some hundred numbers around 1


def routing_of(chosen: list | Tensor, mask: list | None = None, **more) -> SparseRouting:
    marks = torch.as_tensor(chosen, dtype=torch.bool)
    return SparseRouting.from_choice(
        marks,
        torch.ones(marks.shape, dtype=torch.float64),
        mask=None if mask is None else torch.as_tensor(mask, dtype=torch.bool),
        **more,
    )


def some(experts: int = 4, tokens: int = 9, share: float = 0.6, **more) -> SparseRouting:
    return routing_of(torch.rand(2, tokens, experts) < share, **more)


def results(routing: SparseRouting, dim: int = 5) -> Tensor:
    return torch.randn(len(routing.token_of_row), dim, dtype=torch.float64, requires_grad=True)


def same(got: Tensor, want: Tensor, *tensors: Tensor) -> None:
    """Equal in value and in every gradient."""
    torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING)
    for tensor in tensors:
        (fast,) = torch.autograd.grad(got, tensor, retain_graph=True)
        (slow,) = torch.autograd.grad(want, tensor, retain_graph=True)
        # Gradients here are below 1, and divided by distances not much below it.
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)


# Plain definitions


def slow_diversity(routing: SparseRouting, rows: Tensor, counted: list[bool]) -> Tensor:
    token = routing.token_of_row.tolist()
    pairs = [
        (i, j)
        for i in range(len(token))
        for j in range(len(token))
        if i != j and token[i] == token[j] and counted[i] and counted[j]
    ]
    cosines = [rows[i] @ rows[j] / (rows[i].norm() * rows[j].norm()) for i, j in pairs]
    return torch.stack(cosines).mean()


def slow_cka(x: Tensor, y: Tensor, sigma: float, width: str = "median") -> Tensor:
    """Kornblith et al., 2019, section 3, with centring matrices."""
    n = len(x)
    centring = torch.eye(n, dtype=x.dtype) - 1 / n

    def kernel(z: Tensor) -> Tensor:
        square = torch.stack([torch.stack([(a - b).square().sum() for b in z]) for a in z])
        pairs = square[~torch.eye(n, dtype=torch.bool)]
        scale = pairs.median() if width == "median" else 1.0
        return (-square / (2 * sigma**2 * scale)).exp()

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        return torch.trace(centring @ k @ centring @ m)

    k, m = kernel(x), kernel(y)
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


# Diversity


def test_diversity_by_hand():
    #   token   experts   results            cosine
    #   0       0, 1      [3, 0], [1, 1]     1 / sqrt 2
    #   1       1, 2      [0, 2], [0, -5]    -1
    #   2       0         [9, 9]             no pair
    routing = routing_of([[[1, 1, 0], [0, 1, 1], [1, 0, 0]]])
    rows = torch.tensor([[3.0, 0], [9, 9], [1, 1], [0, 2], [0, -5]], dtype=torch.float64)
    assert routing.token_of_row.tolist() == [0, 2, 0, 1, 1]
    got = output_losses.get("diversity")(routing, rows).item()
    assert got == pytest.approx((2**-0.5 - 1) / 2, abs=ROUNDING)


def test_diversity_is_the_mean_over_pairs_of_rows():
    routing = some()
    rows = results(routing)
    got = output_losses.get("diversity")(routing, rows)
    same(got, slow_diversity(routing, rows, [True] * len(rows)), rows)


def test_diversity_of_a_competition_is_that_of_the_winners():
    router = routers.build("compete", dim=5, num_experts=4, k=3, rate=1.0).double().train()
    opened = router(torch.randn(2, 5, 5, dtype=torch.float64))
    rows = results(opened)
    settled = opened.settled(rows)
    won = (settled.weight_of_row > 0).tolist()
    assert sum(won) == 2 * 5 * 3
    want = slow_diversity(settled, rows, won)
    for name in ("diversity", "competing-diversity"):
        same(output_losses.get(name)(settled, rows), want, rows)


def test_the_published_diversity_is_for_competitions_only():
    routing = some()
    rows = results(routing)
    assert output_losses.get("diversity")(routing, rows) != 0
    assert output_losses.get("competing-diversity")(routing, rows) == 0


def test_dead_experts_have_a_cosine_of_zero_and_a_finite_gradient():
    routing = routing_of([[[1, 1]]])
    rows = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    value = output_losses.get("diversity")(routing, rows)
    value.backward()
    assert value == 0
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()


# CKA


def test_cka_by_hand():
    # Three tokens. One expert puts them at 0, 1 and 1 (squared distances 1, 1, 0), the other at
    # 0, 0 and 1 (0, 1, 1); with sigma^2 = 1/2 kernels are exp(-distance) = 1 or e = exp(-1).
    #
    #   K = [1 e e; e 1 1; e 1 1]   L = [1 1 e; 1 1 e; e e 1]
    #
    # K separates the first token, L the last: K = e + (1 - e)(a a' + (1-a)(1-a)') for a = [1 0 0],
    # and H kills what is constant, so that H K H = 2 (1 - e) (H a)(H a)', and CKA is the squared
    # cosine of H a = [2, -1, -1] / 3 and H b = [-1, -1, 2] / 3: (-3 / 6)^2 = 1/4.
    x = torch.tensor([[0.0], [1.0], [1.0]], dtype=torch.float64)
    y = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    real = torch.ones(3, dtype=torch.bool)
    assert cka(x, y, real, 0.5**0.5, "absolute").item() == pytest.approx(1 / 4, abs=ROUNDING)
    # Whatever sigma is: the median of both is 1 as well.
    assert cka(x, y, real, 0.8).item() == pytest.approx(1 / 4, abs=ROUNDING)


@pytest.mark.parametrize("width", ["median", "absolute"])
@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_cka_is_its_definition(width, sigma):
    x, y = (torch.randn(8, d, dtype=torch.float64, requires_grad=True) for d in (3, 3))
    real = torch.ones(8, dtype=torch.bool)
    same(cka(x, y, real, sigma, width), slow_cka(x, y, sigma, width), x, y)


def test_tokens_that_do_not_count_change_nothing():
    x, y = (torch.randn(9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    real = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    same(cka(x, y, real, 0.8), slow_cka(x[real], y[real], 0.8), x, y)


def test_what_cka_does_not_see_and_what_it_does():
    x = torch.randn(12, 4, dtype=torch.float64)
    real = torch.ones(12, dtype=torch.bool)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    moved = 3 * x @ rotation + 5
    assert cka(x, moved, real, 0.8).item() == pytest.approx(1, abs=1e-9)
    assert cka(x, x[torch.randperm(12)], real, 0.8) < 0.9
    # In absolute width, as released, large results are all far apart, and everything is alike.
    far, other = 100 * x, 100 * torch.randn(12, 4, dtype=torch.float64)
    assert cka(far, other, real, 0.8, "absolute").item() == pytest.approx(1, abs=1e-9)
    assert cka(far, other, real, 0.8) < 0.9


def test_cka_without_a_geometry_is_zero():
    one = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for real in ([1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]):
        value = cka(one, other, torch.tensor(real, dtype=torch.bool), 0.8)
        assert value == 0
        for gradient in torch.autograd.grad(value, [one, other]):
            assert (gradient == 0).all()


def test_most_results_alike_give_finite_gradients():
    # The median distance is 0: all but one token come out the same.
    x = torch.zeros(5, 2, dtype=torch.float64)
    x[0] = 1.0
    x.requires_grad_()
    y = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    value = cka(x, y, torch.ones(5, dtype=torch.bool), 0.8)
    assert 0 < value <= 1
    for gradient in torch.autograd.grad(value, [x, y]):
        assert torch.isfinite(gradient).all()


# CKA of the experts that share most tokens


def test_the_experts_that_share_most_tokens_are_compared_on_these():
    #   token      0     1     2     3     4
    #   experts    0 1   1 2   1 2   0 1   1 2      1 and 2 share tokens 1, 2 and 4
    chosen = [[[1, 1, 0], [0, 1, 1], [0, 1, 1], [1, 1, 0], [0, 1, 1]]]
    routing = routing_of(chosen)
    loss = SharedTokensCKA(threshold=0.0)
    one, other, shared = loss.most_alike(routing)
    assert (one, other) == (1, 2)
    assert shared.tolist() == [False, True, True, False, True]
    # rows of expert 0: 0 3, of expert 1: 0 1 2 3 4, of expert 2: 1 2 4
    rows = results(routing)
    same(loss(routing, rows), slow_cka(rows[[3, 4, 6]], rows[[7, 8, 9]], 0.8), rows)


def test_below_the_threshold_experts_are_left_alone():
    routing = routing_of(torch.ones(1, 8, 2, dtype=torch.bool))
    rows = results(routing)
    value = slow_cka(rows[:8], rows[8:], 0.8).item()
    assert SharedTokensCKA(threshold=value - 0.01)(routing, rows).item() == pytest.approx(value)
    quiet = SharedTokensCKA(threshold=value + 0.01)(routing, rows)
    assert quiet == 0
    (gradient,) = torch.autograd.grad(quiet, rows)
    assert (gradient == 0).all()


def test_many_shared_tokens_are_thinned_out_evenly():
    routing = routing_of(torch.ones(1, 12, 2, dtype=torch.bool))
    rows = results(routing)
    kept = torch.tensor([0, 3, 6, 9])
    got = SharedTokensCKA(threshold=0.0, most_tokens=4)(routing, rows)
    same(got, slow_cka(rows[kept], rows[12 + kept], 0.8), rows)


def test_only_winners_of_a_competition_share_a_token():
    router = routers.build("compete", dim=4, num_experts=3, k=2, rate=1.0).double().train()
    opened = router(torch.randn(1, 9, 4, dtype=torch.float64))
    rows = results(opened)
    settled = opened.settled(rows)
    won = settled.wanted[0]
    counts = {(i, j): int((won[:, i] & won[:, j]).sum()) for i in range(3) for j in range(i + 1, 3)}
    one, other, shared = SharedTokensCKA().most_alike(settled)
    best = max(counts, key=lambda pair: counts[pair])
    assert (int(one), int(other)) == best
    assert int(shared.sum()) == counts[best]


@pytest.mark.parametrize("name", output_losses.names())
def test_experts_may_be_renamed(name):
    chosen = torch.rand(2, 30, 4) < 0.6
    order = torch.tensor([2, 0, 3, 1])
    each = torch.randn(2, 30, 4, 5, dtype=torch.float64)
    each[:, :, 1] = each[:, :, 2] + 0.1 * each[:, :, 1]  # alike enough for a threshold
    chosen[:, :, 1] = chosen[:, :, 2]
    values = []
    for marks, numbers in ((chosen, each), (chosen[..., order], each[:, :, order])):
        routing = routing_of(marks)
        rows = numbers.permute(2, 0, 1, 3)[marks.permute(2, 0, 1)]
        values.append(output_losses.get(name)(routing, rows))
    torch.testing.assert_close(*values, rtol=0, atol=ROUNDING)
    assert name == "competing-diversity" or values[0] != 0


@pytest.mark.parametrize("name", output_losses.names())
def test_nothing_to_compare_is_zero(name):
    loss = output_losses.get(name)
    soft = routers.build("soft", dim=5, num_experts=3)(torch.randn(2, 4, 5))
    assert isinstance(soft, SoftRouting)
    assert loss(soft, torch.randn(6, 5)) == 0
    for routing in (
        routing_of(torch.zeros(2, 3, 4, dtype=torch.bool)),
        routing_of(torch.zeros(2, 0, 4, dtype=torch.bool)),
        routing_of(torch.eye(4, dtype=torch.bool).unsqueeze(0)),  # nobody shares a token
        routing_of(torch.ones(2, 3, 1, dtype=torch.bool)),  # one expert
    ):
        rows = results(routing)
        value = loss(routing, rows)
        assert value == 0
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, rows)
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", output_losses.names())
def test_spare_rows_count_nowhere(name):
    # Under torch.compile and on a GPU the list is longer than there are pairs.
    chosen = torch.rand(1, 8, 3) < 0.7
    routing = routing_of(chosen)
    rows = results(routing)
    spare = torch.zeros(5, dtype=torch.int64)
    longer = SparseRouting(
        token_of_row=torch.cat([routing.token_of_row, spare]),
        weight_of_row=torch.cat([routing.weight_of_row, spare.double()]),
        rows_per_expert=routing.rows_per_expert,
        grouping=Grouping("sequence", 1, 8),
    )
    loss = output_losses.get(name)
    more = torch.cat([rows, torch.full((5, 5), 7.0, dtype=torch.float64)])
    assert torch.equal(loss(longer, more), loss(routing, rows))


@pytest.mark.parametrize("name", ["diversity", "cka"])
def test_half_precision_is_compared_in_float32(name):
    # Results that differ by less than bfloat16 resolves near them, once centred or multiplied.
    routing = routing_of(torch.ones(1, 16, 2, dtype=torch.bool))
    rows = (100 + torch.randn(32, 5)).bfloat16()
    want = output_losses.get(name)(routing, rows.double())
    with torch.autocast("cpu", torch.bfloat16):
        got = output_losses.get(name)(routing, rows)
    assert got.dtype == torch.float32
    # Float32 sums of numbers of order 1 after the mean of 100 is gone: 1e-7 * 100.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


# In a layer


def layer(**settings):
    torch.manual_seed(0)
    given = {"router": routers.config("mixtral", k=2), "activation": "tanh", **settings}
    return MoEConfig(num_experts=3, expert_width=8, **given).build(4, site="layer.3").double()


def test_losses_of_both_kinds_ride_as_if_they_were_added():
    x = torch.randn(2, 10, 4, dtype=torch.float64)
    coefficients = {"balance": 0.3, "diversity": 0.2, "cka": 0.5}
    riding, added = layer(losses=coefficients), layer(losses={})
    set_loss_scale(riding, 0.5)
    riding(x).square().sum().backward()
    with record_routing(added) as record:
        y = added(x)
    routing = record[""][0]
    rows = added.experts(routing.dispatch(x), routing.rows_per_expert)
    total = record.loss(balance=0.3)
    total = total + 0.2 * output_losses.get("diversity")(routing, rows)
    total = total + 0.5 * output_losses.get("cka")(routing, rows)
    (y.square().sum() + 0.5 * total).backward()
    for name, parameter in added.named_parameters():
        other = riding.get_parameter(name).grad
        torch.testing.assert_close(other, parameter.grad, rtol=0, atol=ROUNDING)
    alone = output_losses.get("cka")(routing, rows)
    weight = added.router.get_parameter("weight")
    (none,) = torch.autograd.grad(alone, weight, allow_unused=True)
    assert none is None, "results say nothing about the gate"


def test_in_evaluation_nothing_rides():
    x = torch.randn(2, 10, 4, dtype=torch.float64)
    grads = []
    for own in ({}, {"diversity": 1.0, "cka": 1.0}):
        moe = layer(losses=own).eval()
        moe(x).square().sum().backward()
        grads.append([p.grad for p in moe.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("name", "below"), [("diversity", 0.3), ("cka", 0.5)])
def test_experts_that_are_copies_grow_apart(name, below):
    # All experts begin as one, as upcycling makes them, with a little noise: their cosine and
    # their CKA are near 1. Only the loss trains them.
    moe = layer(losses={name: 1.0}).train()
    with torch.no_grad():
        for parameter in moe.experts.parameters():
            noise = 0.01 * torch.randn_like(parameter)
            parameter.copy_(parameter[:1].expand_as(parameter) + noise)
    x = torch.randn(1, 60, 4, dtype=torch.float64)
    optimizer = torch.optim.Adam(moe.experts.parameters(), lr=0.02)

    def alike() -> float:
        routing = moe.router(x)
        rows = moe.experts(routing.dispatch(x), routing.rows_per_expert)
        loss = SharedTokensCKA(threshold=0.0) if name == "cka" else output_losses.get(name)
        return loss(routing, rows).item()

    assert alike() > 0.9
    for _ in range(150):
        optimizer.zero_grad()
        (moe(x) * 0).sum().backward()
        optimizer.step()
    # CKA is left alone once it is below its threshold, and stays near there.
    assert alike() < below + 0.05


# Errors


def test_a_record_has_no_rows_and_says_so():
    moe = layer()
    with record_routing(moe) as record:
        moe(torch.randn(1, 3, 4, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"loss 'competing-diversity' needs the experts' results, which a record"
    ):
        record.loss(competing_diversity=1.0)


def test_an_unknown_loss_is_answered_with_both_kinds():
    with pytest.raises(
        ValueError,
        match=r"unknown loss 'diversty'; did you mean 'diversity'\? Of a routing: balance, .*; of "
        r"the experts' results: diversity, competing-diversity, cka",
    ):
        MoEConfig(losses={"diversty": 1.0})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threshold": 1.5}, r"threshold is 1\.5; CKA lies between 0 and 1"),
        ({"sigma": 0.0}, r"sigma is 0\.0; it must be a positive finite number"),
        ({"width": "mean"}, r"width is 'mean'; allowed: 'median', 'absolute'"),
        ({"most_tokens": 1}, r"most_tokens is 1; CKA compares 2 tokens or more"),
    ],
)
def test_settings_of_cka_that_cannot_be(settings, says):
    with untyped(), pytest.raises(ValueError, match=says):
        SharedTokensCKA(**settings)
