"""Which tokens compete or mix with each other.

Shapes: tensors arrive as `[batch, tokens, ...]`; a router sees them as `[groups, members, ...]`.

    "sequence"   one group per sequence                       groups = batch, members = tokens
    "batch"      one group of everything                      groups = 1
    "position"   the same position of every sequence          groups = tokens, members = batch
    n            n consecutive tokens of the flattened batch  members = n
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Group = Literal["sequence", "batch", "position"] | int
GROUPS = ("sequence", "batch", "position")


def check_group(group: Group) -> None:
    """Refuse anything that is neither a known kind of group nor a positive number of tokens."""
    if isinstance(group, str) and group in GROUPS:
        return
    if isinstance(group, int) and not isinstance(group, bool) and group > 0:
        return
    raise ValueError(
        f"group is {group!r}; it must be 'sequence', 'batch', 'position' or a positive number of "
        "tokens. Use 'sequence' if tokens of one sequence should compete only with each other."
    )


@dataclass(frozen=True, slots=True)
class Grouping:
    """A way to see `[batch, tokens, ...]` as `[groups, members, ...]` and back.

    Attributes:
        group: the kind of group, or the number of tokens in one.
        batch: number of sequences.
        tokens: number of tokens in each sequence, padding included.

    Raises:
        ValueError: if the group is unknown, or its number of tokens does not divide the batch.
    """

    group: Group
    batch: int
    tokens: int

    def __post_init__(self) -> None:
        check_group(self.group)
        total = self.batch * self.tokens
        if isinstance(self.group, int) and total % self.group:
            raise ValueError(
                f"group size {self.group} does not divide the {total} tokens of this batch "
                f"({self.batch} sequences x {self.tokens}); use a divisor of {total}, or "
                "group='sequence' or 'batch'."
            )

    @property
    def members(self) -> int:
        """Number of tokens in one group, padding included."""
        match self.group:
            case "sequence":
                return self.tokens
            case "batch":
                return self.batch * self.tokens
            case "position":
                return self.batch
            case _:
                return self.group

    @property
    def groups(self) -> int:
        """Number of groups."""
        match self.group:
            case "sequence":
                return self.batch
            case "batch":
                return 1
            case "position":
                return self.tokens
            case _:
                return self.batch * self.tokens // self.group

    def split(self, tensor: Tensor) -> Tensor:
        """`[batch, tokens, ...]` to `[groups, members, ...]`."""
        if self.group == "sequence":
            return tensor
        if self.group == "position":
            return tensor.transpose(0, 1)
        return tensor.reshape(self.groups, self.members, *tensor.shape[2:])

    def merge(self, tensor: Tensor) -> Tensor:
        """`[groups, members, ...]` back to `[batch, tokens, ...]`, the inverse of `split`."""
        if self.group == "sequence":
            return tensor
        if self.group == "position":
            return tensor.transpose(0, 1)
        return tensor.reshape(self.batch, self.tokens, *tensor.shape[2:])
