"""`moefold list`: what is registered, one line each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from moefold import routers
from moefold.cli.options import parse
from moefold.experts import backends
from moefold.losses import losses
from moefold.output_losses import output_losses
from moefold.surgery.births import BIRTHS
from moefold.surgery.hosts import FORMS, HOSTS

EXAMPLE = "moefold list routers"

Kind = Literal["all", "routers", "backends", "hosts", "layers", "births", "losses"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """List what is registered under a name, plug-ins of installed packages included.

    Attributes:
        kind: what to list.
    """

    kind: Annotated[Kind, tyro.conf.Positional] = "all"


def main(arguments: Sequence[str]) -> None:
    """Runs the verb."""
    asked = parse(Arguments, arguments, verb="list", example=EXAMPLE)
    members = {
        "routers": routers.names(),
        "backends": backends.describe(),
        "hosts": HOSTS.describe(),
        "layers": FORMS.describe(),
        "births": BIRTHS.describe(),
        "losses": {**losses.describe(), **output_losses.describe()},
    }
    for kind, described in members.items():
        if asked.kind in ("all", kind):
            longest = max(map(len, described))
            lines = [f"  {name:<{longest}}  {summary}" for name, summary in described.items()]
            print("\n".join([kind, *lines]))
