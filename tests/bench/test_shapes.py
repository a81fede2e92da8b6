"""Shapes: what follows from one, and which are refused."""

import pytest

from moefold.bench.layers import dense, ours
from moefold.bench.shapes import SHAPES, Shape, from_dict, shapes_of
from moefold.ops.flops import flop_counter
from tests.bench.common import TINY


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_the_dense_mlp_does_as_much_arithmetic(shape):
    import torch

    x = torch.randn(shape.sequences, shape.tokens // shape.sequences, shape.dim)
    with flop_counter() as of_dense:
        dense(shape)(x)
    assert of_dense.get_total_flops() == shape.flops
    # And the experts of the layer: its rows, each through one expert.
    layer = ours(shape, "reference")
    routing = layer.router(x, None)
    assert int(routing.rows_per_expert.sum()) == shape.rows
    with flop_counter() as of_experts:
        layer.experts(routing.dispatch(x), routing.rows_per_expert, backend="reference")
    inside = of_experts.get_total_flops()
    mixing = 2 * shape.rows * shape.tokens // shape.sequences * shape.dim  # of soft rows
    assert inside in (shape.flops, shape.flops + mixing)


def test_the_table_is_what_the_issue_names():
    widths = {name: shape.active_width for name, shape in SHAPES.items()}
    assert widths["8x2"] == widths["64x8"] == 2048
    assert widths["vit-b"] == widths["soft"] == 3072
    assert [s.name for s in shapes_of("cpu")] == ["8x2", "64x8", "vit-b", "soft"]
    # SonicMoE's figure 14: finer experts, the same arithmetic.
    assert {widths[f"7b-{w}"] for w in (256, 512, 1024)} == {2048}
    assert (SHAPES["7b-256"].experts, SHAPES["7b-256"].k) == (128, 8)
    assert (SHAPES["7b-1024"].experts, SHAPES["7b-1024"].k) == (32, 2)
    assert (SHAPES["120b-2048"].width, SHAPES["120b-2048"].experts) == (2048, 64)


def test_a_shape_survives_json():
    for shape in SHAPES.values():
        assert from_dict(shape.to_dict()) == shape


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"tokens": 0}, "shape 'own': tokens=0 is not possible; it must be at least 1"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 gives no rows; it must be above 0"),
        ({"tokens": 10, "sequences": 4}, "10 tokens do not make 4 sequences of one length"),
        ({"k": 9}, "k=9 experts of a token, but there are 8; choose k up to that"),
    ],
)
def test_impossible_shapes_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        Shape(name="own", **wrong)
