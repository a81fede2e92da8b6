"""The layers surgery knows: for each, where it keeps its MLP.

Written from the sources of transformers 5 and timm 1; whether a layer at hand really computes what
its form says is checked when it is described (see `forms`).
"""

from typing import Any

from torch import nn

from moefold.surgery.hosts.base import Form
from moefold.surgery.hosts.forms import FORMS


def _transformers(module: str, layer: str) -> str:
    return f"transformers.models.{module}.modeling_{module}.{layer}"


def _decodes(layer: nn.Module, config: Any) -> bool:
    return bool(getattr(layer, "is_decoder", False))


def _attends_causally(layer: nn.Module, config: Any) -> bool:
    """A decoder does, unless its config makes an encoder of it, as embedding models do."""
    return bool(getattr(config, "is_causal", True))


def _gemma3_attends_causally(layer: nn.Module, config: Any) -> bool:
    attends = bool(layer.get_submodule("self_attn").is_causal)
    return attends and _attends_causally(layer, config)


def _is_text_of_clip(layer: nn.Module, config: Any) -> bool:
    return getattr(config, "model_type", None) == "clip_text_model"


def _register(name: str, summary: str, **form: Any) -> None:
    FORMS.register(name, Form(**form), summary=summary)


# Text encoders. BERT and its kin keep the MLP in two modules:
#     y = LayerNorm(a + dropout(output.dense(intermediate(a))))
_POST_NORM = {
    "up": "intermediate.dense",
    "down": "output.dense",
    "activation": "intermediate.intermediate_act_fn",
    "pieces": ("intermediate", "output.dense"),
}
_MAY_DECODE = {**_POST_NORM, "cache": "past_key_values", "causal": _decodes}

_register("bert", "BERT", layer=_transformers("bert", "BertLayer"), **_MAY_DECODE)
_register("roberta", "RoBERTa", layer=_transformers("roberta", "RobertaLayer"), **_MAY_DECODE)
_register(
    "xlm-roberta",
    "XLM-RoBERTa",
    layer=_transformers("xlm_roberta", "XLMRobertaLayer"),
    **_MAY_DECODE,
)
_register("mpnet", "MPNet", layer=_transformers("mpnet", "MPNetLayer"), **_POST_NORM)
_register(
    "deberta-v2",
    "DeBERTa v2, v3",
    layer=_transformers("deberta_v2", "DebertaV2Layer"),
    **_POST_NORM,
)
_register(
    "distilbert",
    "DistilBERT",
    layer=_transformers("distilbert", "TransformerBlock"),
    up="ffn.lin1",
    down="ffn.lin2",
    activation="ffn.activation",
    pieces=("ffn",),
    dropout="ffn.dropout",
)
_register(
    "modernbert",
    "ModernBERT",
    layer=_transformers("modernbert", "ModernBertEncoderLayer"),
    up="mlp.Wi",
    down="mlp.Wo",
    fused_gate=True,
    activation="mlp.act",
    inner_dropout="mlp.drop",
)

# Encoder-decoders. The MLP is in the last part of a block, after attention and cross-attention.
for _name, _module, _layer in (("t5", "t5", "T5Block"), ("umt5", "umt5", "UMT5Block")):
    _t5 = {
        "layer": _transformers(_module, _layer),
        "down": "layer.-1.DenseReluDense.wo",
        "activation": "layer.-1.DenseReluDense.act",
        "pieces": ("layer.-1.DenseReluDense",),
        "inner_dropout": "layer.-1.DenseReluDense.dropout",
        "cache": "past_key_values",
        "causal": _decodes,
    }
    _register(
        _name, f"{_name.upper()}, encoder and decoder", up="layer.-1.DenseReluDense.wi", **_t5
    )
    _register(
        f"{_name}-gated",
        f"{_name.upper()} 1.1, with gated MLPs",
        gate="layer.-1.DenseReluDense.wi_0",
        up="layer.-1.DenseReluDense.wi_1",
        **_t5,
    )

# Vision. There is no padding, so no mask but in the text tower of CLIP.
_FC = {"up": "mlp.fc1", "down": "mlp.fc2", "activation": "mlp.activation_fn"}

_register("vit", "ViT", layer=_transformers("vit", "ViTLayer"), **_FC)
_register("deit", "DeiT", layer=_transformers("deit", "DeiTLayer"), **_FC)
_register("dinov2", "DINOv2", layer=_transformers("dinov2", "Dinov2Layer"), **_FC)
_register(
    "clip",
    "CLIP, both towers",
    layer=_transformers("clip", "CLIPEncoderLayer"),
    causal=_is_text_of_clip,
    **_FC,
)
# SigLIP pools the last token of a text, padding or not: padding is a token like others.
_register(
    "siglip",
    "SigLIP, both towers",
    layer=_transformers("siglip", "SiglipEncoderLayer"),
    mask=None,
    **_FC,
)
_register(
    "timm-vit",
    "timm's VisionTransformer",
    layer="timm.models.vision_transformer.Block",
    up="mlp.fc1",
    down="mlp.fc2",
    activation="mlp.act",
    dropout="mlp.drop2",
    inner_dropout="mlp.drop1",
    mask=None,
)

# Gated MLPs in three matrices, as Llama has them.
_SWIGLU = {
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "activation": "mlp.act_fn",
}
_register(
    "dinov2-gated",
    "DINOv2 giant, with gated MLPs",
    layer=_transformers("dinov2", "Dinov2Layer"),
    **_SWIGLU,
)

# Decoders.
_DECODER = {"cache": "past_key_values", "causal": _attends_causally}
for _name, _module, _layer, _summary in (
    ("llama", "llama", "LlamaDecoderLayer", "Llama"),
    ("mistral", "mistral", "MistralDecoderLayer", "Mistral"),
    ("qwen2", "qwen2", "Qwen2DecoderLayer", "Qwen 2"),
    ("qwen3", "qwen3", "Qwen3DecoderLayer", "Qwen 3"),
    ("gemma2", "gemma2", "Gemma2DecoderLayer", "Gemma 2"),
    ("olmo", "olmo", "OlmoDecoderLayer", "OLMo"),
    ("olmo2", "olmo2", "Olmo2DecoderLayer", "OLMo 2"),
):
    _register(_name, _summary, layer=_transformers(_module, _layer), **_SWIGLU, **_DECODER)
_register(
    "gemma3",
    "Gemma 3, EmbeddingGemma too",
    layer=_transformers("gemma3", "Gemma3DecoderLayer"),
    **_SWIGLU,
    cache="past_key_values",
    causal=_gemma3_attends_causally,
)
_register(
    "phi3",
    "Phi 3",
    layer=_transformers("phi3", "Phi3DecoderLayer"),
    up="mlp.gate_up_proj",
    down="mlp.down_proj",
    fused_gate=True,
    activation="mlp.activation_fn",
    **_DECODER,
)
_register(
    "gpt2",
    "GPT-2",
    layer=_transformers("gpt2", "GPT2Block"),
    up="mlp.c_fc",
    down="mlp.c_proj",
    activation="mlp.act",
    dropout="mlp.dropout",
    **_DECODER,
)
_register(
    "gpt-neox",
    "GPT-NeoX, Pythia",
    layer=_transformers("gpt_neox", "GPTNeoXLayer"),
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    activation="mlp.act",
    cache="layer_past",
    causal=_attends_causally,
)
