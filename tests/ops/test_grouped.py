"""Grouped products: against a product per row, in value, gradient, and gradient of gradients."""

import pytest
import torch
from torch import Tensor

from moefold.ops import grouped
from moefold.ops.grouped import grouped_mm, overhang, padded
from tests.routers.common import untyped

# name: (rows per expert, rows). More rows than counted are spare.
LAYOUTS = {
    "uneven": ([7, 1, 12, 4, 9], 33),
    "empty experts": ([0, 20, 0, 13, 0], 33),
    "all rows to one": ([0, 0, 33, 0, 0], 33),
    "spare rows": ([5, 0, 9, 3, 2], 33),
    "only spare rows": ([0, 0, 0, 0, 0], 33),
    "no rows": ([0, 0, 0, 0, 0], 0),
    "more than a block of low precision": ([31, 32, 33, 65, 129], 290),
}
# Half a unit in the last place: how much rounding one result can be off by.
ROUNDING = {
    torch.float64: 2**-53,
    torch.float32: 2**-24,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-9,
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def _poison_inside_operators():
    # The fixture of this folder reaches torch.empty in Python, but not inside an operator.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(layout: str, width: int, out: int, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    counts, rows = LAYOUTS[layout]
    return (
        torch.randn(rows, width).to(dtype).requires_grad_(),
        torch.randn(len(counts), out, width).to(dtype).requires_grad_(),
        torch.tensor(counts),
    )


def by_row(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """The definition: every row times the matrix of its expert; spare rows times a matrix of 0."""
    expert = torch.arange(len(counts)).repeat_interleave(counts)
    spare = rows.shape[0] - len(expert)
    matrices = torch.cat([weights[expert], torch.zeros_like(weights[:1]).expand(spare, -1, -1)])
    return torch.einsum("roi,ri->ro", matrices, rows)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest error of a row as a part of its length; a row of zeros must be exact."""
    length, error = wanted.norm(dim=-1), (found.double() - wanted).norm(dim=-1)
    relative = torch.where(length > 0, error / length, torch.where(error > 0, float("inf"), 0.0))
    return relative.max().item() if relative.numel() else 0.0


def slope(of: Tensor) -> Tensor:
    assert of.grad is not None
    return of.grad


def test_a_product_worked_by_hand():
    # expert 0 doubles, expert 1 has no row, expert 2 swaps; row 3 is spare
    weights = torch.tensor([[[2.0, 0], [0, 2]], [[9, 9], [9, 9]], [[0, 1], [1, 0]]])
    rows = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    out = grouped_mm(rows, weights, torch.tensor([2, 0, 1]))
    assert out.tolist() == [[2, 4], [6, 8], [6, 5], [0, 0]]


@each_layout
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("width", "out"), [(15, 23), (64, 48)])
def test_values_and_gradients_are_those_of_a_product_per_row(layout, dtype, width, out):
    rows, weights, counts = draw(layout, width, out, dtype)
    grad = torch.randn(rows.shape[0], out).to(dtype)
    found = grouped_mm(rows, weights, counts)
    assert found.dtype == dtype
    found_grads = torch.autograd.grad(found, [rows, weights], grad)

    rows, weights = (t.detach().double().requires_grad_() for t in (rows, weights))
    wanted = by_row(rows, weights, counts)
    wanted_grads = torch.autograd.grad(wanted, [rows, weights], grad.double())

    # Low precision is summed in float32 and rounded once at the end: one rounding. float32 and
    # float64 round every partial sum: errors of n terms add up like sqrt(n), n at most 129, and we
    # allow each row three standard deviations.
    low = dtype in (torch.float16, torch.bfloat16)
    limit = ROUNDING[dtype] * (2 if low else 3 * 129**0.5)
    assert distance(found, wanted) < limit
    for one, other in zip(found_grads, wanted_grads, strict=True):
        assert one.dtype == dtype
        assert distance(one, other) < limit


def test_spare_rows_and_empty_experts_get_exact_zeros_even_from_nan():
    rows, weights, counts = draw("spare rows", 15, 23)
    with torch.no_grad():
        rows[19:] = float("nan")
    y = grouped_mm(rows, weights, counts)
    grad_rows, grad_weights = torch.autograd.grad(y, [rows, weights], torch.randn_like(y))
    assert (y[19:] == 0).all()
    assert (grad_rows[19:] == 0).all()
    assert (grad_weights[1] == 0).all()
    assert (grad_weights[[0, 2, 3, 4]].abs().amax((1, 2)) > 0).all()


# Without the last layout: finite differences of 290 rows take minutes, and float64 is not padded.
@pytest.mark.parametrize("layout", list(LAYOUTS)[:-1])
def test_first_and_second_derivatives(layout):
    rows, weights, counts = draw(layout, 3, 2)
    assert torch.autograd.gradcheck(lambda r, w: grouped_mm(r, w, counts), (rows, weights))
    assert torch.autograd.gradgradcheck(lambda r, w: grouped_mm(r, w, counts), (rows, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expanded_gradient(dtype):
    rows, weights, counts = draw("empty experts", 16, 24, dtype)
    grouped_mm(rows, weights, counts).sum().backward()
    # d sum / d row = column sums of the expert's matrix; d sum / d weight = sum of its rows
    expert = torch.arange(5).repeat_interleave(counts)
    assert distance(slope(rows), weights.double().sum(1)[expert]) < 2 * ROUNDING[torch.bfloat16]
    sums = torch.stack([part.double().sum(0) for part in rows.split(counts.tolist())])
    assert distance(slope(weights)[:, 0], sums) < 2 * ROUNDING[torch.bfloat16]
    assert torch.equal(slope(weights)[:, 0], slope(weights)[:, -1])


def test_any_strides():
    rows, weights, counts = draw("uneven", 15, 23)
    wanted = by_row(rows, weights, counts)
    turned_rows = rows.t().contiguous().t()
    turned_weights = weights.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not turned_rows.is_contiguous()
    assert not turned_weights.is_contiguous()
    assert distance(grouped_mm(turned_rows, turned_weights, counts), wanted) < 1e-14
    every_other = torch.zeros(66, 30, dtype=torch.float64)[::2, ::2].copy_(rows)
    assert distance(grouped_mm(every_other, weights, counts), wanted) < 1e-14


@pytest.mark.parametrize("frozen", ["rows", "weights"])
def test_what_needs_no_gradient_gets_none(frozen):
    rows, weights, counts = draw("uneven", 5, 4)
    wanted = torch.autograd.grad(grouped_mm(rows, weights, counts).square().sum(), [rows, weights])
    {"rows": rows, "weights": weights}[frozen].requires_grad_(False)
    grouped_mm(rows, weights, counts).square().sum().backward()
    if frozen == "rows":
        assert rows.grad is None
        assert torch.equal(slope(weights), wanted[1])
    else:
        assert weights.grad is None
        assert torch.equal(slope(rows), wanted[0])


def test_autocast_casts_as_a_linear_layer_does():
    rows, weights, counts = draw("uneven", 15, 23, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_mm(rows, weights, counts)
        wanted = torch.nn.functional.linear(rows[:7], weights[0])
        y.float().square().sum().backward()  # a backward pass inside of autocast
        double = grouped_mm(rows.double(), weights.double(), counts)
    assert y.dtype == wanted.dtype == torch.bfloat16
    # the same product of the same bfloat16 numbers, which another kernel may round elsewhere
    assert distance(y[:7], wanted.double()) < 2 * ROUNDING[torch.bfloat16]
    assert slope(rows).dtype == slope(weights).dtype == torch.float32
    assert double.dtype == torch.float64


@pytest.mark.compile  # it traces with symbolic sizes, which the typing hook takes for wrong types
def test_every_operator_is_registered_right():
    for dtype in (torch.float32, torch.bfloat16):
        rows, weights, counts = draw("spare rows", 8, 16, dtype)
        left = torch.randn(33, 4).to(dtype).requires_grad_()
        torch.library.opcheck(torch.ops.moefold.grouped_mm.default, (rows, weights, counts))
        torch.library.opcheck(torch.ops.moefold.grouped_outer.default, (left, rows, counts))


def test_low_precision_meets_few_shapes_and_few_zero_rows():
    low = torch.empty(0, dtype=torch.bfloat16)
    sizes = {count: padded(count, low) for count in range(1, 4097)}
    assert len(set(sizes.values())) <= 64 + 2 * 32  # up to 1024 by 16, then 32 for each doubling
    assert all(count <= size < count + max(16, count / 32 + 1) for count, size in sizes.items())
    assert all(size - count <= overhang(low.new_empty(count, 0)) for count, size in sizes.items())
    assert all(padded(size, low) == size for size in sizes.values())
    assert padded(7, torch.empty(0)) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_cuda_shares_the_arithmetic_of_the_cpu(dtype, monkeypatch):
    # What runs on CUDA, run here: torch's grouped product also has a CPU kernel. Where that of CUDA
    # leaves memory as it was, we put NaN: spare rows, and matrices of experts without a row.
    kernel, calls = torch.nn.functional.grouped_mm, []

    def careless(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        out = kernel(a, b, offs=offs)
        calls.append(out.shape)
        if out.ndim == 2:
            out[offs[-1] :] = float("nan")
        else:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", careless)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for layout in LAYOUTS:
        for width in (15, 16):  # 15: rows are not whole 16 bytes, so the loop takes over
            rows, weights, counts = draw(layout, width, 24, dtype)
            rows, weights = rows.detach(), weights.detach()
            left = torch.randn(rows.shape[0], 8).to(dtype)
            for found, wanted in (
                (grouped._mm_on_cuda(rows, weights, counts), grouped._mm(rows, weights, counts)),
                (grouped._outer_on_cuda(left, rows, counts), grouped._outer(left, rows, counts)),
            ):
                # one rounding each, and sums in another order
                assert distance(found, wanted.double()) < 2 * ROUNDING[torch.bfloat16]
                assert torch.equal(found == 0, wanted == 0)
    # one product and one sum per layout with rows, and only where the kernel takes them
    assert len(calls) == (2 * (len(LAYOUTS) - 1) if dtype == torch.bfloat16 else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_layout
def test_cuda_equals_the_cpu(layout, dtype):
    rows, weights, counts = draw(layout, 64, 48, dtype)
    grad = torch.randn(rows.shape[0], 48).to(dtype)
    wanted = grouped_mm(rows, weights, counts)
    wanted_grads = torch.autograd.grad(wanted, [rows, weights], grad)
    rows, weights = (t.detach().cuda().requires_grad_() for t in (rows, weights))
    found = grouped_mm(rows, weights, counts.cuda())
    found_grads = torch.autograd.grad(found, [rows, weights], grad.cuda())
    # one rounding of bfloat16 each; float32 may be multiplied as TF32, which has 11 bits
    limit = 2 * ROUNDING[torch.bfloat16]
    for one, other in zip((found, *found_grads), (wanted, *wanted_grads), strict=True):
        assert distance(one.cpu(), other.double()) < limit


def test_wrong_input_is_named():
    rows, weights, counts = torch.zeros(6, 4), torch.zeros(3, 5, 4), torch.tensor([1, 2, 3])
    with untyped(), pytest.raises(ValueError, match=r"4 wide, but weights take 5 .*\[3, 4, 5\]"):
        grouped_mm(rows, weights.mT, counts)
    with untyped(), pytest.raises(ValueError, match="2 counts, but there are weights of 3 experts"):
        grouped_mm(rows, weights, counts[:2])
    with pytest.raises(ValueError, match=r"float32, but weights torch\.bfloat16; cast one"):
        grouped_mm(rows, weights.bfloat16(), counts)
    with pytest.raises(ValueError, match="adds up to 7, but there are only 6 rows"):
        grouped_mm(rows, weights, counts + torch.tensor([1, 0, 0]))


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_into_one_graph_for_all_counts(dtype):
    torch.compiler.reset()
    compiled = torch.compile(lambda r, w, c: 2 * grouped_mm(r, w, c), fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for layout in ("uneven", "empty experts", "spare rows"):
        rows, weights, counts = draw(layout, 16, 24, dtype)
        grad = torch.randn(33, 24).to(dtype)
        found = compiled(rows, weights, counts)
        wanted = 2 * grouped_mm(rows, weights, counts)  # doubling rounds nothing
        assert torch.equal(found, wanted)
        grads = torch.autograd.grad(found, [rows, weights], grad)
        wanted_grads = torch.autograd.grad(wanted, [rows, weights], grad)
        assert all(map(torch.equal, grads, wanted_grads))
    # Counts are data: the same graph served all three.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
