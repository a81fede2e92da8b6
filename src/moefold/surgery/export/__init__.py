"""Export: an upcycled model in a form that runs where moefold is not.

    moefold.export(model, folder)                          a native class of transformers
    moefold.export(model, folder, format="onnx")           a graph of an encoder

What cannot be exported exactly is refused, with all the reasons and the nearest thing that can.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from moefold.routers.base import check_one_of
from moefold.surgery.export import graph
from moefold.surgery.export.reasons import Reason, refusal
from moefold.surgery.hosts import AbstractHost, find_host
from moefold.surgery.saved import MANIFEST, refuse_foreign_folder, written_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moefold.surgery.export.decoder import Decoder

FORMATS = {
    "native": "the first of the next five that can hold the decoder",
    "mixtral": "transformers' Mixtral: Llama, Mistral",
    "qwen2-moe": "transformers' Qwen2-MoE: Qwen 2, Llama, Mistral",
    "qwen3-moe": "transformers' Qwen3-MoE: Qwen 3",
    "olmoe": "transformers' OLMoE: no dense decoder that there is",
    "flex-olmo": "transformers' FlexOlmo: OLMo 2",
    "torch-export": "a program of torch.export: encoders",
    "onnx": "a graph for ONNX runtimes: encoders",
}
"""Every format, and what it is."""

_GRAPHS = ("torch-export", "onnx")


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    format: str = "native",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    inputs: Mapping[str, Any] | None = None,
) -> str:
    """Writes an upcycled model in a form that needs no moefold, atomically.

    The function of evaluation mode is written: noise, jitter and auxiliary losses stay behind, and
    so do the mixture's zeros in the place of padding, which a native class computes and nobody
    attends to.

    Args:
        model: an upcycled host, or a loaded one.
        folder: where; new or empty.
        format: one of `FORMATS`. Native classes are transformers' own; a graph, `model.pt2` or
            `model.onnx`, takes a batch of any size and token ids of any length, and computes every
            expert on every token (see `dense`).
        tokenizer: written beside it.
        inputs: of a graph, an example of the model's keyword arguments; made up if None.

    Returns:
        The format that was written: the one that `native` came to, or what was asked for.

    Raises:
        ValueError: an unknown format; the model is not upcycled, or cannot be exported exactly; the
            folder holds something.
    """
    check_one_of("format", format, tuple(FORMATS))
    folder = Path(folder).resolve()
    host = find_host(model)
    if host.section(model) is None:
        raise ValueError(
            f"{type(model).__name__} is not upcycled; call moefold.upcycle(model) first, or save "
            f"a dense model with its own save_pretrained"
        )
    refuse_full_folder(folder)
    chosen, write = _writer(model, host, format, inputs)
    with written_whole(folder) as new:
        write(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
    return chosen


def refuse_full_folder(folder: Path) -> None:
    """Raises if the folder holds anything: what an export may replace it cannot know.

    Raises:
        ValueError: it is not empty, is a file, or the current directory or one above it.
    """
    refuse_foreign_folder(folder)
    if (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} holds an upcycled model, which an export does not replace; give a new or an "
            f"empty folder"
        )


def _writer(
    model: nn.Module, host: AbstractHost, format: str, inputs: Mapping[str, Any] | None
) -> tuple[str, Callable[[Path], None]]:
    """The format that was asked for, without `native`, and what writes it.

    Raises:
        ValueError: it cannot hold the model.
    """
    decoder, why_none = _as_decoder(model, host)
    given = graph.example(model, inputs)
    against = {name: graph.reasons_against_graph(model, given, name) for name in _GRAPHS}
    if decoder is not None:
        from moefold.surgery.export.native import NATIVE

        against |= {name: native.reasons_against(decoder) for name, native in NATIVE.items()}
    can = [name for name in FORMATS if against.get(name) == []]
    wanted = format
    if format == "native":
        wanted = next((name for name in can if name not in _GRAPHS), _natural(decoder))
    reasons = against.get(wanted, [why_none])
    if reasons:
        raise refusal(type(model).__name__, wanted, reasons, can)
    if wanted in _GRAPHS:
        assert given is not None
        write = graph.write_onnx if wanted == "onnx" else graph.write_program
        return wanted, lambda new: write(model, given, new)
    assert decoder is not None
    return wanted, lambda new: _write_native(model, decoder, wanted, new)


def _as_decoder(model: nn.Module, host: AbstractHost) -> "tuple[Decoder | None, Reason]":
    """The model as native classes see it; where they do not, the reason."""
    decoder = None
    if host.name == "transformers":
        from moefold.surgery.export.decoder import as_decoder

        decoder = as_decoder(model)
    instead = "export the transformer in it" if host.name == "sentence-transformer" else ""
    why = f"no native mixture of transformers has the layers of a {type(model).__name__}"
    return decoder, Reason(why, instead)


def _natural(decoder: "Decoder | None") -> str:
    """The format whose reasons are given where no native one can hold the model."""
    if decoder is None:
        return "native"
    from moefold.surgery.export.native import NATURAL

    return NATURAL.get(decoder.kind, "mixtral")


def _write_native(model: nn.Module, decoder: "Decoder", format: str, folder: Path) -> None:
    from moefold.surgery.export import native

    native.write(cast("PreTrainedModel", model), decoder, native.NATIVE[format], folder)


__all__ = ["FORMATS", "export", "refuse_full_folder"]
