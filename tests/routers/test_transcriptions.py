"""Every published router against its line-by-line transcription, on random cases in float64.

Compared are the chosen pairs (exactly), the scores that competed, the combine weights, and the
gradients of a random linear function of the weights, to the tokens and to the parameters. For Soft
MoE, which chooses nobody, the whole layer and its gradients. The transcriptions drop padding before
they compute anything; so agreeing with them also means that padding changes nothing.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moefold import routers
from tests.transcriptions import linear_logits, softmax_over_experts
from tests.transcriptions.cases import (
    CLOSE_IN_PLAN,
    SOLVED,
    TRANSCRIPTIONS,
    Case,
    decided_by_rounding,
    draw,
    draw_soft,
    groups_of,
    transcribe,
)
from tests.transcriptions.soft import soft_layer, soft_weights

CASES = 200
CASES_WITH_TIES = 200

# A weight is at most 1 and some fifty float64 operations (1e-16 each) away from its logit, whose
# own rounding, 1e-15 at |logit| <= 10, it inherits: 1e-14 of it. Normalised weights divide by sums
# down to 1e-2.
VALUES = {"rtol": 1e-11, "atol": 1e-12}
# The plan after Adam, which magnifies rounding (see tests.transcriptions.cases).
PLAN_AFTER_ADAM = {"rtol": 0.0, "atol": CLOSE_IN_PLAN}
# Gradients add up to 54 such terms with random factors, times |x| or |W| of order 1.
GRADIENTS = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("name", TRANSCRIPTIONS)
def test_router_agrees_with_its_transcription(name: str):
    cases = list(draw(name, CASES))
    assert_same_routings(cases, cases)


# Not for the routers that solve a transport problem: between equal tokens their plans differ by
# rounding, in any implementation, and the published algorithms say nothing about it.
@pytest.mark.parametrize("name", [name for name in TRANSCRIPTIONS if name not in SOLVED])
def test_equal_scores_go_to_the_lowest_index(name: str):
    cases = list(draw(name, CASES_WITH_TIES, tied=True))
    assert_same_routings(cases, cases)


def test_soft_layer_agrees_with_its_transcription():
    for case in draw_soft(CASES):
        assert_same_soft_layer(case, case)


# In training, noise of standard deviation noise_std / E on the logits decides who is chosen. It is
# also in the combine weights, except for those of Sinkhorn token choice (as in V-MoE's release).
@pytest.mark.parametrize(
    ("name", "weights_are_noisy"),
    [
        ("token-choice", True),
        ("expert-choice", True),
        ("sinkhorn-token-choice", False),
        ("sinkhorn-expert-choice", True),
    ],
)
def test_noisy_logits_choose_and_weigh(name: str, weights_are_noisy: bool):
    seen = []
    for case in draw(name, 60):
        router, x = build(case.but(noise_std=1.5, group="sequence"))
        routing = router.train()(x, case.mask)
        num_experts = routing.num_experts
        assert routing.noise_std == pytest.approx(1.5 / num_experts, rel=1e-6)
        # Whoever is handed the noisy logits as they are chooses and weighs alike.
        noisy = replace(
            case.but(group="sequence"),
            x=routing.noisy_logits.detach(),
            parameters={"weight": torch.eye(num_experts, dtype=x.dtype)},
        )
        if decided_by_rounding(noisy):
            continue
        weights, chosen, _ = transcribe(noisy)
        if not weights_are_noisy:
            clean = linear_logits(x.flatten(0, 1), case.parameters["weight"])
            weights = softmax_over_experts(clean).unflatten(0, x.shape[:2]) * chosen
        assert torch.equal(routing.chosen, chosen), str(case)
        assert_close(routing.weights, weights, f"{case}: weights", VALUES)
        real = slice(None) if case.mask is None else case.mask
        seen.append((routing.noisy_logits - routing.logits)[real].flatten() * num_experts)
    # Some 1500 draws: the standard error of their spread is 1.5 / sqrt(2 * 1500) = .027.
    draws = torch.cat(seen)
    assert len(draws) > 1000
    assert draws.std().item() == pytest.approx(1.5, abs=0.15)
    assert draws.mean().item() == pytest.approx(0.0, abs=0.2)


# A comparison that cannot fail proves nothing. Each of these routers is wrong in one setting.
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("token-choice", {"k": 1}),
        ("token-choice", {"priority": "order"}),
        ("token-choice", {"capacity_factor": 1.0}),
        ("token-choice", {"convention": "vmoe"}),
        ("token-choice", {"group": "sequence"}),
        ("sinkhorn-token-choice", {"iterations": 2}),
        ("sinkhorn-token-choice", {"epsilon": 4.0}),
        ("sinkhorn-token-choice", {"priority": "gate"}),
        ("expert-choice", {"capacity_factor": 2.5}),
        ("expert-choice", {"renormalize": True}),
        ("expert-choice", {"convention": "flaxformer"}),
        ("sinkhorn-expert-choice", {"iterations": 2}),
        ("sinkhorn-expert-choice", {"epsilon": 4.0}),
        ("sparse-transport-expert-choice", {"iterations": 19}),
        ("sparse-transport-expert-choice", {"learning_rate": 2e-2}),
        ("sparse-transport-expert-choice", {"gamma": 1.1}),
        ("unified", {"alpha": 0.51}),
        ("unified", {"budget": 1.75}),
        ("unified", {"expert_score": "sigmoid"}),
        ("unified", {"combine": "renormalized"}),
        ("unified", {"combine": "row-normalized"}),
        ("unified", {"group": "sequence"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, *value.items())),
)
def test_comparison_notices_a_wrong_setting(name: str, wrong: dict):
    changed = [case for case in draw(name, 60) if case.but(**wrong).settings != case.settings]
    with pytest.raises(AssertionError, match="seed"):
        assert_same_routings([case.but(**wrong) for case in changed], changed)


def test_comparison_notices_a_wrong_soft_scale():
    case = next(draw_soft(1))
    larger = case.with_parameters({**case.parameters, "scale": 1.01 * case.parameters["scale"]})
    with pytest.raises(AssertionError, match="seed"):
        assert_same_soft_layer(larger, case)


def assert_same_routings(cases: list[Case], published: list[Case]) -> None:
    for case, on_paper in zip(cases, published, strict=True):
        assert_same_routing(case, on_paper)


def assert_same_routing(case: Case, published: Case) -> None:
    """The library's routing of `case` equals the transcription of `published`."""
    router, x = build(case)
    routing = router(x, case.mask)
    expected_weights, expected_chosen, scores_of_groups = transcribe(published)

    assert torch.equal(routing.chosen, expected_chosen), (
        f"{case}\nchosen\n{routing.chosen.int()}\npublished\n{expected_chosen.int()}"
    )
    assert routing.scores is not None
    by_adam = published.router == "sparse-transport-expert-choice"
    for members, scores in zip(groups_of(published), scores_of_groups, strict=True):
        ours = torch.stack([routing.scores[b, t] for b, t in members])
        assert_close(ours, scores, f"{case}: scores", PLAN_AFTER_ADAM if by_adam else VALUES)
    assert_close(routing.weights, expected_weights, f"{case}: weights", VALUES)
    assert torch.equal(routing.rows_per_expert, expected_chosen.sum((0, 1))), str(case)

    # One entry of each matrix per chosen pair, the rows sorted by expert and then by token.
    dispatch, combine = routing.as_matrices()
    pairs = expected_chosen.flatten(0, 1).mT.nonzero()  # (expert, flat token), sorted
    expected = torch.zeros_like(dispatch)
    expected[torch.arange(len(pairs)), pairs[:, 1]] = 1
    assert torch.equal(dispatch, expected), str(case)
    weight_of_row = expected_weights.flatten(0, 1)[pairs[:, 1], pairs[:, 0]]
    assert_close(combine, expected.mT * weight_of_row, f"{case}: combine matrix", VALUES)

    assert_same_gradients(case, router, x, routing.weights, published, expected_weights)


def assert_same_soft_layer(case: Case, published: Case) -> None:
    """Y = C f(D^T X) through the library's dispatch and combine, and group by group on paper."""
    router, x = build(case)
    routing = router(x, case.mask)
    rows = routing.dispatch(x)
    of_expert = rows.split(routing.rows_per_expert.tolist())
    y = routing.combine(torch.cat([expert(k, part) for k, part in enumerate(of_expert)]))

    phi, scale = published.parameters["phi"], published.parameters["scale"]
    expected = torch.zeros_like(y)
    dispatch = torch.zeros(*x.shape[:2], *phi.shape[1:], dtype=x.dtype)
    combine = torch.zeros_like(dispatch)
    for members in groups_of(published):
        tokens = torch.stack([published.x[b, t] for b, t in members])
        d, c = soft_weights(tokens, phi, scale)
        of_group = soft_layer(tokens, d, c, expert)
        for i, (b, t) in enumerate(members):
            expected[b, t], dispatch[b, t], combine[b, t] = of_group[i], d[i], c[i]

    real = torch.ones(x.shape[:2], dtype=torch.bool) if case.mask is None else case.mask
    ours = routing.grouping.merge(routing.dispatch_weight)
    assert_close(ours, dispatch, f"{case}: dispatch weights", VALUES)
    ours = routing.grouping.merge(routing.combine_weight)
    assert_close(ours[real], combine[real], f"{case}: combine weights", VALUES)
    assert_close(y, expected, f"{case}: layer", VALUES)
    assert (y[~real] == 0).all(), f"{case}: padding came back as something"
    assert_same_gradients(case, router, x, y, published, expected)


def assert_same_gradients(
    case: Case, router: nn.Module, x: Tensor, ours: Tensor, published: Case, expected: Tensor
) -> None:
    """Gradients of one random linear function of both results."""
    generator = torch.Generator().manual_seed(case.seed)
    direction = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
    leaves = [x, *(router.get_parameter(name) for name in case.parameters)]
    leaves_on_paper = [published.x, *published.parameters.values()]
    # A case without a chosen pair has weights that depend on nothing: the gradient is zero.
    gradients = torch.autograd.grad(
        (ours * direction).sum() + 0 * sum(leaf.sum() for leaf in leaves), leaves
    )
    gradients_on_paper = torch.autograd.grad(
        (expected * direction).sum() + 0 * sum(leaf.sum() for leaf in leaves_on_paper),
        leaves_on_paper,
    )
    for name, one, other in zip(
        ("x", *case.parameters), gradients, gradients_on_paper, strict=True
    ):
        assert_close(one, other, f"{case}: gradient to {name}", GRADIENTS)


def build(case: Case) -> tuple[nn.Module, Tensor]:
    """The library's router with the parameters of the case, in float64, and its own input."""
    first = next(iter(case.parameters.values()))
    num_experts = first.shape[1 if case.router == "soft" else 0]
    router = routers.build(
        case.router, dim=case.x.shape[-1], num_experts=num_experts, **case.settings
    )
    router = router.double().eval()
    with torch.no_grad():
        for name, value in case.parameters.items():
            router.get_parameter(name).copy_(value)
    return router, case.x.detach().clone().requires_grad_()


def expert(k: int, rows: Tensor) -> Tensor:
    """A different function for every expert, so that a row sent to the wrong one shows."""
    return torch.tanh((1 + 0.5 * k) * rows + 0.1 * k)


def assert_close(ours: Tensor, published: Tensor, message: str, tolerance: dict) -> None:
    torch.testing.assert_close(
        ours, published, **tolerance, msg=lambda difference: f"{message}\n{difference}"
    )
