"""Activations: each against its formula, and under every name that transformers gives it."""

import math

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from moefold.experts import activations

X = torch.linspace(-6, 6, 241, dtype=torch.float64)


def phi(x: float) -> float:
    """The normal distribution function."""
    return (1 + math.erf(x / math.sqrt(2))) / 2


FORMULAS = {
    "gelu": lambda x: x * phi(x),
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "identity": lambda x: x,
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}


def test_every_activation_has_a_formula_here():
    assert set(FORMULAS) == set(activations.names())


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    wanted = torch.tensor([FORMULAS[name](x) for x in X.tolist()], dtype=torch.float64)
    # a few roundings of float64, relative to arguments of up to 6 and their squares
    assert (activations.get(name)(X) - wanted).abs().max() < 1e-14


@pytest.mark.parametrize("name", [*activations._ALIASES, *FORMULAS])
def test_transformers_means_the_same_by_the_name(name):
    theirs = {"gelu_tanh": "gelu_pytorch_tanh", "identity": "linear"}.get(name, name)
    # gelu_fast and gelu_accurate write sqrt(2 / pi) with ten digits: 1e-9 at x = 6
    assert (activations.get(name)(X) - ACT2FN[theirs](X)).abs().max() < 1e-8


def test_a_function_is_taken_as_it_is():
    assert activations.get(torch.sin) is torch.sin
    assert activations.canonical(torch.sin) is torch.sin


def test_aliases_have_one_name():
    assert activations.canonical("swish") == "silu"
    assert activations.canonical("gelu_new") == "gelu_tanh"


def test_unknown_name_is_met_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown activation 'swishh'; did you mean 'swish'\?.*silu"
    ):
        activations.get("swishh")
    with pytest.raises(
        ValueError, match=r"unknown activation '123'; Known: gelu, .*or pass a func"
    ):
        activations.get("123")


UNLIKE_OURS = {"gelu_10", "hardswish", "laplace", "prelu", "relu6", "sqrtsoftplus"}


@pytest.mark.parametrize("name", sorted({*ACT2FN} - {"xielu"}))  # xielu says that it lacks CUDA
def test_what_transformers_means_is_recognised_by_its_values(name):
    found = activations.recognise(ACT2FN[name])
    if name in UNLIKE_OURS:
        assert found is None  # gelu_10 and relu6 are GELU and ReLU near zero
    else:
        assert found == activations.canonical("gelu_tanh" if name == "gelu_python_tanh" else name)


def test_modules_and_functions_are_recognised():
    assert activations.recognise(nn.GELU()) == "gelu"
    assert activations.recognise(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activations.recognise(nn.LeakyReLU(0.01)) == "leaky_relu"
    assert activations.recognise(lambda x: x.clamp_min(0)) == "relu"
    assert activations.recognise(nn.Dropout(0.5).eval()) == "identity"


def test_what_works_in_place_is_no_identity():
    assert activations.recognise(nn.ReLU(inplace=True)) == "relu"
    assert activations.recognise(nn.SiLU(inplace=True)) == "silu"


@pytest.mark.parametrize(
    "other",
    [
        nn.LeakyReLU(0.2),  # near to one of ours, with another slope
        nn.Hardtanh(-20, 20),  # an identity near zero
        nn.GLU(),  # halves what it is given
        nn.Linear(3, 3),
        nn.PReLU(init=0.01).double(),  # a leaky ReLU at the moment, but it learns
        "gelu",  # a name is no function
        None,
        lambda x: "nothing",
    ],
    ids=lambda other: type(other).__name__,
)
def test_what_is_none_of_ours_is_not_recognised(other):
    assert activations.recognise(other) is None
