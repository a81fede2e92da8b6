"""What is fast on the CPU is deterministic, and never shows memory that nobody wrote.

Everything here runs under `torch.use_deterministic_algorithms(True)`: operators without one order
of summation raise, warnings are errors, and empty memory is filled, inside of operators too, with
NaN or the largest integer. Comparisons are of bits, so there are no tolerances.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.utils.deterministic
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moefold import MoE, MoEConfig, routers
from moefold.experts import AbstractMixer, backends
from moefold.experts.backends import PRIORITY, fused_ops
from moefold.ops import soft
from moefold.routers import RouterConfig
from moefold.testing.mixers import MixProblem, mix_problem, solve_mix
from moefold.testing.problems import problem, solve

_POISON: Any = torch.utils.deterministic

MAIN = [
    routers.config("token-choice", k=3, renormalize=True),
    routers.config("token-choice", k=2, capacity_factor=0.5),
    routers.config("expert-choice", capacity_factor=2.0),
    routers.config("unified", budget=2.0),
    routers.config("soft", slots=3),
]
MIXERS = [name for name in PRIORITY if isinstance(backends.get(name), AbstractMixer)]


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    before, filled = torch.are_deterministic_algorithms_enabled(), _POISON.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    _POISON.fill_uninitialized_memory = True
    # More threads than processors: what depends on who comes first has a chance to show it.
    torch.set_num_threads(4)
    assert torch.empty(3).isnan().all(), "nothing is poisoned, so nothing is tested here"
    yield
    torch.use_deterministic_algorithms(before)
    _POISON.fill_uninitialized_memory = filled


@pytest.fixture(params=["float32", "bfloat16", "bfloat16 in float32"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype, and low precision as this processor would not compute it by itself too."""
    name, _, wide = request.param.partition(" ")
    work: dict[torch.dtype, torch.dtype] = {torch.bfloat16: torch.float32} if wide else {}
    for module in (fused_ops, soft):
        monkeypatch.setattr(module, "work_dtype", lambda dtype: work.get(dtype, dtype))
    return getattr(torch, name)


def layer_of(router: RouterConfig, dim: int, **settings: Any) -> MoE:
    torch.manual_seed(0)
    config = MoEConfig(**{"num_experts": 5, "expert_width": 32, "router": router, **settings})
    return config.build(dim).train()


def step(layer: nn.Module, x: Tensor, *given: Tensor | None) -> dict[str, Tensor]:
    """What a training step leaves: the result and every gradient, drawn from one seed."""
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    y = layer(leaf, *given)
    back = torch.linspace(-1, 2, y.numel()).reshape(y.shape)
    (y.float() * back).square().sum().backward()
    named = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    assert leaf.grad is not None
    return {"result": y.detach(), "gradient of x": leaf.grad, **named}


def infer(layer: nn.Module, x: Tensor, *given: Tensor | None) -> dict[str, Tensor]:
    """What a layer returns where nothing is learnt."""
    torch.manual_seed(1)
    with torch.no_grad():
        return {"result": layer(x, *given)}


def same_bits(found: Sequence[dict[str, Tensor]]) -> None:
    """Raise unless all are equal, number by number, and finite."""
    first, *others = found
    for other in others:
        assert set(other) == set(first)
        for name, tensor in first.items():
            assert torch.isfinite(tensor).all(), f"{name} holds what nobody wrote"
            assert torch.equal(other[name], tensor), f"{name} is another"


def batch(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    x, mask = torch.randn(2, tokens, dim), torch.rand(2, tokens) < 0.8
    return x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask


# The same again is the same bits. Tokens have several experts, so results are added up, and there
# are more numbers than one thread takes by itself (32,768).


@pytest.mark.parametrize("router", MAIN, ids=str)
@pytest.mark.parametrize("backend", ["auto", *PRIORITY])
def test_layers_repeat_themselves(router: RouterConfig, backend: str):
    kind = {"gated": True, "bias": True, "activation": "silu", "shared_width": 16}
    losses = {} if router.name == "soft" else {"balance": 0.1, "z": 0.1}
    layer = layer_of(router, 64, backend=backend, losses=losses, **kind)
    x, mask = batch(300, 64)
    same_bits([step(layer, x, mask) for _ in range(3)])
    same_bits([infer(layer, x, mask) for _ in range(3)])


@pytest.mark.parametrize("name", routers.names())
def test_routers_repeat_themselves(name: str):
    layer = layer_of(routers.config(name), 32)
    x, mask = batch(80, 32)
    ids = (torch.randint(99, mask.shape),) if name == "hash" else ()
    same_bits([step(layer, x, mask, *ids) for _ in range(2)])


@pytest.mark.parametrize("router", MAIN, ids=str)
@pytest.mark.parametrize("backend", PRIORITY)
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_repeats_itself(router: RouterConfig, backend: str, autocast: bool):
    layer = layer_of(router, 24, backend=backend, gated=True, expert_width=8)
    x, mask = batch(40, 24)
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = [step(layer, x, mask) for _ in range(2)]
    assert found[0]["result"].dtype == torch.bfloat16
    same_bits(found)


class Sees(TorchDispatchMode):
    """Sees every operator, so that none may be left out."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run it."""
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", PRIORITY)
@pytest.mark.parametrize("router", MAIN, ids=str)
def test_who_watches_changes_no_bit(router: RouterConfig, backend: str):
    layer = layer_of(router, 16, gated=True, backend=backend)
    x, mask = batch(30, 16)
    for run in (step, infer):
        unseen = run(layer, x, mask)
        with Sees():
            same_bits([run(layer, x, mask), unseen])


# Memory that nobody wrote.


def unpoisoned(run: Any, *args: Any) -> Any:
    """The same where memory holds whatever was there before: zeros, mostly, and old results."""
    _POISON.fill_uninitialized_memory = False
    try:
        return run(*args)
    finally:
        _POISON.fill_uninitialized_memory = True


# Rows of each expert: none for the first, in the middle, for the last; padded and not; no rows.
COUNTS = [(0, 29, 0, 41, 1, 0), (16, 16, 0, 16, 5), (1,), (0, 0, 0)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("name", MIXERS)
def test_mixing_shows_no_scratch_memory(name: str, dtype: torch.dtype, spare: int, counts):
    mixer = backends.get(name)
    assert isinstance(mixer, AbstractMixer)
    given = mix_problem(counts, 45, 8, 6, spare=spare)

    def run() -> dict[str, Tensor]:
        return solve_mix(mixer.mix, given.to(dtype))

    same_bits([run(), unpoisoned(run)])
    for part in given.leaves():
        same_bits(
            [
                alone(mixer, given.to(dtype), part),
                unpoisoned(alone, mixer, given.to(dtype), part),
            ]
        )


def alone(mixer: AbstractMixer, given: MixProblem, wanted: str) -> dict[str, Tensor]:
    """The gradient of one part, where nothing else is learnt."""
    for name, tensor in given.leaves().items():
        tensor.requires_grad_(name == wanted)
    y = mixer.mix(given.x, given.routing, given.weights)
    (found,) = torch.autograd.grad(y, given.leaves()[wanted], given.back.to(y.dtype))
    return {"result": y.detach(), f"gradient of {wanted}": found}


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("backend", PRIORITY)
def test_rows_show_no_scratch_memory(backend: str, dtype: torch.dtype, spare: int, counts):
    given = problem(counts, 8, 6, spare=spare)

    def run() -> dict[str, Tensor]:
        return solve(backends.get(backend), given.to(dtype))

    found = run()
    same_bits([found, unpoisoned(run)])
    used = sum(counts)
    assert (found["result"][used:] == 0).all()
    assert (found["gradient of rows"][used:] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("router", MAIN, ids=str)
@pytest.mark.parametrize("backend", PRIORITY)
def test_few_tokens_or_none_show_no_scratch_memory(
    backend: str, router: RouterConfig, shape: tuple[int, int]
):
    layer = layer_of(router, 8, backend=backend, gated=True, bias=True, shared_width=4)
    x = torch.randn(*shape, 8)
    for mask in (None, torch.zeros(shape, dtype=torch.bool)):
        for run in (step, infer):
            same_bits([run(layer, x, mask), unpoisoned(run, layer, x, mask)])


@pytest.mark.parametrize("name", routers.names())
def test_routers_show_no_scratch_memory(name: str):
    # More experts than tokens: some have no row.
    layer = layer_of(routers.config(name), 8, num_experts=9, expert_width=4)
    x, mask = batch(4, 8)
    ids = (torch.randint(99, mask.shape),) if name == "hash" else ()
    for run in (step, infer):
        layer.train(run is step or not layer.router.is_taught)
        same_bits([run(layer, x, mask, *ids), unpoisoned(run, layer, x, mask, *ids)])


# torch.compile itself instantiates what it traces (torch 2.13, autograd functions).
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.compile
@pytest.mark.parametrize("router", [MAIN[1], MAIN[3]], ids=str)
def test_compiled_layers_repeat_themselves(router: RouterConfig):
    # A graph keeps spare rows, which are made of token 0: padding here, and NaN.
    layer = layer_of(router, 16, gated=True)
    x, mask = batch(30, 16)
    mask[0, 0], x[0, 0] = False, torch.nan
    torch.compiler.reset()
    call: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same_bits([step(call, x, mask), unpoisoned(step, call, x, mask), step(call, x, mask)])
    same_bits([infer(call, x, mask), unpoisoned(infer, call, x, mask)])
    torch.compiler.reset()
