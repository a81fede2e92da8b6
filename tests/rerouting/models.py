"""Tiny pretrained mixtures of every class that can be rerouted: random, but with gates that choose.

Shapes: 2 layers, width 16, 6 or 8 experts, top 2.
"""

from typing import Any

import torch
import transformers
from torch import nn

COMMON = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
LATENT = {
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "moe_intermediate_size": 12,
    "n_shared_experts": 1,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
FEW_GROUPS = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}

# name: the prefix of its classes, and what its config has beside COMMON
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("Olmoe", {"num_experts": 6}),
    "mixtral": ("Mixtral", {"num_local_experts": 6}),
    "qwen2-moe": (
        "Qwen2Moe",
        {"num_experts": 6, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12},
    ),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 6, "moe_intermediate_size": 12, "head_dim": 8}),
    "deepseek-v2": ("DeepseekV2", {"n_routed_experts": 6, **LATENT, **FEW_GROUPS}),
    "deepseek-v3": (
        "DeepseekV3",
        {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, **LATENT},
    ),
    "gpt-oss": ("GptOss", {"num_local_experts": 6, "head_dim": 8}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 6}),
    "phimoe": ("Phimoe", {"num_local_experts": 6}),
}


def build(kind: str, **changes: object) -> Any:
    """A model of the kind in evaluation mode, in float32: some experts refuse float64."""
    prefix, settings = KINDS[kind]
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **settings, **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight")):
            nn.init.normal_(parameter, std=0.5)  # tokens differ in what they choose
        elif ".experts." in name:
            nn.init.normal_(parameter, std=0.3)  # and experts in what they do
    return model


def texts(tokens: int = 24) -> dict[str, torch.Tensor]:
    """Two sequences, the second half as long, padded on the right."""
    mask = torch.arange(tokens) < torch.tensor([[tokens], [tokens // 2]])
    ids = torch.randint(3, 60, (2, tokens)) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}
