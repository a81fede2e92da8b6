"""One tiny random model for every form that is registered, and what to give it.

    case = CASES["bert"]
    case.build()      the dense model: made by its real class, float64, evaluation mode
    case.inputs()     arguments of its forward pass: real tokens and padding, pixels, or both

Layouts: 1 is a real token, . is padding. Texts are 1111111 / 1111... / 1......, a decoder of an
encoder-decoder gets 11111 / 111.. / 1...., images have 4 patches.
"""

import importlib
import tempfile
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from moefold.testing.contract import from_seed

VOCABULARY, LENGTHS, DECODED = 60, (7, 4, 1), (5, 3, 1)
PAD = 1

_GPT2_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    # Larger than usual, so that the MLPs matter to the output of so small a model.
    "initializer_range": 0.3,
}
_BERT = {**_SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_IMAGES = {"image_size": 8, "patch_size": 4}
_VISION = {
    **{name: _SIZES[name] for name in _SIZES if "size" in name or "num" in name},
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    **_IMAGES,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "pad_token_id": PAD,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    # The class divides by sqrt(d_model): three times a T5 of its width.
    "initializer_factor": 3.0,
}
_GQA = {**_SIZES, "num_key_value_heads": 1}
_GEMMA = {
    **_GQA,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A tiny model of one form.

    Attributes:
        form: name of the form.
        model: the real class, in transformers; or how to build a model of another library.
        settings: of its config.
        text: whether it takes token ids.
        images: whether it takes pixels.
        decodes: whether its decoder takes token ids of its own.
        sides: where texts may be padded.
        exceptions: what such a host is known not to keep, and why.
        head: a class with a head, and the Auto class that opens it.
        layers: number of layers with an MLP.
    """

    form: str
    model: str | Callable[[], nn.Module]
    settings: Mapping[str, Any] = field(default_factory=dict)
    text: bool = True
    images: bool = False
    decodes: bool = False
    sides: tuple[str, ...] = ()
    exceptions: Mapping[str, str] = field(default_factory=dict)
    head: tuple[str, str] | None = None
    layers: int = 2

    def __str__(self) -> str:
        return self.form

    @property
    def of_transformers(self) -> bool:
        """Whether the model is one of transformers."""
        return isinstance(self.model, str)

    def build(self, model: str | None = None, **changes: Any) -> nn.Module:
        """The dense model, the same whenever it is built.

        Args:
            model: another class for the same config.
            **changes: to the config.
        """
        with from_seed(0):
            if not isinstance(self.model, str):
                made = self.model()
            else:
                kind = getattr(transformers, model or self.model)
                made = kind(kind.config_class(**{**self.settings, **changes}))
                _stir(made)
        return made.double().eval()

    def opened(self, **changes: Any) -> nn.Module:
        """The same as the real class opens it from the folder it saved it in."""
        made = self.build(**changes)
        if not isinstance(made, transformers.PreTrainedModel):
            return made
        with tempfile.TemporaryDirectory() as folder:
            made.save_pretrained(folder)
            return type(made).from_pretrained(folder, dtype=torch.float64).eval()

    def inputs(self) -> dict[str, Tensor]:
        """Arguments of the model's forward pass."""
        with from_seed(1):
            given: dict[str, Tensor] = {}
            if self.text:
                given.update(_texts(LENGTHS, ""))
            if self.decodes:
                given.update(_texts(DECODED, "decoder_"))
            if self.images:
                given["pixel_values" if self.of_transformers else "x"] = torch.randn(
                    3, 3, 8, 8, dtype=torch.float64
                )
        return given


def _texts(lengths: tuple[int, ...], prefix: str) -> dict[str, Tensor]:
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(5, VOCABULARY, mask.shape).masked_fill(~mask, PAD)
    # CLIP pools the token of the highest id: the last of each text.
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = VOCABULARY - 1
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask.long()}


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Draws what starts at zero or one, so that no scale or bias can be forgotten unseen."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            start = 0.0 if name.endswith("bias") or "gemma" in type(model).__module__ else 1.0
            parameter.copy_(start + 0.3 * torch.randn_like(parameter))


class StandInMlp(nn.Module):
    """As timm.layers.Mlp, with the same names."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(width, dim)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


class StandInAttention(nn.Module):
    """As timm.layers.Attention, with the same names."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        batch, tokens, dim = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, attn_mask=attn_mask)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class StandInBlock(nn.Module):
    """As timm.models.vision_transformer.Block, with the same names."""

    def __init__(self, dim: int = 16, heads: int = 2, width: int = 24) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = StandInAttention(dim, heads)
        self.ls1 = nn.Identity()
        self.drop_path1 = nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = StandInMlp(dim, width)
        self.ls2 = nn.Identity()
        self.drop_path2 = nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class StandInViT(nn.Module):
    """As timm's VisionTransformer, as far as it matters to a block."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 4, stride=4)
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 16))
        self.grad_checkpointing = False
        self.blocks = nn.Sequential(StandInBlock(), StandInBlock())
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            if self.grad_checkpointing:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)  # pyright: ignore
            else:
                x = block(x)
        return self.head(self.norm(x).mean(1))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable


_TIMM = "timm.models.vision_transformer"
# Forms are found by the full name of a class, and a pickle finds the class itself by it.
StandInBlock.__module__, StandInBlock.__qualname__, StandInBlock.__name__ = _TIMM, "Block", "Block"


def stand_in_for_timm() -> dict[str, types.ModuleType]:
    """Modules to find the stand-in in, where timm itself cannot be imported; else nothing."""
    if _timm() is not None:
        return {}
    modules = {}
    for name in ("timm", "timm.models", _TIMM):
        modules[name] = types.ModuleType(name)
        modules[name].__spec__ = ModuleSpec(name, None)
    modules[_TIMM].Block = StandInBlock  # pyright: ignore[reportAttributeAccessIssue]
    return modules


def _timm() -> Any:
    try:
        return importlib.import_module(_TIMM)
    except ImportError:  # timm is not there, or what it needs is not
        return None


def build_vit() -> nn.Module:
    """timm's own VisionTransformer where it can be had."""
    timm = _timm()
    if timm is None or not hasattr(timm, "VisionTransformer"):
        return StandInViT()
    return timm.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1.5, num_classes=5
    )


def _decoder(
    form: str, name: str, sides: tuple[str, ...] = ("right", "left"), **settings: Any
) -> Case:
    head = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
    return Case(
        form=form,
        model=f"{name}Model",
        settings={**_GQA, **settings},
        sides=sides,
        head=(head.get(name, f"{name}ForCausalLM"), "AutoModelForCausalLM"),
    )


def _encoder(
    form: str, name: str, exceptions: Mapping[str, str] | None = None, **settings: Any
) -> Case:
    return Case(
        form=form,
        model=f"{name}Model",
        settings={**_BERT, **settings},
        sides=("right",),
        exceptions=exceptions or {},
        head=(f"{name}ForMaskedLM", "AutoModelForMaskedLM"),
    )


def _t5(form: str, name: str, **settings: Any) -> Case:
    return Case(
        form=form,
        model=f"{name}Model",
        settings={**_T5, **settings},
        decodes=True,
        sides=("right",),
        layers=4,
        head=(f"{name}ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    )


def _vision(form: str, name: str, **settings: Any) -> Case:
    return Case(
        form=form,
        model=f"{name}Model",
        settings={**_VISION, **settings},
        text=False,
        images=True,
        head=(f"{name}ForImageClassification", "AutoModelForImageClassification"),
    )


def _towers(form: str, name: str, sides: tuple[str, ...], **settings: Any) -> Case:
    text = {**_BERT, "projection_dim": 12, **settings}
    vision = {**_VISION, "projection_dim": 12, **settings}
    return Case(
        form=form,
        model=f"{name}Model",
        settings={"text_config": text, "vision_config": vision, "projection_dim": 12},
        images=True,
        sides=sides,
        layers=4,
        head=(f"{name}ForImageClassification", "AutoModelForImageClassification"),
    )


CASES: dict[str, Case] = {
    case.form: case
    for case in (
        _encoder("bert", "Bert"),
        _encoder("roberta", "Roberta"),
        _encoder("xlm-roberta", "XLMRoberta"),
        _encoder("mpnet", "MPNet", {"checkpointing": "transformers does not offer it for MPNet"}),
        _encoder(
            "deberta-v2",
            "DebertaV2",
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
        Case(
            form="distilbert",
            model="DistilBertModel",
            settings={
                "vocab_size": VOCABULARY,
                "dim": 16,
                "n_layers": 2,
                "n_heads": 2,
                "hidden_dim": 24,
                "max_position_embeddings": 40,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "pad_token_id": PAD,
                "initializer_range": 0.3,
            },
            sides=("right",),
            head=("DistilBertForMaskedLM", "AutoModelForMaskedLM"),
        ),
        _encoder(
            "modernbert",
            "ModernBert",
            # The first layer attends everywhere, the second to two tokens on each side.
            layer_types=["full_attention", "sliding_attention"],
            local_attention=4,
            cls_token_id=0,
            sep_token_id=2,
            attention_bias=True,
            mlp_bias=True,
            norm_bias=True,
        ),
        _t5("t5", "T5"),
        _t5("t5-gated", "T5", feed_forward_proj="gated-gelu"),
        _t5("umt5", "UMT5", feed_forward_proj="relu"),
        _t5("umt5-gated", "UMT5", feed_forward_proj="gated-gelu"),
        _vision("vit", "ViT"),
        _vision("deit", "DeiT"),
        _vision("dinov2", "Dinov2", mlp_ratio=2),
        _vision("dinov2-gated", "Dinov2", mlp_ratio=2, use_swiglu_ffn=True),
        _towers("clip", "CLIP", sides=("right",), initializer_factor=2.0),
        # Pools the last token, padding or not: texts are as long as they are.
        _towers("siglip", "Siglip", sides=(), bos_token_id=0, eos_token_id=2),
        Case(form="timm-vit", model=build_vit, text=False, images=True),
        _decoder("llama", "Llama", attention_bias=True, mlp_bias=True),
        _decoder("mistral", "Mistral", sliding_window=4),
        _decoder("qwen2", "Qwen2"),
        _decoder("qwen3", "Qwen3", head_dim=8),
        # Its attention is eager: padding that sees nothing but padding becomes NaN in float64.
        _decoder("gemma2", "Gemma2", ("right",), **{**_GEMMA, "sliding_window": 16}),
        _decoder("gemma3", "Gemma3Text", **_GEMMA),
        _decoder("olmo", "Olmo"),
        _decoder("olmo2", "Olmo2"),
        _decoder("phi3", "Phi3", resid_pdrop=0.0),
        _decoder("gpt2", "GPT2", n_inner=24, **dict.fromkeys(_GPT2_DROPOUT, 0.0)),
        _decoder("gpt-neox", "GPTNeoX"),
    )
}
