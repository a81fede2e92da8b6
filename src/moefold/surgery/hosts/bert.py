"""BERT: the MLP of a layer is the pair `intermediate.dense`, `output.dense`.

    BertLayer:     a = attention(x);  y = LayerNorm(a + dropout(down(act(up(a)))))
    BertMoELayer:  a = attention(x);  y = LayerNorm(a + dropout(moe(a, mask)))

Attention, dropout, LayerNorm and the residual stay the host's own modules. The mask is read from
the layer's own attention mask inside its forward, so it is the right one under gradient
checkpointing too, whatever ran between a forward pass and its backward.

Shapes: `batch tokens dim` hidden states; an attention mask is None, `[batch, keys]` (flash) or
`[batch, heads or 1, queries, keys]` (eager: added to the scores, sdpa: True where attended).
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)
from transformers.models.bert.modeling_bert import BertLayer, BertOutput

from moefold.experts import activations
from moefold.moe import MoE, MoEConfig
from moefold.surgery.hosts.base import AbstractHost, Changes, DenseMLP, Site

_HEADS = (BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification)


@final
class BertMoEOutput(BertOutput):
    """What follows the mixture: dropout, residual, LayerNorm; the host's own modules."""

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        input_tensor: Float[Tensor, "batch tokens dim"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """Adds the mixture's output to its input and normalises."""
        return self.LayerNorm(self.dropout(hidden_states) + input_tensor)


@final
class BertMoELayer(BertLayer):
    """A BertLayer whose MLP is a mixture that is told which tokens are real.

    A subclass, because transformers finds the layers whose outputs it records by their class.
    `chunk_size_feed_forward` is not followed: a chunk is not a group of tokens that compete.
    """

    moe: MoE

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attention, then the mixture.

        Raises:
            ValueError: several sequences are packed into one without padding and the router looks
                at more than one token, so that it would mix them; or there is an encoder to attend
                to, for which this layer has nothing.
        """
        if self.is_decoder and encoder_hidden_states is not None:
            raise ValueError(
                f"{self.moe.site}: encoder_hidden_states were passed, but the layer has no "
                f"cross-attention; call the model without them"
            )
        if kwargs.get("cu_seq_lens_q") is not None and self.moe.router.reach != "token":
            raise ValueError(
                f"{self.moe.site}: the batch is packed into one sequence, and a router that "
                f"reaches the {self.moe.router.reach} would mix its sequences; pad it instead "
                f"(SentenceTransformer: model[0].unpad_inputs = False)"
            )
        attended, _ = self.attention(
            hidden_states, attention_mask, past_key_values=past_key_values, **kwargs
        )
        mask = real_tokens(attention_mask, attended)
        return self.output(self.moe(attended, mask), attended)


def real_tokens(
    attention_mask: object, hidden: Float[Tensor, "batch tokens dim"]
) -> Bool[Tensor, "batch tokens"] | None:
    """Which tokens are real, as an attention mask says it.

    A token is real if it may attend to itself: in a bidirectional mask its column is attended or
    not as a whole, in a causal one the diagonal is what padding takes away.

    Args:
        attention_mask: what the layer was given, see the module's docstring.
        hidden: the tokens that the mask's last queries belong to.

    Returns:
        True for real tokens; None if the mask is None, that is, all are.

    Raises:
        ValueError: a mask of another form (flex attention's blocks).
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim not in (2, 4):
        shape = getattr(attention_mask, "shape", None)
        raise ValueError(
            f"cannot tell the real tokens from an attention mask of type "
            f"{type(attention_mask).__name__} and shape {shape}; load the model with "
            f"attn_implementation 'sdpa', 'eager' or 'flash_attention_2'"
        )
    batch, tokens = hidden.shape[:2]
    if attention_mask.ndim == 2:
        own = attention_mask[:, -tokens:]
    elif attention_mask.shape[2] == 1:
        own = attention_mask[:, 0, 0, -tokens:]
    else:
        queries, keys = attention_mask.shape[2:]
        own = attention_mask[:, 0].diagonal(offset=keys - queries, dim1=-2, dim2=-1)
    if own.is_floating_point():
        own = own > torch.finfo(own.dtype).min / 2
    return own.ne(0).expand(batch, tokens)


@final
class BertHost(AbstractHost):
    """BertModel, or one of the heads on it that this module registers."""

    name = "bert"

    def claims(self, model: nn.Module) -> bool:
        """Whether the model is a BertModel or one of the known heads."""
        return isinstance(model, (BertModel, *_HEADS))

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """One for each layer of the encoder, `encoder.layer.0` and so on."""
        bert, prefix = _body(model)
        layers = enumerate(bert.encoder.layer)
        return tuple(_site(f"{prefix}encoder.layer.{i}", layer, bert) for i, layer in layers)

    def install(self, model: nn.Module, site: Site, moe: MoE, changes: Changes) -> None:
        """Makes the layer a BertMoELayer; its two Linear modules leave the tree."""
        output = site.layer.get_submodule("output")
        changes.replace_children(output, dense=None)
        changes.become(output, BertMoEOutput)
        changes.replace_children(site.layer, intermediate=None, moe=moe)
        changes.become(site.layer, BertMoELayer)

    def sign(self, model: nn.Module, section: Mapping[str, Any], changes: Changes) -> None:
        """Gives the model a config of type `moefold_bert`; a stock library does not know the type.

        The config is a copy: another model may hold the old one.
        """
        bert, prefix = _body(model)
        old = bert.config
        new = copy.deepcopy(old)
        new.__class__ = MoefoldBertConfig
        sites = {name.removeprefix(prefix): moe for name, moe in section["sites"].items()}
        new.moefold = {**section, "sites": sites}
        for module in model.modules():
            if module.__dict__.get("config") is old:
                changes.set_attribute(module, "config", new)

    def section(self, model: nn.Module) -> dict[str, Any] | None:
        """The `moefold` entry of the config."""
        bert, prefix = _body(model)
        if not isinstance(bert.config, MoefoldBertConfig) or bert.config.moefold is None:
            return None
        section = bert.config.moefold
        sites = {prefix + name: moe for name, moe in section["sites"].items()}
        return {**section, "sites": sites}

    def dense_flops(self, model: nn.Module, tokens: int) -> float:
        """Matrix products of all layers: four projections, the two of attention, the MLP.

        Two operations for each multiply-add; embeddings, norms and heads are left out.
        """
        config = _body(model)[0].config
        dim, width = config.hidden_size, config.intermediate_size
        layer = 2 * (4 * dim * dim + 2 * tokens * dim + 2 * dim * width)
        return float(layer * config.num_hidden_layers)

    def source(self, model: nn.Module) -> str:
        """The folder or name the model was loaded from."""
        return str(_body(model)[0].config.name_or_path or "")

    def write(self, model: nn.Module, folder: Path) -> None:
        """What `save_pretrained` writes."""
        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(folder)

    def read(self, folder: Path) -> nn.Module:
        """Opens the folder with the class that wrote it, on the CPU, in evaluation mode."""
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        architecture = (config.architectures or ["BertModel"])[0].removeprefix("Moefold")
        kinds = {kind.__name__.removeprefix("Moefold"): kind for kind in _MOE_CLASSES}
        if not isinstance(config, MoefoldBertConfig) or architecture not in kinds:
            raise ValueError(
                f"{folder}/config.json describes a {architecture} of type {config.model_type!r}; "
                f"it must be one of {', '.join(sorted(kinds))} of type 'moefold_bert'"
            )
        return _read_strictly(kinds[architecture], folder)


def _body(model: nn.Module) -> tuple[BertModel, str]:
    if isinstance(model, BertModel):
        return model, ""
    body = model.get_submodule("bert")
    assert isinstance(body, BertModel)
    return body, "bert."


def _site(name: str, layer: nn.Module, bert: BertModel) -> Site:
    """Describes a layer; gathers all the reasons against it."""
    config = bert.config
    reasons: list[str] = []
    mlp = None
    if isinstance(layer, BertMoELayer):
        reasons.append("is already a mixture of experts")
    elif type(layer) is not BertLayer:
        reasons.append(f"is a {type(layer).__qualname__}, not the BertLayer of transformers")
    else:
        up, down = layer.intermediate.dense, layer.output.dense
        if type(up) is nn.Linear and type(down) is nn.Linear and up.weight.is_floating_point():
            mlp = DenseMLP(up=up.weight, up_bias=up.bias, down=down.weight, down_bias=down.bias)
        else:
            reasons.append(
                f"its MLP is made of {type(up).__qualname__} ({up.weight.dtype}) and "
                f"{type(down).__qualname__}, whose weights cannot be copied as they are (merge "
                f"adapters and dequantise first)"
            )
        if hasattr(layer, "crossattention"):
            reasons.append("has cross-attention, which this host does not handle")
    try:
        activations.canonical(config.hidden_act)
    except ValueError as error:
        reasons.append(f"cannot be copied: {error}")
    return Site(
        name=name,
        layer=layer,
        dim=config.hidden_size,
        width=config.intermediate_size,
        activation=config.hidden_act,
        causal=config.is_decoder,
        mlp=mlp,
        reasons_against=tuple(reasons),
    )


class MoefoldBertConfig(BertConfig):
    """A BertConfig that says which layers are mixtures, in the entry `moefold`."""

    # Configs of transformers take whatever stands in the file; a typed __init__ would not.
    __no_type_check__ = True

    model_type = "moefold_bert"
    moefold: dict[str, Any] | None = None


def _rebuild(model: PreTrainedModel) -> None:
    """Makes a model whose `__init__` built every layer dense what its config says."""
    host, config = BertHost(), model.config
    section = host.section(model)
    if section is None:
        raise ValueError(
            f"a {type(config).__name__} without its `moefold` entry describes no mixture; upcycle "
            f"a dense model with moefold.upcycle"
        )
    sites = {site.name: site for site in host.sites(model)}
    for name, moe in section["sites"].items():
        if name not in sites:
            raise ValueError(f"the config lists the site {name!r}; the model has {list(sites)}")
        site = sites[name]
        built = MoEConfig.from_dict(moe).build(site.dim, causal=site.causal, site=name)
        if site.mlp is not None:
            built.to(site.mlp.up.dtype)
        host.install(model, site, built, Changes())


@final
class MoefoldBertModel(BertModel):
    """BertModel with mixtures of experts, as `from_pretrained` opens a saved one."""

    config_class = MoefoldBertConfig

    def __init__(self, config: MoefoldBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        _rebuild(self)


@final
class MoefoldBertForMaskedLM(BertForMaskedLM):
    """BertForMaskedLM with mixtures of experts."""

    config_class = MoefoldBertConfig

    def __init__(self, config: MoefoldBertConfig) -> None:
        super().__init__(config)
        _rebuild(self)


@final
class MoefoldBertForSequenceClassification(BertForSequenceClassification):
    """BertForSequenceClassification with mixtures of experts."""

    config_class = MoefoldBertConfig

    def __init__(self, config: MoefoldBertConfig) -> None:
        super().__init__(config)
        _rebuild(self)


@final
class MoefoldBertForTokenClassification(BertForTokenClassification):
    """BertForTokenClassification with mixtures of experts."""

    config_class = MoefoldBertConfig

    def __init__(self, config: MoefoldBertConfig) -> None:
        super().__init__(config)
        _rebuild(self)


_MOE_CLASSES = (
    MoefoldBertModel,
    MoefoldBertForMaskedLM,
    MoefoldBertForSequenceClassification,
    MoefoldBertForTokenClassification,
)

AutoConfig.register("moefold_bert", MoefoldBertConfig)
AutoModel.register(MoefoldBertConfig, MoefoldBertModel)
AutoModelForMaskedLM.register(MoefoldBertConfig, MoefoldBertForMaskedLM)
AutoModelForSequenceClassification.register(MoefoldBertConfig, MoefoldBertForSequenceClassification)
AutoModelForTokenClassification.register(MoefoldBertConfig, MoefoldBertForTokenClassification)


def _read_strictly(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """`from_pretrained`, which only warns of weights it lacks, made to refuse."""
    loaded = kind.from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused below by name
    )
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    wrong = {name: sorted(map(str, info[name])) for name in _WRONG if info.get(name)}
    if wrong:
        raise ValueError(
            f"the weights in {folder} are not those of the model it describes: {wrong}"
        )
    return model.eval()


_WRONG = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
