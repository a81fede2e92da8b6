"""The suite of mixers fails where it should: for every check, a mixer that breaks just that."""

import re
from dataclasses import replace

import pytest
import torch

from moefold.experts import AbstractMixer
from moefold.experts.backends.reference import ReferenceBackend
from moefold.testing import MIX_CHECKS, check_backend
from moefold.testing.contract import run
from moefold.testing.mixers import Mix, by_rows
from moefold.testing.problems import BackendCase


class Made(AbstractMixer):
    """A mixer from a function; its rows are right."""

    def __init__(self, mix: Mix) -> None:
        self._mix = mix

    def reasons_against(self, rows, weights):
        return []

    def compute(self, rows, rows_per_expert, weights):
        return ReferenceBackend().compute(rows, rows_per_expert, weights)

    def mix(self, x, routing, weights):
        return self._mix(x, routing, weights)


def forgets_the_weights(x, routing, weights):
    ones = torch.ones_like(routing.weight_of_row) + 0 * routing.weight_of_row
    return by_rows(x, replace(routing, weight_of_row=ones), weights)


def weighs_with_half_a_gradient(x, routing, weights):
    weight = routing.weight_of_row
    half = weight / 2 + weight.detach() / 2
    return by_rows(x, replace(routing, weight_of_row=half), weights)


def writes_where_it_should_add(x, routing, weights):
    """The last row of a token is all it gets."""
    rows = routing.dispatch(x.unsqueeze(0))
    made = ReferenceBackend().compute(rows, routing.rows_per_expert, weights)
    weighed = made * routing.weight_of_row.to(made.dtype).unsqueeze(1)
    used = int(routing.rows_per_expert.sum())
    place = routing.token_of_row[:used].unsqueeze(1).expand(-1, x.shape[1])
    return (
        torch.zeros_like(weighed[: x.shape[0]]).new_zeros(x.shape).scatter(0, place, weighed[:used])
    )


def needs_a_row(x, routing, weights):
    return by_rows(x, routing, weights) + 0 * routing.weight_of_row.max()


def lets_lonely_tokens_pass(x, routing, weights):
    lonely = torch.ones(x.shape[0], 1, dtype=x.dtype)
    lonely[routing.token_of_row] = 0
    return by_rows(x, routing, weights) + x * lonely


def gathers_spare_rows(x, routing, weights):
    """The last expert computes them, as rows of weight zero."""
    counts = routing.rows_per_expert.clone()
    counts[-1] += routing.token_of_row.shape[0] - counts.sum()
    return by_rows(x, replace(routing, rows_per_expert=counts), weights)


def learns_only_with_tokens(x, routing, weights):
    with torch.set_grad_enabled(x.requires_grad):
        return by_rows(x, routing, weights)


def works_in_place(x, routing, weights):
    y = by_rows(x, routing, weights)
    x.data.mul_(1 + 1e-7)
    return y


def ignores_autocast(x, routing, weights):
    with torch.autocast("cpu", enabled=False):
        return by_rows(x, routing, weights)


BROKEN = [
    (forgets_the_weights, "mixing: values and gradients", "result is off by"),
    (
        weighs_with_half_a_gradient,
        "mixing: values and gradients",
        "gradient of the rows' weights is off by 0.5",
    ),
    (writes_where_it_should_add, "mixing: values and gradients", "result is off by"),
    (needs_a_row, "mixing: few or all", "raised"),
    (lets_lonely_tokens_pass, "mixing: zeros", "result of a token without rows is not zero"),
    (gathers_spare_rows, "mixing: spare rows", "spare rows change the"),
    (learns_only_with_tokens, "mixing: frozen parts", "to be learnt, nothing is"),
    (works_in_place, "mixing: inputs stay", "x was changed in place"),
    (ignores_autocast, "mixing: autocast", "not bfloat16"),
]


@pytest.mark.parametrize(
    ("mix", "check", "says"), BROKEN, ids=[f"{b[1]}-{b[0].__name__}" for b in BROKEN]
)
def test_a_broken_mixer_is_caught(mix: Mix, check: str, says: str):
    case = BackendCase(backend=Made(mix), device="cpu")
    with pytest.raises(AssertionError, match=re.escape(says)):
        run("mixer", {check: MIX_CHECKS[check]}, case)


def test_every_check_has_been_seen_to_fail():
    # Compiling has its broken mixer in test_compile.py.
    assert {check for _, check, _ in BROKEN} == set(MIX_CHECKS) - {"mixing: compiles"}


def test_a_mixer_that_is_not_broken_passes():
    report = check_backend(Made(by_rows))
    assert set(MIX_CHECKS) - set(report.ran) == {"mixing: compiles"}


def test_rows_alone_are_not_asked_to_mix():
    assert not set(MIX_CHECKS) & {*(report := check_backend("reference")).ran, *report.skipped}
