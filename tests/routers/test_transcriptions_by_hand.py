"""Small examples of every published router, worked by hand.

Each example is put both to the library and to the transcription that the random tests trust. The
logits are set exactly: the router's weight is the identity and the tokens are the logits; where an
example is easier in probabilities, the logits are their logarithms.
"""

from math import log, tanh

import pytest
import torch
from torch import Tensor

from moefold import routers
from tests.transcriptions.cases import Case, transcribe
from tests.transcriptions.soft import soft_layer, soft_weights

# The arithmetic in the comments is exact; what differs is float64 rounding, 1e-15 per operation.
ROUNDING = 1e-12


@pytest.fixture(params=["library", "transcription"])
def decide(request: pytest.FixtureRequest):
    """A function (name, logits, **settings) -> weights [tokens, experts], chosen pairs, scores."""

    def of_transcription(name: str, logits: list[list[float]], **settings):
        x = torch.tensor(logits, dtype=torch.float64)[None]
        identity = torch.eye(x.shape[-1], dtype=torch.float64)
        case = Case(
            router=name,
            seed=0,
            x=x,
            mask=None,
            parameters={"weight": identity},
            settings=settings,
        )
        weights, chosen, scores = transcribe(case)
        return weights[0], pairs_of(chosen[0]), scores[0]

    def of_library(name: str, logits: list[list[float]], **settings):
        x = torch.tensor(logits, dtype=torch.float64)[None]
        num_experts = x.shape[-1]
        router = routers.build(name, dim=num_experts, num_experts=num_experts, **settings)
        router = router.double().eval()
        with torch.no_grad():
            router.get_parameter("weight").copy_(torch.eye(num_experts))
        routing = router(x)
        return routing.weights[0], pairs_of(routing.chosen[0]), routing.scores[0]

    return of_library if request.param == "library" else of_transcription


@pytest.fixture(params=["library", "transcription"])
def mix(request: pytest.FixtureRequest):
    """A function (x, phi, scale) -> dispatch, combine [tokens, experts, slots], layer output."""

    def of_transcription(x: Tensor, phi: Tensor, scale: float):
        dispatch, combine = soft_weights(x, phi, torch.tensor(scale, dtype=x.dtype))
        layer = soft_layer(x, dispatch, combine, lambda k, row: torch.tanh(row) * (k + 1))
        return dispatch, combine, layer

    def of_library(x: Tensor, phi: Tensor, scale: float):
        dim, num_experts, num_slots = phi.shape
        router = routers.build("soft", dim=dim, num_experts=num_experts, slots=num_slots)
        router = router.double().eval()
        with torch.no_grad():
            router.get_parameter("phi").copy_(phi)
            router.get_parameter("scale").fill_(scale)
        routing = router(x[None])
        rows = routing.dispatch(x[None]).split(routing.rows_per_expert.tolist())
        rows = [torch.tanh(part) * (k + 1) for k, part in enumerate(rows)]
        layer = routing.combine(torch.cat(rows))[0]
        return routing.dispatch_weight[0], routing.combine_weight[0], layer

    return of_library if request.param == "library" else of_transcription


def pairs_of(chosen: Tensor) -> set[tuple[int, int]]:
    return {(i, k) for i, k in chosen.nonzero().tolist()}


def logits_of(probabilities: list[list[float]]) -> list[list[float]]:
    """Logits whose softmax is given."""
    for row in probabilities:
        assert sum(row) == pytest.approx(1, abs=ROUNDING), row
    return [[log(p) for p in row] for row in probabilities]


def assert_close(ours: Tensor, expected: list | float, tolerance: float = ROUNDING) -> None:
    torch.testing.assert_close(
        ours.detach(), torch.tensor(expected, dtype=ours.dtype), rtol=0, atol=tolerance
    )


# --- softmax token choice -----------------------------------------------------------------------


def test_token_choice_fills_buffers_with_first_choices_first(decide):
    #          A    B    C          first  second        one row per expert:
    # token 0  .5   .3   .2           A      B           round 1: 0 -> A, 1 -> B
    # token 1  .4   .5   .1           B      A           round 2: 0 -> B is full, 1 -> A is full
    # Token by token, token 0 would have taken both A and B, and token 1 neither.
    probabilities = [[0.5, 0.3, 0.2], [0.4, 0.5, 0.1]]
    weights, chosen, _ = decide("token-choice", logits_of(probabilities), k=2, capacity=1)
    assert chosen == {(0, 0), (1, 1)}
    # The gates as they are: neither divided by .5 + .3 nor by what was kept.
    assert_close(weights, [[0.5, 0, 0], [0, 0.5, 0]])


def test_token_choice_in_batch_prioritised_order(decide):
    #          A    B    C          first  second        one row per expert:
    # token 0  .5   .4   .1           A      B
    # token 1  .7   .2   .1           A      B
    # In order: 0 -> A, 1 -> A is full; 0 -> B, 1 -> B is full.
    # By top-1 gate (.7 before .5): 1 -> A, 0 -> A is full; then second choices *in the same order*,
    # 1 -> B (.2) before 0 -> B (.4), which is full.
    logits = logits_of([[0.5, 0.4, 0.1], [0.7, 0.2, 0.1]])
    _, chosen, _ = decide("token-choice", logits, k=2, capacity=1, priority="order")
    assert chosen == {(0, 0), (0, 1)}
    weights, chosen, _ = decide("token-choice", logits, k=2, capacity=1, priority="gate")
    assert chosen == {(1, 0), (1, 1)}
    assert_close(weights, [[0, 0, 0], [0.7, 0.2, 0]])


def test_token_choice_counts_refused_assignments_too(decide):
    # Everybody wants A, then B. c = ceil(1 * 3 * 2 / 3) = 2 rows per expert.
    # A takes tokens 0 and 1, B takes tokens 0 and 1; token 2 gets nothing although C is empty.
    logits = logits_of([[0.5, 0.3, 0.2]] * 3)
    weights, chosen, _ = decide("token-choice", logits, k=2, capacity_factor=1.0)
    assert chosen == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert_close(weights, [[0.5, 0.3, 0], [0.5, 0.3, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("convention", "kept"),
    # 7 tokens, 3 experts, k = 2, factor .75: .75 * 7 * 2 / 3 = 3.5. Everybody wants A, then B.
    [
        ("moefold", 4),  # ceil(3.5)
        ("vmoe", 4),  # 4 is a multiple of four already
        ("flaxformer", 4),  # round(.75 * 7 / 3 = 1.75) = 2, but at least 4
    ],
)
def test_token_choice_capacities_that_coincide(decide, convention: str, kept: int):
    logits = logits_of([[0.5, 0.3, 0.2]] * 7)
    settings = {"k": 2, "capacity_factor": 0.75, "convention": convention}
    _, chosen, _ = decide("token-choice", logits, **settings)
    assert chosen == {(i, k) for i in range(kept) for k in (0, 1)}


@pytest.mark.parametrize(
    ("convention", "kept"),
    # 9 tokens, 2 experts, k = 2, factor 1/2: .5 * 9 * 2 / 2 = 4.5. Everybody wants both.
    [
        ("moefold", 5),  # ceil(4.5)
        ("vmoe", 8),  # 5, rounded up to a multiple of four
        ("flaxformer", 4),  # round(.5 * 9 / 2 = 2.25) = 2, but at least 4
    ],
)
def test_token_choice_capacity_conventions(decide, convention: str, kept: int):
    logits = logits_of([[0.6, 0.4]] * 9)
    settings = {"k": 2, "capacity_factor": 0.5, "convention": convention}
    _, chosen, _ = decide("token-choice", logits, **settings)
    assert chosen == {(i, k) for i in range(kept) for k in (0, 1)}


# --- expert choice ------------------------------------------------------------------------------


def test_expert_choice_ranks_the_softmax_over_experts(decide):
    # Softmax over the experts, columns ranked over the tokens, c = ceil(1.5 * 3 / 3) = 2.
    #          A    B    C
    # token 0  .6   .3   .1     A: .6 .5     -> tokens 0, 1
    # token 1  .5   .1   .4     B: .8 .3     -> tokens 2, 0
    # token 2  .05  .8  .15     C: .4 .15    -> tokens 1, 2
    weights, chosen, _ = decide(
        "expert-choice",
        logits_of([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.05, 0.8, 0.15]]),
        capacity_factor=1.5,
    )
    assert chosen == {(0, 0), (1, 0), (0, 1), (2, 1), (1, 2), (2, 2)}
    assert_close(weights, [[0.6, 0.3, 0], [0.5, 0, 0.4], [0, 0.8, 0.15]])


def test_expert_choice_is_not_fooled_by_large_logits(decide):
    # Token 1 has the larger logits everywhere, but its softmax is (1/2, 1/2); that of token 0 is
    # (3/4, 1/4). c = ceil(1 * 2 / 2) = 1: A takes token 0, B takes token 1. A softmax over the
    # tokens would have given both to token 1.
    weights, chosen, _ = decide("expert-choice", [[log(3), 0.0], [9.0, 9.0]], capacity_factor=1.0)
    assert chosen == {(0, 0), (1, 1)}
    assert_close(weights, [[0.75, 0], [0, 0.5]])


def test_normalised_combine_weights_of_komatsuzaki(decide):
    # The worked example of *Sparse Upcycling*: .3, .2, .1 -> .5, .333, .167; one expert -> 1;
    # none -> 0. Three tokens, four experts, c = ceil(4/3 * 3 / 4) = 1 (capacity given as such).
    #          A    B    C    D
    # token 0  .3   .2   .1   .4     A, B and C take token 0
    # token 1  .1   .1  .05  .75     D takes token 1
    # token 2  .25 .15  .08  .52     nobody takes token 2
    logits = logits_of([[0.3, 0.2, 0.1, 0.4], [0.1, 0.1, 0.05, 0.75], [0.25, 0.15, 0.08, 0.52]])
    weights, chosen, _ = decide("expert-choice", logits, capacity=1, renormalize=True)
    assert chosen == {(0, 0), (0, 1), (0, 2), (1, 3)}
    assert_close(weights, [[1 / 2, 1 / 3, 1 / 6, 0], [0, 0, 0, 1], [0, 0, 0, 0]])


# --- Sinkhorn -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sinkhorn-token-choice", "sinkhorn-expert-choice"])
def test_sinkhorn_plan_of_constant_logits_is_uniform(decide, name: str):
    # Every token has mass 1, spread evenly over four experts: 1/4 everywhere.
    settings = {"k": 1} if name == "sinkhorn-token-choice" else {"capacity_factor": 4.0}
    _, _, plan = decide(name, [[0.7] * 4] * 8, **settings)
    assert_close(plan, [[0.25] * 4] * 8)


def test_sinkhorn_after_one_round(decide):
    # K = exp(L) = [1 2]   columns: v = (1 / (1 + 1), 1 / (2 + 8)) = (1/2, 1/10)
    #               [1 8]   rows:    u = 1 / (1/2 + 2/10) = 10/7  and  1 / (1/2 + 8/10) = 10/13
    # P = u K v = [ 5/7  2/7 ]    rows sum to 1; the columns, 1.099 and .901, do not yet.
    #             [ 5/13 8/13]
    logits = [[0.0, log(2)], [0.0, log(8)]]
    _, chosen, plan = decide("sinkhorn-token-choice", logits, k=1, iterations=1)
    assert_close(plan, [[5 / 7, 2 / 7], [5 / 13, 8 / 13]])
    assert chosen == {(0, 0), (1, 1)}


def test_sinkhorn_in_the_limit_balances_where_softmax_does_not(decide):
    # Softmax: token 0 (1/3, 2/3), token 1 (1/9, 8/9): both prefer B. The plan with all marginals 1
    # is [p 1-p; 1-p p] with the odds ratio of K: (p / (1-p))^2 = 1 * 8 / (2 * 1) = 4, so p = 2/3.
    # Token 0 goes to A, token 1 to B, and the weights are the softmax ones: 1/3 and 8/9.
    logits = [[0.0, log(2)], [0.0, log(8)]]
    _, chosen, _ = decide("token-choice", logits, k=1)
    assert chosen == {(0, 1), (1, 1)}
    # The error shrinks by more than 8 a round here (the square of the second singular value of the
    # plan, 1/3): after 30 rounds it is below rounding.
    weights, chosen, plan = decide("sinkhorn-token-choice", logits, k=1, iterations=30)
    assert_close(plan, [[2 / 3, 1 / 3], [1 / 3, 2 / 3]])
    assert chosen == {(0, 0), (1, 1)}
    assert_close(weights, [[1 / 3, 0], [0, 8 / 9]])


def test_sinkhorn_temperature_flattens_the_plan(decide):
    # The same K with eps = 2: K = sqrt([1 2; 1 8]), odds ratio 2, p / (1-p) = 2^(1/2),
    # p = sqrt 2 / (1 + sqrt 2) = 2 - sqrt 2. The weights know no temperature.
    logits = [[0.0, log(2)], [0.0, log(8)]]
    weights, _, plan = decide("sinkhorn-token-choice", logits, k=1, iterations=30, epsilon=2.0)
    p = 2 - 2**0.5
    assert_close(plan, [[p, 1 - p], [1 - p, p]])
    assert_close(weights, [[1 / 3, 0], [0, 8 / 9]])


def test_sinkhorn_expert_choice_takes_columns_of_the_plan(decide):
    # Three tokens, two experts of mass 3/2, one round. K = [1 1]  v = (3/2) / (1 + 1 + 1) = 1/2
    #                                                       [1 2]  and (3/2) / (1 + 2 + 6) = 1/6
    # Rows: (1/2, 1/6), (1/2, 1/3), (1/2, 1), divided by    [1 6]  their sums 2/3, 5/6, 3/2:
    # P = [3/4 1/4]   c = ceil(1 * 3 / 2) = 2: A takes 0 and 1 (weights 1/2, 1/3),
    #     [3/5 2/5]                            B takes 2 and 1 (weights 6/7, 2/3).
    #     [1/3 2/3]
    logits = [[0.0, 0.0], [0.0, log(2)], [0.0, log(6)]]
    weights, chosen, plan = decide(
        "sinkhorn-expert-choice", logits, capacity_factor=1.0, iterations=1
    )
    assert_close(plan, [[3 / 4, 1 / 4], [3 / 5, 2 / 5], [1 / 3, 2 / 3]])
    assert chosen == {(0, 0), (1, 0), (1, 1), (2, 1)}
    assert_close(weights, [[1 / 2, 0], [1 / 3, 2 / 3], [0, 6 / 7]])


# --- sparsity-constrained expert choice ---------------------------------------------------------


def test_sparse_projection_keeps_at_most_k(decide):
    # Four tokens, two experts: b = 4 / 2 = 2, gamma = 1/2, so x = S / (gamma b) = S. c = 4 / 2 = 2.
    #          A    B     The rate vanishes: no step of the solver is felt.
    # token 0  .9   .1    A: the two largest, .9 and .8: cumulated .9, 1.7;
    # token 1  .8   .2       1 + 1 * .9 > .9 and 1 + 2 * .8 = 2.6 > 1.7: rho = 2,
    # token 2  .4   .6       tau = (1.7 - 1) / 2 = .35, p = (.55, .45, 0, 0), column (1.1, .9, 0, 0)
    # token 3  .3   .7    B: .7 and .6: tau = .15, p = (0, 0, .45, .55), column (0, 0, .9, 1.1)
    probabilities = [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]]
    weights, chosen, plan = decide(
        "sparse-transport-expert-choice",
        logits_of(probabilities),
        capacity_factor=1.0,
        gamma=0.5,
        iterations=1,
        learning_rate=1e-15,
    )
    assert_close(plan, [[1.1, 0], [0.9, 0], [0, 0.9], [0, 1.1]])
    assert chosen == {(0, 0), (1, 0), (2, 1), (3, 1)}
    assert_close(weights, [[0.9, 0], [0.8, 0], [0, 0.6], [0, 0.7]])


def test_sparse_plan_may_leave_rows_empty(decide):
    # Two tokens, S = [.9 .1; .1 .9], b = 1, c = ceil(2 * 2 / 2) = 2.
    # gamma = .1: x = S / .1 = (9, 1): 1 + 9 > 9, but 1 + 2 * 1 = 3 is not > 10: rho = 1, tau = 8,
    #   p = (1, 0). Each expert takes one token although it has room for two. The rows sum to one,
    #   so the gradient is zero and Adam never moves.
    # gamma = 1: x = (.9, .1): 1 + 2 * .1 = 1.2 > 1: rho = 2, tau = 0, p = (.9, .1): both taken.
    logits = logits_of([[0.9, 0.1], [0.1, 0.9]])
    name = "sparse-transport-expert-choice"
    weights, chosen, plan = decide(name, logits, capacity_factor=2.0, gamma=0.1)
    assert chosen == {(0, 0), (1, 1)}
    assert_close(plan, [[1, 0], [0, 1]])
    assert_close(weights, [[0.9, 0], [0, 0.9]])
    weights, chosen, plan = decide(name, logits, capacity_factor=2.0, gamma=1.0)
    assert chosen == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert_close(plan, [[0.9, 0.1], [0.1, 0.9]])
    assert_close(weights, [[0.9, 0.1], [0.1, 0.9]])


def test_sparse_transport_steps_towards_tokens_left_out(decide):
    # Three tokens, three experts, b = 1, gamma = 1, c = 1: each column is its largest entry alone.
    #           A     B     C
    # token 0  .6    .2    .2
    # token 1  .2   .403  .397     At alpha = 0: A takes 0, B and C take 1, token 2 is left out.
    # token 2  .21  .395  .395     grad = T1 - a = (0, 1, -1).
    # Adam's first step is -rate * sign: alpha = (0, -rate, +rate). With rate .0025,
    #   B: .4005 against .3975, still token 1;  C: .3945 against .3975, now token 2.
    # With rate .005, B: .398 against .400 goes to token 2 as well.
    logits = logits_of([[0.6, 0.2, 0.2], [0.2, 0.403, 0.397], [0.21, 0.395, 0.395]])
    name, settings = "sparse-transport-expert-choice", {"capacity_factor": 1.0, "iterations": 1}
    _, chosen, _ = decide(name, logits, **settings, learning_rate=1e-9)
    assert chosen == {(0, 0), (1, 1), (1, 2)}
    weights, chosen, _ = decide(name, logits, **settings, learning_rate=0.0025)
    assert chosen == {(0, 0), (1, 1), (2, 2)}
    assert_close(weights, [[0.6, 0, 0], [0, 0.403, 0], [0, 0, 0.395]])
    _, chosen, _ = decide(name, logits, **settings, learning_rate=0.005)
    assert chosen == {(0, 0), (2, 1), (2, 2)}

    # A second step at rate .0025 starts from rows that sum to one (gradient 0), on momentum alone:
    #   m = .9 * .1 g = .09 g, corrected by 1 - .81 = .19: .473684 g
    #   v = .999 * .001 = .000999, corrected by 1 - .998001 = .001999: .499750, root .706930
    #   alpha moves by .0025 * .473684 / .706930 = .001675, to (0, -.004175, +.004175):
    #   B: .403 - .004175 = .398825 against .395 + .004175 = .399175: token 2 wins it.
    # Without bias correction the moments would be .09 and .0316: .00712, more than four times that;
    # with plain gradient descent nothing would move at all.
    settings["iterations"] = 2
    _, chosen, _ = decide(name, logits, **settings, learning_rate=0.0025)
    assert chosen == {(0, 0), (2, 1), (2, 2)}
    # At rate .0023 the same two steps come to .00384: .39916 against .39884, token 1 keeps B.
    _, chosen, _ = decide(name, logits, **settings, learning_rate=0.0023)
    assert chosen == {(0, 0), (1, 1), (2, 2)}


# --- unified ------------------------------------------------------------------------------------

GOLDEN_LOGITS = [
    [2.0, 0.0, -1.0, 1.0],
    [0.1, 0.0, -0.1, 0.05],
    [3.0, 2.5, 2.0, -3.0],
    [-2.0, -2.5, -3.0, -1.5],
]


def test_unified_on_four_tokens_and_four_experts(decide):
    # U = softmax / 2 + sigmoid / 4 (alpha = 1/2, 2 / E = 1/2). For the pair (0, 0):
    #   softmax = 7.389056 / (7.389056 + 1 + .367879 + 2.718282) = .643914, half of it .321957
    #   sigmoid(2) = .880797, a quarter of it .220199;   U = .542156
    # and so on. Budget 2 per token, 8 pairs. In descending order:
    #   .542 (0,0)   .491 (2,0)   .384 (2,1)   .313 (2,2)   .301 (0,3)   .273 (3,3)   .267 (1,0)
    #   .258 (1,3) | .248 (1,1)   ...
    # Token 2 gets three experts and token 3 only one.
    weights, chosen, scores = decide("unified", GOLDEN_LOGITS, budget=2.0, alpha=0.5)
    table = [
        [0.542156, 0.168572, 0.083265, 0.301206],
        [0.267307, 0.248114, 0.230153, 0.257550],
        [0.491066, 0.384441, 0.313244, 0.012483],
        [0.167803, 0.102667, 0.062625, 0.273133],
    ]
    assert_close(scores, table, tolerance=5e-7)  # the table has six digits
    assert chosen == {(0, 0), (0, 3), (1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (3, 3)}
    expected = [
        [0.542156, 0, 0, 0.301206],
        [0.267307, 0, 0, 0.257550],
        [0.491066, 0.384441, 0.313244, 0],
        [0, 0, 0, 0.273133],
    ]
    assert_close(weights, expected, tolerance=5e-7)


def test_unified_weights_in_four_manners(decide):
    # Two tokens, two experts, alpha = 1/2, 2 / E = 1, budget 1 per token: 2 pairs.
    #   token 0: logits (0, log 3): softmax (1/4, 3/4), sigmoid (1/2, 3/4), U = (3/8, 3/4)
    #   token 1: logits (0, 0):     softmax (1/2, 1/2), sigmoid (1/2, 1/2), U = (1/2, 1/2)
    # The best two: (0, 1) with 3/4, then the tie of (1, 0) and (1, 1), which the lower index wins.
    logits = [[0.0, log(3)], [0.0, 0.0]]
    expected = {
        "unified": [[0, 3 / 4], [1 / 2, 0]],
        "softmax": [[0, 3 / 4], [1 / 2, 0]],
        "renormalized": [[0, 1], [1, 0]],
        "row-normalized": [[0, 2 / 3], [1 / 2, 0]],  # 3/4 / (3/8 + 3/4), 1/2 / (1/2 + 1/2)
    }
    for combine, table in expected.items():
        weights, chosen, _ = decide("unified", logits, budget=1.0, combine=combine)
        assert chosen == {(0, 1), (1, 0)}
        assert_close(weights, table)


def test_unified_with_a_budget_per_token_that_is_no_whole_number(decide):
    # As above, but 3 / 4 per token: 1.5 pairs are 2, halves go up; 1.25 per token: 2.5 pairs are 3.
    # .7 per token: 1.4 pairs are 1, and token 1 gets no expert at all. 2 per token: everything.
    logits = [[0.0, log(3)], [0.0, 0.0]]
    for budget, expected in {
        0.75: {(0, 1), (1, 0)},
        1.25: {(0, 1), (1, 0), (1, 1)},
        0.7: {(0, 1)},
        2.0: {(0, 0), (0, 1), (1, 0), (1, 1)},
    }.items():
        weights, chosen, _ = decide("unified", logits, budget=budget, combine="renormalized")
        assert chosen == expected
        # Zero-safe: a token with an expert sums to one, a token without sums to zero.
        assert_close(weights.sum(-1), [1.0, 1.0 if (1, 0) in expected else 0.0])


def test_unified_with_the_first_published_expert_score(decide):
    # Softmax over the tokens, then rows divided by their sums. exp(L) = [1 3]  column sums 4 and 4:
    #   q = [1/4 3/4]   rows sum to 1 and 1 here: they stay              [3 1]
    #       [3/4 1/4]   softmax over experts: the same. U = q whatever alpha is.
    weights, chosen, scores = decide(
        "unified",
        [[0.0, log(3)], [log(3), 0.0]],
        budget=1.0,
        alpha=0.7,
        expert_score="token-softmax",
    )
    assert_close(scores, [[1 / 4, 3 / 4], [3 / 4, 1 / 4]])
    assert chosen == {(0, 1), (1, 0)}
    assert_close(weights, [[0, 3 / 4], [3 / 4, 0]])


def test_first_published_expert_score_need_not_follow_a_row(decide):
    # exp(L) = [2 3]  column sums 3 and 15: q = [2/3 1/5], rows divided by 13/15 and 17/15:
    #          [1 12]                           [1/3 4/5]
    #   f_e = [10/13  3/13]    f_t = [2/5   3/5 ]
    #         [ 5/17 12/17]          [1/13 12/13]
    # alpha = 1: token 0 prefers A (10/13) although its larger logit is B's. The best two pairs are
    # (0, A) = .769 and (1, B) = .706. With alpha = 0 they are (1, B) = .923 and (0, B) = .6.
    logits = [[log(2), log(3)], [0.0, log(12)]]
    settings = {"budget": 1.0, "expert_score": "token-softmax"}
    weights, chosen, _ = decide("unified", logits, alpha=1.0, **settings)
    assert chosen == {(0, 0), (1, 1)}
    assert_close(weights, [[10 / 13, 0], [0, 12 / 17]])
    weights, chosen, _ = decide("unified", logits, alpha=0.0, **settings)
    assert chosen == {(0, 1), (1, 1)}
    assert_close(weights, [[0, 3 / 5], [0, 12 / 13]])
    # alpha = 1/4 is on the expert's side: (0, A) = 3/4 * 2/5 + 1/4 * 10/13 = .4923.
    _, _, scores = decide("unified", logits, alpha=0.25, **settings)
    assert_close(scores[0, 0], 3 / 10 + 5 / 26)


# --- Soft MoE -----------------------------------------------------------------------------------

# Hand arithmetic takes |v| for sqrt(|v|^2 + 1e-6): at |v| >= 1 the two differ by less than 5e-7 of
# the logit, and no value below is more than 5 times as sensitive.
LENGTH = 5e-6


def test_soft_mixture_of_two_tokens_for_one_expert(mix):
    # Tokens 3 and -4 in one dimension, phi = 2, scale s = log(3) / 2. Normalised: 1, -1 and 1, so
    # the logits are s and -s. D = softmax over the tokens: e^(2s) = 3, so 3/4 and 1/4.
    # C = softmax over the only slot: 1 and 1. Slot = 3/4 * 3 + 1/4 * (-4) = 5/4, of tokens as they
    # are; normalised ones would have made it 1/2. Both tokens receive tanh(5/4).
    dispatch, combine, y = mix(
        torch.tensor([[3.0], [-4.0]]).double(), torch.tensor([[[2.0]]]).double(), log(3) / 2
    )
    assert_close(dispatch, [[[3 / 4]], [[1 / 4]]], LENGTH)
    assert_close(combine, [[[1]], [[1]]])
    assert_close(y, [[tanh(1.25)], [tanh(1.25)]], LENGTH)


def test_soft_mixture_of_two_experts(mix):
    # Tokens (3, 4) and (4, 3), normalised (.6, .8) and (.8, .6). phi of expert A is (1, 0) and of
    # expert B (0, 7), normalised (0, 1). With s = 5 log 3 the logits are
    #            A          B                A    B                  A    B
    # token 0  3 log 3   4 log 3     D =   1/4  3/4          C =   1/4  3/4
    # token 1  4 log 3   3 log 3           3/4  1/4                3/4  1/4
    # (D: softmax down a column, C: softmax along a row; alike here by symmetry.)
    # Slot A = (3, 4) / 4 + 3 (4, 3) / 4 = (15/4, 13/4), slot B = (13/4, 15/4). Expert A is tanh,
    # expert B is 2 tanh; y_0 = 1/4 tanh(slot A) + 3/4 * 2 tanh(slot B).
    dispatch, combine, y = mix(
        torch.tensor([[3.0, 4.0], [4.0, 3.0]]).double(),
        torch.tensor([[1.0, 0.0], [0.0, 7.0]]).double()[..., None],
        5 * log(3),
    )
    table = [[[1 / 4], [3 / 4]], [[3 / 4], [1 / 4]]]
    assert_close(dispatch, table, LENGTH)
    assert_close(combine, table, LENGTH)
    a, b = (tanh(15 / 4), tanh(13 / 4)), (tanh(13 / 4), tanh(15 / 4))
    expected = [
        [a[0] / 4 + 6 * b[0] / 4, a[1] / 4 + 6 * b[1] / 4],
        [3 * a[0] / 4 + 2 * b[0] / 4, 3 * a[1] / 4 + 2 * b[1] / 4],
    ]
    assert_close(y, expected, LENGTH)


def test_soft_combine_is_over_the_slots_of_all_experts(mix):
    # One token, two experts with two slots each, phi along four directions: (1, 0) -> logit s for
    # the first slot of A, (-1, 0) -> -s for its second, (0, 1) and (0, -1) -> 0 for those of B.
    # s = log 2: exp gives 2, 1/2, 1, 1, in sum 9/2. C = (4/9, 1/9 | 2/9, 2/9). One token: D = 1.
    phi = torch.tensor([[[1.0, -1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, -1.0]]]).double()
    dispatch, combine, y = mix(torch.tensor([[5.0, 0.0]]).double(), phi, log(2))
    assert_close(dispatch, [[[1, 1], [1, 1]]])
    assert_close(combine, [[[4 / 9, 1 / 9], [2 / 9, 2 / 9]]], LENGTH)
    # Every slot is the token: A gives tanh(5) with weight 5/9, B gives 2 tanh(5) with weight 4/9.
    assert_close(y, [[13 / 9 * tanh(5), 0]], LENGTH)
