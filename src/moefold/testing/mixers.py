"""The contract of a mixer: tokens to tokens, what its rows would have given, values and gradients.

Shapes: `tokens dim` in and out, `rows` chosen pairs sorted by expert. How close is close: as in
`testing.problems`, against the reference loop between a gather and a weighted sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moefold.experts import AbstractMixer, ExpertWeights
from moefold.experts.backends.reference import ReferenceBackend
from moefold.routing import Grouping, SparseRouting
from moefold.testing.contract import Check
from moefold.testing.problems import (
    SLACK,
    BackendCase,
    error_of,
    floor,
    leaf,
    problem,
    tensors_of,
)

Mix = Callable[[Tensor, SparseRouting, ExpertWeights], Tensor]

# (rows of every expert, tokens, dim, width): some tokens have several rows and some none, some
# experts equally many.
SIZES = (
    ((33, 7, 64), 70, 40, 24),
    ((0, 29, 0, 41, 1, 0), 45, 37, 51),
    ((16, 16, 0, 16, 16, 5), 20, 24, 12),
    ((5, 3), 9, 1, 1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixProblem:
    """Tokens, a routing, experts, and a gradient of the result."""

    x: Float[Tensor, "tokens dim"]
    routing: SparseRouting
    weights: ExpertWeights
    back: Float[Tensor, "tokens dim"]

    def to(self, dtype: torch.dtype) -> "MixProblem":
        """The same numbers in another dtype, as leaves that want a gradient."""
        moved = {name: leaf(tensor, dtype) for name, tensor in tensors_of(self.weights).items()}
        # Routers weigh in float32 or better.
        weight = leaf(self.routing.weight_of_row, torch.promote_types(dtype, torch.float32))
        return replace(
            self,
            x=leaf(self.x, dtype),
            routing=replace(self.routing, weight_of_row=weight),
            weights=replace(self.weights, **moved),
            back=self.back.to(dtype),
        )

    def leaves(self) -> dict[str, Tensor]:
        """Everything a gradient may be asked for."""
        weight = self.routing.weight_of_row
        return {"x": self.x, "the rows' weights": weight, **tensors_of(self.weights)}


def mix_problem(
    counts: Sequence[int],
    tokens: int,
    dim: int,
    width: int,
    *,
    spare: int = 0,
    device: str = "cpu",
    **kind: Any,
) -> MixProblem:
    """Random numbers, rounded to bfloat16; every expert sees so many tokens, none of them twice."""
    drawn = problem(counts, dim, width, spare=spare, device=device, **kind)
    own = [torch.randperm(tokens)[:count].sort().values for count in counts]
    weight = (0.1 + 0.9 * torch.rand(sum(counts))).bfloat16().double()
    routing = SparseRouting(
        token_of_row=torch.cat([*own, torch.zeros(spare, dtype=torch.long)]).to(device),
        weight_of_row=torch.cat([weight, torch.zeros(spare).double()]).to(device),
        rows_per_expert=drawn.counts,
        grouping=Grouping("sequence", 1, tokens),
    )
    x, back = (torch.randn(tokens, dim).bfloat16().double().to(device) for _ in range(2))
    return MixProblem(x=x, routing=routing, weights=drawn.weights, back=back)


def by_rows(x: Tensor, routing: SparseRouting, weights: ExpertWeights) -> Tensor:
    """The definition: rows, the reference loop, and their weighted sum."""
    rows = routing.dispatch(x.unsqueeze(0))
    made = ReferenceBackend().compute(rows, routing.rows_per_expert, weights)
    return routing.combine(made).squeeze(0)


def solve_mix(mix: Mix, given: MixProblem) -> dict[str, Tensor]:
    """The result and every gradient."""
    for tensor in given.leaves().values():
        tensor.grad = None  # of whoever was asked before
    y = mix(given.x, given.routing, given.weights)
    assert y.shape == given.x.shape, f"{tuple(given.x.shape)} became {tuple(y.shape)}"
    y.backward(given.back.to(y.dtype))
    gradients = {f"gradient of {name}": tensor.grad for name, tensor in given.leaves().items()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"there is no {', no '.join(missing)}"
    return {"result": y.detach(), **{name: g for name, g in gradients.items() if g is not None}}


def mixes_as_rows(mixer: AbstractMixer, given: MixProblem, dtype: torch.dtype, what: str) -> None:
    """Raise unless the mixer is as close to the definition as gather, loop and sum are."""
    truth = solve_mix(by_rows, given.to(torch.float64))
    plain = solve_mix(by_rows, given.to(dtype))
    for name, got in solve_mix(mixer.mix, given.to(dtype)).items():
        assert got.dtype == plain[name].dtype, f"{what}: {name} is {got.dtype}, not {dtype}"
        error, usual = error_of(got, truth[name]), error_of(plain[name], truth[name])
        assert error <= SLACK * usual + floor(dtype), (
            f"{what}: {name} is off by {error:.2g} of its largest number; by rows it is off by "
            f"{usual:.2g}"
        )


def _refused(case: BackendCase, given: MixProblem) -> str | None:
    return "; ".join(case.backend.reasons_against(given.x, given.weights)) or None


def _mixer(case: BackendCase) -> AbstractMixer:
    assert isinstance(case.backend, AbstractMixer), "these checks are for mixers"
    return case.backend


def mix_values(case: BackendCase) -> str | None:
    """Plain and gated, with and without biases, in every dtype it takes."""
    reason: str | None = "nothing ran"
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for counts, tokens, dim, width in SIZES:
            for gated, bias in ((False, False), (False, True), (True, False), (True, True)):
                kind = {"gated": gated, "bias": bias, "device": case.device}
                given = mix_problem(counts, tokens, dim, width, **kind)
                if refused := _refused(case, given.to(dtype)):
                    reason = reason and refused
                    continue
                what = f"{'gated' if gated else 'plain'}, {'biases, ' if bias else ''}{dim} wide"
                mixes_as_rows(_mixer(case), given, dtype, f"{dtype}, {what}, rows {list(counts)}")
                reason = None
    return reason


def mix_few_or_all(case: BackendCase) -> str | None:
    """No rows at all, one row, all rows at one expert, every token at every expert."""
    for counts, tokens in (
        ((0, 0, 0), 4),
        ((0, 1, 0), 4),
        ((0, 50, 0), 50),
        ((9, 9, 9), 9),
        ((1, *[0] * 30), 1),
    ):
        given = mix_problem(counts, tokens, 8, 6, device=case.device)
        if refused := _refused(case, given.to(torch.float32)):
            return refused
        mixes_as_rows(_mixer(case), given, torch.float32, f"rows {list(counts)}, {tokens} tokens")
    return None


def mix_zeros(case: BackendCase) -> str | None:
    """A token without rows is exactly zero and has no gradient, nor has an expert without rows."""
    given = mix_problem((6, 0, 11), 40, 16, 8, device=case.device).to(torch.float32)
    if refused := _refused(case, given):
        return refused
    got = solve_mix(_mixer(case).mix, given)
    alone = torch.ones(40, dtype=torch.bool, device=case.device)
    alone[given.routing.token_of_row] = False
    for name in ("result", "gradient of x"):
        assert (got[name][alone] == 0).all(), f"the {name} of a token without rows is not zero"
        assert (got[name][~alone] != 0).any(1).all(), f"the {name} of a token with rows is zero"
    for name in tensors_of(given.weights):
        assert (got[f"gradient of {name}"][1] == 0).all(), (
            f"the gradient of {name} is not zero for an expert without a row"
        )
    return None


def mix_spare_rows(case: BackendCase) -> str | None:
    """Spare rows change nothing, even where the token that they name is not a number."""
    given = mix_problem((6, 0, 11, 3), 30, 16, 8, spare=9, device=case.device)
    if refused := _refused(case, given.to(torch.float32)):
        return refused
    used = int(given.routing.rows_per_expert.sum())
    tokens = given.routing.token_of_row.clone()
    tokens[:used] = tokens[:used].clamp_min(1)  # nobody but the spare rows names token 0
    routing = replace(given.routing, token_of_row=tokens)
    given = replace(given, routing=routing)
    short = replace(routing, token_of_row=tokens[:used], weight_of_row=routing.weight_of_row[:used])
    want = solve_mix(_mixer(case).mix, replace(given, routing=short).to(torch.float32))
    x = given.x.clone()
    x[0] = torch.nan
    for name, got in solve_mix(_mixer(case).mix, replace(given, x=x).to(torch.float32)).items():
        if name == "gradient of the rows' weights":
            assert (got[used:] == 0).all(), "the gradient of a spare row's weight is not zero"
            got = got[:used]
        # As many roundings as in the reference; a spare row would add numbers of order 1.
        assert error_of(got, want[name].double()) < 1e-5, f"spare rows change the {name}"
    return None


def mix_frozen_parts(case: BackendCase) -> str | None:
    """Gradients of some parts only, or of none, are those of all."""
    given = mix_problem((6, 0, 11), 14, 16, 8, device=case.device).to(torch.float32)
    if refused := _refused(case, given):
        return refused
    mix = _mixer(case).mix
    want = solve_mix(mix, given)
    for alone in given.leaves():
        for name, tensor in given.leaves().items():
            tensor.requires_grad_(name == alone)
            tensor.grad = None
        y = mix(given.x, given.routing, given.weights)
        assert y.requires_grad, f"with only {alone} to be learnt, nothing is"
        y.backward(given.back)
        got = given.leaves()[alone].grad
        assert got is not None, f"with only {alone} to be learnt, it gets no gradient"
        error = error_of(got, want[f"gradient of {alone}"].double())
        assert error < 1e-5, f"alone, the gradient of {alone} is another"
    with torch.inference_mode():
        y = mix(given.x, given.routing, given.weights)
    assert error_of(y, want["result"].double()) < 1e-5, "inference mode changes the result"
    return None


def mix_inputs_stay(case: BackendCase) -> str | None:
    """Nothing given is changed, an expanded gradient will do, the same again is the same bits."""
    given = mix_problem((6, 0, 11), 14, 16, 8, device=case.device).to(torch.float32)
    if refused := _refused(case, given):
        return refused
    given = replace(given, back=torch.ones((), device=case.device).expand_as(given.back))
    before = {name: tensor.detach().clone() for name, tensor in given.leaves().items()}
    first = {name: t.clone() for name, t in solve_mix(_mixer(case).mix, given).items()}
    for name, tensor in given.leaves().items():
        assert torch.equal(tensor, before[name]), f"{name} was changed in place"
        tensor.grad = None
    for name, tensor in solve_mix(_mixer(case).mix, given).items():
        assert torch.equal(tensor, first[name]), f"a second time the {name} is another"
    return None


def mix_autocast(case: BackendCase) -> str | None:
    """Under autocast it is as good as rows are, and its result of the same dtype."""
    given = mix_problem((26, 0, 31), 40, 16, 24, device=case.device)
    if refused := _refused(case, given.to(torch.float32)):
        return refused
    truth = solve_mix(by_rows, given.to(torch.float64))
    plain = solve_mix(by_rows, given.to(torch.bfloat16))
    with torch.autocast(torch.device(case.device).type, torch.bfloat16):
        single = given.to(torch.float32)
        y = _mixer(case).mix(single.x, single.routing, single.weights)
        got = solve_mix(_mixer(case).mix, given.to(torch.float32))
    assert y.dtype == torch.bfloat16, f"the result is {y.dtype}, not bfloat16"
    for name, tensor in got.items():
        limit = SLACK * error_of(plain[name], truth[name]) + floor(torch.bfloat16)
        assert error_of(tensor, truth[name]) <= limit, f"autocast gives another {name}"
    return None


def mix_compiles(case: BackendCase) -> str | None:
    """`torch.compile(fullgraph=True)` equals eager, values and gradients."""
    if not case.compile:
        return "it takes seconds; ask for it by compile=True"
    given = mix_problem((6, 0, 11), 14, 16, 8, spare=4, device=case.device)
    if refused := _refused(case, given.to(torch.float32)):
        return refused
    want = solve_mix(_mixer(case).mix, given.to(torch.float32))
    torch.compiler.reset()
    compiled = torch.compile(_mixer(case).mix, fullgraph=True, backend="aot_eager")
    for name, got in solve_mix(compiled, given.to(torch.float32)).items():
        assert error_of(got, want[name].double()) < 1e-5, f"compiling changes the {name}"
    return None


MIX_CHECKS: dict[str, Check[BackendCase]] = {
    "mixing: values and gradients": mix_values,
    "mixing: few or all": mix_few_or_all,
    "mixing: zeros": mix_zeros,
    "mixing: spare rows": mix_spare_rows,
    "mixing: frozen parts": mix_frozen_parts,
    "mixing: inputs stay": mix_inputs_stay,
    "mixing: autocast": mix_autocast,
    "mixing: compiles": mix_compiles,
}
"""What a backend that takes tokens to tokens keeps besides what every backend does."""
