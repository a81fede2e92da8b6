"""Compiled products: what torch's products give, at every edge of a tile.

Shapes: `[rows, depth] @ [depth, columns]`, or stacks by expert.
"""

import ctypes
import itertools
import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moefold.ops.cpu import products
from tests.ops.compiled_here import instruction_set, needs_compiled_code, with_pairs

__all__ = ["instruction_set"]
pytestmark = [needs_compiled_code, pytest.mark.usefixtures("instruction_set")]

# Around 3, 6, 8, 24 and 96 rows, 4, 16 and 32 columns, 8 and 16 steps, 256 and 512 steps of a sum,
# 768 of a product.
ROWS = (1, 2, 3, 4, 5, 6, 7, 9, 24, 25, 64, 95, 97, 300)
COLUMNS = (1, 3, 15, 16, 33, 64)
DEPTHS = (1, 8, 16, 17, 769)


@pytest.fixture
def room(instruction_set) -> Iterator[Tensor]:
    made = products.make_room()
    assert made is not None
    # None of it may reach a result, and nobody may write behind it.
    longer = torch.full((made.shape[0] + 64,), torch.nan)
    longer[made.shape[0] :] = 7.0
    yield longer[: made.shape[0]]
    assert (longer[made.shape[0] :] == 7.0).all()


def assert_near(got: Tensor, left: Tensor, right: Tensor, plus: Tensor | float = 0.0) -> None:
    """Equal to `left @ right + plus`, but for rounding.

    A sum of n products is off by at most n units in the last place of the sum of their absolute
    values (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); what is added or
    multiplied after that takes 3 more.
    """
    left, right = left.double(), right.double()
    exact = left @ right + plus
    size = left.abs() @ right.abs() + torch.as_tensor(plus).abs()
    bound = (left.shape[-1] + 3) * 2.0**-24 * size
    assert ((got - exact).abs() <= bound).all()


def turned_and_not(*shape: int) -> list[Tensor]:
    *experts, depth, columns = shape
    return [torch.randn(shape), torch.randn(*experts, columns, depth).mT]


@pytest.mark.parametrize("rows", ROWS)
def test_product(rows, room):
    for columns, depth in itertools.product(COLUMNS, DEPTHS):
        left = torch.randn(rows, depth)
        for right in turned_and_not(depth, columns):
            out = torch.full((rows, columns), torch.nan)
            products.product(left, right, out, room)
            assert_near(out, left, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_product_with_two_bytes_a_number(rows, dtype, room):
    for columns, depth in itertools.product(COLUMNS, DEPTHS):
        left = torch.randn(rows, depth)
        for right in turned_and_not(depth, columns):
            right = right.to(dtype)
            out = torch.full((rows, columns), torch.nan)
            products.product(left, right, out, room)
            assert_near(out, left, right)


def few_bits(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def assert_rounded(got: Tensor, left: Tensor, right: Tensor) -> None:
    """Equal to `left @ right`, rounded once to bfloat16: by 2^-8 of it at most."""
    assert got.dtype == torch.bfloat16
    left, right = left.double(), right.double()
    exact, size = left @ right, left.abs() @ right.abs()
    bound = (left.shape[-1] + 3) * 2.0**-24 * size
    assert ((got.double() - exact).abs() <= bound * (1 + 2**-8) + 2**-8 * exact.abs()).all()


# Up to one part of the depth, and more than one.
@with_pairs
@pytest.mark.parametrize("depth", [2, 16, 34, 1538, 3078])
def test_product_in_pairs(depth, room):
    for rows, columns in itertools.product(ROWS, COLUMNS):
        left, index = few_bits(rows, depth), torch.randperm(rows)
        for right in (few_bits(depth, columns), few_bits(columns, depth).mT):
            out = torch.full((rows, columns), torch.nan)
            products.product(left, right, out, room)
            assert_near(out, left, right)
            out, bias, scale = torch.rand(rows, columns), torch.rand(columns), torch.rand(rows)
            plus = (out + bias * scale[:, None]).double()
            products.product(
                left, right, out, room, bias=bias, scale=scale, add=True, left_index=index
            )
            assert_near(out, left[index].double() * scale[:, None].double(), right, plus)
            low = torch.full((rows, columns + 5), torch.nan, dtype=torch.bfloat16)
            products.product(left, right, low[:, :columns], room)
            assert_rounded(low[:, :columns], left, right)
            assert low[:, columns:].isnan().all()


@with_pairs
@pytest.mark.parametrize("depth", [2, 16, 34, 1538])
def test_a_matrix_of_float32_is_rounded_as_it_is_read(depth, room):
    for rows, columns in itertools.product(ROWS, COLUMNS):
        left = few_bits(rows, depth)
        for right in turned_and_not(depth, columns):
            # Memory with gaps: what lies between is nobody's.
            wide = torch.full((right.shape[0], right.shape[1] + 4), torch.nan)
            wide = wide if right.stride(1) == 1 else torch.full((columns, depth + 4), torch.nan).mT
            spread = wide[:depth, :columns].copy_(right)
            out, want = torch.full((2, rows, columns), torch.nan).unbind()
            products.product(left, spread, out, room)
            products.product(left, wide.bfloat16()[:depth, :columns], want, room)
            assert torch.equal(out, want)


@with_pairs
def test_stacks_in_pairs(room):
    for right in (few_bits(3, 20, 18), few_bits(3, 18, 20).mT):
        left, out = few_bits(3, 7, 20), torch.full((3, 7, 18), torch.nan)
        products.product(left, right, out, room)
        assert_near(out, left, right)


# Odd, even, up to what is rounded at once, and beyond.
@with_pairs
@pytest.mark.parametrize("rows", [1, 2, 5, 64, 255, 1024, 1500, 2051])
def test_sums_in_pairs(rows, room):
    for lefts, rights in itertools.product((1, 6, 8, 9, 97), (1, 16, 33, 530)):
        left, right = few_bits(rows, lefts), few_bits(50, rights + 3)[:, :rights]
        index = torch.randint(50, (rows,))
        out = torch.full((lefts, rights), torch.nan)
        products.sums(left, right, out, room, right_index=index)
        assert_near(out, left.T, right[index])
        if rows <= 1024:
            low = torch.full((lefts, rights), torch.nan, dtype=torch.bfloat16)
            products.sums(left, right, low, room, right_index=index)
            assert_rounded(low, left.T, right[index])


@pytest.mark.parametrize("columns", COLUMNS)
def test_product_with_bias_and_scale_added(columns, room):
    for rows, depth in itertools.product((7, 97), (17, 769)):
        left, bias, scale = torch.randn(rows, depth), torch.randn(columns), torch.rand(rows)
        for right in turned_and_not(depth, columns):
            out = torch.randn(rows, columns)
            plus = (out + bias * scale[:, None]).double()
            products.product(left, right, out, room, bias=bias, scale=scale, add=True)
            assert_near(out, left * scale[:, None].double(), right, plus)


def test_product_of_rows_elsewhere_added_to_rows_elsewhere(room):
    # The same token several times, in and out, and rows that are wider than what is read of them.
    tokens, around = torch.randn(50, 40)[:, :33], torch.randn(20, 48)
    out, beyond = around[:, :17], around[:, 17:].clone()
    left_index, out_index = torch.randint(50, (130,)), torch.randint(20, (130,))
    right, before = torch.randn(33, 17), out.clone()
    products.product(tokens, right, out, room, add=True, left_index=left_index, out_index=out_index)
    sums = torch.zeros(20, 130).index_put_((out_index, torch.arange(130)), torch.ones(()))
    assert_near(out, (sums @ tokens[left_index]), right, before.double())
    assert torch.equal(around[:, 17:], beyond)


def test_stacks_of_experts(room):
    for right in turned_and_not(3, 20, 18):
        left, biases, scale = torch.randn(3, 7, 20), torch.randn(3, 40)[:, 5:23], torch.rand(21)
        out = torch.full((3, 7, 18), torch.nan)
        products.product(left, right, out, room, bias=biases, scale=scale)
        scale = scale.view(3, 7, 1).double()
        assert_near(out, left * scale, right, biases[:, None] * scale)
        products.product(left, right, out, room, bias=biases[0])  # one for all
        assert_near(out, left, right, biases[0].double())
        tokens, index = torch.randn(9, 20), torch.randint(9, (21,))
        products.product(tokens, right, out, room, left_index=index)
        assert_near(out, tokens[index].view(3, 7, 20), right)
        made = torch.full((3, 20, 18), torch.nan)
        products.sums(tokens, out, made, room, left_index=index)
        assert_near(made, tokens[index].view(3, 7, 20).mT, out)


@pytest.mark.parametrize("rows", [1, 5, 255, 257, 600, 1030])
def test_sums(rows, room):
    for lefts, rights in itertools.product((1, 6, 7, 97), (1, 16, 33, 530)):
        left, right = torch.randn(rows, lefts), torch.randn(rows, rights)
        out = torch.full((lefts, rights), torch.nan)
        products.sums(left, right, out, room)
        assert_near(out, left.T, right)


def test_sums_of_rows_elsewhere(room):
    for rows in (30, 300):
        left, right = torch.randn(50, 13), torch.randn(40, 35)[:, :34]
        of_left, of_right = torch.randint(50, (rows,)), torch.randint(40, (rows,))
        out = torch.full((13, 34), torch.nan)
        products.sums(left, right, out, room, left_index=of_left, right_index=of_right)
        assert_near(out, left[of_left].T, right[of_right])


def test_a_row_does_not_depend_on_the_others(room):
    left, right, out = torch.randn(100, 50), torch.randn(50, 40), torch.empty(100, 40)
    products.product(left, right, out, room)
    for some in (slice(3, 9), slice(95, 100)):
        alone = torch.empty(left[some].shape[0], 40)
        products.product(left[some], right, alone, room)
        assert torch.equal(alone, out[some])
    again = torch.empty_like(out)
    products.product(left, right, again, room)
    assert torch.equal(again, out)


def test_a_few_rows_do_not_depend_on_each_other(room):
    left, right = torch.randn(3, 50), torch.randn(7, 50).T
    out, swapped = torch.empty(3, 7), torch.empty(3, 7)
    products.product(left, right, out, room)
    products.product(left.flip(0), right, swapped, room)
    assert torch.equal(swapped.flip(0), out)


def at_the_end_of_memory(tensor: Tensor) -> Tensor:
    """A copy whose last number is the last one that the process may read."""
    of_one, page = tensor.element_size(), mmap.PAGESIZE
    size = tensor.numel() * of_one
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    whole = torch.frombuffer(memory, dtype=tensor.dtype)
    code = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(whole.data_ptr() + pages)
    assert code.mprotect(guard, ctypes.c_size_t(page), 0) == 0
    copy = whole[(pages - size) // of_one : pages // of_one].view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 97])
def test_nobody_reads_beyond_a_factor(rows, room):
    for columns, depth in itertools.product((1, 5, 19), (3, 13, 17)):
        left, right = torch.randn(rows, depth), torch.randn(columns, depth)
        out = torch.empty(rows, columns)
        products.product(at_the_end_of_memory(left), at_the_end_of_memory(right).T, out, room)
        assert_near(out, left, right.T)
        products.product(left, at_the_end_of_memory(right.T.contiguous()), out, room)
        assert_near(out, left, right.T)
        made, other = torch.empty(depth, columns), torch.randn(rows, columns)
        products.sums(at_the_end_of_memory(left), at_the_end_of_memory(other), made, room)
        assert_near(made, left.T, other)


@with_pairs
@pytest.mark.parametrize("rows", [1, 3, 7, 30, 97])
def test_nobody_reads_beyond_a_factor_of_pairs(rows, room):
    for columns, depth in itertools.product((1, 5, 19, 40), (2, 14, 18)):
        left, right = few_bits(rows, depth), few_bits(columns, depth)
        for factor in (right, right.float()):
            out = torch.empty(rows, columns)
            products.product(at_the_end_of_memory(left), at_the_end_of_memory(factor).T, out, room)
            assert_near(out, left, right.T)
            products.product(left, at_the_end_of_memory(factor.T.contiguous()), out, room)
            assert_near(out, left, right.T)
        made, other = torch.empty(depth, columns), few_bits(rows, columns)
        products.sums(at_the_end_of_memory(left), at_the_end_of_memory(other), made, room)
        assert_near(made, left.T, other)


def test_gaps_between_rows_are_not_read(room):
    for rows, depth in itertools.product((2, 7), (5, 13)):
        left = torch.full((rows, depth + 9), torch.nan)[:, :depth].copy_(torch.randn(rows, depth))
        right = torch.full((6, depth + 9), torch.nan)[:, :depth].copy_(torch.randn(6, depth))
        out = torch.empty(rows, 6)
        products.product(left, right.T, out, room)
        assert_near(out, left, right.T)
