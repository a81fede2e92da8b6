"""Experts in compiled code: activations against float64, experts against autograd's gradients.

Shapes: `tokens dim`; experts of a hidden `width`; `rows` sorted by expert.
"""

import math
from dataclasses import replace
from itertools import accumulate, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moefold.ops.cpu import experts
from moefold.ops.cpu.expert_rows import ExpertRows, readable
from moefold.ops.cpu.experts import ACTIVATIONS
from tests.ops.compiled_here import IN_PAIRS, instruction_set, needs_compiled_code, with_pairs

__all__ = ["instruction_set"]
pytestmark = [needs_compiled_code, pytest.mark.usefixtures("instruction_set")]

TWINS = {
    "relu": torch.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
EPS = 2.0**-24


def slope(name: str, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(TWINS[name](x).sum(), x)[0]


def both(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """An activation and its derivative, of one row."""
    row, value, again, first = x[None], torch.empty_like(x), torch.empty_like(x), torch.ones_like(x)
    experts.activate(name, row, None, value[None])
    experts.differentiate(
        name, row, None, again[None], weights=None, of_hidden=first[None], of_first=first[None],
        of_weights=None,
    )  # fmt: skip
    assert torch.equal(again, value) or x.isnan().any()
    return value, first


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_as_near_as_float32_allows(name):
    near_zero = torch.logspace(-30, 0, 2000)
    x = torch.cat([torch.linspace(-12, 12, 100_001), near_zero, -near_zero])
    value, derivative = both(name, x)
    exact = x.double()
    # The share that an activation lets through is a number below 1 from an exponential function
    # (2 roundings of EPS), a sum, a quotient and a product with x: in the worst case 5, and 4 as
    # their errors meet here. The derivative adds x times its own, 0.8 at most; where the argument
    # of a sigmoid is a cubic, its roundings, times up to 4, come on top.
    assert ((value - TWINS[name](exact)).abs() <= 4 * EPS * exact.abs()).all()
    bound = (8 if name == "gelu_tanh" else 4) * EPS * (1 + 0.8 * exact.abs())
    assert ((derivative - slope(name, exact)).abs() <= bound).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_at_the_ends(name):
    x = torch.tensor([0.0, -0.0, 30.0, -30.0, 88.0, -88.0, 200.0, -200.0, 1e18, -1e18, math.inf])
    value, derivative = both(name, x)
    torch.testing.assert_close(value[:-1], TWINS[name](x)[:-1])
    assert value[-1] == math.inf  # torch's own gelu is no number there on some processors
    torch.testing.assert_close(derivative[:-1], slope(name, x)[:-1])
    x = torch.tensor([1.0, math.nan, -1.0])
    value, derivative = both(name, x)
    torch.testing.assert_close(value, TWINS[name](x), equal_nan=True)
    torch.testing.assert_close(derivative, slope(name, x), equal_nan=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_number_does_not_depend_on_its_place(name):
    x = torch.randn(64)
    value, derivative = both(name, x)
    for start, end in ((0, 1), (3, 10), (5, 13), (60, 64)):
        own, own_derivative = both(name, x[start:end].clone())
        assert torch.equal(own, value[start:end])
        assert torch.equal(own_derivative, derivative[start:end])


def problem(
    counts, dim, width, made, *, gated, bias, weighted, turned=False, dtype=torch.float32,
    of_rows=torch.float32, gap=3, **kind
) -> ExpertRows:  # fmt: skip
    """Random experts and rows, everything with gaps that may have them; spare rows and tokens."""
    rows, tokens, first = sum(counts), max(counts) + 5, (2 if gated else 1) * width

    def stack(out, into):
        numbers = (torch.randn(len(counts), out, into) / into**0.5).to(dtype)
        return numbers.mT.contiguous().mT if turned else numbers

    return ExpertRows(
        counts=counts,
        kept_counts=counts,
        tokens=torch.randint(tokens, (rows + 2,)),
        weights=torch.rand(rows + 2) if weighted else None,
        x=torch.randn(tokens, dim + gap).to(of_rows)[:, :dim],
        up=stack(first, dim),
        down=stack(made, width),
        up_bias=torch.randn(len(counts), first) if bias else None,
        down_bias=torch.randn(len(counts), made) if bias else None,
        pre=torch.full((rows, width), math.nan, dtype=of_rows),
        value=torch.full((rows, width), math.nan, dtype=of_rows) if gated else None,
        gated=gated,
        grad=torch.randn(tokens, made + gap).to(of_rows)[:, :made],
        **{"activation": "silu", **kind},
    )


def twin(given: ExpertRows) -> dict[str, Tensor]:
    """Results by token and all gradients, in float64 by autograd."""

    def leaf(t: Tensor | None) -> Any:
        return None if t is None else t.double().detach().requires_grad_()

    names = ("x", "weights", "up", "down", "up_bias", "down_bias")
    x, weights, up, down, up_bias, down_bias = leaves = [leaf(getattr(given, n)) for n in names]
    sums = x.new_zeros(x.shape[0], down.shape[1])
    for i, start in enumerate(accumulate(given.counts[:-1], initial=0)):
        own = slice(start, start + given.counts[i])
        tokens = given.tokens[own]
        first = x[tokens] @ up[i].T + (0 if up_bias is None else up_bias[i])
        hidden = TWINS[given.activation](first[:, : down.shape[2]])
        hidden = hidden * first[:, down.shape[2] :] if given.gated else hidden
        out = hidden @ down[i].T + (0 if down_bias is None else down_bias[i])
        out = out if weights is None else out * weights[own, None]
        sums = sums.index_add(0, tokens, out)
    assert given.grad is not None
    inputs = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(sums, inputs, given.grad.double())
    there = [n for n, t in zip(names, leaves, strict=True) if t is not None]
    found = dict(zip(there, grads, strict=True))
    return {"result": sums.detach(), **found}


EVERY = ("x", "weights", "up", "down", "up_bias", "down_bias")


def compiled(given: ExpertRows, shares, wanted=EVERY) -> dict[str, Any]:
    """The same by compiled code; memory for what is not wanted is not there."""
    sums = [torch.zeros(given.x.shape[0], given.down.shape[1]) for _ in shares]
    experts.forward(given, shares, sums)
    return {"result": sum(sums), **gradients(given, shares, wanted)}


def gradients(given: ExpertRows, shares, wanted=EVERY) -> dict[str, Any]:
    """Of the backward pass alone, from what was kept."""

    def like(name):
        tensor = getattr(given, name)
        if tensor is None or name not in wanted:
            return None
        return torch.full(tensor.shape, 0.0 if name == "weights" else math.nan, dtype=tensor.dtype)

    for_x = "x" in wanted
    of_x: list[Any] = [torch.zeros(given.x.shape) if for_x else None for _ in shares]
    made: dict[str, Any] = {
        name: like(name) for name in ("weights", "up", "down", "up_bias", "down_bias")
    }
    experts.backward(replace(given, **{f"of_{n}": t for n, t in made.items()}), shares, of_x)
    made["x"] = sum(of_x) if for_x else None
    return {n: t for n, t in made.items() if t is not None}


def assert_agree(got: dict[str, Tensor], want: dict[str, Tensor], terms: int) -> None:
    """Equal but for rounding.

    Errors of sums of `terms` products, up to three of them behind each other, add up like a random
    walk; nothing goes beyond 8 of its deviations. Gradients of two bytes a number are rounded once
    more, to within half of what lies between two such numbers.
    """
    assert got.keys() == want.keys()
    for name, exact in want.items():
        error = (got[name] - exact).abs()
        if got[name].dtype != torch.float32:
            kind = torch.finfo(got[name].dtype)
            error -= torch.clamp(exact.abs(), min=kind.smallest_normal) * kind.eps / 2
        assert error.max() <= 8 * EPS * terms**0.5 * exact.abs().max(), name


SHAPES = (
    # Around the kernels' 3, 6, 8, 24 and 96 rows, 8, 16 and 32 columns, 16 steps.
    ((1, 0, 2, 3), 17, 9, 5),
    ((7, 0, 4, 97), 33, 24, 40),
    ((100,), 8, 1, 1),
    ((6, 5), 1, 16, 3),
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("counts", "dim", "width", "made"), SHAPES)
def test_values_and_gradients(counts, dim, width, made, gated, bias):
    for weighted, turned in product((False, True), (False, True)):
        given = problem(
            counts, dim, width, made, gated=gated, bias=bias, weighted=weighted, turned=turned
        )
        want = twin(given)
        for shares in ([range(len(counts))], [[i] for i in reversed(range(len(counts)))]):
            got = compiled(given, shares)
            assert_agree(got, want, terms=dim + 2 * width + made + max(counts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("counts", "dim", "width", "made"), SHAPES)
def test_matrices_of_two_bytes_a_number(counts, dim, width, made, gated, dtype):
    for turned in (False, True):
        kind: dict[str, Any] = {"turned": turned, "dtype": dtype}
        given = problem(counts, dim, width, made, gated=gated, bias=True, weighted=True, **kind)
        got = compiled(given, [range(len(counts))])
        assert got["up"].dtype == got["down"].dtype == dtype
        assert_agree(got, twin(given), terms=dim + 2 * width + made + max(counts))


def widened(part: Any) -> Any:
    return part.float() if isinstance(part, Tensor) and part.is_floating_point() else part


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("counts", "dim", "width", "made"),
    # The last is of gradients so large that they are rounded part by part.
    [*SHAPES, ((2, 7), 2750, 130, 200), ((5,), 40, 2750, 130)],
)
def test_two_bytes_a_number_are_what_float32_makes_of_them(counts, dim, width, made, gated, dtype):
    given = problem(
        counts, dim, width, made, gated=gated, bias=True, weighted=True, dtype=dtype, of_rows=dtype
    )
    names, shares = ExpertRows.__dataclass_fields__, [range(len(counts))]
    wide = ExpertRows(**{name: widened(getattr(given, name)) for name in names})
    got, want = compiled(given, shares), compiled(wide, shares)
    assert torch.equal(got["result"], want["result"])
    kept = ("pre", "value") if gated else ("pre",)
    for name in kept:
        assert torch.equal(getattr(given, name), getattr(wide, name).to(dtype)), name
    # What was rounded is all that the backward pass has.
    again = gradients(replace(wide, **{n: getattr(given, n).float() for n in kept}), shares)
    for name, gradient in again.items():
        assert torch.equal(got[name], gradient.to(got[name].dtype)), name


@with_pairs
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("counts", "dim", "width", "made"),
    # Edges of tiles, few rows, more than are rounded at once, a depth of more than one part, the
    # largest that there may be.
    [((1, 0, 2, 30), 18, 10, 6), ((7, 0, 25, 97), 34, 64, 40), ((1500, 3), 64, 98, 32),
     ((40, 9), 1600, 66, 1602), ((30, 26), 8192, 6, 8), ((30, 26), 6, 6, 8192)],
)  # fmt: skip
def test_all_in_pairs(counts, dim, width, made, turned, gated):
    low: dict[str, Any] = {"dtype": torch.bfloat16, "of_rows": torch.bfloat16, "gap": 4}
    low["paired"] = True
    kind: dict[str, Any] = {"gated": gated, "turned": turned, "bias": True, "weighted": True}
    given = problem(counts, dim, width, made, **kind, **low)
    got, want = compiled(given, [range(len(counts))]), twin(given)
    for name, exact in want.items():
        # Up to five numbers on the way are rounded, each by a random number within 2^-8 of itself:
        # their deviations add up to 2^-8 * (5 / 3)^0.5. Nothing goes beyond twice as much.
        error = (got[name].double() - exact).norm() / exact.norm()
        assert error <= 2 * 2**-8 * (5 / 3) ** 0.5, name
    apart = got["result"] - compiled(replace(given, paired=False), [range(len(counts))])["result"]
    assert apart.abs().max() > 0  # else nothing was rounded on the way


@with_pairs
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("counts", "dim", "width", "made"),
    [((1, 0, 2, 30), 18, 10, 6), ((7, 0, 25, 97), 34, 64, 40), ((40, 9), 1600, 66, 1602)],
)
def test_matrices_of_float32_are_rounded_as_they_are_read(counts, dim, width, made, turned, gated):
    low: dict[str, Any] = {"of_rows": torch.bfloat16, "gap": 4, "paired": True}
    kind: dict[str, Any] = {"gated": gated, "turned": turned, "bias": True, "weighted": True}
    given, shares = problem(counts, dim, width, made, **kind, **low), [range(len(counts))]
    rounded = replace(given, up=given.up.bfloat16(), down=given.down.bfloat16())
    got, want = compiled(given, shares), compiled(rounded, shares)
    for name in want:
        is_matrix = name in ("up", "down")
        assert got[name].dtype == torch.float32
        # Their gradients are what was rounded there at the end.
        assert torch.equal(got[name].bfloat16() if is_matrix else got[name], want[name]), name
        assert not is_matrix or not torch.equal(got[name], want[name].float())


def test_what_does_not_come_in_pairs_is_refused_or_made_so():
    low: dict[str, Any] = {"dtype": torch.bfloat16, "of_rows": torch.bfloat16, "paired": True}
    kind: dict[str, Any] = {"gated": True, "bias": False, "weighted": False, **low}
    odd = problem((9, 3), 20, 18, 10, gap=3, **kind)
    even = readable(odd)
    assert even.grad is not None
    assert odd.grad is not None
    assert [even.x.stride(0), even.grad.stride(0)] == [20, 10]
    assert torch.equal(even.x, odd.x)
    assert torch.equal(even.grad, odd.grad)
    wide = readable(replace(even, x=even.x.float()))
    assert wide.x.dtype == torch.bfloat16
    one = replace(odd, x=odd.x[:1], grad=odd.grad[:1])
    assert readable(one) is one  # where one token ends does not matter
    wrong = [odd, replace(even, x=even.x.float())]
    wrong += [problem((9, 3), *sizes, gap=4, **kind) for sizes in ((19, 18, 10), (20, 17, 10))]
    wrong += [problem((9, 3), *sizes, gap=4, **kind) for sizes in ((20, 18, 9), (8194, 6, 4))]
    wrong += [replace(even, up=even.up.half(), down=even.down.half())]
    wrong += [replace(even, up=even.up.float()[..., :-1], down=even.down.float(), x=even.x[:, :-1])]
    for given in wrong:
        with pytest.raises(ValueError, match="pairs are of bfloat16 numbers in an even number"):
            experts.backward(given, [[0]], [None])


def test_pairs_are_refused_where_there_are_none(instruction_set):
    low: dict[str, Any] = {"dtype": torch.bfloat16, "of_rows": torch.bfloat16, "paired": True}
    given = problem((9, 3), 20, 18, 10, gated=True, bias=False, weighted=False, gap=4, **low)
    sums = [torch.zeros(14, 10)]
    if instruction_set == IN_PAIRS:
        experts.forward(given, [[0]], sums)
        assert (sums[0] != 0).any()
        return
    with pytest.raises(ValueError, match="compiled here multiplies no pairs of bfloat16"):
        experts.forward(given, [[0]], sums)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gap", [3, 4])
def test_zeros_follow_what_is_kept(gap, low, instruction_set):
    given = problem(
        (3, 0, 5, 1), 6, 4, 8, gated=True, bias=False, weighted=True, of_rows=low, gap=gap,
        dtype=low if low == torch.bfloat16 else torch.float32,
    )  # fmt: skip
    in_pairs = instruction_set == IN_PAIRS and low == torch.bfloat16 and gap == 4
    given = replace(given, paired=in_pairs)
    want = compiled(given, [range(4)])
    kept = torch.full((40, 4), math.nan, dtype=low)
    spread = replace(given, pre=kept, value=kept.clone(), kept_counts=(16, 0, 5, 16))
    got = compiled(spread, [range(4)])
    for name in want:
        assert torch.equal(got[name], want[name]), name
    for half, other in ((given.pre, spread.pre), (given.value, spread.value)):
        assert half is not None
        assert other is not None
        assert torch.equal(other[:3], half[:3])
        assert torch.equal(other[16:21], half[3:8])
        assert torch.equal(other[21:22], half[8:9])
        assert (other[3:16] == 0).all()
        assert (other[22:37] == 0).all()
        assert other[37:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_rounded_as_torch_does(dtype, instruction_set):
    # One row of one number each: the gradient of `down` is the hidden number times the gradient.
    bits = torch.arange(0, 2**32, 65537 * 251, dtype=torch.int64).to(torch.int32)
    halfway = (torch.arange(2**16, dtype=torch.int32) << 16) | 0x8000
    numbers = torch.cat([bits, halfway, halfway - 1, halfway + 1]).view(torch.float32)
    numbers = torch.cat([numbers, torch.tensor([math.inf, -math.inf, math.nan, 65519.9, 65520.0])])
    made = len(numbers)
    given = problem(
        (1,), 1, 1, made, gated=False, bias=False, weighted=False, dtype=dtype, activation="relu"
    )
    given = replace(
        given,
        x=torch.ones(6, 1),
        tokens=torch.zeros(3, dtype=torch.int64),
        up=torch.ones(1, 1, 1, dtype=dtype),
        down=torch.zeros(1, made, 1, dtype=dtype),
        grad=numbers.expand(6, made),
    )
    got = compiled(given, [[0]], ("down",))["down"].flatten()
    want = numbers.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    if instruction_set == IN_PAIRS and dtype == torch.bfloat16:
        # The instruction that rounds takes numbers below the smallest normal one for 0.
        want = want.where(numbers.abs() >= torch.finfo(dtype).tiny, 0 * want)
    assert torch.equal(got[~want.isnan()], want[~want.isnan()])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    for gated in (False, True):
        given = problem(
            (20, 0, 11), 24, 20, 12, gated=gated, bias=True, weighted=True, activation=activation
        )
        assert_agree(compiled(given, [[0, 1, 2]]), twin(given), terms=24 + 40 + 12 + 20)


def test_only_what_is_wanted_is_computed():
    given = problem((9, 0, 12), 20, 18, 10, gated=True, bias=True, weighted=True)
    every = compiled(given, [[0, 1, 2]])
    for wanted in ((), ("x",), ("weights",), ("up",), ("down",), ("up_bias",), ("down_bias",)):
        got = compiled(given, [[0, 1, 2]], wanted)
        assert set(got) == {"result", *wanted}
        for name in wanted:
            assert torch.equal(got[name], every[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nobody_writes_where_nothing_was_asked_for(dtype, monkeypatch):
    # Memory of a thread is poisoned, and so is what lies behind it.
    rooms, empty = [], torch.empty

    def poisoned(size, **kind):
        longer = torch.full((size + 64,), math.nan, **kind)
        longer[size:] = 7.0
        rooms.append(longer[size:])
        return longer[:size]

    kind: dict[str, Any] = {"dtype": dtype, "of_rows": dtype}
    given = problem((9, 0, 97, 2), 33, 18, 10, gated=True, bias=True, weighted=True, **kind)
    monkeypatch.setattr(experts.torch, "empty", poisoned)
    try:
        got = compiled(given, [[0, 2], [1, 3]])
        inference = [torch.zeros(given.x.shape[0], 10)]
        experts.forward(replace(given, pre=None, value=None), [range(4)], inference)
    finally:
        monkeypatch.setattr(experts.torch, "empty", empty)
    assert len(rooms) == 5
    assert all((behind == 7.0).all() for behind in rooms)
    for name, tensor in got.items():
        assert tensor.isfinite().all(), name
    torch.testing.assert_close(inference[0], got["result"])


@pytest.mark.parametrize(
    "name", ["x", "up", "up_bias", "down_bias", "tokens", "weights", "pre", "value", "grad"]
)
def test_sizes_that_do_not_belong_together_are_refused(name):
    given = problem((9, 0, 12), 20, 18, 10, gated=True, bias=True, weighted=True)
    tensor = getattr(given, name)
    short = tensor[:20] if tensor.ndim == 1 else tensor[:, :5]
    wrong = replace(given, **{name: short})
    sums: list[Any] = [None]
    with pytest.raises(ValueError, match=f"^{name} is .* 21 rows and experts of"):
        experts.backward(wrong, [[0, 1, 2]], sums)


def test_counts_that_do_not_belong_to_the_experts_are_refused():
    given = problem((9, 0, 12), 20, 18, 10, gated=True, bias=True, weighted=True)
    for counts in ((9, 12), (9, -1, 12)):
        with pytest.raises(ValueError, match=r"3 experts cannot have .* rows"):
            experts.forward(replace(given, counts=counts), [[0, 1]], [torch.zeros(17, 10)])
    for kept in ((9, 12), (9, 0, 11)):
        with pytest.raises(ValueError, match=r"9, 0, 12\] rows do not fit in .* kept ones"):
            experts.forward(replace(given, kept_counts=kept), [[0, 1]], [torch.zeros(17, 10)])
    with pytest.raises(ValueError, match=r"pre is \[21, 18\], which does not belong"):
        experts.forward(replace(given, kept_counts=(9, 0, 13)), [[0, 1]], [torch.zeros(17, 10)])


def test_memory_that_is_not_as_it_was_promised_is_refused():
    given = problem((9, 0, 12), 20, 18, 10, gated=True, bias=True, weighted=True)
    assert given.pre is not None and given.up_bias is not None  # noqa: PT018
    freed = torch.zeros(3, 36)
    freed.untyped_storage().resize_(0)
    wrong = {
        "pre": given.pre.T.contiguous().T,
        "value": given.pre.half(),
        "x": given.x.double(),
        "up_bias": given.up_bias.to("meta"),
        "tokens": given.tokens.int(),
        "up": given.up.double(),
        "down": given.down.half(),
        "of_up": given.up.half(),
        "of_up_bias": freed,
    }
    for name, tensor in wrong.items():
        sums: list[Any] = [None]
        with pytest.raises(ValueError, match=f"^{name} is torch"):
            experts.backward(replace(given, **{name: tensor}), [[0, 1, 2]], sums)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_first_of_an_index_that_is_not_there(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(experts, "_functions", lambda: None)
    for index, size, wrong in (
        ([], 0, None),
        ([0, 4, 0], 5, None),
        ([4, 0, 5, -1], 5, 5),
        ([4, 0, -1, 5], 5, -1),
        ([0], 0, 0),
        ([-(2**63)], 5, -(2**63)),
        ([2**63 - 1], 5, 2**63 - 1),
    ):
        assert experts.first_beyond(torch.tensor(index, dtype=torch.int64), size) == wrong, index


def test_tokens_are_made_readable_where_they_are_not():
    given = problem((3, 2), 8, 6, 10, gated=True, bias=False, weighted=False)
    assert given.grad is not None
    assert readable(given) is given
    turned = replace(given, x=given.x.mT.contiguous().mT)
    found = readable(turned)
    assert torch.equal(found.x, given.x)
    assert (turned.x.stride(1), found.x.stride(1)) == (8, 1)
    assert found.grad is turned.grad
    wide = readable(replace(given, grad=given.grad.double()))
    assert wide.grad is not None
    assert wide.grad.dtype == torch.float32
    assert torch.equal(wide.grad, given.grad)
    assert wide.x is given.x


def test_what_cannot_be_computed(monkeypatch, instruction_set):
    like, stack = torch.empty(0), torch.empty(2, 12, 8)
    assert experts.can_compute(like, stack, stack.mT)
    assert experts.can_compute(like, stack.half(), stack.half())
    assert not experts.can_compute(like.double(), stack, stack)
    assert not experts.can_compute(like.half(), stack.half(), stack.half())
    assert not experts.can_compute(like.to("meta"), stack, stack)
    assert not experts.can_compute(like, stack.double(), stack.double())
    assert not experts.can_compute(like, stack, stack.bfloat16())
    assert not experts.can_compute(like, stack, stack.to("meta"))
    assert not experts.can_compute(like, stack[:, :0], stack)
    assert not experts.can_compute(like, stack, stack[..., ::2].repeat(1, 2, 1)[..., ::2])
    low = stack.bfloat16()
    assert experts.can_compute(low, low, low.mT) == (instruction_set == IN_PAIRS)
    # A matrix of float32 is rounded as it is read; one of float16 is not.
    assert experts.can_compute(low, stack, stack.mT) == (instruction_set == IN_PAIRS)
    assert not experts.can_compute(low, stack.half(), stack.half())
    assert not experts.can_compute(low, stack[:, :, :7], stack)
    for odd in (low[:, :, :7], low[:, :, ::2], torch.empty(2, 12, 9, dtype=low.dtype)[:, :, :8]):
        assert not experts.can_compute(low, odd, low)
    for odd in (low[:, :, :7], low[:, :11]):
        assert not experts.can_compute(low, low, odd)
    monkeypatch.setattr(experts, "_functions", lambda: None)
    assert not experts.can_compute(like, stack, stack)
    assert not experts.can_compute(low, low, low)
