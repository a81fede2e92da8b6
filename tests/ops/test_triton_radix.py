"""Radix selection in long rows, against its slow twin: the same marks, bit by bit.

Blocks are made small here, so that short rows take several of them.
"""

import pytest
import torch
from torch import Tensor

from tests.ops.triton_library import DEVICE  # isort: skip - before any kernel is defined

from moefold.ops.select import top
from moefold.ops.triton import radix, select
from moefold.routers.choice import TopPairs, TopTokens
from tests.ops.triton_interpreter import kernels_everywhere, unwritten_memory_is_poison

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

INF = float("inf")
BLOCK = 64


@pytest.fixture(autouse=True)
def _small_and_poisoned(monkeypatch):
    monkeypatch.setattr(select, "SHORT", 0)  # every row is long
    monkeypatch.setattr(radix, "_BLOCK", BLOCK)
    monkeypatch.setattr(radix, "_READ", 2)
    with unwritten_memory_is_poison():
        yield


def marks(scores: Tensor, count: int | Tensor, dim: int, valid: Tensor | None = None) -> Tensor:
    """`top` by the kernel."""
    if isinstance(count, Tensor):
        count = count.to(DEVICE)
    with kernels_everywhere():
        valid = None if valid is None else valid.to(DEVICE)
        return top(scores.to(DEVICE), count, dim, valid).cpu()


def assert_same_marks(scores, count, dim, valid=None):
    assert torch.equal(marks(scores, count, dim, valid), top(scores, count, dim, valid))


def test_the_count_th_of_a_row_by_hand():
    # 150 scores 0 .. 149 in three blocks; the 40 largest are 110 .. 149.
    scores = torch.randperm(150).float().unsqueeze(0)
    assert torch.equal(marks(scores, 40, 1), scores >= 110)


def test_the_lowest_indices_of_equals_over_many_blocks():
    # Everything is equal: of five blocks the first 200 scores, so three and a piece of a fourth.
    # There is a second row: none counts the equals of another.
    marked = marks(torch.full((2, 300), 0.5), torch.tensor([200, 7]), 1)
    assert marked[0].nonzero().flatten().tolist() == list(range(200))
    assert marked[1].nonzero().flatten().tolist() == list(range(7))


@pytest.mark.parametrize("byte", range(4))
def test_scores_that_differ_in_one_byte_only(byte):
    # One pass alone has to tell them apart. Positive and negative: the order of bits turns around.
    places = torch.randperm(256)[:100].int()
    bits = 0x3F804020 & ~(0xFF << (8 * byte)) | (places << (8 * byte))
    if byte == 3:
        bits = (places % 0x7F) << 24  # neither NaN nor infinite
    positive = bits.view(torch.float32)
    scores = torch.stack([positive, -positive])
    assert_same_marks(scores, 37, 1)


def test_both_zeros_infinities_and_tiny_numbers():
    values = torch.tensor([0.0, -0.0, -INF, INF, 1e-45, -1e-45, 1.0])
    scores = values[torch.randint(len(values), (3, 70))]
    valid = torch.rand(3, 70) < 0.5
    valid[2] = False  # a group without members
    counts = torch.tensor([100, 20, 70])
    for count, mask in ((30, None), (counts, valid), (500, valid)):
        assert_same_marks(scores, count, 1, mask)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_rows_that_end_at_the_edge_of_a_block(size):
    scores = torch.randn(2, size)
    for count in (1, size):
        assert_same_marks(scores, count, 1)


def test_every_count_of_a_row():
    # The same nine scores of three values ten times, to take 0 of them, then 1, up to all 9.
    scores = torch.randint(3, (1, 9)).float().expand(10, 9)
    assert_same_marks(scores, torch.arange(10), 1)


def test_twice_the_same():
    scores, counts = torch.randint(3, (2, 150)).float(), torch.tensor([33, 90])
    assert torch.equal(marks(scores, counts, 1), marks(scores, counts, 1))


def test_half_precision_is_compared_as_float32():
    assert_same_marks(torch.randn(1, 100).bfloat16(), 30, 1)


# As routers use it


def test_the_budget_of_a_group():
    # USMoE's unified competition: a budget of pairs for each real token of a group.
    scores = torch.rand(2, 30, 6)
    valid = torch.rand(2, 30) < 0.6
    choice = TopPairs(budget=1.5)
    for real in (None, valid):
        expected = choice(scores, real, True)
        with kernels_everywhere():
            found = choice(scores.to(DEVICE), None if real is None else real.to(DEVICE), True)
        assert torch.equal(found.chosen.cpu(), expected.chosen)


def test_the_tokens_of_experts():
    # Expert choice: rows of the kernel are columns of the scores, and counts those of a group.
    scores = torch.rand(2, 70, 3)
    valid = torch.rand(2, 70) < 0.6
    choice = TopTokens()
    expected = choice(scores, valid, True)
    with kernels_everywhere():
        found = choice(scores.to(DEVICE), valid.to(DEVICE), True)
    assert torch.equal(found.chosen.cpu(), expected.chosen)


def test_the_operator_declares_what_it_does():
    scores = torch.randn(2, 9, device=DEVICE)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(radix.mark_long, (scores, None, None, 2, 1), test_utils=tests)
