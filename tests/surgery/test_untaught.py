"""A router whose inference rule is a head that has to be taught: surgery, training, then use."""

import pytest
import torch
from transformers import PreTrainedModel

import moefold
from moefold import MoEConfig, UpcycleConfig, routers
from moefold.modes import competing
from tests.surgery.decoders import VOCABULARY, decoder

RULES = ["predictor", "prefix", "threshold"]


def setting(rule: str) -> UpcycleConfig:
    router = routers.config("unified", budget=2, inference=rule)
    return UpcycleConfig(moe=MoEConfig(num_experts=4, router=router))


def taught(model: PreTrainedModel, steps: int) -> PreTrainedModel:
    """Trained on random text, as a bare loop would."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        ids = torch.randint(1, VOCABULARY, (4, 12))
        with moefold.record_routing(model) as record:
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        record.update()
    return model.eval()


def test_a_predictor_is_upcycled_trained_and_then_causal():
    model = decoder("llama")
    ids = torch.randint(1, VOCABULARY, (2, 9))
    plan = moefold.upcycle(model, setting("predictor"))
    # The receipt is of the group's own choice, which is all there is before training.
    assert plan.receipt is not None
    assert all(site.coverage > 0.5 for site in plan.receipt.sites.values())
    with pytest.raises(
        ValueError, match=r"layers\.\d+.*: inference='predictor', and the predictor"
    ):
        model.eval()(input_ids=ids)
    taught(model, steps=4)
    assert moefold.leakage(model, {"input_ids": ids}).clean
    generated = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(generated[:, :9], ids)


@pytest.mark.parametrize("rule", RULES)
def test_a_plan_says_what_training_looks_at_and_what_has_to_be_taught(rule):
    model = decoder("llama")
    text = str(moefold.plan(model, setting(rule)))
    looks = "past" if rule == "prefix" else "token"
    assert f"  router looks at        the {looks}, no later token" in text
    assert "  in training at         the group" in text
    untaught = (
        "before use             train it, or call moefold.calibrate: its predictor has learnt"
    )
    assert (untaught in text) == (rule == "predictor")


def test_only_an_untaught_router_is_tried_as_in_training():
    model = decoder("llama")
    mixtures = moefold.upcycle(model, setting("predictor")).mixtures
    assert not any(mixture.trial.taught for mixture in mixtures.values())
    router = next(m for m in model.modules() if isinstance(m, routers.AbstractRouter))
    with competing(model, untaught_only=True):
        assert router.reach_now == "group"
    assert router.reach_now == "token"
    taught(model, steps=2)
    with competing(model, untaught_only=True):
        assert router.reach_now == "token"
    with competing(model):
        assert router.reach_now == "group"
