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
from tests.ops.compiled_here import needs_compiled_code

pytestmark = needs_compiled_code

# Around 3, 6 and 96 rows, 4 and 16 columns, 8 and 16 steps, 256 steps of a sum, 768 of a product.
ROWS = (1, 2, 3, 4, 5, 6, 7, 64, 95, 97, 300)
COLUMNS = (1, 3, 15, 16, 33, 64)
DEPTHS = (1, 8, 16, 17, 769)


@pytest.fixture
def room() -> Iterator[Tensor]:
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


@pytest.mark.parametrize("rows", [1, 5, 255, 257, 600])
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
    size, page = tensor.numel() * 4, mmap.PAGESIZE
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    whole = torch.frombuffer(memory, dtype=torch.float32)
    code = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(whole.data_ptr() + pages)
    assert code.mprotect(guard, ctypes.c_size_t(page), 0) == 0
    copy = whole[(pages - size) // 4 : pages // 4].view(tensor.shape)
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


def test_gaps_between_rows_are_not_read(room):
    for rows, depth in itertools.product((2, 7), (5, 13)):
        left = torch.full((rows, depth + 9), torch.nan)[:, :depth].copy_(torch.randn(rows, depth))
        right = torch.full((6, depth + 9), torch.nan)[:, :depth].copy_(torch.randn(6, depth))
        out = torch.empty(rows, 6)
        products.product(left, right.T, out, room)
        assert_near(out, left, right.T)
