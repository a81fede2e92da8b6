"""The sweep over budgets: what it measures, that it goes on where it stopped, what it refuses."""

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import OlmoeModel

import moefold
from moefold import routers
from moefold.evaluate import Interval
from moefold.evaluate import budgets as module
from moefold.evaluate.budget_plot import plot_sweep
from moefold.evaluate.budgets import (
    at_budget,
    default_budgets,
    halves,
    learn,
    reroute_at,
    sweep_budgets,
)
from moefold.evaluate.language import passed
from moefold.evaluate.sweep import Measured, Sweep, SweepConfig, big, shown
from moefold.rerouting import rerouting_of
from moefold.rerouting.saved import learnt_in
from tests.embedding.tiny import WORDS, tokenizer
from tests.rerouting.models import build

PAIRS = [
    ("the rain falls", "rain falls on the sea", 4.0),
    ("the sun rises", "a sun rises", 5.0),
    ("one word", "the hill", 0.0),
    ("a token", "this sentence means one word", 1.5),
]


def texts(count: int = 12, words: int = 24) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS[3:], words)) for _ in range(count)]


def config(router: str = "unified", *budgets: float, **changes: Any) -> SweepConfig:
    """Of few draws."""
    settings = {"inference": "threshold"} if router == "unified" else {}
    given = {"length": 16, "resamples": 100, "texts": 8, "batch_size": 4, **changes}
    return SweepConfig(router=routers.config(router, **settings), budgets=budgets, **given)


def sweep(config: SweepConfig, model: Any = None, **given: Any) -> Sweep:
    torch.manual_seed(0)
    return sweep_budgets(model or build("olmoe"), tokenizer(), config, texts(), **given)


def test_every_number_is_that_of_the_model_at_the_budget():
    torch.manual_seed(0)
    model, asked = build("olmoe"), config("unified", 1, 1.5)
    found = sweep(asked, model, pairs=PAIRS)
    calibration, held_out = halves(texts(), tokenizer(), asked)
    # Twelve texts of 24 words, the first six to learn from: 6 pieces of 16 and 6 of 8.
    assert (calibration.tokens, held_out.tokens) == (144, 144)
    assert set(calibration.document) == set(range(6))
    plain = passed(model, held_out, batch_size=4)
    assert found.original.flops_per_token == plain.flops_per_token
    assert found.original.experts_per_token == 2
    for one in found.budgets:
        assert one.budget is not None
        router = routers.config("unified", inference="threshold", budget=one.budget)
        done = moefold.reroute(model, router)
        learn(model, asked, calibration, done)
        again = passed(model, held_out, batch_size=4)
        assert again.losses is not None
        assert again.predicted.sum() == 144 - 12
        assert one.losses == tuple(again.losses.tolist())
        assert one.flops_per_token == again.flops_per_token
        assert one.experts_per_token == again.experts_per_token
        assert one.perplexity is not None
        assert one.perplexity.mean == pytest.approx(float(np.exp(again.losses.sum() / 132)))
        assert plain.losses is not None
        assert one.perplexity_ratio is not None
        ratio = float(np.exp((again.losses.sum() - plain.losses.sum()) / 132))
        assert one.perplexity_ratio.mean == pytest.approx(ratio)
        moefold.revert(model)
    cheaper, dearer = found.budgets
    assert cheaper.flops_per_token < dearer.flops_per_token < found.original.flops_per_token


def test_the_models_own_choice_is_the_untouched_model():
    found = sweep(config("token-choice", 1, 2), pairs=PAIRS)
    own, old = found.at(2), found.original
    assert own.losses == old.losses
    assert own.perplexity == old.perplexity
    assert own.perplexity_ratio == Interval(mean=1.0, low=1.0, high=1.0)
    assert own.flops_per_token == old.flops_per_token
    assert own.experts_per_token == 2
    assert own.cosines == old.cosines
    assert own.quality == old.quality
    assert own.quality_change == Interval(mean=0.0, low=0.0, high=0.0)
    assert own.agreement is not None
    assert own.agreement.low == pytest.approx(100)
    assert found.at(1).losses != old.losses


def test_embeddings_are_those_of_the_last_token():
    torch.manual_seed(0)
    model = build("olmoe")
    found = sweep(config("unified", 1.5), model, pairs=PAIRS)
    calibration, _ = halves(texts(), tokenizer(), config("unified", 1.5))
    reroute_at(model, config("unified", 1.5), 1.5, calibration)
    for (one, other, _), cosine in zip(PAIRS, found.at(1.5).cosines or (), strict=True):
        with torch.no_grad():
            a, b = (
                model.model(**tokenizer()(text, return_tensors="pt")).last_hidden_state[0, -1]
                for text in (one, other)
            )
        assert torch.cosine_similarity(a, b, dim=0).item() == pytest.approx(cosine, abs=1e-5)


def test_who_sees_later_tokens_has_no_perplexity():
    asked = replace(config("unified", 1), router=routers.config("unified", alpha=0.25))
    found = sweep(asked)
    assert found.original.perplexity is not None
    assert found.at(1).perplexity is None
    assert found.at(1).losses is None
    assert found.at(1).agreement is not None
    assert found.at(1).experts_per_token == 1
    assert "unified(alpha=0.25) looks at later tokens" in str(found.no_perplexity)
    assert "no perplexity: unified(alpha=0.25) looks" in found.in_words(1)
    assert sweep(config("unified", 1)).no_perplexity is None


@pytest.mark.parametrize("rule", ["threshold", "predictor"])
def test_what_is_kept_is_what_was_measured(rule):
    torch.manual_seed(0)
    model = build("olmoe")
    router = routers.config("unified", inference=rule)
    asked = replace(config("unified", 1.5), router=router)
    found = sweep(asked, model)
    assert rerouting_of(model) is None  # it is reverted
    calibration, held_out = halves(texts(), tokenizer(), asked)
    torch.manual_seed(5)  # whatever else is drawn meanwhile
    done = reroute_at(model, asked, 1.5, calibration)
    assert done.config == routers.config("unified", inference=rule, budget=1.5)
    again = passed(model, held_out, batch_size=4)
    assert again.losses is not None
    assert tuple(again.losses.tolist()) == found.at(1.5).losses
    assert len(learnt_in(model)) >= 2


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    whole = sweep(config("unified", 1, 1.5, 2), pairs=PAIRS)

    class StoppedError(Exception):
        pass

    seen: list[str] = []

    class Watch:
        def expect(self, total: float) -> None:
            pass

        def step(self, what: str, total: float | None = None) -> None:
            seen.append(what)
            if what == stop:
                raise StoppedError

        def advance(self, work: float) -> None:
            pass

    stop = "measuring at 2"
    with pytest.raises(StoppedError):
        sweep(config("unified", 1, 1.5, 2), pairs=PAIRS, results=file, watch=Watch())
    assert [row["budget"] for row in json.loads(file.read_text())["rows"]] == [None, 1, 1.5]
    assert list(tmp_path.iterdir()) == [file]
    seen.clear()
    stop = "never"
    again = sweep(config("unified", 1, 1.5, 2), pairs=PAIRS, results=file, watch=Watch())
    assert seen == ["embedding with it untouched", "calibrating at 2", "measuring at 2"]
    assert asdict(again) == asdict(whole)
    # A budget more is measured, and what is there is kept.
    more = sweep(config("unified", 1, 1.25), pairs=PAIRS, results=file)
    assert more.at(1) == whole.at(1)
    rows = json.loads(file.read_text())["rows"]
    assert [row["budget"] for row in rows] == [None, 1, 1.25, 1.5, 2]


def test_what_belongs_to_the_numbers_is_in_the_file(tmp_path):
    sweep(config("unified", 1), results=tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["about"]["router"] == {
        "name": "unified",
        "settings": {"inference": "threshold"},
    }
    assert found["about"]["model"] == "OlmoeForCausalLM"
    assert {"moefold", "torch", "transformers"} < set(found["surroundings"]["versions"])
    assert found["surroundings"]["machine"]["cpu"]


def test_a_file_of_another_sweep_is_not_touched(tmp_path):
    file = tmp_path / "results.json"
    sweep(config("unified", 1), results=file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"results.json holds a sweep with another length; give"):
        sweep(config("unified", 1, length=8), results=file)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"holds a sweep with another text, weights; give"):
        sweep_budgets(build("olmoe"), tokenizer(), config("unified", 1), texts(14), results=file)
    with pytest.raises(ValueError, match=r"holds a sweep with another pairs; give another file"):
        sweep(config("unified", 1), pairs=PAIRS, results=file)
    assert file.read_bytes() == before
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"holds no sweep over budgets \(KeyError\('about'\)\)"):
        sweep(config("unified", 1), results=file)


def test_refusals_come_before_anything_is_run(monkeypatch):
    monkeypatch.setattr(module, "passed", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(ValueError, match=r"model.layers.0.mlp: budget is 7"):
        sweep(config("unified", 1, 7))
    with pytest.raises(ValueError, match=r"gives every token a whole number of experts, not 1.5"):
        sweep(config("token-choice", 1, 1.5))
    with pytest.raises(ValueError, match=r"router 'hash' cannot take the logits of a pretrained"):
        sweep(config("hash", 1))
    with pytest.raises(ValueError, match=r"router 'soft' has no budget; take unified, threshold"):
        sweep(config("soft", 1))
    body = build("olmoe").model
    assert isinstance(body, OlmoeModel)
    with pytest.raises(ValueError, match=r"a OlmoeModel predicts no tokens, and has no perplexity"):
        sweep(config("unified", 1), body)
    with pytest.raises(ValueError, match=r"the text has 24 tokens in 2 pieces, too few for two"):
        sweep_budgets(build("olmoe"), tokenizer(), config("unified", 1), texts(1))
    with pytest.raises(ValueError, match=r"1 texts hold no two tokens"):
        sweep_budgets(build("olmoe"), tokenizer(), config("unified", 1), [" "])
    model = build("olmoe")
    moefold.reroute(model, "unified")
    with pytest.raises(ValueError, match=r"was already changed by moefold; call moefold.revert"):
        sweep(config("unified", 1), model)


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"there are no budgets; give some, as in 1,1.5,2"):
        config("unified")
    with pytest.raises(ValueError, match=r"budget is 0; it must be a finite number of experts"):
        config("unified", 1, 0)
    with pytest.raises(ValueError, match=r"tokens is 0; it must be at least 1"):
        config("unified", 1, tokens=0)


def test_budgets_by_router():
    model = build("olmoe")
    unified = routers.config("unified", alpha=0.25)
    assert at_budget(model, unified, 1.5) == routers.config("unified", alpha=0.25, budget=1.5)
    assert at_budget(model, routers.config("token-choice"), 2) == "token-choice"
    ours = routers.config("token-choice", renormalize=True)
    assert at_budget(model, ours, 2) == routers.config("token-choice", renormalize=True, k=2)
    choice = routers.config("expert-choice")
    assert at_budget(model, choice, 1.5) == routers.config("expert-choice", capacity_factor=1.5)
    assert default_budgets(unified, 2) == (1, 1.25, 1.5, 1.75, 2)
    assert default_budgets(unified, 8) == (4, 5, 6, 7, 8)
    assert default_budgets(unified, 1) == (1,)
    assert default_budgets(routers.config("token-choice"), 4) == (2, 3, 4)


def made(budget: float | None, flops: float, **given: Any) -> Measured:
    return Measured(budget=budget, experts_per_token=budget or 2, flops_per_token=flops, **given)


def interval(mean: float, width: float) -> Interval:
    return Interval(mean=mean, low=mean - width, high=mean + width)


def example() -> Sweep:
    return Sweep(
        original=made(None, 2.0e9, perplexity=interval(20.1, 0.3), quality=interval(61.2, 1.0)),
        budgets=(
            made(
                1.5,
                1.72e9,
                perplexity=interval(20.4, 0.3),
                perplexity_ratio=interval(1.015, 0.004),
                quality=interval(60.9, 1.0),
                quality_change=interval(-0.3, 0.5),
                agreement=interval(98.0, 0.5),
            ),
        ),
        router="unified(inference='threshold')",
        no_perplexity=None,
    )


def test_in_words():
    assert example().in_words(1.5).splitlines() == [
        "at a budget of 1.5: 14.0 % fewer FLOPs per token (2 G -> 1.72 G), 1.50 experts per token "
        "instead of 2.00",
        "  perplexity 20.10 -> 20.40 [20.1, 20.7]: +1.5 % [+1.1, +1.9]",
        "  Spearman x100 with people's scores 61.20 -> 60.90 [59.9, 61.9]: -0.30 [-0.80, +0.20]",
        "  Spearman x100 with the untouched model's similarities 98.00 [97.5, 98.5]",
    ]
    assert [big(n) for n in (12, 3456, 7.89e6, 1e12)] == ["12", "3.46 k", "7.89 M", "1 T"]
    assert shown(interval(5.2143, 0.01)) == "5.214 [5.20, 5.22]"
    assert shown(interval(1234.5, 20)) == "1234 [1214, 1254]"  # half to even
    assert shown(interval(0.0, 0.0)) == "0.000 [0.00, 0.00]"


def test_the_plot_shows_every_point(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda s, *a, **k: (drawn.append(s), real(s, *a, **k)))
    plot_sweep(example(), tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    left, right = drawn[0].axes
    for axes, value, untouched in ((left, 20.4, 20.1), (right, 60.9, 61.2)):
        dots = {
            (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
            for line in axes.lines
            if line.get_marker() in ("o", "D")
        }
        assert dots == {(86.0, value), (100.0, untouched)}
        assert [text.get_text() for text in axes.texts] == ["1.5"]
    sees = replace(
        example(),
        no_perplexity="unified() looks at later tokens",
        original=replace(example().original, quality=None),
        budgets=(made(1.5, 1.72e9, agreement=interval(98.0, 0.5)),),
    )
    plot_sweep(sees, tmp_path / "plot.png")
    left, right = drawn[1].axes
    assert left.texts[0].get_text().startswith("perplexity is not measured: unified() looks")
    assert not left.axison
    assert "agreement" in right.get_title("left")
