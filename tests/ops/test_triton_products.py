"""Kernels of experts, one family at a time, against plain sums in float64."""

from dataclasses import replace
from typing import NamedTuple, no_type_check

import pytest
import torch
from torch import Tensor

from tests.ops.triton_library import DEVICE  # isort: skip - before any kernel is defined

import triton
import triton.language as tl

from moefold.experts import activations
from moefold.experts.backends.triton import ACTIVATIONS
from moefold.ops.triton import blocks as sizes
from moefold.ops.triton.activation import activated
from moefold.ops.triton.combine import combine
from moefold.ops.triton.first import first
from moefold.ops.triton.hidden import columns_of, hidden_backward
from moefold.ops.triton.pieces import place
from moefold.ops.triton.schedule import row_bounds, rows_of_tokens, schedule
from moefold.ops.triton.second import second
from moefold.ops.triton.weights import outer, sums
from tests.ops.triton_interpreter import rounding

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

COUNTS = [21, 0, 1, 40]
SPARE = 5
TOKENS, DIM, WIDTH = 30, 40, 37  # two tiles of 32, the second not whole
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Case(NamedTuple):
    """Rows of four experts, one without any, and some spare ones."""

    counts: Tensor
    expert: Tensor
    token: Tensor
    weight: Tensor

    @property
    def used(self) -> int:
        return len(self.expert)

    @property
    def rows(self) -> int:
        return len(self.token)


@pytest.fixture(autouse=True)
def _many_tiles(monkeypatch):
    monkeypatch.setattr(sizes, "INTERPRETED", 32)


@pytest.fixture
def case() -> Case:
    counts = torch.tensor(COUNTS, device=DEVICE)
    rows = sum(COUNTS) + SPARE
    return Case(
        counts=counts,
        expert=torch.arange(4, device=DEVICE).repeat_interleave(counts),
        token=torch.randint(0, TOKENS, (rows,), device=DEVICE),
        weight=torch.rand(rows, device=DEVICE) + 0.5,
    )


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def distance(found: Tensor, wanted: Tensor) -> float:
    """The error as a part of the length of all numbers together; NaN if there is a NaN."""
    return float((found.double() - wanted).norm() / wanted.norm())


def limit(dtype: torch.dtype, roundings: int = 1) -> float:
    """What rounding explains: that of what is stored, and that of a sum, each time.

    If every number is off by at most a part of itself, all of them together are by at most that
    part of their length. A sum of n products in float32 goes through up to n roundings of half a
    unit, 2**-24, which add up as a random walk does, to sqrt(n) of them; n is at most 64 here.
    """
    return roundings * (rounding(dtype) + 64**0.5 * 2**-24)


def blocks_for(x: Tensor, case: Case):
    blocks = sizes.of_rows(x, case.rows, len(case.counts))
    return blocks, schedule(case.counts, case.rows, blocks.rows)


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers with other strides."""
    return tensor.mT.contiguous().mT


# Pieces.


@triton.jit
@no_type_check
def _place_of_all(out, tiles, columns, GROUP: tl.constexpr):  # noqa: N803
    tile, column = place(tl.program_id(0), tiles, columns, GROUP)
    tl.atomic_add(out + tile * columns + column, 1)


@pytest.mark.parametrize(("tiles", "columns"), [(1, 1), (8, 3), (11, 4), (3, 5)])
def test_programs_share_out_all_places(tiles, columns):
    seen = torch.zeros(tiles, columns, dtype=torch.int32, device=DEVICE)
    _place_of_all[(tiles * columns,)](seen, tiles, columns, GROUP=4)
    assert (seen == 1).all()


@triton.jit
@no_type_check
def _activate(x, y, slope, NAME: tl.constexpr, SIZE: tl.constexpr):  # noqa: N803
    at = tl.arange(0, SIZE)
    value, derivative = activated(tl.load(x + at), NAME)
    tl.store(y + at, value)
    tl.store(slope + at, derivative)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_slopes(name):
    # near the bends, and where exp overflows unless one is careful
    x = torch.cat([torch.linspace(-6, 6, 241), torch.linspace(-200, 200, 15)]).to(DEVICE)
    y, slope = poison(256), poison(256)
    _activate[(1,)](x, y, slope, NAME=name, SIZE=256)
    exact = x.double().requires_grad_()
    wanted = activations.get(name)(exact)
    (of_x,) = torch.autograd.grad(wanted.sum(), exact)
    # A handful of operations on numbers of order 1, or of order x, each rounded once.
    assert ((y - wanted).abs() <= 8 * 2**-24 * (1 + wanted.abs())).all()
    assert ((slope - of_x).abs() <= 8 * 2**-24 * (1 + x.abs())).all()


def test_nan_passes_through_every_activation():
    for name in ACTIVATIONS:
        y, slope = draw(256), draw(256)
        _activate[(1,)](poison(256), y, slope, NAME=name, SIZE=256)
        assert y.isnan().all(), name


# Products.


@each_dtype
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_first(case, dtype, gated, gather):
    wide = 2 * WIDTH if gated else WIDTH
    x = draw(TOKENS if gather else case.rows, DIM, dtype=dtype)
    up, bias = draw(4, wide, DIM, dtype=dtype, scale=DIM**-0.5), draw(4, wide, dtype=dtype)
    blocks, tiles = blocks_for(x, case)
    token = case.token if gather else None
    kept = []
    for given, matrices in ((x, up), (transposed(x), transposed(up))):
        hidden = poison(case.rows, WIDTH, dtype=dtype)
        pre = poison(case.rows, wide, dtype=dtype)
        first(given, token, matrices, bias, tiles, blocks, "silu", hidden, pre)
        kept.append((hidden, pre))
    rows = (x[case.token] if gather else x)[: case.used].double()
    product = torch.einsum("rd,rwd->rw", rows, up.double()[case.expert]) + bias[case.expert]
    half = torch.nn.functional.silu(product[:, :WIDTH])
    wanted = half * product[:, WIDTH:] if gated else half
    for hidden, pre in kept:
        assert distance(pre[: case.used], product) < limit(dtype)
        # before the last rounding everything was float32: product, activation, and gate
        assert distance(hidden[: case.used], wanted) < limit(dtype) + 2 * limit(torch.float32)
        assert hidden[case.used :].isnan().all()
        assert pre[case.used :].isnan().all()


def test_first_without_what_is_optional(case):
    x, up, bias = draw(case.rows, DIM), draw(4, WIDTH, DIM), torch.zeros(4, WIDTH, device=DEVICE)
    blocks, tiles = blocks_for(x, case)
    found = []
    for term, kept in ((bias, None), (None, None), (None, poison(case.rows, WIDTH))):
        hidden = poison(case.rows, WIDTH)
        first(x, None, up, term, tiles, blocks, "relu", hidden, kept)
        found.append(hidden[: case.used])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@each_dtype
@pytest.mark.parametrize("bias", [False, True])
def test_second(case, dtype, bias):
    rows, matrices = draw(case.rows, WIDTH, dtype=dtype), draw(4, DIM, WIDTH, dtype=dtype)
    rows[case.used :] = float("nan")
    term = draw(4, DIM, dtype=dtype) if bias else None
    blocks, tiles = blocks_for(rows, case)
    wanted = torch.einsum("rw,rdw->rd", rows[: case.used].double(), matrices.double()[case.expert])
    if term is not None:
        wanted += term[case.expert]
    for given, clear in ((matrices, True), (transposed(matrices), False)):
        out = poison(case.rows, DIM, dtype=dtype)
        second(rows, given, term, tiles, blocks, out, clear_spare=clear)
        assert distance(out[: case.used], wanted) < limit(dtype)
        left = out[case.used :]
        assert (left == 0).all() if clear else left.isnan().all()


@each_dtype
@pytest.mark.parametrize("weighted", [False, True])
def test_combine(case, dtype, weighted):
    rows = draw(case.rows, DIM, dtype=dtype)
    rows[case.used :] = float("nan")
    of_tokens = rows_of_tokens(case.token, case.counts, TOKENS + 2)
    out = poison(TOKENS + 2, DIM, dtype=dtype)
    combine(rows, case.weight if weighted else None, of_tokens, out)
    scaled = rows[: case.used].double()
    if weighted:
        scaled = scaled * case.weight[: case.used, None]
    wanted = torch.zeros(TOKENS + 2, DIM, dtype=torch.float64, device=DEVICE)
    wanted.index_add_(0, case.token[: case.used], scaled)
    assert distance(out, wanted) < limit(dtype)
    assert (out[TOKENS:] == 0).all()


# Backward.


@each_dtype
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_hidden_backward(case, dtype, gated, mixed):
    wide = 2 * WIDTH if gated else WIDTH
    pre, down = draw(case.rows, wide, dtype=dtype), draw(4, DIM, WIDTH, dtype=dtype)
    grad = draw(TOKENS if mixed else case.rows, DIM, dtype=dtype)
    bias = draw(4, DIM, dtype=dtype)
    token, weight = (case.token, case.weight) if mixed else (None, None)

    exact, scale = pre[: case.used].double().requires_grad_(), case.weight[: case.used].double()
    scale = (scale if mixed else torch.ones_like(scale)).requires_grad_()
    half = torch.nn.functional.silu(exact[:, :WIDTH])
    hidden = half * exact[:, WIDTH:] if gated else half
    y = torch.einsum("rw,rdw->rd", hidden, down.double()[case.expert]) + bias[case.expert]
    back = (grad[case.token] if mixed else grad)[: case.used].double()
    of_exact, of_scale = torch.autograd.grad((y * scale[:, None] * back).sum(), [exact, scale])

    blocks, tiles = blocks_for(pre, case)
    for g, d in ((grad, down), (transposed(grad), transposed(down))):
        of_pre = poison(case.rows, wide, dtype=dtype)
        again = poison(case.rows, WIDTH, dtype=dtype)
        parts = poison(columns_of(blocks, WIDTH), case.rows) if mixed else None
        hidden_backward(g, token, weight, d, bias, pre, tiles, blocks, "silu", of_pre, again, parts)
        # float32 all the way from the product to what is stored
        assert distance(of_pre[: case.used], of_exact) < limit(dtype) + 3 * limit(torch.float32)
        wanted = (hidden * scale[:, None]).detach()
        assert distance(again[: case.used], wanted) < limit(dtype) + 2 * limit(torch.float32)
        assert of_pre[case.used :].isnan().all()
        assert again[case.used :].isnan().all()
        if parts is not None:
            # two sums, one of them of the results of the other
            assert distance(parts.sum(0)[: case.used], of_scale) < 4 * limit(torch.float32)
            assert parts[:, case.used :].isnan().all()


@each_dtype
@pytest.mark.parametrize("gathered", ["left", "right", "none"])
def test_outer(case, dtype, gathered):
    left = draw(TOKENS if gathered == "left" else case.rows, DIM, dtype=dtype)
    right = draw(TOKENS if gathered == "right" else case.rows, WIDTH, dtype=dtype)
    one = (left[case.token] if gathered == "left" else left)[: case.used].double()
    other = (right[case.token] if gathered == "right" else right)[: case.used].double()
    wanted = torch.zeros(4, DIM, WIDTH, dtype=torch.float64, device=DEVICE)
    wanted.index_add_(0, case.expert, one[:, :, None] * other[:, None, :])
    bounds = row_bounds(case.counts, case.rows)
    for a, b in ((left, right), (transposed(left), transposed(right))):
        out = poison(4, DIM, WIDTH, dtype=dtype)
        outer(
            a,
            b,
            case.token,
            bounds,
            out,
            gather_left=gathered == "left",
            gather_right=gathered == "right",
        )
        assert distance(out, wanted) < limit(dtype)
        assert (out[1] == 0).all()


def test_outer_keeps_the_nan_of_an_expert_to_itself(case):
    left, right = draw(case.rows, DIM), draw(case.rows, WIDTH)
    left[21] = right[22] = float("nan")  # the first row of expert 2, and of expert 3
    out = poison(4, DIM, WIDTH)
    outer(left, right, None, row_bounds(case.counts, case.rows), out)
    assert out[:2].isfinite().all()
    assert out[2:].isnan().all()


@each_dtype
@pytest.mark.parametrize("gather", [False, True])
def test_sums(case, dtype, gather):
    rows = draw(TOKENS if gather else case.rows, DIM, dtype=dtype)
    scaled = (rows[case.token] if gather else rows)[: case.used].double()
    if gather:
        scaled = scaled * case.weight[: case.used, None]
    wanted = torch.zeros(4, DIM, dtype=torch.float64, device=DEVICE)
    wanted.index_add_(0, case.expert, scaled)
    bounds = row_bounds(case.counts, case.rows)
    given = (case.token, case.weight) if gather else (None, None)
    for one in (rows, transposed(rows)):
        out = poison(4, DIM, dtype=dtype)
        sums(one, *given, bounds, out)
        assert distance(out, wanted) < limit(dtype)
        assert (out[1] == 0).all()


def test_sums_of_low_precision_do_not_stop_growing():
    # 1024 rows of 1: a sum kept in bfloat16 would stop at 256
    rows, out = torch.ones(1024, 3, dtype=torch.bfloat16, device=DEVICE), poison(1, 3)
    out = out.bfloat16()
    sums(rows, None, None, torch.tensor([0, 1024, 1024], device=DEVICE).int(), out)
    assert (out == 1024).all()


def test_every_size_of_tile_gives_the_same(case, monkeypatch):
    x, up = draw(TOKENS, DIM), draw(4, 2 * WIDTH, DIM)
    found = []
    for rows, columns, depth in ((16, 16, 32), (32, 16, 64), (64, 64, 16)):
        blocks = replace(sizes.of_rows(x, case.rows, 4), rows=rows, columns=columns, depth=depth)
        tiles = schedule(case.counts, case.rows, rows)
        hidden = poison(case.rows, WIDTH)
        first(x, case.token, up, None, tiles, blocks, "gelu", hidden, None)
        found.append(hidden[: case.used])
    # sums of 40 terms in other orders
    assert distance(found[1], found[0].double()) < 2 * limit(torch.float32)
    assert distance(found[2], found[0].double()) < 2 * limit(torch.float32)
