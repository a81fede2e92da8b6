"""Grouped products: rows sorted by expert, every block of rows times the matrix of its expert.

    rows             [rows, in]            block of expert 0 | of expert 1 | of expert 3 | spare
    weights          [experts, out, in]
    rows_per_expert  [experts]             4                 | 3           (0) | 2       |
    result           [rows, out]           row r of expert e is `weights[e] @ rows[r]`

Two operators that are each other's derivatives: `moefold::grouped_mm` above, and
`moefold::grouped_outer`, the sum over a block of `left[r] outer right[r]`. Both are opaque to
torch.compile, which could neither trace a loop over counts that are data nor, for float32, torch's
own grouped product (its shape rule refuses what its CPU kernel computes).

Shapes: `rows in` times `experts out in` gives `rows out`; counts are `experts`.

Spare rows (past `rows_per_expert.sum()`) come back as zero and send no gradient; an expert without
a row gets a gradient of exactly zero.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

LOW_PRECISION = (torch.bfloat16, torch.float16)


def grouped_mm(
    rows: Float[Tensor, "rows in"],
    weights: Float[Tensor, "experts out in"],
    rows_per_expert: Int[Tensor, " experts"],
) -> Float[Tensor, "rows out"]:
    """Multiply the rows of expert e by `weights[e].T`.

    Differentiable any number of times; under autocast it casts as a linear layer does. On CUDA
    bfloat16 with rows of whole 16 bytes runs as one kernel and waits for nothing; other dtypes and
    widths run as a loop that reads the counts once.

    Args:
        rows: sorted by expert; rows past `rows_per_expert.sum()` give zeros.
        weights: one matrix per expert, in the layout of `torch.nn.Linear`; any strides.
        rows_per_expert: how many rows each expert has; 0 is fine.

    Raises:
        ValueError: widths, numbers of experts or dtypes do not agree; on the CPU also if there are
            fewer rows than `rows_per_expert` says.
    """
    rows, weights = as_linear_casts(rows, weights)
    _check(rows, weights, rows_per_expert)
    return _mm(rows, weights, rows_per_expert)


def as_linear_casts(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the dtype of the autocast in force, as it does for a linear layer; float64 stays."""
    return tuple(t.to(linear_dtype(t)) for t in tensors)


def linear_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would take a tensor: that of the autocast in force."""
    kind = tensor.device.type
    if kind == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def padded(count: int, like: Tensor) -> int:
    """Return how many rows a block of `count` rows is computed with.

    On the CPU oneDNN compiles a low-precision product anew for every shape, which takes about as
    long as a product of 500 rows by 512 by 512, and keeps the 1024 latest. Counts differ in every
    step, so we round up to multiples of 16 rows, or a 64th of the next power of two. Blocks then
    meet a few dozen shapes, for one or two percent of zero rows.
    """
    if like.device.type != "cpu" or like.dtype not in LOW_PRECISION:
        return count
    step = max(16, (1 << (count - 1).bit_length()) // 64)
    return -(-count // step) * step


def overhang(rows: Tensor) -> int:
    """Return the most rows by which a padded block can end after the last of these rows."""
    return 0 if padded(1, rows) == 1 else 15 + rows.shape[0] // 32


def stretched(block: Tensor, size: int) -> Tensor:
    """Return the block with zero rows added up to `size`; itself if none are needed."""
    count = block.shape[0]
    if count == size:
        return block
    longer = block.new_empty(size, block.shape[1])
    longer[:count].copy_(block)
    longer[count:].zero_()
    return longer


def blocks(rows_per_expert: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first row, row after the last) of every expert that has a row.

    Raises:
        ValueError: if the blocks need more rows than there are.
    """
    counts = rows_per_expert.tolist()
    if sum(counts) > rows:
        raise ValueError(too_few_rows(sum(counts), rows))
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, start, start + count
        start += count


def too_few_rows(wanted: int, rows: int) -> str:
    """What is wrong with counts that need more rows than there are."""
    return (
        f"rows_per_expert adds up to {wanted}, but there are only {rows} rows; "
        f"pass the rows and the counts of one routing"
    )


def _check(rows: Tensor, weights: Tensor, rows_per_expert: Tensor) -> None:
    if rows.shape[1] != weights.shape[2]:
        raise ValueError(
            f"rows are {rows.shape[1]} wide, but weights take {weights.shape[2]} "
            f"(weights are [experts, out, in] = {list(weights.shape)}); transpose one of them?"
        )
    if rows_per_expert.shape[0] != weights.shape[0]:
        raise ValueError(
            f"rows_per_expert has {rows_per_expert.shape[0]} counts, but there are weights of "
            f"{weights.shape[0]} experts; pass one count per expert, 0 where it has no row"
        )
    if rows.dtype != weights.dtype:
        raise ValueError(
            f"rows are {rows.dtype}, but weights {weights.dtype}; cast one of them, "
            f"or run under torch.autocast"
        )


@torch.library.custom_op("moefold::grouped_mm", mutates_args=())
def _mm(rows: Tensor, weights: Tensor, rows_per_expert: Tensor) -> Tensor:
    # Every product is written where it belongs, with out=: nothing is concatenated, and autocast,
    # which leaves out= alone, cannot change the dtype when a backward pass runs inside of it.
    # A padded block reaches into the rows of the next expert, which writes them afterwards.
    count = rows.shape[0]
    out = rows.new_empty(count + overhang(rows), weights.shape[1])
    stop = 0
    for expert, start, stop in blocks(rows_per_expert, count):
        block = stretched(rows[start:stop], padded(stop - start, rows))
        torch.mm(block, weights[expert].t(), out=out[start : start + block.shape[0]])
    out[stop:].zero_()
    return out[:count]


@torch.library.custom_op("moefold::grouped_outer", mutates_args=())
def _outer(left: Tensor, right: Tensor, rows_per_expert: Tensor) -> Tensor:
    """Sum `left[r] outer right[r]` over the rows of each expert: [experts, left, right]."""
    out = left.new_empty(rows_per_expert.shape[0], left.shape[1], right.shape[1])
    before = 0
    for expert, start, stop in blocks(rows_per_expert, left.shape[0]):
        out[before:expert].zero_()
        size = padded(stop - start, left)
        tall = stretched(left[start:stop], size).t()
        torch.mm(tall, stretched(right[start:stop], size), out=out[expert])
        before = expert + 1
    out[before:].zero_()
    return out


@_mm.register_kernel("cuda")
def _mm_on_cuda(rows: Tensor, weights: Tensor, rows_per_expert: Tensor) -> Tensor:
    matrices = weights.transpose(1, 2)
    if not _kernel_takes(rows, matrices):
        return _mm._init_fn(rows, weights, rows_per_expert)
    ends = rows_per_expert.cumsum(0, dtype=torch.int32)
    out = functional.grouped_mm(rows, matrices, offs=ends)
    # The kernel leaves spare rows unwritten. How many there are is known to the device alone.
    spare = torch.arange(rows.shape[0], device=rows.device) >= ends[-1]
    return out.masked_fill_(spare.unsqueeze(1), 0.0)


@_outer.register_kernel("cuda")
def _outer_on_cuda(left: Tensor, right: Tensor, rows_per_expert: Tensor) -> Tensor:
    left = left.contiguous()  # an expanded gradient has strides of 0
    if not _kernel_takes(left.t(), right):
        return _outer._init_fn(left, right, rows_per_expert)
    ends = rows_per_expert.cumsum(0, dtype=torch.int32)
    out = functional.grouped_mm(left.t(), right, offs=ends)
    return out.masked_fill_((rows_per_expert == 0).reshape(-1, 1, 1), 0.0)


def _kernel_takes(*tensors: Tensor) -> bool:
    """Whether torch's grouped kernel runs on these: bfloat16, rows of whole 16 bytes."""

    def fits(t: Tensor) -> bool:
        inner, outer = sorted(t.stride()[-2:])
        return t.numel() > 0 and inner == 1 and outer % 8 == 0 and t.data_ptr() % 16 == 0

    first = tensors[0]
    modern = torch.cuda.get_device_capability(first.device) >= (8, 0)
    return modern and first.dtype == torch.bfloat16 and all(map(fits, tensors))


@_mm.register_fake
def _mm_shape(rows: Tensor, weights: Tensor, rows_per_expert: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[1])


@_outer.register_fake
def _outer_shape(left: Tensor, right: Tensor, rows_per_expert: Tensor) -> Tensor:
    return left.new_empty(rows_per_expert.shape[0], left.shape[1], right.shape[1])


def _keep_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weights, counts = ctx.saved_tensors
    for_rows, for_weights, _ = ctx.needs_input_grad
    return (
        _mm(grad, weights.transpose(1, 2), counts) if for_rows else None,
        _outer(grad, rows, counts) if for_weights else None,
        None,
    )


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    left, right, counts = ctx.saved_tensors
    for_left, for_right, _ = ctx.needs_input_grad
    return (
        _mm(right, grad, counts) if for_left else None,
        _mm(left, grad.transpose(1, 2), counts) if for_right else None,
        None,
    )


_mm.register_autograd(_mm_backward, setup_context=_keep_inputs)
_outer.register_autograd(_outer_backward, setup_context=_keep_inputs)
