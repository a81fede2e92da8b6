"""Every peer that is known: those that may run here, and why the others do not.

What is known of them is in the licence, version and code that was read; see `docs/how-to`.
"""

import difflib
from collections.abc import Sequence

from moefold.bench.peers.base import AbstractPeer, Built, Given, NeverRuns
from moefold.bench.peers.from_transformers import TransformersBlock
from moefold.bench.peers.gpu import ScatterMoe, SonicMoe
from moefold.bench.peers.soft import SoftMixtureOfExperts, SoftMoe, SoftMoePytorch
from moefold.bench.peers.sparse import MixtureOfExperts, SinkhornRouter, StMoe

PEERS: dict[str, AbstractPeer] = {
    peer.name: peer
    for peer in (
        TransformersBlock("eager"),
        TransformersBlock("grouped_mm"),
        TransformersBlock("batched_mm"),
        TransformersBlock("sonicmoe"),
        StMoe(),
        MixtureOfExperts(),
        SoftMoePytorch(),
        SoftMoe(),
        SoftMixtureOfExperts(),
        SinkhornRouter(),
        ScatterMoe(),
        SonicMoe(),
        NeverRuns(
            "MegaBlocks",
            "megablocks",
            "it wants torch 2.7 and asks for a GPU when it is built; its sparse kernels refuse "
            "Triton 3.2 and newer",
        ),
        NeverRuns("FastMoE", "fastmoe", "it has to be compiled for a GPU, and is not on PyPI"),
        NeverRuns("Tutel", "tutel", "it has to be compiled, and is not on PyPI"),
        NeverRuns("V-MoE", "vmoe", "it is JAX: not in one process with these"),
        NeverRuns(
            "CoLT5-attention", "CoLT5-attention", "it has a light and a heavy branch, no experts"
        ),
    )
}
"""Every peer by its name."""


def peers_named(names: Sequence[str]) -> list[AbstractPeer]:
    """Peers by name; `all` for every one, `none` for none.

    Raises:
        ValueError: no peer has such a name.
    """
    if list(names) == ["all"]:
        return list(PEERS.values())
    if list(names) == ["none"]:
        return []
    for name in names:
        if name not in PEERS:
            near = difflib.get_close_matches(name, PEERS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"unknown peer {name!r}; {hint}There are: {', '.join(PEERS)}; or all, or none"
            )
    return [PEERS[name] for name in names]


__all__ = ["PEERS", "AbstractPeer", "Built", "Given", "peers_named"]
