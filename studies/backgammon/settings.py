"""What the study does: ways to learn, sizes and seeds, in one value to which a folder belongs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way to learn from decisions.

    Attributes:
        says: what it is, for a table.
        loss: one of `moefold.preference.preference_losses`, or of `absolute`.
        loss_settings: of the loss.
        by_equity: what is learnt from: the equities of all plays, or which one was chosen.
        absolute: whether each position is learnt by itself.
        net: settings of the net, besides its width.
        sees_before: whether the net is shown the position before the play as well.
    """

    says: str
    loss: str
    loss_settings: Mapping[str, Any] = field(default_factory=dict)
    by_equity: bool = False
    absolute: bool = False
    net: Mapping[str, Any] = field(default_factory=dict)
    sees_before: bool = False


ARMS: Mapping[str, Arm] = {
    "pair": Arm(says="chosen against each other play, logistic", loss="pair-logistic"),
    "pair-squared": Arm(says="the same, squared error (1988)", loss="pair-squared"),
    "list": Arm(says="chosen among all plays, softmax", loss="listwise"),
    "soft": Arm(
        says="softmax of equities, cross entropy",
        loss="listnet",
        loss_settings={"temperature": 0.05},
        by_equity=True,
    ),
    "sharp": Arm(
        says="the same of equities that count as further apart",
        loss="listnet",
        loss_settings={"temperature": 0.02},
        by_equity=True,
    ),
    "regression": Arm(
        says="the equity of each play, squared error",
        loss="equity",
        by_equity=True,
        absolute=True,
        net={"bias": True},
    ),
    "pointwise": Arm(
        says="was it chosen? of each play, logistic",
        loss="was-it-chosen",
        absolute=True,
        net={"bias": True},
    ),
    "experts": Arm(
        says="4 experts, one for each position after a play",
        loss="listwise",
        net={"num_experts": 4},
    ),
    "experts-before": Arm(
        says="4 experts, one for each position before the play",
        loss="listwise",
        net={"num_experts": 4, "over": "context"},
        sees_before=True,
    ),
    "list-before": Arm(
        says="one net that sees the position before the play too",
        loss="listwise",
        sees_before=True,
    ),
}
"""Ways to learn by name; all but the last three have the same net."""

METHODS = ("pair", "pair-squared", "list", "soft", "regression", "pointwise")
BY_SIZE = ("pair", "list", "regression")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A net to train and judge.

    Attributes:
        arm: key of `ARMS`.
        games: of gnubg-nn against itself to learn from; 0: people's choices.
        passes: over their decisions.
        hidden: units of the net, of each expert if there are some.
        seed: of weights, order, and where among all games those of this run begin.
        after: whose weights it begins with, None for new ones.
    """

    arm: str
    games: int
    passes: int
    hidden: int
    seed: int
    after: "Run | None" = None

    @property
    def name(self) -> str:
        """A name for a folder."""
        source = f"{self.games}-games" if self.games else "people"
        return f"{self.arm}-{self.hidden}-{source}-{self.passes}-passes-{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that changes a number.

    Attributes:
        seeds: of every way to learn.
        hidden: units of the net.
        games: sizes of the data, each with its passes; those of `methods` are the key of the same.
        methods: how many games all methods are compared at.
        tuning: games, passes, games held out, and rates tried, for each method's learning rate.
        test: games to judge by.
        random_share: of plays in the games, drawn at random.
        pairs: of games against PubEval, the same dice for every net.
        scorers: arms to compare, one net and those with experts.
        people: share of the matches that is held out, passes and hidden units.
        strongest: games, passes and hidden units of the net that is to be as strong as it can.
        strongest_arm: how that one learns.
        strongest_rate: its learning rate, which for so many steps is not that of the small ones.
        strongest_then: how it learns after that: arm, passes and learning rate.
        last_pairs: of games of the strongest net, against PubEval and against gnubg's nets.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    hidden: int = 40
    games: tuple[tuple[int, int], ...] = ((400, 16), (1200, 12), (4000, 8), (40000, 1))
    methods: int = 4000
    tuning: tuple[int, int, int] = (500, 8, 100)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    test: int = 400
    random_share: float = 0.05
    pairs: int = 1500
    scorers: tuple[str, ...] = ("list", "experts", "list-before", "experts-before")
    people: tuple[float, int, int] = (0.1, 6, 120)
    strongest: tuple[int, int, int] = (40000, 10, 320)
    strongest_arm: str = "soft"
    strongest_rate: float = 1e-2
    strongest_then: tuple[str, int, float] = ("sharp", 6, 3e-3)
    last_pairs: int = 5000

    @property
    def most_games(self) -> int:
        """How many games are needed to learn from."""
        spread = [n * len(self.seeds) for n, _ in self.games]
        largest = max(max(n for n, _ in self.games), self.strongest[0])
        return max([n for n in spread if n <= largest] + [largest])

    def passes(self, games: int) -> int:
        """Passes over so many games."""
        return dict(self.games)[games]

    def runs(self) -> dict[str, list[Run]]:
        """What is trained, by what it is for; a run can be for several."""
        made: dict[str, list[Run]] = {}

        def add(part: str, arm: str, games: int, passes: int, hidden: int) -> None:
            made.setdefault(part, []).extend(
                Run(arm=arm, games=games, passes=passes, hidden=hidden, seed=seed)
                for seed in self.seeds
            )

        passes = self.passes(self.methods)
        for arm in METHODS:
            add("methods", arm, self.methods, passes, self.hidden)
        for arm in self.scorers:
            add("experts", arm, self.methods, passes, self.hidden)
        add("experts", "list", self.methods, passes, 4 * self.hidden)
        add("people", "list", 0, self.people[1], self.people[2])
        for games, often in self.games:
            for arm in BY_SIZE:
                add("sizes", arm, games, often, self.hidden)
        games, often, hidden = self.strongest
        first = Run(arm=self.strongest_arm, games=games, passes=often, hidden=hidden, seed=0)
        then, often, _ = self.strongest_then
        made["strongest"] = [
            Run(arm=then, games=games, passes=often, hidden=hidden, seed=0, after=first)
        ]
        return made

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return json.loads(json.dumps(asdict(self)))


QUICK = Settings(
    seeds=(0, 1),
    hidden=8,
    games=((8, 1), (16, 1)),
    methods=16,
    tuning=(8, 1, 4),
    rates=(2e-3, 8e-3),
    test=8,
    pairs=8,
    people=(0.1, 1, 8),
    strongest=(16, 1, 8),
    strongest_then=("sharp", 1, 3e-3),
    last_pairs=8,
)
"""A look at every part, in a few minutes; its numbers mean nothing."""
