"""The router suite fails where it should: for every check, routers that break just that."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moefold.routers import AbstractRouter
from moefold.routing import Grouping, SoftRouting, SparseRouting
from moefold.testing import ROUTER_CHECKS, check_router
from moefold.testing.contract import Report, run
from moefold.testing.probe import RouterCase, untyped

# How a good router is made, in steps that the broken ones below replace one at a time.


class Plain(AbstractRouter):
    """Top-2 token choice with a bias; keeps the contract."""

    reach_: str = "token"

    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts, reach=self.reach_)  # pyright: ignore[reportArgumentType]
        self.weight = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5)
        self.bias = nn.Parameter(torch.randn(num_experts) * 0.1)

    def forward(self, x, mask=None, ids=None):
        self.refuse(x, mask)
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        with torch.autocast(x.device.type, enabled=False):
            logits = self.logits(self.tokens(x, real))
            self.refuse_logits(logits, mask)
            scores = self.scores(logits, real)
            chosen = self.choice(scores.detach(), real)
            weights = self.weights(scores, chosen, real)
        return self.value(chosen, weights, mask, logits, scores)

    def refuse(self, x, mask):
        self.check(x, mask)

    def refuse_logits(self, logits, mask):
        self.check_finite(logits, mask)

    def tokens(self, x, real):
        return x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~real[..., None], 0.0)

    def logits(self, tokens):
        return tokens @ self.weight.to(tokens).t() + self.bias.to(tokens)

    def scores(self, logits, real):
        return logits.softmax(-1)

    def choice(self, scores, real):
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        return chosen.scatter(-1, scores.topk(2, -1).indices, True) & real[..., None]

    def weights(self, scores, chosen, real):
        return scores

    def value(self, chosen, weights, mask, logits, scores) -> Any:
        return SparseRouting.from_choice(chosen, weights, mask=mask, logits=logits, scores=scores)


# Broken routers. The name says what is wrong.


class ReturnsTuple(Plain):
    def value(self, chosen, weights, mask, logits, scores) -> Any:
        return (super().value(chosen, weights, mask, logits, scores),)


class ForgetsMaskInValue(Plain):
    def value(self, chosen, weights, mask, logits, scores):
        return super().value(chosen, weights, None, logits, scores)


class CountsOneExpertMore(Plain):
    def value(self, chosen, weights, mask, logits, scores):
        made = super().value(chosen, weights, mask, logits, scores)
        return replace(
            made,
            rows_per_expert=torch.cat([made.rows_per_expert, made.rows_per_expert.new_zeros(1)]),
        )


class ReturnsNaNWeights(Plain):
    def weights(self, scores, chosen, real):
        return scores * torch.where(scores > scores.mean(), 1.0, torch.nan)


class RowsByToken(Plain):
    """Rows in the order of tokens, though counted by expert."""

    def value(self, chosen, weights, mask, logits, scores):
        made = super().value(chosen, weights, mask, logits, scores)
        order = made.token_of_row.argsort(stable=True)
        return replace(
            made,
            token_of_row=made.token_of_row[order],
            weight_of_row=made.weight_of_row[order],
        )


class MiscountsRows(Plain):
    def value(self, chosen, weights, mask, logits, scores):
        made = super().value(chosen, weights, mask, logits, scores)
        return replace(
            made, token_of_row=made.token_of_row[:-1], weight_of_row=made.weight_of_row[:-1]
        )


class CountsInFloat(Plain):
    def value(self, chosen, weights, mask, logits, scores):
        made = super().value(chosen, weights, mask, logits, scores)
        return replace(made, rows_per_expert=made.rows_per_expert.int())


class LosesARow(Plain):
    """Its experts' results cost a row."""

    def value(self, chosen, weights, mask, logits, scores):
        made = super().value(chosen, weights, mask, logits, scores)

        def decide(routing, rows):
            fewer = routing.rows_per_expert - torch.tensor([1, 0, 0, 0, 0])
            return replace(routing, rows_per_expert=fewer, decide=None)

        return replace(made, decide=decide)


class NeverDecides(Plain):
    def value(self, chosen, weights, mask, logits, scores):
        made = super().value(chosen, weights, mask, logits, scores)
        return replace(made, decide=lambda routing, rows: replace(routing))


class Averaging(SparseRouting):
    """Combines by a mean, though its matrix is a sum."""

    def combine(self, rows):
        count = self.chosen.sum(-1, keepdim=True).clamp_min(1)
        return SparseRouting.combine(self, rows) / count


class CombinesByMean(Plain):
    def value(self, chosen, weights, mask, logits, scores):
        return Averaging.from_choice(chosen, weights, mask=mask, logits=logits, scores=scores)


class Residual(SparseRouting):
    """Gives a token without a row something back."""

    def combine(self, rows):
        out = SparseRouting.combine(self, rows)
        return out + (~self.chosen.any(-1, keepdim=True)) * 0.5


class ReturnsSomethingForNothing(Plain):
    def value(self, chosen, weights, mask, logits, scores):
        return Residual.from_choice(chosen, weights, mask=mask, logits=logits, scores=scores)


class FavoursFirstExpert(Plain):
    """A preference that is no parameter, so that it does not move with the experts."""

    def scores(self, logits, real):
        return (logits + torch.eye(self.num_experts).to(logits)[0]).softmax(-1)


class FavoursEarlyTokens(Plain):
    def scores(self, logits, real):
        place = torch.arange(logits.shape[1]).to(logits)[:, None]
        return (logits * (1 + 0.1 * place)).softmax(-1)


class MixesUpWeights(Plain):
    """Weights in the order of tokens for rows in the order of experts."""

    def value(self, chosen, weights, mask, logits, scores):
        made = super().value(chosen, weights, mask, logits, scores)
        return replace(made, weight_of_row=weights[chosen])


class LooksAtItsSequence(Plain):
    def scores(self, logits, real):
        mean = (logits * real[..., None]).sum(1, keepdim=True) / real.sum(1).clamp_min(1)[
            :, None, None
        ]
        return (logits - mean).softmax(-1)


class LooksAtTheBatch(LooksAtItsSequence):
    reach_ = "group"

    def scores(self, logits, real):
        mean = (logits * real[..., None]).sum((0, 1)) / real.sum().clamp_min(1)
        return (logits - mean).softmax(-1)


class LimitsByArrival(Plain):
    """Two rows for each expert and sequence, first come, first served: it looks at the past."""

    def choice(self, scores, real):
        wanted = super().choice(scores, real)
        return wanted & (wanted.cumsum(1) <= 2)


class LimitsByScore(LimitsByArrival):
    """The best of all, later ones included."""

    reach_ = "past"

    def choice(self, scores, real):
        wanted = Plain.choice(self, scores, real)
        place = scores.masked_fill(~wanted, -1.0).argsort(1, descending=True).argsort(1)
        return wanted & (place < 2)


class LooksAtThePastOnly(LimitsByArrival):
    """Says what LimitsByArrival does not; keeps the contract."""

    reach_ = "past"


class SaysItIsCausal(LimitsByScore):
    reach_ = "group"

    @property
    def is_causal(self):
        return True


class LooksAtItsSequenceInTraining(LooksAtItsSequence):
    def scores(self, logits, real):
        return super().scores(logits, real) if self.training else Plain.scores(self, logits, real)


class ChoosesForPadding(Plain):
    def choice(self, scores, real):
        return super().choice(scores, torch.ones_like(real))


class LetsPaddingIn(Plain):
    """What padding holds moves a mean over the sequence."""

    reach_ = "group"

    def tokens(self, x, real):
        return super().tokens(x, torch.ones_like(real))

    def refuse_logits(self, logits, mask):
        pass

    def scores(self, logits, real):
        return (logits - logits.mean(1, keepdim=True)).softmax(-1)


class LeaksNaNToGradients(Plain):
    """Masks its logits, but zero times NaN reaches the gradient of its weights."""

    def tokens(self, x, real):
        return super().tokens(x, torch.ones_like(real))


class CountsPaddingInCapacity(Plain):
    """Room grows with the length of the batch, padding included."""

    reach_ = "group"

    def choice(self, scores, real):
        wanted = super().choice(scores, real)
        return wanted & (wanted.cumsum(1) <= scores.shape[1] // 4)


class CountsPaddingAsWanted(Plain):
    def value(self, chosen, weights, mask, logits, scores):
        made = super().value(chosen, weights, mask, logits, scores)
        return replace(
            made, wanted=Plain.choice(self, scores.detach(), torch.ones(scores.shape[:2]).bool())
        )


class NeedsATwoTokens(Plain):
    """Standard deviation over tokens: NaN for one, an empty mean for none."""

    reach_ = "group"

    def scores(self, logits, real):
        spread = (logits - logits.mean((0, 1))).square().sum((0, 1))
        return (logits / (spread / (real.sum() - 1)).sqrt()).softmax(-1)


class FailsOnNothing(Plain):
    def scores(self, logits, real):
        return logits.softmax(-1) + 0 * logits.max()


class OverflowsOnLarge(Plain):
    """A softmax without subtracting the largest logit."""

    def scores(self, logits, real):
        powers = logits.exp()
        return powers / powers.sum(-1, keepdim=True)


class DividesByLength(Plain):
    """The derivative of a norm at zero."""

    def logits(self, tokens):
        return super().logits(tokens / (tokens.norm(dim=-1, keepdim=True)))


class DetachesWeights(Plain):
    def weights(self, scores, chosen, real):
        return scores.detach()


class NeverUsesItsBias(Plain):
    def logits(self, tokens):
        return tokens @ self.weight.to(tokens).t()


class CancelsItsBias(Plain):
    """A parameter that takes part, without effect."""

    def logits(self, tokens):
        return tokens @ self.weight.to(tokens).t() + self.bias.to(tokens).sum()


class StraightThrough(Plain):
    """Values of one function, gradient of another."""

    def weights(self, scores, chosen, real):
        return scores + (scores - scores.detach())


class ChoosesAtRandomPoints(Plain):
    """A choice that changes everywhere."""

    def choice(self, scores, real):
        return super().choice((scores * 1e6).sin(), real)


class CountsInForward(Plain):
    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts)
        self.register_buffer("load", torch.zeros(num_experts))

    def choice(self, scores, real):
        chosen = super().choice(scores, real)
        assert isinstance(self.load, Tensor)
        self.load += chosen.sum((0, 1))
        return chosen


class CountsInHiddenBuffer(CountsInForward):
    """Not in the state dict, which therefore stays the same."""

    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts)
        self.register_buffer("load", torch.zeros(num_experts), persistent=False)


class RemembersItsChoice(Plain):
    def choice(self, scores, real):
        self.last = super().choice(scores, real)
        return self.last


class KeepsAList(Plain):
    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts)
        self.seen: list[Tensor] = []

    def choice(self, scores, real):
        self.seen.append(scores)
        return super().choice(scores, real)


class ChangesItsInput(Plain):
    def tokens(self, x, real):
        with torch.no_grad():
            x.masked_fill_(~real[..., None], 0.0)
        return super().tokens(x, real)


class NoisyAlways(Plain):
    def logits(self, tokens):
        logits = super().logits(tokens)
        return logits + torch.randn_like(logits)


class NoisyInTraining(Plain):
    def logits(self, tokens):
        logits = super().logits(tokens)
        return logits + torch.randn_like(logits) if self.training else logits


class DrawsElsewhere(Plain):
    """Python's random numbers, which checkpointing does not draw again."""

    def logits(self, tokens):
        return super().logits(tokens) * random.random()


class UpdatesToNaN(Plain):
    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts)
        self.register_buffer("load", torch.zeros(num_experts))

    def update(self, routings):
        counts = torch.stack([r.rows_per_expert for r in routings]).sum(0).double()
        self.load = counts / counts.sum()


class HidesItsTable(Plain):
    """Random, and neither a parameter nor a buffer."""

    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts)
        self.table = torch.randn(num_experts, dim, dtype=torch.float64)

    def logits(self, tokens):
        return super().logits(tokens) + tokens @ self.table.to(tokens).t()


class ScoresInHalf(Plain):
    def tokens(self, x, real):
        return x.masked_fill(~real[..., None], 0.0)


class FollowsAutocast(Plain):
    def forward(self, x, mask=None, ids=None):
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        tokens = self.tokens(x, real)
        logits = nn.functional.linear(tokens, self.weight.to(tokens), self.bias.to(tokens))
        scores = logits.float().softmax(-1)
        return self.value(self.choice(scores.detach(), real), scores, mask, logits, scores)


class AcceptsAnything(Plain):
    def refuse(self, x, mask):
        pass


class RoutesNaN(Plain):
    def refuse_logits(self, logits, mask):
        pass


class NamesNoLayer(Plain):
    def refuse(self, x, mask):
        site, self.site = self.site, "somewhere"
        try:
            super().refuse(x, mask)
        finally:
            self.site = site


@dataclass(frozen=True)
class Broken:
    """A router, the check that must catch it, and what it must say."""

    make: Callable[[int, int], AbstractRouter]
    check: str
    says: str

    def __str__(self) -> str:
        return f"{self.check}-{getattr(self.make, '__name__', 'router')}".replace(" ", "-")


BROKEN = [
    Broken(ReturnsTuple, "returns a routing", "returned tuple"),
    Broken(ForgetsMaskInValue, "returns a routing", "carries no mask"),
    Broken(CountsOneExpertMore, "returns a routing", "for 6 experts instead of 5"),
    Broken(ReturnsNaNWeights, "returns a routing", "not finite"),
    Broken(RowsByToken, "rows in order", "not sorted"),
    Broken(MiscountsRows, "rows in order", "sums to 42, but there are only 41 rows"),
    Broken(CountsInFloat, "rows in order", "not int64"),
    Broken(CombinesByMean, "maps are matrices", "combine against its matrix"),
    Broken(ReturnsSomethingForNothing, "maps are matrices", "differ"),
    Broken(LosesARow, "settles on the same rows", "change rows_per_expert"),
    Broken(NeverDecides, "settles on the same rows", "can be settled again"),
    Broken(FavoursFirstExpert, "relabelling experts", "after relabelling"),
    Broken(FavoursEarlyTokens, "permuting tokens", "after permuting"),
    Broken(MixesUpWeights, "permuting tokens", "after permuting"),
    Broken(MixesUpWeights, "reach is honest", "declares reach 'token'"),
    Broken(LooksAtItsSequence, "reach is honest", "declares reach 'token'"),
    Broken(LooksAtItsSequenceInTraining, "reach is honest", "in training token"),
    Broken(LooksAtTheBatch, "reach is honest", "declares reach 'group'"),
    Broken(LimitsByArrival, "reach is honest", "declares reach 'token'"),
    Broken(LimitsByScore, "reach is honest", "declares reach 'past'"),
    Broken(LimitsByScore, "causality is honest", "says is_causal"),
    Broken(SaysItIsCausal, "causality is honest", "says is_causal"),
    Broken(ChoosesForPadding, "padding gets no row", "padding token has a row"),
    Broken(LetsPaddingIn, "padding gets no row", "in the padding"),
    Broken(LeaksNaNToGradients, "padding gets no row", "in the padding reached x.grad"),
    Broken(CountsPaddingInCapacity, "padding counts nowhere", "with padding against without"),
    Broken(CountsPaddingAsWanted, "padding counts nowhere", "'dropped' counts padding"),
    Broken(NeedsATwoTokens, "odd and empty sizes", "1 x 1 tokens"),
    Broken(FailsOnNothing, "odd and empty sizes", "raised"),
    Broken(OverflowsOnLarge, "extreme tokens", "large tokens: the output is not finite"),
    Broken(DividesByLength, "extreme tokens", "raised ValueError"),
    Broken(DetachesWeights, "gradient reaches parameters", "no gradient reaches weight"),
    Broken(NeverUsesItsBias, "gradient reaches parameters", "no gradient reaches bias"),
    Broken(CancelsItsBias, "gradient reaches parameters", "gradient of bias is always zero"),
    Broken(StraightThrough, "gradient is the derivative", "Jacobian mismatch"),
    Broken(ChoosesAtRandomPoints, "gradient is the derivative", "constant almost everywhere"),
    Broken(CountsInForward, "forward changes nothing", "eval changed load"),
    Broken(CountsInHiddenBuffer, "forward changes nothing", "eval changed load"),
    Broken(RemembersItsChoice, "forward changes nothing", "changed last"),
    Broken(KeepsAList, "forward changes nothing", "changed seen"),
    Broken(ChangesItsInput, "forward changes nothing", "changed its input"),
    Broken(NoisyAlways, "deterministic", "routed twice"),
    Broken(NoisyInTraining, "same in training", "training against eval"),
    Broken(DrawsElsewhere, "checkpointing", "with checkpointing against without"),
    Broken(UpdatesToNaN, "update", "made load not finite"),
    Broken(HidesItsTable, "saved state", "neither a parameter nor a buffer"),
    Broken(ScoresInHalf, "half precision", "must be float32 or better"),
    Broken(FollowsAutocast, "half precision", "autocast"),
    Broken(AcceptsAnything, "bad input", "x of rank 2"),
    Broken(RoutesNaN, "bad input", "NaN in a real token is accepted"),
    Broken(NamesNoLayer, "bad input", "does not name the layer"),
]


def one_check(
    make: Callable[[int, int], AbstractRouter],
    check: str,
    exceptions: dict[str, str] | None = None,
) -> Report:
    case = RouterCase(make=make, dim=7, num_experts=5)
    with untyped():  # most people have no typing hook to catch it first
        return run("router", {check: ROUTER_CHECKS[check]}, case, exceptions)


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_a_broken_router_is_caught(broken: Broken):
    with pytest.raises(AssertionError, match=re.escape(broken.says)) as caught:
        one_check(broken.make, broken.check)
    assert f"\n  {broken.check}: " in str(caught.value)


def test_every_check_has_been_seen_to_fail():
    # Compiling has its broken router in test_compile.py.
    assert {broken.check for broken in BROKEN} == set(ROUTER_CHECKS) - {"compiles"}


@pytest.mark.parametrize("router", [Plain, LooksAtThePastOnly], ids=lambda r: r.__name__)
def test_a_router_that_is_not_broken_passes(router: type[AbstractRouter]):
    torch.manual_seed(5)
    report = check_router(router)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3)), "the suite changed the caller's random state"
    assert set(report.ran) | set(report.skipped) == set(ROUTER_CHECKS)
    expected = {"settles on the same rows", "update", "compiles"}
    if router is LooksAtThePastOnly:
        expected |= {"permuting tokens"}
    assert set(report.skipped) == expected


def test_one_message_names_everything_that_is_broken():
    class Several(NoisyAlways, ForgetsMaskInValue):
        pass

    with pytest.raises(AssertionError) as caught:
        check_router(Several)
    text = str(caught.value)
    assert text.startswith("router Several breaks ")
    for line in ("returns a routing: the routing carries no mask", "deterministic: routed twice"):
        assert f"\n  {line}" in text


def test_a_declared_exception_is_skipped_with_its_reason():
    report = one_check(NoisyInTraining, "same in training", {"same in training": "noise"})
    assert report.skipped == {"same in training": "noise"}
    assert "skipped  same in training: noise" in str(report)


def test_an_exception_that_is_not_needed_fails():
    with pytest.raises(AssertionError, match=r"deterministic: is declared as an exception \(none"):
        one_check(Plain, "deterministic", {"deterministic": "none that I know"})


def test_an_exception_to_nothing_is_refused():
    with pytest.raises(ValueError, match="no check 'determinism' to except; checks: returns a"):
        check_router(Plain, exceptions={"determinism": "a slip"})


def test_what_is_no_router_is_refused():
    with untyped(), pytest.raises(ValueError, match="made a Linear; a router derives from"):
        check_router(nn.Linear)  # pyright: ignore[reportArgumentType]


class SoftOverBatch(AbstractRouter):
    """A soft router that mixes tokens of all sequences, but declares to keep to one."""

    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts, reach="group")
        self.weight = nn.Parameter(torch.randn(num_experts, dim))

    def forward(self, x, mask=None, ids=None):
        grouping = Grouping("batch", x.shape[0], x.shape[1])
        logits = grouping.split(x @ self.weight.to(x).t()).unsqueeze(-1)
        return SoftRouting(
            dispatch_weight=logits.softmax(1),
            combine_weight=logits.softmax(2),
            grouping=grouping,
            mask=mask,
        )


def test_a_soft_router_is_watched_through_what_it_mixes():
    # Its weights for a token would be unchanged; what lies in the rows is not. Groups are read off
    # the value, which here tells the truth that the router does not.
    class SaysToken(SoftOverBatch):
        def __init__(self, dim, num_experts):
            super().__init__(dim, num_experts)
            self.reach = "token"

    with pytest.raises(AssertionError, match="declares reach 'token'"):
        one_check(SaysToken, "reach is honest")
