"""The layer suite fails where it should: for every check, a way to break just that.

A layer is final and made of parts, so that what is broken here is a part.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import moefold.moe
import moefold.record
from moefold.experts.backends.fused import FusedBackend
from moefold.experts.backends.grouped import GroupedBackend
from moefold.losses import losses
from moefold.moe import MoE, MoEConfig
from moefold.routers import AbstractRouter, config, routers
from moefold.routing import SparseRouting
from moefold.testing import LAYER_CHECKS, check_layer, layer_training
from moefold.testing.contract import run
from moefold.testing.layer_probe import layer_case

Patch = pytest.MonkeyPatch
CONFIG = MoEConfig(
    num_experts=5,
    expert_width=6,
    router=config("token-choice", k=2, renormalize=True),
    gated=True,
    shared_width=4,
)


def wrap(patch: Patch, owner: type, name: str, make: Callable) -> None:
    """Replace a method by what `make` makes of it."""
    patch.setattr(owner, name, make(getattr(owner, name)))


def combine_by_mean(patch: Patch) -> None:
    wrap(patch, FusedBackend, "mix", lambda mix: lambda *given: mix(*given) / 2)


def combine_detached(patch: Patch) -> None:
    """Right values, but the router learns nothing."""

    def make(mix):
        def detached(self, x, routing, weights):
            unlearnt = replace(routing, weight_of_row=routing.weight_of_row.detach())
            return mix(self, x, unlearnt, weights)

        return detached

    wrap(patch, FusedBackend, "mix", make)


class SumsToTwo(AbstractRouter):
    """Has k and renormalize, and does not renormalise."""

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, renormalize: bool = False):
        super().__init__(dim, num_experts)
        self.k = k
        self.weight = nn.Parameter(torch.randn(num_experts, dim))

    def forward(self, x, mask=None, ids=None):
        scores = (x @ self.weight.to(x).t()).softmax(-1)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen = chosen.scatter(-1, scores.topk(self.k).indices, True)
        chosen = chosen if mask is None else chosen & mask.unsqueeze(-1)
        return SparseRouting.from_choice(chosen, 2 * scores, mask=mask)


def renormalise_to_two(patch: Patch) -> None:
    patch.setitem(routers._targets, "token-choice", SumsToTwo)


class HidesItsTable(SumsToTwo):
    """Random, and neither a parameter nor a buffer."""

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, renormalize: bool = False):
        super().__init__(dim, num_experts, k=k)
        self.table = torch.randn(num_experts, dim, dtype=torch.float64)

    def forward(self, x, mask=None, ids=None):
        return super().forward(x + self.table[0], mask)


def hide_a_table(patch: Patch) -> None:
    patch.setitem(routers._targets, "token-choice", HidesItsTable)


def leave_padding_to_the_shared_expert(patch: Patch) -> None:
    def shared(self, x, mask):
        count = torch.full((1,), x.shape[0] * x.shape[1])
        out = self.shared(x.flatten(0, 1), count, backend=self.backend).reshape(x.shape)
        return out if mask is None else out.masked_fill(~mask.unsqueeze(-1), 0.0)

    patch.setattr(MoE, "_shared", shared)


def add_the_shared_expert_to_padding(patch: Patch) -> None:
    wrap(patch, MoE, "_shared", lambda shared: lambda self, x, mask: shared(self, x * 0 + 1, None))


def lose_the_mask_of_a_sequence(patch: Patch) -> None:
    def make(forward):
        def lossy(self, x, mask=None, ids=None):
            if x.ndim == 2:
                return self(x.unsqueeze(0)).squeeze(0)
            return forward(self, x, mask, ids)

        return lossy

    wrap(patch, MoE, "forward", make)


def divide_a_loss_by_tokens(patch: Patch) -> None:
    def balance(routing):
        return routing.logits.sum() / routing.rows_per_expert.sum()

    patch.setitem(losses._targets, "balance", balance)


def record_repetitions(patch: Patch) -> None:
    patch.setattr(moefold.record, "_in_backward", lambda: False)


def let_no_loss_ride(patch: Patch) -> None:
    patch.setattr(moefold.moe, "ride", lambda y, loss: y)


def let_a_loss_ride_twice(patch: Patch) -> None:
    ride = moefold.moe.ride
    patch.setattr(moefold.moe, "ride", lambda y, loss: ride(ride(y, loss), loss))


def forget_the_loss_scale(patch: Patch) -> None:
    patch.setattr(layer_training, "set_loss_scale", lambda layer, scale: None)


def make_losses_of_constants(patch: Patch) -> None:
    for name in ("balance", "z"):
        patch.setitem(losses._targets, name, lambda routing: routing.weights.sum() * 0)


def ride_in_evaluation(patch: Patch) -> None:
    def make(forward):
        def always(self, x, mask=None, ids=None):
            y = forward(self, x, mask, ids)
            if self.losses and not self.training and x.ndim == 3:
                y = moefold.moe.ride(y, self.loss(self.router(x, mask), x.flatten(0, 1)))
            return y

        return always

    wrap(patch, MoE, "forward", make)


def route_in_half_under_autocast(patch: Patch) -> None:
    def make(forward):
        def rounded(self, x, mask=None, ids=None):
            if torch.is_autocast_enabled("cpu"):
                x = x.round()
            return forward(self, x, mask, ids)

        return rounded

    wrap(patch, moefold.routers.SparseRouter, "forward", make)


def return_float32(patch: Patch) -> None:
    def make(mix):
        def widened(*given):
            y = mix(*given)
            return y.to(torch.promote_types(y.dtype, torch.float32))

        return widened

    wrap(patch, FusedBackend, "mix", make)


def compute_one_percent_more(patch: Patch) -> None:
    wrap(
        patch,
        GroupedBackend,
        "compute",
        lambda compute: lambda self, *given: compute(self, *given) * 1.01,
    )


def count_passes(patch: Patch) -> None:
    def make(forward):
        def counting(self, x, mask=None, ids=None):
            self.passes = getattr(self, "passes", 0) + 1
            return forward(self, x, mask, ids)

        return counting

    wrap(patch, MoE, "forward", make)


def forget_the_activation(patch: Patch) -> None:
    def make(to_dict):
        return lambda self: {n: v for n, v in to_dict(self).items() if n != "gated"}

    wrap(patch, MoEConfig, "to_dict", make)


def accept_anything(patch: Patch) -> None:
    patch.setattr(AbstractRouter, "check", lambda self, x, mask: None)


def name_no_site(patch: Patch) -> None:
    def site(self, name):
        self._site = name

    patch.setattr(MoE, "site", MoE.site.setter(site))


BROKEN = [
    (combine_by_mean, "definition", "the layer against its definition"),
    (combine_detached, "definition", "only one of the two gives a gradient to"),
    (combine_by_mean, "copies are one MLP", "copies against one dense MLP"),
    (renormalise_to_two, "dense ensemble", "the weights of a token are normalised"),
    (leave_padding_to_the_shared_expert, "padding", "NaN in the padding reached shared"),
    (add_the_shared_expert_to_padding, "padding", "padding does not come back as zero"),
    (lose_the_mask_of_a_sequence, "any rank", "[tokens, dim]"),
    (divide_a_loss_by_tokens, "odd and empty sizes", "gradient of"),
    (record_repetitions, "checkpointing", "left 2 routings in the record"),
    (let_no_loss_ride, "losses ride", "riding against added"),
    (let_a_loss_ride_twice, "losses ride", "riding against added"),
    (forget_the_loss_scale, "losses ride", "2 batches"),
    (make_losses_of_constants, "losses ride", "riding could not be seen"),
    (ride_in_evaluation, "losses ride in training only", "a loss rides in eval mode"),
    (route_in_half_under_autocast, "autocast", "autocast changes the choice"),
    (return_float32, "half precision", "bfloat16 came back as torch.float32"),
    (compute_one_percent_more, "every backend", "backend grouped against reference"),
    (count_passes, "forward changes nothing", "passes"),
    (hide_a_table, "copies and saved state", "does not hold everything"),
    (forget_the_activation, "config as data", "config"),
    (accept_anything, "bad input", "x of rank 4"),
    (name_no_site, "bad input", "no layer is named"),
]


@pytest.mark.parametrize(
    ("breaks", "check", "says"), BROKEN, ids=[f"{b[1]}-{b[0].__name__}" for b in BROKEN]
)
def test_a_broken_layer_is_caught(
    breaks: Callable[[Patch], None], check: str, says: str, monkeypatch: Patch
):
    case = layer_case(CONFIG)
    run("layer", {check: LAYER_CHECKS[check]}, case)  # whole, it passes
    breaks(monkeypatch)
    with pytest.raises(AssertionError, match=re.escape(says)) as caught:
        run("layer", {check: LAYER_CHECKS[check]}, case)
    assert f"\n  {check}: " in str(caught.value)


def test_every_check_has_been_seen_to_fail():
    # Compiling has its broken layer in test_compile.py.
    assert {check for _, check, _ in BROKEN} == set(LAYER_CHECKS) - {"compiles"}


def test_what_does_not_apply_is_skipped_with_the_reason():
    report = check_layer(replace(CONFIG, router=config("soft")))
    assert set(report.skipped) == {"copies are one MLP", "dense ensemble", "compiles"}
    assert "mix tokens" in report.skipped["copies are one MLP"]
