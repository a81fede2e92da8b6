"""Operations are counted as they run, grouped products and attention on the CPU too."""

import pytest
import torch

from moefold.ops.flops import flop_counter


def test_a_grouped_product_costs_each_row_one_group():
    # 12 rows of width 16, in groups of 5, 0 and 7, with 16 x 8 weights for each group.
    rows = torch.randn(12, 16, requires_grad=True)
    weights = torch.randn(3, 16, 8, requires_grad=True)
    ends = torch.tensor([5, 5, 12], dtype=torch.int32)
    with flop_counter() as counter:
        made = torch.nn.functional.grouped_mm(rows, weights, offs=ends)
    assert counter.get_total_flops() == 2 * 12 * 16 * 8
    # Backward there are two products of the same size: for the rows and for the weights.
    with flop_counter() as counter:
        made.backward(torch.randn(12, 8))
    assert counter.get_total_flops() == 2 * (2 * 12 * 16 * 8)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_the_cpu_counts_whole(causal):
    q, k, v = torch.randn(3, 2, 4, 10, 8).unbind()  # 2 sequences, 4 heads, 10 tokens, width 8
    with flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # Scores and sums, each 10 x 10 x 8 products in each of the heads.
    assert counter.get_total_flops() == 2 * (2 * 2 * 4 * 10 * 10 * 8)
