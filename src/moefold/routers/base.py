"""What every router is: a module that turns tokens into a routing, and says how far it looks.

Shapes: `batch tokens dim` in, a routing out. `mask` is True for real tokens.
"""

import abc
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moefold.routing import Group, Grouping, Routing
from moefold.routing.grouping import check_group

Reach = Literal["token", "past", "group", "batch"]
"""How far a router looks to route one token: at itself, at earlier tokens of its sequence, at all
of its sequence, or beyond it."""


class AbstractRouter(nn.Module, abc.ABC):
    """Turns tokens into a routing.

    To write a router, derive from this class, call `super().__init__(dim, num_experts)`, set
    `reach`, and write `forward`. `moefold.testing.check_router` then runs the whole contract on it.

    Attributes:
        dim: width of a token.
        num_experts: number of experts.
        reach: how far the router looks, see `Reach`.
        reach_in_training: the same in training, where that is further.
        group: which tokens compete.
        losses: auxiliary losses the router's authors train it with, name to coefficient.
        site: name of the layer, used in errors.
        remembers: whether it looks at the past and can be told of it, token by token.
        competes: whether it routes as in training outside of it too, see `modes.competing`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        reach: Reach = "token",
        group: Group = "sequence",
        losses: Mapping[str, float] | None = None,
        reach_at_inference: Reach | None = None,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("num_experts", num_experts)
        check_group(group)
        self.dim = dim
        self.num_experts = num_experts
        self.group: Group = group
        self.reach: Reach = reach if reach == "token" or group == "sequence" else "batch"
        self.reach_in_training: Reach = self.reach
        if reach_at_inference is not None:
            self.reach = reach_at_inference
        self.losses = dict(losses or {})
        self.site = "this layer"
        self.remembers = False
        self.competes = False

    @property
    def is_causal(self) -> bool:
        """Whether no later token of its own sequence can change a token's routing at inference.

        Groups of one position see other sequences, but nothing that comes later.
        """
        return self.reach in ("token", "past") or self.group == "position"

    @property
    def reach_now(self) -> Reach:
        """How far the router looks in the mode that it is in."""
        return self.reach_in_training if self.training or self.competes else self.reach

    @property
    def is_causal_now(self) -> bool:
        """The same in the mode that it is in."""
        return self.reach_now in ("token", "past") or self.group == "position"

    @property
    def is_taught(self) -> bool:
        """Whether it can route outside of training: nothing that it needs for it is unlearnt."""
        return True

    @abc.abstractmethod
    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        ids: Int[Tensor, "batch tokens"] | None = None,
    ) -> Routing:
        """Route the tokens.

        Args:
            x: the tokens.
            mask: True for real tokens; padding gets no row and counts nowhere. All real if None.
            ids: token ids, for the routers that hash them.
        """

    def extra_repr(self) -> str:
        """What `print` shows of the router."""
        return f"dim={self.dim}, num_experts={self.num_experts}, reach={self.reach!r}"

    def update(self, routings: Sequence[Routing]) -> None:
        """Adapt what is not learnt by gradient (a bias, a threshold) to the routings of one step.

        Called once for each optimiser step, by `record.update()`. Most routers have nothing to
        adapt.
        """

    def check(self, x: Tensor, mask: Tensor | None) -> None:
        """Refuse input of the wrong kind, naming the layer.

        Raises:
            ValueError: wrong rank, width or dtype of `x`; wrong shape or dtype of `mask`.
        """
        if not x.is_floating_point():
            raise ValueError(
                f"{self.site}: x has dtype {x.dtype}; a router needs floating point. "
                "Pass hidden states (for token ids, embed them first)."
            )
        if x.ndim != 3:
            raise ValueError(
                f"{self.site}: x has shape {tuple(x.shape)}, rank {x.ndim}; a router needs "
                "[batch, tokens, dim]. Add or flatten dims."
            )
        if x.shape[2] != self.dim:
            raise ValueError(
                f"{self.site}: x has width {x.shape[2]}, the router was built for dim={self.dim}. "
                "Build it with the width of the hidden states."
            )
        if mask is None:
            return
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"{self.site}: mask has shape {tuple(mask.shape)}, but x has [batch, tokens] = "
                f"{tuple(x.shape[:2])}. Pass one value for each token."
            )
        if mask.dtype != torch.bool:
            raise ValueError(
                f"{self.site}: mask has dtype {mask.dtype}; it must be bool, True for real tokens. "
                "For an attention mask of ones and zeros pass mask.bool()."
            )

    def as_groups(
        self, x: Tensor, mask: Tensor | None
    ) -> tuple[Grouping, Bool[Tensor, "groups members"] | None]:
        """How a batch falls into groups, and which of their members are real tokens.

        Raises:
            ValueError: the number of tokens in a group does not divide the batch.
        """
        try:
            grouping = Grouping(self.group, x.shape[0], x.shape[1])
        except ValueError as error:
            raise ValueError(f"{self.site}: {error}") from None
        return grouping, None if mask is None else grouping.split(mask)

    def check_finite(
        self, values: Tensor, mask: Tensor | None, what: str = "router logits"
    ) -> None:
        """Refuse NaN or infinite values of real tokens, naming the layer.

        On a GPU and in a compiled graph the check does not wait for the device: it fails there,
        as a RuntimeError with the same text, when the device comes to it.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        reads = not torch.compiler.is_compiling() and values.device.type == "cpu"
        if reads and values.numel() == 0:
            return
        if reads and mask is None and math.isfinite(values.detach().sum()):
            return  # a sum is finite only if everything in it is
        finite = torch.isfinite(values)
        if mask is not None:
            finite = finite | ~mask.unsqueeze(-1)
        message = (
            f"{self.site}: {what} are NaN or infinite. Look at the hidden states that enter this "
            "layer (learning rate, overflow in half precision) before routing them."
        )
        if torch.compiler.is_compiling() or values.device.type in ("cuda", "meta"):
            torch._assert_async(finite.all(), message)  # pyright: ignore[reportPrivateImportUsage]
        elif not finite.all():
            raise ValueError(message)

    def check_trained(self, trained: Bool[Tensor, ""]) -> None:
        """Refuse to route by a predictor that has learnt nothing.

        On a GPU and in a compiled graph it fails there, as `check_finite` does.

        Raises:
            ValueError: it was never trained.
        """
        message = (
            f"{self.site}: inference='predictor', and the predictor was never trained. Train the "
            f"model (the loss 'membership' teaches it), call moefold.calibrate(model, batches), or "
            f"use inference='prefix', which needs neither."
        )
        if torch.compiler.is_compiling() or trained.device.type in ("cuda", "meta"):
            torch._assert_async(trained, message)  # pyright: ignore[reportPrivateImportUsage]
        elif not trained:
            raise ValueError(message)


def check_positive(name: str, value: object, *, integer: bool = True) -> None:
    """Refuse a setting that is not a positive (whole) number.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """
    if not _is_number(value, integer) or not value > 0:
        what = "a positive whole number" if integer else "a positive finite number"
        raise ValueError(f"{name} is {value!r}; it must be {what}.")


def check_at_least_zero(name: str, value: object, *, integer: bool = False) -> None:
    """Refuse a setting that is negative, or not a (whole) number.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """
    if not _is_number(value, integer) or not value >= 0:
        what = "a whole number, zero or more" if integer else "zero or more, and finite"
        raise ValueError(f"{name} is {value!r}; it must be {what}.")


def check_k(k: int, num_experts: int) -> None:
    """Refuse more experts for a token than there are.

    Raises:
        ValueError: names k, the number of experts and what to do.
    """
    check_positive("k", k)
    check_positive("num_experts", num_experts)
    if k > num_experts:
        raise ValueError(
            f"k is {k}, but there are only {num_experts} experts; use k <= {num_experts} or more "
            "experts."
        )


def check_one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a setting outside a short list.

    Raises:
        ValueError: names the setting, the value and the list.
    """
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(one) for one in allowed], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.{hint}")


def float32_or_better(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are.

    Rounding scores to half precision before a choice changes which experts are chosen.
    """
    if tensor.dtype == torch.float32:
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _is_number(value: object, integer: bool) -> TypeGuard[int | float]:
    kind = int if integer else (int, float)
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
