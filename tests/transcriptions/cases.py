"""Random cases for the transcriptions, and the transcription of a whole batch, group by group.

A case is everything a router is given: parameters, tokens, mask, settings. Sizes are odd and even
and go down to one token and one expert; every third case has padding, which holds large garbage, as
real padding may. `transcribe` cuts the batch into groups, drops the padding *before* anything is
computed, and puts the results back in their places.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.transcriptions import linear_logits, rows_of_an_expert
from tests.transcriptions.expert_choice import expert_choice
from tests.transcriptions.sinkhorn import sinkhorn_expert_choice, sinkhorn_token_choice
from tests.transcriptions.sparse_transport import sparse_transport_expert_choice
from tests.transcriptions.token_choice import token_choice
from tests.transcriptions.unified import unified

TRANSCRIPTIONS: dict[str, Callable[..., tuple[Tensor, set[tuple[int, int]], Tensor]]] = {
    "token-choice": token_choice,
    "sinkhorn-token-choice": sinkhorn_token_choice,
    "expert-choice": expert_choice,
    "sinkhorn-expert-choice": sinkhorn_expert_choice,
    "sparse-transport-expert-choice": sparse_transport_expert_choice,
    "unified": unified,
}
SOLVED = ("sinkhorn-token-choice", "sinkhorn-expert-choice", "sparse-transport-expert-choice")
FACTORS = (0.5, 1.0, 1.25, 1.5, 2.0, 3.0)  # exact in binary: no ceil() is decided by rounding
# The published two round up to four rows, which on so few tokens is nearly everybody: now and then.
CONVENTIONS = ("moefold", "moefold", "moefold", "moefold", "vmoe", "flaxformer")
CLOSE = 1e-9  # far above rounding (1e-15), far below the spacing of random scores (some 1e-3)
# Adam magnifies rounding: a gradient of 1e-16 against its epsilon of 1e-8 moves alpha by up to
# 0.05 * 1e-8, and the plan by 1 / gamma = 10 times that. One step of it is far below this.
CLOSE_IN_PLAN = 1e-6


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one call of a router is given. x [batch, tokens, dim], mask [batch, tokens]."""

    router: str
    seed: int
    x: Tensor
    mask: Tensor | None
    parameters: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    tied: bool = False

    def __str__(self) -> str:
        shapes = {name: tuple(value.shape) for name, value in self.parameters.items()}
        mask = None if self.mask is None else self.mask.int().tolist()
        return (
            f"{self.router} seed={self.seed} tied={self.tied} x={tuple(self.x.shape)} {shapes} "
            f"settings={self.settings} mask={mask}"
        )

    def but(self, **settings: Any) -> "Case":
        """The same case with other settings."""
        return replace(self, settings={**self.settings, **settings})

    def with_parameters(self, parameters: dict[str, Tensor]) -> "Case":
        """The same case with other parameters."""
        return replace(self, parameters=parameters)


def groups_of(case: Case) -> list[list[tuple[int, int]]]:
    """The real tokens of each group as (sequence, position), in row-major order."""
    batch, tokens = case.x.shape[:2]
    group = case.settings.get("group", "sequence")
    places: dict[int, list[tuple[int, int]]] = {}
    for b in range(batch):
        for t in range(tokens):
            if case.mask is None or case.mask[b, t]:
                label = {"sequence": b, "batch": 0, "position": t}[group]
                places.setdefault(label, []).append((b, t))
    return list(places.values())


def transcribe(case: Case) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Combine weights and chosen pairs of the whole batch, [batch, tokens, experts].

    Also the scores of each group, [members, experts]. Weights carry gradients to `case.x` and to
    the parameters.
    """
    weight = case.parameters["weight"]
    shape = (*case.x.shape[:2], weight.shape[0])
    weights, chosen = case.x.new_zeros(shape), torch.zeros(shape, dtype=torch.bool)
    competed = []
    for members in groups_of(case):
        x = torch.stack([case.x[b, t] for b, t in members])
        settings = settings_of_a_group(case, len(members))
        of_group, pairs, scores = TRANSCRIPTIONS[case.router](linear_logits(x, weight), **settings)
        for i, (b, t) in enumerate(members):
            weights[b, t] = of_group[i]
        for i, k in pairs:
            chosen[(*members[i], k)] = True
        competed.append(scores)
    return weights, chosen, competed


def settings_of_a_group(case: Case, num_tokens: int) -> dict[str, Any]:
    """The router's settings in the words of its transcription: capacity is counted per group."""
    settings = {name: value for name, value in case.settings.items() if name != "group"}
    if case.router == "unified":
        return settings
    factor = settings.pop("capacity_factor", None)
    convention = settings.pop("convention", "moefold")
    choices = settings["k"] if case.router.endswith("token-choice") else 1
    num_experts = case.parameters["weight"].shape[0]
    if factor is not None:
        settings["capacity"] = rows_of_an_expert(
            num_tokens, num_experts, factor, choices, convention
        )
    if "priority" in settings:
        settings["batch_prioritised"] = settings.pop("priority") == "gate"
    return settings


def draw(router: str, count: int, tied: bool = False) -> Iterator[Case]:
    """`count` cases whose outcome is not decided by rounding; the same ones every time.

    Of random cases, those are left out in which two competing scores are equal up to rounding and
    not by construction: one token alone with a Sinkhorn plan (its row is uniform whatever the
    logits are), or, with tied logits, two rows that hold the same numbers in another order.
    """
    drawn, seed = 0, 0
    while drawn < count:
        case = (draw_tied if tied else draw_continuous)(router, seed)
        if not decided_by_rounding(case):
            yield case
            drawn += 1
        seed += 1
        assert seed < 4 * count + 40, f"of {seed} cases of {router} only {drawn} are decisive"


def draw_continuous(router: str, seed: int) -> Case:
    """Gaussian tokens and weights, the logits flat in some cases and peaked in others."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    num_experts, dim = random.randint(1, 6), random.randint(1, 6)
    batch, tokens = random.randint(1, 3), random.randint(1, 9)
    spread = random.choice((0.3, 1.0, 2.5)) / dim**0.5
    x = torch.randn(batch, tokens, dim, generator=generator, dtype=torch.float64)
    weight = spread * torch.randn(num_experts, dim, generator=generator, dtype=torch.float64)
    mask = draw_mask(random, batch, tokens, padded=seed % 3 == 0)
    return Case(
        router=router,
        seed=seed,
        x=with_garbage(x, mask),
        mask=mask,
        parameters={"weight": weight.requires_grad_()},
        settings=draw_settings(router, random, num_experts, "batch" if batch > 1 else "sequence"),
    )


def draw_tied(router: str, seed: int) -> Case:
    """Few different tokens and few different experts, coordinates in halves: logits are exact."""
    case = draw_continuous(router, seed)
    random = Random(seed)
    batch, tokens, dim = case.x.shape
    num_experts = case.parameters["weight"].shape[0]
    kinds_of_token = [[random.randint(-2, 2) / 2 for _ in range(dim)] for _ in range(3)]
    kinds_of_expert = [[random.randint(-2, 2) / 2 for _ in range(dim)] for _ in range(3)]
    x = [[random.choice(kinds_of_token) for _ in range(tokens)] for _ in range(batch)]
    weight = torch.tensor(
        [random.choice(kinds_of_expert) for _ in range(num_experts)], dtype=torch.float64
    )
    return replace(
        case,
        x=with_garbage(torch.tensor(x, dtype=torch.float64), case.mask),
        parameters={"weight": weight.requires_grad_()},
        tied=True,
    )


def draw_soft(count: int) -> Iterator[Case]:
    """Cases for Soft MoE, which chooses nobody: phi [dim, experts, slots] and a learned scale."""
    for seed in range(count):
        case, random = draw_continuous("soft", seed), Random(seed)
        batch, _, dim = case.x.shape
        num_experts, num_slots = case.parameters["weight"].shape[0], random.randint(1, 3)
        generator = torch.Generator().manual_seed(seed)
        phi = torch.randn(dim, num_experts, num_slots, generator=generator, dtype=torch.float64)
        scale = torch.tensor(random.choice((0.5, 1.0, 3.0)), dtype=torch.float64)
        group = random.choice(("sequence", "batch" if batch > 1 else "sequence"))
        yield replace(
            case,
            parameters={"phi": phi.requires_grad_(), "scale": scale.requires_grad_()},
            settings={"slots": num_slots, "group": group},
        )


def draw_mask(random: Random, batch: int, tokens: int, *, padded: bool) -> Tensor | None:
    """Left, right or scattered padding in padded cases, else none at all or all real."""
    if not padded:
        return random.choice((None, torch.ones(batch, tokens, dtype=torch.bool)))
    manner = random.choice(("left", "right", "scattered"))
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    for b in range(batch):
        real = random.randint(0, tokens)
        if manner == "left":
            mask[b, tokens - real :] = True
        elif manner == "right":
            mask[b, :real] = True
        else:
            mask[b, random.sample(range(tokens), real)] = True
    return mask


def with_garbage(x: Tensor, mask: Tensor | None) -> Tensor:
    """Large tokens in the padding: whoever lets them compete lets them win."""
    x = x if mask is None else torch.where(mask[..., None], x, 40 + 7 * x)
    return x.requires_grad_()


def draw_settings(router: str, random: Random, num_experts: int, wide_group: str) -> dict[str, Any]:
    """Settings that matter to this router, at ordinary and at extreme values."""
    settings: dict[str, Any] = {"group": random.choice(("sequence", wide_group))}
    if router.endswith("token-choice"):
        settings["k"] = random.choice((1, min(2, num_experts), random.randint(1, num_experts)))
        if random.random() < 0.75:
            settings["capacity_factor"] = random.choice(FACTORS)
            settings["priority"] = random.choice(("order", "gate"))
            settings["convention"] = random.choice(CONVENTIONS)
        elif router == "token-choice":
            settings["renormalize"] = random.random() < 0.5
    elif router == "unified":
        settings["group"] = random.choice(("sequence", wide_group, "position"))
        budgets = (0.25, 0.5, 1.0, 1.25, 1.5, 2.0, 2.5, float(num_experts))
        settings["budget"] = random.choice([one for one in budgets if one <= num_experts])
        settings["alpha"] = random.choice((0.0, 0.3, 0.5, 0.5, 0.8, 1.0))
        settings["expert_score"] = random.choice(("sigmoid", "token-softmax"))
        settings["combine"] = random.choice(
            ("unified", "softmax", "renormalized", "row-normalized")
        )
    else:
        # Most factors below two: with more of them, on so few tokens, everybody takes everything.
        factors = (0.5, 0.75, 1.0, 1.0, 1.25, 1.5, 2.0, float(num_experts))
        settings["capacity_factor"] = random.choice(factors)
        if router == "expert-choice":
            settings["renormalize"] = random.random() < 0.5
        if router != "sparse-transport-expert-choice":
            settings["convention"] = random.choice(CONVENTIONS)
    if router.startswith("sinkhorn"):
        settings["iterations"] = random.choice((1, 3, 20, 20))
        settings["epsilon"] = random.choice((0.5, 1.0, 1.0, 2.0))
    if router.startswith("sparse-transport"):
        settings["iterations"] = random.choice((1, 5, 20, 20))
        settings["learning_rate"] = random.choice((1e-2, 1e-2, 5e-2))
        settings["gamma"] = random.choice((0.1, 1.0, 1.0, 3.0))
    return settings


def decided_by_rounding(case: Case) -> bool:
    """Whether two scores that compete differ by rounding only, and not by construction."""
    logits = case.x @ case.parameters["weight"].mT
    scores_of_groups = transcribe(case)[2]
    for members, scores in zip(groups_of(case), scores_of_groups, strict=True):
        rows = [tuple(logits[b, t].tolist()) for b, t in members]
        for (i, k), (j, m) in pairs_that_compete(case, scores):
            if abs(scores[i, k] - scores[j, m]) > CLOSE:
                continue
            same_by_construction = rows[i] == rows[j] and rows[i][k] == rows[j][m]
            # With one expert a softmax is 1 to the last bit, whatever the logits are.
            alone = scores.shape[1] == 1 and scores[i, k] == scores[j, m] == 1.0
            if case.router in SOLVED or not (same_by_construction or alone):
                return True
    if case.router == "sparse-transport-expert-choice":
        at_start = transcribe(case.but(iterations=0))[2]
        return any(
            bool(((plan > 0) & (plan < CLOSE_IN_PLAN)).any())
            or (case.settings["iterations"] > 1 and adam_follows_rounding(first))
            for plan, first in zip(scores_of_groups, at_start, strict=True)
        )
    return False


def adam_follows_rounding(plan: Tensor) -> bool:
    """Whether the solver starts at its optimum, so that its gradient is nothing but rounding.

    The rows of the plan sum to one from the start whenever no column is cut, because the rows of S
    do. Adam divides what rounding is left of the gradient by its own size and walks away: 1e-16,
    1e-10, 1e-4, then full steps, in a direction that no definition gives. A token alone is safe:
    its plan is the same wherever Adam goes.
    """
    return len(plan) > 1 and bool(((plan.sum(1) - 1).abs() < CLOSE).all())


Pair = tuple[int, int]


def pairs_that_compete(case: Case, scores: Tensor) -> Iterator[tuple[Pair, Pair]]:
    """Neighbours in the order by score, wherever that order matters to the outcome."""
    num_tokens, num_experts = scores.shape
    settings = settings_of_a_group(case, num_tokens)
    columns = [[(i, k) for i in range(num_tokens)] for k in range(num_experts)]
    fields: list[tuple[list[Pair], range]] = []  # who competes, and at which places it matters
    if case.router.endswith("token-choice"):
        for i in range(num_tokens):
            first = 1 if "capacity" in settings else settings["k"]
            fields.append(([(i, k) for k in range(num_experts)], range(first, settings["k"] + 1)))
        if settings.get("batch_prioritised"):
            best = [(i, int(scores[i].argmax())) for i in range(num_tokens)]
            fields.append((best, range(1, num_tokens)))
    elif case.router == "unified":
        fields.append(([pair for column in columns for pair in column], range(1, scores.numel())))
    elif case.router != "sparse-transport-expert-choice":
        capacity = settings["capacity"]
        fields.extend((column, range(capacity, capacity + 1)) for column in columns)
    for field_, places in fields:
        order = sorted(field_, key=lambda pair: -float(scores[pair]))
        for place in places:
            if 0 < place < len(order):
                yield order[place - 1], order[place]
