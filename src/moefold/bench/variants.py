"""Variants of a layer that are let in: built, given the same weights, compared with the reference.

Shapes: `batch tokens dim` in and out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from moefold.bench.agreement import (
    AMP_GAP,
    SAFE_GAP,
    TOLERANCE,
    disagreement,
    draw_inputs,
    gradients_of,
    outcome,
)
from moefold.bench.layers import After, copy_weights, dense, ours, reference
from moefold.bench.peers import AbstractPeer, Built, Given
from moefold.bench.precision import AMP, DTYPES, as_run, result_dtype, running
from moefold.bench.settings import Settings
from moefold.bench.shapes import Shape
from moefold.experts.backends import AUTO, backends
from moefold.moe import MoE
from moefold.ops.flops import flop_counter
from moefold.routing import SparseRouting

DENSE, OURS = "dense", "moefold"


@dataclass(slots=True, kw_only=True)
class Variant:
    """A layer that is to be timed, and what is known of it.

    Attributes:
        record: as it will be reported.
        layer: with the reference's weights.
        flops: of a forward pass: those that had to be done, of a variant that is compared.
        first: seconds of its first timed pass.
    """

    record: dict[str, Any]
    layer: nn.Module
    flops: int
    first: float = 0.0


@final
class Entrance:
    """Builds variants and compares them with the reference before they are let in.

    Args:
        shape: the layer.
        dtype_name: one of `precision.DTYPES`.
        device: where it runs.
        master: the reference, whose weights all get.
        inputs: of the run; the first is the one that is compared on.
        back: gradient of the result; None if results alone are compared.
    """

    def __init__(
        self,
        shape: Shape,
        dtype_name: str,
        device: str,
        master: MoE,
        inputs: Sequence[Tensor],
        back: Tensor | None,
    ) -> None:
        self.shape = shape
        self.dtype_name = dtype_name
        self.dtype = DTYPES[dtype_name]
        self.device = device
        self.master = master
        self.inputs = inputs
        self.back = back
        self.most_rows = _most_rows(master, inputs)
        self._wanted: dict[str, Tensor] | None = None

    @classmethod
    def of_run(
        cls, shape: Shape, dtype_name: str, settings: Settings, *, training: bool = True
    ) -> "Entrance":
        """For a run: its reference, an input for each round, and for training a gradient."""
        dtype, device = DTYPES[dtype_name], settings.device
        torch.manual_seed(settings.seed)
        master = reference(shape, device, dtype)
        number = settings.rounds + settings.warmup
        gap = AMP_GAP if dtype_name == AMP else SAFE_GAP
        inputs = draw_inputs(shape, master, number, dtype, device, gap)
        back = None
        if training:
            back = torch.randn(inputs[0].shape).to(device, result_dtype(dtype_name))
        return cls(shape, dtype_name, device, master, inputs, back)

    def all(
        self, backends: Sequence[str], peers: Sequence[AbstractPeer]
    ) -> tuple[dict[str, Variant], list[dict[str, Any]]]:
        """Every variant that is let in, by name, and a record of each, let in or not."""
        timed: dict[str, Variant] = {}
        records = [self.dense(timed)]
        records += [self.ours(backend, timed) for backend in backends]
        records += [self.peer(peer, timed) for peer in peers]
        return timed, records

    def dense(self, timed: dict[str, Variant]) -> dict[str, Any]:
        """The yardstick, which there is nothing to compare with."""
        record: dict[str, Any] = {"variant": DENSE, "kind": "dense"}
        layer = dense(self.shape).to(self.device, self.dtype)
        self._let_in(record, layer, self.shape.flops, timed)
        return record

    def ours(self, backend: str, timed: dict[str, Variant]) -> dict[str, Any]:
        """Our layer with one of its backends."""
        name = OURS if backend == AUTO else f"{OURS} {backend}"
        record: dict[str, Any] = {"variant": name, "kind": "ours"}
        try:
            layer = ours(self.shape, backend).to(self.device, self.dtype)
            copy_weights(self.master, layer)
            if backend != AUTO:
                rows = self.inputs[0].flatten(0, 1)
                with running(self.dtype_name, self.device):
                    against = backends.get(backend).reasons_against(rows, layer.experts.weights)
                if against:
                    record["refused"] = "; ".join(against)
                    return record
            found = self._outcome(layer, lambda: gradients_of(layer))
        except Exception as error:  # what it raises is the reason, whatever it is
            return _refused(record, error)
        if self._agrees(record, found, self._want()):
            self._let_in(record, layer, self.shape.flops, timed)
        return record

    def peer(self, peer: AbstractPeer, timed: dict[str, Variant]) -> dict[str, Any]:
        """Somebody else's layer."""
        record: dict[str, Any] = {"variant": peer.name, "kind": "peer", "version": peer.version()}
        with running(self.dtype_name, self.device):
            reasons = peer.reasons_against(self.shape, self.dtype, self.device)
        if reasons:
            record["refused"] = "; ".join(reasons)
            return record
        given = Given(
            shape=self.shape,
            master=self.master,
            most_rows=self.most_rows,
            device=self.device,
            dtype=self.dtype,
        )
        try:
            built = peer.build(given)
            found = self._outcome(built.layer, built.gradients)
        except Exception as error:  # what it raises is the reason, whatever it is
            return _refused(record, error)
        remarks = [built.remark] if built.remark else []
        if (made := found["y"].dtype) != result_dtype(self.dtype_name):
            remarks.append(f"its result is {str(made).removeprefix('torch.')}")
        if remarks:
            record["remark"] = "; ".join(remarks)
        if built.another:
            record["not_compared"] = built.another
            flops = _counted_flops(self._as_run(built.layer), self.inputs[0])
            self._let_in(record, built.layer, flops, timed)
        elif self._agrees(record, found, self._want(built)):
            self._let_in(record, built.layer, self.shape.flops, timed)
        return record

    def _want(self, built: Built | None = None) -> dict[str, Tensor]:
        """What the reference gives, after what a peer does to its input if it does something."""
        if built is not None and built.before is not None:
            layer = After(built.before, self.master)
            return self._outcome(layer, lambda: gradients_of(self.master))
        if self._wanted is None:
            self._wanted = self._outcome(self.master, lambda: gradients_of(self.master))
        return self._wanted

    def _outcome(
        self, layer: nn.Module, gradients: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        return outcome(self._as_run(layer), self.inputs[0], self.back, gradients)

    def _as_run(self, layer: nn.Module) -> nn.Module:
        return as_run(layer, self.dtype_name, self.device)

    def _agrees(
        self, record: dict[str, Any], found: dict[str, Tensor], wanted: dict[str, Tensor]
    ) -> bool:
        worst = disagreement(found, wanted)
        record["error"] = worst.error if worst.error == worst.error else None  # JSON has no NaN
        record["error_in"] = worst.where
        tolerance = TOLERANCE[self.dtype_name]
        if worst.error <= tolerance:
            return True
        record["refused"] = (
            f"it differs from the reference by {worst.error:.1e} in {worst.where}, which is more "
            f"than {tolerance:.0e}"
        )
        record["differs"] = True
        return False

    def _let_in(
        self, record: dict[str, Any], layer: nn.Module, flops: int, timed: dict[str, Variant]
    ) -> None:
        timed[record["variant"]] = Variant(record=record, layer=self._as_run(layer), flops=flops)


def _refused(record: dict[str, Any], error: Exception) -> dict[str, Any]:
    what = str(error).strip().partition("\n")[0] or "no message"
    record["refused"] = f"it raised {type(error).__name__}: {what}"
    return record


def _most_rows(master: MoE, inputs: Sequence[Tensor]) -> int:
    """The most rows of any expert in any sequence of any input."""
    most = 1
    with torch.no_grad():
        for x in inputs:
            for sequence in x:
                routing = master.router(sequence.unsqueeze(0), None)
                if not isinstance(routing, SparseRouting):
                    return most
                most = max(most, int(routing.rows_per_expert.max()))
    return most


def _counted_flops(layer: nn.Module, x: Tensor) -> int:
    """Operations of a forward pass as torch counts them."""
    with flop_counter() as counter, torch.no_grad():
        layer(x)
    return counter.get_total_flops()


__all__ = ["DENSE", "OURS", "Entrance", "Variant"]
