"""What a host is: a dense model that says where its MLPs are and lets them be exchanged.

A host describes; it decides nothing. `plan` picks sites from what it describes, `upcycle` makes the
mixtures and asks it to install them through `Changes`, which can take everything back.

Shapes: `dim` is the width of a token, `width` the inner width of the MLP.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from moefold.moe import MoE
from moefold.surgery.hosts.changes import Changes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseMLP:
    """Weights of an MLP, as `nn.Linear` keeps them; the host's own or views of them, not copies.

    Plain: `down(activation(up(x)))`. Gated: `down(activation(gate(x)) * up(x))`.
    """

    up: Float[Tensor, "width dim"]
    up_bias: Float[Tensor, " width"] | None = None
    down: Float[Tensor, "dim width"]
    down_bias: Float[Tensor, " dim"] | None = None
    gate: Float[Tensor, "width dim"] | None = None
    gate_bias: Float[Tensor, " width"] | None = None

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.gate is not None

    @property
    def has_bias(self) -> bool:
        """Whether any product has a bias."""
        return any(b is not None for b in (self.up_bias, self.down_bias, self.gate_bias))

    @property
    def num_parameters(self) -> int:
        """Number of weights and biases."""
        parts = (getattr(self, part.name) for part in fields(self))
        return sum(part.numel() for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Where one kind of layer keeps its MLP; paths are those of modules below the layer.

    A path may end in a number below zero for the last of a list, as in `layer.-1.wi`.

    Attributes:
        layer: the class of the layer, by its full name: `package.module.Class`.
        up: the first linear map.
        down: the second one.
        gate: the linear map whose activated result multiplies that of `up`; None for a plain MLP.
        fused_gate: `up` makes both halves at once, the one that is activated first.
        activation: the module or function between the maps.
        pieces: modules that, applied one after the other, are the MLP. The mixture stands in for
            the first, nothing for the others. What else stands around them stays the host's.
        dropout: a dropout inside a piece, applied to its result, that the mixture keeps.
        inner_dropout: a dropout between the maps, which experts do not have.
        mask: the argument of the layer that says which tokens are real; None if all are.
        cache: the argument with the keys and values of earlier tokens.
        causal: whether later tokens are hidden; a function of the layer and of the configuration of
            the model it is in (None outside of transformers) where that depends.
    """

    layer: str
    up: str
    down: str
    gate: str | None = None
    fused_gate: bool = False
    activation: str
    pieces: tuple[str, ...] = ("mlp",)
    dropout: str | None = None
    inner_dropout: str | None = None
    mask: str | None = "attention_mask"
    cache: str | None = None
    causal: bool | Callable[[nn.Module, Any], bool] = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Site:
    """One MLP that may become a mixture of experts.

    Attributes:
        name: path of the layer in the model that was passed in.
        layer: the module that is changed if the site is taken.
        form: how such a layer keeps its MLP.
        dim: width of a token.
        width: inner width of the MLP.
        activation: as moefold names it; empty where it is not known.
        causal: whether the layer may not see later tokens.
        mlp: the weights; None where `reasons_against` says why they cannot be had.
        reasons_against: why the site cannot be taken; empty if it can.
        notes: what a mixture there does otherwise than the MLP did, in training.
    """

    name: str
    layer: nn.Module
    form: Form
    dim: int
    width: int
    activation: str
    causal: bool
    mlp: DenseMLP | None
    reasons_against: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class AbstractHost(abc.ABC):
    """The adapter of one kind of model."""

    name: ClassVar[str]

    @abc.abstractmethod
    def claims(self, model: nn.Module) -> bool:
        """Whether the model is of this kind."""

    @abc.abstractmethod
    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """All MLPs of the model, first layer first."""

    @abc.abstractmethod
    def install(self, model: nn.Module, site: Site, moe: MoE, changes: Changes) -> None:
        """Puts the mixture in the place of the MLP."""

    @abc.abstractmethod
    def sign(self, model: nn.Module, section: Mapping[str, Any], changes: Changes) -> None:
        """Writes into the model's own config what was done, so that a saved folder says it.

        Args:
            model: the model that was operated on.
            section: JSON data with `sites`, a mapping from the site's name to its config.
            changes: takes note.
        """

    @abc.abstractmethod
    def unsign(self, model: nn.Module) -> None:
        """Makes the config, and the class of a loaded model, those of a dense model again."""

    @abc.abstractmethod
    def section(self, model: nn.Module) -> dict[str, Any] | None:
        """What `sign` wrote, site names being those of `model`; None if nothing was done."""

    @abc.abstractmethod
    def dense_flops(self, model: nn.Module, tokens: int) -> float:
        """Floating-point operations of a forward pass for each token of a sequence of `tokens`."""

    @abc.abstractmethod
    def source(self, model: nn.Module) -> str:
        """Where the dense model came from: a folder, a name on the hub, or an empty string."""

    @abc.abstractmethod
    def write(
        self, model: nn.Module, folder: Path, *, max_shard_size: int | str | None = None
    ) -> None:
        """Writes the model into an empty folder, weights as safetensors.

        Args:
            model: an upcycled model.
            folder: where.
            max_shard_size: bytes that a file of weights holds at most, or text such as "5GB"; the
                default of the host's library if None.

        Raises:
            ValueError: the host writes one file only, and a size is asked for.
        """

    @abc.abstractmethod
    def read(self, folder: Path) -> nn.Module:
        """Opens what `write` wrote.

        Raises:
            ValueError: the weights in the folder are not those of the model it describes.
        """
