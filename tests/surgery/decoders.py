"""Tiny random decoders, what to pad them with, and mixtures whose every choice shows.

model = decoder("llama")                       a LlamaForCausalLM in float64
upcycled(model, "token-choice", k=2)           in place; its experts differ
ids, mask = left_padded([7, 4, 1])             1111111 / ...1111 / ......1
"""

import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import moefold
from moefold import MoEConfig, UpcycleConfig, routers
from moefold.surgery import Copies

VOCABULARY, WINDOW = 60, 4

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    # Larger than usual, so that the MLPs matter to the output of so small a model.
    "initializer_range": 0.3,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1}
_GEMMA = {
    **_GROUPED,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralForCausalLM", {**_GROUPED, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", _GEMMA),
    "phi3": ("Phi3ForCausalLM", {**_GROUPED, "resid_pdrop": 0.0}),
    "gpt2": ("GPT2LMHeadModel", {**_SIZES, "n_inner": 24, **_NO_DROPOUT}),
    "gpt-neox": ("GPTNeoXForCausalLM", _SIZES),
    "olmo": ("OlmoForCausalLM", _GROUPED),
    "olmo2": ("Olmo2ForCausalLM", _GROUPED),
}
"""Every decoder surgery knows: its class with a head, and a tiny config; windows are 4 tokens."""

ATTENTIONS = [
    (form, attention)
    for form in DECODERS
    for attention in ("sdpa", "eager")
    if (form, attention) != ("gemma2", "sdpa")  # which caps its scores, and sdpa cannot
]
"""Every decoder with every way of attention it has on a CPU."""

# What may differ is the order of summation. sdpa is run in float64. Eager attention is run in
# float32, whose steps are 1e-7 of outputs of size 10: its masks hold the lowest number of the
# dtype, which becomes -inf in its softmax in float32, and a row of padding then all NaN.
TOLERANCE = {"sdpa": 1e-10, "eager": 1e-4}


def decoder(form: str, attention: str | None = None, **changes: Any) -> Any:
    """The dense model in evaluation mode; keyword arguments change its config."""
    attention = attention or ("eager" if form == "gemma2" else "sdpa")
    name, settings = DECODERS[form]
    kind = getattr(transformers, name)
    config = kind.config_class(**{**settings, "attn_implementation": attention, **changes})
    dtype = torch.float32 if attention == "eager" else torch.float64
    return kind(config).to(dtype).eval()


def upcycled(model: PreTrainedModel, router: str, *, spread: bool = True, **settings: Any) -> Any:
    """The same model, every MLP of it a mixture of four experts that differ."""
    moe = MoEConfig(num_experts=4, router=routers.config(router, **settings))
    # A router of some size, so that tokens differ in what they choose.
    config = UpcycleConfig(moe=moe, sites="all", birth=Copies(router_std=1.0))
    moefold.upcycle(model, config, inputs=False)
    if spread:
        spread_experts(model)
    return model


def spread_experts(model: nn.Module) -> None:
    """Makes experts differ, so that a change of routing is a change of output."""
    for module in model.modules():
        if isinstance(module, moefold.MoE):
            for parameter in module.experts.parameters():
                nn.init.normal_(parameter, std=0.3)


def checkpoint(model: PreTrainedModel, *, reentrant: bool) -> None:
    """Makes every layer compute itself again during backward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # older releases know no other name
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def left_padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Random tokens and their mask, padding on the left."""
    mask = torch.arange(max(lengths)).flip(0) < torch.tensor(lengths).unsqueeze(1)
    return torch.randint(5, VOCABULARY, mask.shape), mask.long()


def given(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Arguments of a forward pass; positions count real tokens."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def further(ids: Tensor, mask: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The same with more padding on the left, of ids that stand for something elsewhere."""
    return functional.pad(ids, (by, 0), value=9), functional.pad(mask, (by, 0))


def heard(record: moefold.Record, site: str) -> tuple[Tensor, Tensor]:
    """The choices and the masks of all passes of a record, one after the other."""
    routings: Any = record[site]
    chosen = torch.cat([routing.chosen for routing in routings], dim=1)
    masks = [
        torch.ones(routing.chosen.shape[:2], dtype=torch.bool)
        if routing.mask is None
        else routing.mask
        for routing in routings
    ]
    return chosen, torch.cat(masks, dim=1)
