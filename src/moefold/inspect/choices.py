"""Who chooses whom: what the routings of many texts say about every expert.

    tally = Tally()
    with moefold.record_routing(model) as record:
        for features, tokens in batches:
            model(features)
            tally.add(record, tokens)
            record.clear()
    choices = tally.choices()

Shapes: `batch tokens experts` for one forward pass; `experts`, `experts experts` and, while
counting, `vocabulary experts` for the whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from moefold.metrics import metrics
from moefold.record import Record
from moefold.routing import Routing, SparseRouting

Tokens = Sequence[Sequence[str | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteChoices:
    """What happened at one site.

    Attributes:
        site: name of the layer.
        load: share of the rows of each expert (of the combine weight, if soft); sums to 1.
        mass: share of the combine weight of each expert; sums to 1.
        dead: experts that nothing was sent to.
        coactivation: of the tokens of expert i, the share that expert j has too; None if soft, for
            then every expert has every token.
        metrics: scalar metrics, averaged over forward passes.
        characteristic: for each expert its most typical tokens as (token, z, times chosen).
    """

    site: str
    load: tuple[float, ...]
    mass: tuple[float, ...]
    dead: tuple[int, ...]
    coactivation: tuple[tuple[float, ...], ...] | None
    metrics: dict[str, float]
    characteristic: tuple[tuple[tuple[str, float, int], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Who chose whom at every site, and token by token in a few texts.

    Attributes:
        sites: one entry per MoE layer.
        texts: the tokens of the texts that were kept.
        chosen: by site, text and token: (expert, weight) pairs, heaviest first.
        tokens: how many tokens were counted at each site.
    """

    sites: tuple[SiteChoices, ...]
    texts: tuple[tuple[str, ...], ...]
    chosen: dict[str, tuple[tuple[tuple[tuple[int, float], ...], ...], ...]]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Choices":
        """The inverse of `to_dict`, also of what came back from JSON."""
        sites = tuple(SiteChoices(**{**site, **_frozen(site)}) for site in data["sites"])
        return cls(
            sites=sites,
            texts=_tuples(data["texts"]),
            chosen={site: _tuples(texts) for site, texts in data["chosen"].items()},
            tokens=data["tokens"],
        )


class Tally:
    """Counts over many forward passes.

    Args:
        keep: how many texts to keep token by token.
        typical: how many characteristic tokens to list per expert.
    """

    def __init__(self, *, keep: int = 0, typical: int = 12) -> None:
        self._keep = keep
        self._typical = typical
        self._words: dict[str, int] = {}
        self._sites: dict[str, _Counts] = {}
        self._texts: list[tuple[str, ...]] = []
        self._chosen: dict[str, list[Any]] = {}
        self._tokens = 0

    def add(self, record: Record, tokens: Tokens) -> None:
        """Count the last forward pass of a record.

        Args:
            record: open or closed; every site must have at least one routing.
            tokens: for each sequence and position the token as text, None where it is padding or
                should not be counted. Sequences may be shorter than the batch is wide.

        Raises:
            ValueError: if the record is empty, or has another number of sequences or tokens.
        """
        last = {site: record[site][-1] for site in record if record[site]}
        if len(last) < len(record.sites) or not last:
            raise ValueError("the record holds no routing of some layer; run the model inside it")
        kept = range(min(self._keep - len(self._texts), len(tokens)))
        for site, routing in last.items():
            weights, chosen = _pairs(routing)
            _check_shape(site, weights, tokens)
            flat = [
                (row, column, self._words.setdefault(word, len(self._words)))
                for row, sequence in enumerate(tokens)
                for column, word in enumerate(sequence)
                if word is not None
            ]
            where = np.array(flat, dtype=np.int64).reshape(-1, 3)
            counts = self._sites.setdefault(site, _Counts(weights.shape[-1]))
            counts.add(
                routing,
                weights[where[:, 0], where[:, 1]],
                chosen[where[:, 0], where[:, 1]],
                where[:, 2],
            )
            texts = self._chosen.setdefault(site, [])
            texts.extend(_token_by_token(weights[i], chosen[i], tokens[i]) for i in kept)
        self._texts.extend(tuple(word for word in tokens[i] if word is not None) for i in kept)
        self._tokens += sum(word is not None for sequence in tokens for word in sequence)

    def choices(self) -> Choices:
        """What was counted.

        Raises:
            ValueError: if nothing was.
        """
        if not self._sites:
            raise ValueError("nothing was counted; call add at least once")
        words = list(self._words)
        return Choices(
            sites=tuple(
                counts.summary(site, words, self._typical) for site, counts in self._sites.items()
            ),
            texts=tuple(self._texts),
            chosen={site: tuple(texts) for site, texts in self._chosen.items()},
            tokens=self._tokens,
        )


class _Counts:
    """The sums of one site."""

    def __init__(self, experts: int) -> None:
        self.rows = np.zeros(experts)
        self.weight = np.zeros(experts)
        self.together: np.ndarray | None = np.zeros((experts, experts))
        self.of_word = np.zeros((0, experts))
        self.metrics: list[dict[str, float]] = []

    def add(
        self,
        routing: Routing,
        weights: Float[np.ndarray, "counted experts"],
        chosen: Float[np.ndarray, "counted experts"],
        words: np.ndarray,
    ) -> None:
        self.rows += chosen.sum(0)
        self.weight += weights.sum(0)
        if isinstance(routing, SparseRouting) and self.together is not None:
            self.together += chosen.T @ chosen
        else:
            self.together = None
        missing = words.max(initial=-1) + 1 - len(self.of_word)
        if missing > 0:
            grown = np.zeros((2 * missing + len(self.of_word), len(self.rows)))
            grown[: len(self.of_word)] = self.of_word
            self.of_word = grown
        np.add.at(self.of_word, words, chosen)
        self.metrics.append(metrics(routing))

    def summary(self, site: str, words: list[str], typical: int) -> SiteChoices:
        coactivation = None
        if self.together is not None:
            own = np.maximum(self.together.diagonal(), 1)[:, None]
            coactivation = _tuples((self.together / own).tolist())
        names = self.metrics[0]
        return SiteChoices(
            site=site,
            load=tuple((self.rows / max(self.rows.sum(), 1e-12)).tolist()),
            mass=tuple((self.weight / max(self.weight.sum(), 1e-12)).tolist()),
            dead=tuple(np.flatnonzero(self.rows == 0).tolist()),
            coactivation=coactivation,
            metrics={n: float(np.mean([m[n] for m in self.metrics])) for n in names},
            characteristic=characteristic(self.of_word[: len(words)], words, typical),
        )


def characteristic(
    counts: Float[np.ndarray, "vocabulary experts"], words: Sequence[str], most: int
) -> tuple[tuple[tuple[str, float, int], ...], ...]:
    """For each expert the tokens it gets most out of proportion.

    The z-score of the log-odds ratio between one expert and all others, with the counts over all
    experts as an informative prior, which keeps rare tokens from looking typical by chance
    (Monroe, Colaresi and Quinn, *Fightin' Words*, Political Analysis 16, 2008, equations 16-22).

    Args:
        counts: how often each token was sent to each expert.
        words: the tokens.
        most: how many to list per expert.

    Returns:
        For each expert (token, z, count), highest z first; only tokens with z above 1.96.
    """
    total = counts.sum(1)
    prior = total / max(total.sum(), 1e-12) * 1000.0  # a prior worth a thousand tokens
    prior = np.maximum(prior, 1e-3)
    lists = []
    for expert in range(counts.shape[1]):
        here, there = counts[:, expert], total - counts[:, expert]
        odds = [
            np.log((n + prior) / np.maximum(n.sum() + prior.sum() - n - prior, 1e-12))
            for n in (here, there)
        ]
        z = (odds[0] - odds[1]) / np.sqrt(1 / (here + prior) + 1 / (there + prior))
        order = np.argsort(-z, kind="stable")[:most]
        lists.append(
            tuple((words[i], round(float(z[i]), 2), int(here[i])) for i in order if z[i] > 1.96)
        )
    return tuple(lists)


def _pairs(routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    """Combine weight of every (token, expert), and whether it was chosen (soft: the weight)."""
    if isinstance(routing, SparseRouting):
        weights = routing.weights.detach().double().cpu().numpy()
        return weights, routing.chosen.cpu().numpy().astype(float)
    by_expert = routing.grouping.merge(routing.combine_weight.sum(-1))
    weights = by_expert.detach().double().cpu().numpy()
    return weights, weights


def _check_shape(site: str, weights: np.ndarray, tokens: Tokens) -> None:
    longest = max((len(sequence) for sequence in tokens), default=0)
    if len(tokens) != weights.shape[0] or longest > weights.shape[1]:
        raise ValueError(
            f"{site} routed {weights.shape[0]} sequences of {weights.shape[1]} tokens, but the "
            f"tokens given are {len(tokens)} sequences of up to {longest}; pass the batch that the "
            "model saw last"
        )


def _token_by_token(
    weights: np.ndarray, chosen: np.ndarray, words: Sequence[str | None]
) -> tuple[tuple[tuple[int, float], ...], ...]:
    out = []
    for position, word in enumerate(words):
        if word is None:
            continue
        experts = np.flatnonzero(chosen[position] > 0)
        experts = experts[np.argsort(-weights[position, experts], kind="stable")]
        out.append(tuple((int(e), round(float(weights[position, e]), 3)) for e in experts))
    return tuple(out)


def _frozen(site: Mapping[str, Any]) -> dict[str, Any]:
    names = ("load", "mass", "dead", "coactivation", "characteristic")
    return {name: _tuples(site[name]) for name in names}


def _tuples(value: Any) -> Any:
    """Lists turned into tuples all the way down, as JSON turned tuples into lists."""
    return tuple(_tuples(part) for part in value) if isinstance(value, list | tuple) else value
