"""What an embedding is made of, as data.

    kind      hidden            routing           concat             sum
    vector    h                 r                 [h ; r]            [unit h ; sqrt(a) unit r]

h is a hidden state of the model, r what its routers said of the same text, layer after layer. With
"sum" the dot product of two vectors is cos(h, h') + a cos(r, r').

Source: Li and Zhou, *Your Mixture-of-Experts LLM Is Secretly an Embedding Model For Free*, 2024
(MoEE), whose protocol Do et al., *Unified Sparse Mixture of Experts*, 2025, use.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

Kind = Literal["hidden", "routing", "concat", "sum"]
"""What the vector holds: a hidden state, routing weights, or both."""

Pooling = Literal["last", "mean", "weighted-mean"]
"""How the real tokens of a text become one vector."""

RoutingOf = Literal["logits", "softmax"]
"""What a router says of a token."""

Standardize = Literal["none", "batch", "fitted"]
"""Whose mean and deviation the features are measured by."""

Padding = Literal["left", "right"]
"""On which side of a text padding is."""

if TYPE_CHECKING:
    _Kind = Kind
    _Pooling = Pooling
    _RoutingOf = RoutingOf
    _Standardize = Standardize
    _Padding = Padding
else:  # any word may be given; what is wrong with it is said below, not by a type checker
    _Kind = _Pooling = _RoutingOf = _Standardize = _Padding = str

TEXT = "{text}"
"""What a template has in place of the text."""

PROMPTS = {
    "quotes": '"{text}"',
    "prompteol": 'This sentence : "{text}" means in one word:"',
}
"""Templates by name: the published `none` and `PromptEOL` (Jiang et al., 2023)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingConfig:
    """How a text becomes a vector.

    Attributes:
        kind: "hidden" for a hidden state, "routing" for routing weights, "concat" and "sum" for
            both.
        pooling: of hidden states: the last real token, the mean, or a mean in which the i-th token
            counts i times (Muennighoff, *SGPT*, 2022).
        layer: which hidden states; -1 for the last, after the final norm, 0 for the embeddings.
        routing_of: "logits", as the released code of MoEE and USMoE has it, or "softmax" over
            experts, as the paper of MoEE says.
        routing_pooling: of routing weights; both papers take the last token.
        similarity_weight: weight of the cosine of routing weights in "sum".
        prompt: None for the bare text, a name of `PROMPTS`, or a template that holds {text}.
        instruction: put before the text, inside the template, as published.
        clean_text: as published: "." after a text that does not end in one of .?!"', then double
            quotes become single ones and underscores spaces.
        standardize: "none"; "batch" as published for all kinds but "hidden" (vectors then depend on
            which texts share a batch); or "fitted", by what `fit` learnt from text once.
        max_length: most tokens of a text with its template, whose text is cut at its end; None for
            what the model's positions allow.
        padding: on which side; the vectors are the same.
        compete: routers with a causal inference rule let the whole text compete instead, as in
            training; a text that is whole has no future to hide.

    Raises:
        ValueError: a value is not one of those.
    """

    kind: _Kind = "hidden"
    pooling: _Pooling = "last"
    layer: int = -1
    routing_of: _RoutingOf = "logits"
    routing_pooling: _Pooling = "last"
    similarity_weight: float = 1.0
    prompt: str | None = None
    instruction: str = ""
    clean_text: bool = False
    standardize: _Standardize = "none"
    max_length: int | None = None
    padding: _Padding = "left"
    compete: bool = False

    def __post_init__(self) -> None:
        _check_word("kind", self.kind, Kind)
        _check_word("pooling", self.pooling, Pooling)
        _check_word("routing_of", self.routing_of, RoutingOf)
        _check_word("routing_pooling", self.routing_pooling, Pooling)
        _check_word("standardize", self.standardize, Standardize)
        _check_word("padding", self.padding, Padding)
        if not 0 <= self.similarity_weight < float("inf"):
            raise ValueError(
                f"similarity_weight is {self.similarity_weight}; it must be a finite number, zero "
                f"or more"
            )
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; it must be at least 1, or None")
        if self.template.count(TEXT) != 1:
            raise ValueError(
                f"prompt {self.prompt!r} has no place for the text; give one of "
                f"{', '.join(PROMPTS)}, or a template that holds {TEXT} once"
            )

    @classmethod
    def published(cls, kind: Kind = "hidden", *, prompteol: bool = False) -> "EmbeddingConfig":
        """The protocol of MoEE and USMoE, which depends on the batch for all kinds but "hidden".

        Args:
            kind: what the vector holds.
            prompteol: the template PromptEOL rather than plain quotes.
        """
        return cls(
            kind=kind,
            prompt="prompteol" if prompteol else "quotes",
            clean_text=True,
            standardize="none" if kind == "hidden" else "batch",
        )

    @property
    def template(self) -> str:
        """What is made of a text."""
        return TEXT if self.prompt is None else PROMPTS.get(self.prompt, self.prompt)

    @property
    def needs_routing(self) -> bool:
        """Whether the vector holds routing weights."""
        return self.kind != "hidden"

    @property
    def needs_hidden(self) -> bool:
        """Whether the vector holds a hidden state."""
        return self.kind != "routing"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "EmbeddingConfig":
        """The inverse of `to_dict`; what is missing keeps its default.

        Raises:
            ValueError: an unknown setting.
        """
        known = {part.name for part in fields(cls)}
        if strangers := set(data) - known:
            raise ValueError(
                f"EmbeddingConfig has no setting {', '.join(map(repr, sorted(strangers)))}; it has "
                f"{', '.join(sorted(known))}"
            )
        return cls(**data)


def _check_word(name: str, value: str, words: Any) -> None:
    allowed = get_args(words)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
