"""Tiny upcycled decoders in which nothing is left at a value that would hide a mistake."""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import moefold
from moefold import Copies, MoEConfig, UpcycleConfig, routers

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-3,
}

KINDS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "olmo": OlmoConfig,
    "olmo2": Olmo2Config,
}


def decoder(kind: str, auto: Any = AutoModelForCausalLM, **config: Any) -> PreTrainedModel:
    """A dense decoder in float64 and evaluation mode."""
    settings = {**TINY, **config}
    if kind == "olmo":
        del settings["rms_norm_eps"]
    return auto.from_config(KINDS[kind](**settings)).double().eval()


def mixed(
    model: PreTrainedModel,
    *,
    sites: str = "all",
    router: str = "token-choice",
    shared_width: int = 0,
    moe_at: dict[str, MoEConfig] | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Upcycles it, with experts that differ, norms, biases and a shared expert that do something.

    `decoder` initialises norms to one and biases to zero, and a shared expert adds nothing at
    birth: what a form loses of them would not show.
    """
    if router == "token-choice":
        settings = {"k": 2, "renormalize": True, **settings}
    moe = MoEConfig(
        num_experts=4, shared_width=shared_width, router=routers.config(router, **settings)
    )
    birth = Copies(copy_noise_std=0.3, router_std=0.5)
    config = UpcycleConfig(moe=moe, moe_at=moe_at or {}, sites=sites, birth=birth)
    moefold.upcycle(model, config, inputs=False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
        elif name.endswith("bias") or ".moe.shared." in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def batch() -> dict[str, torch.Tensor]:
    """Three sequences of 9, 5 and 1 tokens, padded on the left as for generation."""
    mask = torch.arange(9) >= torch.tensor([[0], [4], [8]])
    return {"input_ids": torch.randint(1, 64, (3, 9)) * mask, "attention_mask": mask.long()}
