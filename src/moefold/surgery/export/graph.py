"""An upcycled encoder as a graph that runs without moefold: a program of torch.export, or ONNX.

While the graph is made every mixture is a `DenseMixture`, which has fixed shapes and loses no
expert; the model is put back as it was. Any batch size and, for token ids, any length go through.

Shapes: integer inputs are `batch tokens`, others `batch ...` with all but the batch fixed.
"""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from moefold.modes import evaluating
from moefold.moe import MoE
from moefold.routers import SparseRouter
from moefold.routers.score import SparseTransport
from moefold.surgery.export.dense import DenseMixture, reasons_against
from moefold.surgery.export.reasons import Reason, refusal
from moefold.surgery.hosts.base import Form
from moefold.surgery.hosts.changes import Changes
from moefold.surgery.hosts.layer import MIXTURE, is_moe_layer
from moefold.surgery.inputs import made_up_inputs

PROGRAM = "model.pt2"
ONNX = "model.onnx"

_NEEDED = ("onnx", "onnxscript", "onnxruntime")


@final
class Graph(nn.Module):
    """A model as a function of named tensors to named tensors."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        # torch.export reads the names of a module's inputs off the signature of its forward.
        self.forward = _with_parameters(self._run, names)

    def _run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a SentenceTransformer the embedding comes back, of others every tensor."""
        if _is_sentence_transformer(self.model):
            return {"sentence_embedding": self.model(inputs)["sentence_embedding"]}
        made = self.model(**inputs)
        if isinstance(made, Tensor):
            return {"output": made}
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _with_parameters(
    function: Callable[[dict[str, Tensor]], dict[str, Tensor]], names: Iterable[str]
) -> Callable[..., dict[str, Tensor]]:
    def forward(**inputs: Tensor) -> dict[str, Tensor]:
        return function(inputs)

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # pyright: ignore
    return forward


def reasons_against_graph(
    model: nn.Module, inputs: Mapping[str, Tensor] | None, format: str
) -> list[Reason]:
    """Why there is no graph of the model; empty if there is.

    Args:
        model: an upcycled model.
        inputs: an example; None if there is none.
        format: `torch-export` or `onnx`.
    """
    reasons: list[Reason] = []
    layers = [layer for layer in model.modules() if is_moe_layer(layer)]
    decoding = [getattr(layer, MIXTURE).site for layer in layers if _decodes(layer)]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        reasons.append(Reason("it encodes and decodes", "export its encoder by itself"))
    elif decoding:
        sites = ", ".join(decoding)
        reasons.append(Reason(f"{sites}: decodes, with a cache that a graph does not have"))
    for layer in layers:
        moe = getattr(layer, MIXTURE)
        reasons += [Reason(f"{moe.site}: {why}") for why in reasons_against(moe)]
        if format == "onnx" and _transports(moe):
            why = "its router iterates a transport plan, which other runtimes round to another one"
            reasons.append(Reason(f"{moe.site}: {why}", "upcycle with router 'expert-choice'"))
    if inputs is None:
        what = f"a {type(model).__name__} does not say what it takes"
        reasons.append(Reason(what, "pass inputs, its keyword arguments by name"))
    missing = [name for name in _NEEDED if format == "onnx" and find_spec(name) is None]
    if missing:
        what = f"{', '.join(missing)} not installed"
        reasons.append(Reason(what, "pip install 'moefold[export]'"))
    return reasons


def example(model: nn.Module, inputs: Mapping[str, Any] | None) -> dict[str, Tensor] | None:
    """Named tensors to trace the model with: the ones given, or made-up ones."""
    if inputs is None and (hasattr(model, "config") or _is_sentence_transformer(model)):
        made = made_up_inputs(model)
        inputs = None if made is None else made[0]
    if inputs is None:
        return None
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def write_program(model: nn.Module, inputs: Mapping[str, Tensor], folder: Path) -> None:
    """Writes `model.pt2`, which `torch.export.load` opens."""
    made = program(model, inputs)
    with _quiet():
        torch.export.save(made, folder / PROGRAM)


def write_onnx(model: nn.Module, inputs: Mapping[str, Tensor], folder: Path) -> None:
    """Writes `model.onnx`, and `model.onnx.data` with its weights where they are large.

    Raises:
        ValueError: an operation of the model has no counterpart in ONNX.
    """
    made = program(model, inputs)
    try:
        with _quiet():
            onnx = torch.onnx.export(
                made,
                kwargs=dict(inputs),
                dynamo=True,
                input_names=list(inputs),
                output_names=list(made.call_spec.out_spec.context),  # pyright: ignore
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        first = str(error.__cause__ or error).strip().partition("\n")[0]
        why = f"torch.onnx cannot convert it ({first})"
        raise refusal(type(model).__name__, "onnx", [Reason(why)], ["torch-export"]) from error
    assert onnx is not None
    onnx.save(folder / ONNX)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch warns itself of: a tree it copies, and operations of torchvision."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _stable_sort(values: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    """`torch.sort(stable=True)` in ONNX, whose TopK breaks ties by the lower index."""
    op: Any = import_module("onnxscript").opset18
    size = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
    return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)


def program(model: nn.Module, inputs: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """The graph of the model in evaluation mode."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        name: {0: dynamic} if value.is_floating_point() else dict.fromkeys(range(2), dynamic)
        for name, value in inputs.items()
    }
    with _dense(model), torch.no_grad():
        return torch.export.export(
            Graph(model, inputs).eval(),
            (),
            kwargs=dict(inputs),
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


@contextmanager
def _dense(model: nn.Module) -> Iterator[None]:
    """Every mixture dense and the model in evaluation mode, as long as the context is open."""
    changes = Changes()
    with evaluating(model):
        try:
            for layer in list(model.modules()):
                if is_moe_layer(layer):
                    dense = DenseMixture(getattr(layer, MIXTURE)).eval()
                    changes.replace_children(layer, **{MIXTURE: dense})
            yield
        finally:
            changes.undo()


def _decodes(layer: nn.Module) -> bool:
    form: Form = layer._moefold_form  # pyright: ignore
    causal = form.causal(layer, None) if callable(form.causal) else form.causal
    return causal and form.cache is not None


def _transports(moe: MoE) -> bool:
    router = moe.router
    return isinstance(router, SparseRouter) and isinstance(router.recipe.score, SparseTransport)


def _is_sentence_transformer(model: nn.Module) -> bool:
    return any(kind.__name__ == "SentenceTransformer" for kind in type(model).__mro__)
