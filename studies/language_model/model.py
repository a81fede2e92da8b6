"""The model, how a trained one is kept, and how it is opened under a router.

It is OLMoE's class at a small size, with tied embeddings. All routers of a seed begin with the same
weights: a router for logits that a gate computes draws none of its own.
"""

from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from transformers import OlmoeConfig, OlmoeForCausalLM

import moefold
from moefold.evaluate.files import whole_file
from moefold.routers import RouterConfig
from studies.language_model.settings import Settings

REROUTER = ".rerouter."
"""In the names of what a router learns without gradient."""

FASTEST = "grouped_mm"
"""How experts are computed: on one core the fastest of what transformers offers at this size."""


def new_model(settings: Settings, seed: int) -> OlmoeForCausalLM:
    """The model before training, the same for every router."""
    torch.manual_seed(seed)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.dim,
            intermediate_size=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            num_experts=settings.experts,
            num_experts_per_tok=int(settings.budget),
            max_position_embeddings=4 * settings.length,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=0,
            router_aux_loss_coef=settings.balance,
            experts_implementation=FASTEST,  # pyright: ignore[reportCallIssue]
        )
    )


def save_trained(model: OlmoeForCausalLM, path: Path) -> None:
    """Writes the weights, and what the routers learnt, whole or not at all."""
    with whole_file(path) as beside:
        save_model(model, str(beside))


def open_trained(
    settings: Settings, path: Path, router: RouterConfig | None, *, learnt: bool = False
) -> OlmoeForCausalLM:
    """A trained model in evaluation mode.

    Args:
        settings: of the study.
        path: its weights.
        router: what chooses; None for the model's own top k.
        learnt: whether the router takes over what was learnt with it in training.
    """
    model = new_model(settings, 0)
    if not learnt:
        _load(model, path)
    moefold.reroute(model, "token-choice" if router is None else router)
    if learnt:
        _load(model, path)
    return model.eval()


def _load(model: OlmoeForCausalLM, path: Path) -> None:
    missing, unexpected = load_model(model, path, strict=False)
    own = [name for name in missing if REROUTER not in name]
    strange = [name for name in unexpected if REROUTER not in name]
    assert not own, f"{path} has no {own}"
    assert not strange, f"{path} has {strange}, which the model has not"


def parameters(settings: Settings) -> dict[str, int]:
    """How many there are, and how many of them a token uses at the budget; embeddings once."""
    with torch.device("meta"):
        model = new_model(settings, 0)
    every = sum(p.numel() for p in model.parameters())
    in_experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    used = every - in_experts + round(in_experts * settings.budget / settings.experts)
    return {"all": every, "active": used, "embeddings": settings.vocabulary * settings.dim}
