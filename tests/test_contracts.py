"""Everything that is registered keeps its contract: routers, backends, and layers made of them.

Being registered means being tested: a member without a case here fails.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from moefold import MoEConfig, routers
from moefold.experts import AbstractBackend, backends
from moefold.experts.backends import PRIORITY
from moefold.registry import Registry
from moefold.testing import check_backend, check_layer, check_router, without_a_case


@dataclass(frozen=True)
class Case:
    """One setting of a router, and what it is known not to keep."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    exceptions: Mapping[str, str] = field(default_factory=dict)
    num_experts: int = 5

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{name}={value}" for name, value in self.settings.items())])


BY_ARRIVAL = {"permuting tokens": "who comes first finds room"}
JITTER = {"same in training": "jitter multiplies the input in training"}
NOISE = {"same in training": "noise is added in training"}
COMPETES = {
    "same in training": "all experts compete in training",
    "gradient reaches parameters": "in a competition the gate learns from a loss only",
}
FIXED_GROUPS = {"relabelling experts": "a group of experts is a range of their numbers"}

ROUTERS = [
    Case("token-choice"),
    Case("token-choice", {"k": 3, "renormalize": True, "noise_std": 1.0}, NOISE),
    Case("token-choice", {"capacity_factor": 0.5}, BY_ARRIVAL),
    Case("token-choice", {"capacity_factor": 0.5, "priority": "gate"}),
    Case("token-choice", {"k": 1, "capacity": 2}),
    Case(
        "token-choice", {"capacity_factor": 0.5, "convention": "vmoe", "group": "batch"}, BY_ARRIVAL
    ),
    Case("token-choice", {"capacity": 2, "group": 6}, BY_ARRIVAL),
    Case("switch", exceptions={**BY_ARRIVAL, **JITTER}),
    Case("mixtral"),
    Case("compete"),
    Case("compete", {"k": 3, "rate": 1.0}, COMPETES),
    Case("sinkhorn-token-choice"),
    Case(
        "sinkhorn-token-choice", {"capacity_factor": 0.5, "noise_std": 1.0}, {**BY_ARRIVAL, **NOISE}
    ),
    Case("expert-choice"),
    Case("expert-choice", {"capacity": 4, "renormalize": True, "group": "batch"}),
    Case("expert-choice", {"capacity_factor": 2.0, "group": "position"}),
    Case("expert-choice", {"convention": "flaxformer", "capacity_factor": 1.0, "group": 4}),
    Case("sinkhorn-expert-choice"),
    Case("sparse-transport-expert-choice", {"iterations": 4}),
    Case("soft"),
    Case("soft", {"slots": 2, "group": "batch", "noise_std": 1.0}, NOISE),
    Case("soft", {"group": "position"}),
    Case("unified"),
    Case("unified", {"budget": 1.5, "expert_score": "token-softmax", "combine": "row-normalized"}),
    Case(
        "unified", {"min_experts": 1, "max_experts": 3, "combine": "renormalized", "group": "batch"}
    ),
    Case("unified", {"alpha": 1.0, "combine": "softmax", "group": 6}),
    Case("seq-topk"),
    Case("expert-race"),
    Case("bias-balanced", {"rate": 0.1}),
    Case(
        "bias-balanced",
        {"expert_groups": 3, "top_groups": 2, "scale": 2.5},
        FIXED_GROUPS,
        num_experts=6,
    ),
    Case("cosine"),
    Case("relu"),
    Case("threshold"),
    Case("hash", {"k": 2}),
    Case("hash", {"by": "position"}, {"permuting tokens": "the position decides"}),
    Case("base", exceptions={"same in training": "assignments are balanced in training only"}),
    Case(
        "random",
        exceptions={
            "permuting tokens": "draws know places, not tokens",
            "deterministic": "drawn anew in each pass",
            "padding counts nowhere": "as many draws as there are places",
        },
    ),
    Case("custom", {"score": "sinkhorn", "choice": "top-pairs", "weight": "clean-softmax"}),
    Case("custom", {"score": "sigmoid", "choice": "top-tokens", "capacity": 2, "normalize": "all"}),
]


@pytest.mark.parametrize("case", ROUTERS, ids=str)
def test_every_registered_router_keeps_the_contract(case: Case):
    report = check_router(
        case.name,
        settings=case.settings,
        exceptions=case.exceptions,
        num_experts=case.num_experts,
        ids=case.name == "hash",
    )
    # What most routers must have been through, whatever was skipped.
    assert {"maps are matrices", "padding gets no row", "gradient is the derivative"} <= set(
        report.ran
    )


def test_no_router_is_without_a_case():
    assert not without_a_case(routers.names(), (case.name for case in ROUTERS))


@pytest.mark.parametrize("name", backends.names())
def test_every_registered_backend_keeps_the_contract(name: str):
    report = check_backend(name)
    # What "auto" may choose runs here. Others, which run when they are named, may refuse this
    # machine or these widths; each has tests of its own for what it computes.
    if name in PRIORITY:
        assert {"float32", "spare rows", "no rows"} <= set(report.ran)
    assert all(report.skipped.values())


def test_a_member_without_a_case_is_noticed():
    scratch: Registry[AbstractBackend] = Registry("scratch")
    for name in backends.names():
        scratch.register(name, backends.get(name), summary="as it is")
    assert without_a_case(scratch.names(), backends.names()) == ()
    scratch.register("brand-new", backends.get("reference"), summary="without a case")
    assert without_a_case(scratch.names(), backends.names()) == ("brand-new",)


# Every router in a layer, the kinds of experts taking turns; and what a layer can have besides.
KINDS: tuple[dict[str, Any], ...] = (
    {"gated": True, "activation": "silu", "shared_width": 4},
    {"gated": False, "bias": True, "activation": "gelu"},
    {"gated": True, "bias": True, "activation": "relu2", "losses": {"z": 0.1}},
)
LAYERS = [
    MoEConfig(
        num_experts=5,
        expert_width=6,
        router=routers.config(name, **({"iterations": 4} if "transport" in name else {})),
        **KINDS[i % len(KINDS)],
    )
    for i, name in enumerate(routers.names())
] + [
    MoEConfig(
        num_experts=5,
        expert_width=6,
        router=routers.config("token-choice", k=2, capacity_factor=0.5, noise_std=1.0),
        losses={"load": 0.1, "importance": 0.1},
    ),
    MoEConfig(num_experts=1, expert_width=6, router=routers.config("token-choice", k=1)),
    MoEConfig(num_experts=5, expert_width=6, router=routers.config("soft", slots=2, group="batch")),
]


@pytest.mark.parametrize("config", LAYERS, ids=lambda config: str(config.router))
def test_layers_keep_the_contract(config: MoEConfig):
    report = check_layer(config, ids=config.router.name == "hash")
    assert {"definition", "losses ride", "checkpointing", "padding"} <= set(report.ran)


def test_no_router_is_without_a_layer():
    assert not without_a_case(routers.names(), (config.router.name for config in LAYERS))
