"""Models of no library: your own, described in ten lines, and timm's.

Layouts: 1 is a real token, . is padding.
"""

import copy
import dataclasses
import json
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import moefold
from moefold import Form, MoEConfig, UpcycleConfig, describe_layer, routers
from moefold.surgery.hosts import FORMS, find_host
from moefold.surgery.hosts.layer import is_moe_layer
from moefold.surgery.hosts.plain import PlainHost
from moefold.testing.host_surgery import Photograph
from moefold.testing.hosts import check_host
from tests.surgery.hosts.cases import CASES


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 16)
        self.ff = FeedForward()

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        scores = self.mix(x) @ x.mT
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask.bool().unsqueeze(1), float("-inf"))
        x = self.norm(x + scores.softmax(-1) @ x)
        return x + self.ff(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 60, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.checkpoints = False

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.checkpoints = enable

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            if self.checkpoints:
                x = checkpoint(block, x, key_mask=real, use_reentrant=False)
            else:
                x = block(x, key_mask=real)
        return self.head(x)


@pytest.fixture(autouse=True)
def mine(monkeypatch: pytest.MonkeyPatch) -> Form:
    """The description, taken back after the test."""
    monkeypatch.setattr(FORMS, "_targets", dict(FORMS._targets))
    monkeypatch.setattr(FORMS, "_summaries", dict(FORMS._summaries))
    return describe_layer(
        "mine",
        "blocks of mine",
        Form(
            layer=f"{Block.__module__}.Block",
            up="ff.first",
            down="ff.second",
            activation="ff.activation",
            pieces=("ff",),
            mask="key_mask",
        ),
    )


def inputs() -> dict[str, Tensor]:
    real = torch.arange(5) < torch.tensor([[5], [2]])  # 11111 / 11...
    return {"tokens": torch.randint(60, (2, 5)), "real": real}


def pad(given: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    return {
        "tokens": functional.pad(given["tokens"], (0, by), value=3),
        "real": functional.pad(given["real"], (0, by)),
    }


def build() -> Model:
    return Model().double().eval()


def test_your_own_module_keeps_the_contract():
    report = check_host(
        build(),
        inputs(),
        paddings={"right": pad},  # pyright: ignore[reportArgumentType]
        mask_of=lambda site, given: given["real"],
    )
    assert set(report.skipped) == {"causality"}


def test_the_description_is_found_and_printed():
    made = moefold.plan(build(), UpcycleConfig(sites="all"))
    assert made.layers == ("mine",)
    assert made.chosen == ("blocks.0", "blocks.1")
    assert str(made).startswith("Model (mine): 2 of 2 MLPs become 8 experts")
    assert isinstance(find_host(build()), PlainHost)


def test_a_name_that_is_taken_is_refused(mine):
    with pytest.raises(ValueError, match=r"form 'bert' is already registered"):
        describe_layer("bert", "mine too", mine)


def test_a_module_without_a_description_is_no_host():
    with pytest.raises(
        ValueError, match=r"no host for a torch.nn.*Linear: .*describe_layer where yours keep their"
    ):
        moefold.plan(nn.Linear(2, 2))


def upcycled(router: str = "expert-choice") -> Model:
    model = build()
    moe = MoEConfig(num_experts=3, router=routers.config(router))
    moefold.upcycle(model, UpcycleConfig(moe=moe, sites="all"), inputs=inputs())
    return model


def test_load_into_the_dense_model(tmp_path):
    model, given = upcycled(), inputs()
    moefold.save(model, tmp_path / "moe")
    assert {file.name for file in (tmp_path / "moe").iterdir()} == {
        "config.json",
        "model.safetensors",
        "moefold.json",
    }
    assert json.loads((tmp_path / "moe" / "moefold.json").read_text())["host"] == "plain"
    into = build().train()
    loaded = moefold.load(tmp_path / "moe", into=into)
    assert loaded is into
    assert not loaded.training
    assert is_moe_layer(into.blocks[1])
    assert into.head.weight is into.embed.weight  # still tied
    for name, value in model.state_dict().items():
        assert torch.equal(value, into.state_dict()[name]), name
    with torch.no_grad():
        # The same weights at other addresses: the order of summation in float64.
        change = (into(**given) - model(**given))[given["real"]].abs().max()
    assert change < 1e-12


def test_mlps_without_company_follow_the_model_too():
    """The weights around an MLP say where the model went; here there are none."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ff = FeedForward()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.ff(x)

    where = f"{Bare.__module__}.{Bare.__qualname__}"
    bare = dataclasses.replace(FORMS.get("mine"), layer=where, mask=None)
    describe_layer("bare", "a bare one", bare)
    model = nn.Sequential(Bare(), Bare())
    moefold.upcycle(model, UpcycleConfig(sites="all"), inputs=False)
    model.double()
    moefold.revert(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_a_broken_description_leaves_the_model_untouched(tmp_path):
    moefold.save(upcycled(), tmp_path / "moe")
    config = tmp_path / "moe" / "config.json"
    data = json.loads(config.read_text())
    del data["moefold"]["sites"]["blocks.1"]["activation"]
    config.write_text(json.dumps(data))
    dense = build()
    before = Photograph(dense)
    with pytest.raises(KeyError, match="activation"):
        PlainHost().read_into(tmp_path / "moe", dense)
    before.compare(dense)


def test_load_without_a_model_says_what_to_do(tmp_path):
    moefold.save(upcycled(), tmp_path / "moe")
    with pytest.raises(
        ValueError, match=r"moe holds a model of no library.*moefold.load\(folder, into=it\)"
    ):
        moefold.load(tmp_path / "moe")


class Wider(Model):
    """Another model: its embeddings are of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.head = nn.Linear(16, 61, bias=False)


class Shorter(Model):
    """Another model: a block is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])


class Longer(Model):
    """Another model: it has a part that was not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


@pytest.mark.parametrize("kind", [Wider, Shorter, Longer])
def test_a_wrong_model_to_load_into_is_left_untouched(tmp_path, kind):
    moefold.save(upcycled(), tmp_path / "moe")
    wrong = kind().double()
    before = Photograph(wrong)
    with pytest.raises(ValueError, match=r"not the one that was saved in .*moe: "):
        moefold.load(tmp_path / "moe", into=wrong)
    before.compare(wrong)


def test_loading_into_an_upcycled_model_is_refused_and_leaves_it(tmp_path):
    model = upcycled()
    moefold.save(model, tmp_path / "moe")
    before = Photograph(model)
    with pytest.raises(
        ValueError, match=r"the Model given is upcycled already; give the dense model"
    ):
        moefold.load(tmp_path / "moe", into=model)
    before.compare(model)


def test_weights_are_not_rounded_on_the_way_in(tmp_path):
    moefold.save(upcycled(), tmp_path / "moe")
    single = Model()
    before = Photograph(single)
    with pytest.raises(
        ValueError, match=r"embed.weight is torch.float32 there and torch.float64 in the folder"
    ):
        moefold.load(tmp_path / "moe", into=single)
    before.compare(single)


def test_into_is_for_models_of_no_library(tmp_path):
    model = CASES["bert"].build()
    moefold.upcycle(model, inputs=False)
    moefold.save(model, tmp_path / "moe")
    with pytest.raises(ValueError, match=r"host 'transformers', which is built from its own conf"):
        moefold.load(tmp_path / "moe", into=CASES["bert"].build())


def test_a_mask_under_another_name_reaches_the_router():
    model, given = upcycled("expert-choice"), inputs()
    with moefold.record_routing(model) as record:
        model(**given)
    for site in ("blocks.0.moe", "blocks.1.moe"):
        (routing,) = record[site]
        assert torch.equal(routing.mask, given["real"])  # pyright: ignore[reportArgumentType]


def test_timm_keeps_its_function():
    model = CASES["timm-vit"].build()
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        before = model(pixels)
        made = moefold.upcycle(model, UpcycleConfig(sites="all"), inputs={"x": pixels})
        # Renormalised copies, float64, logits about 1.
        assert (model(pixels) - before).abs().max() < 1e-12
    assert made.layers == ("timm-vit",)
    assert made.receipt is not None
    assert made.receipt.error < 1e-12


def real_timm() -> ModuleType:
    return pytest.importorskip("timm.models.vision_transformer", exc_type=ImportError)


def test_the_real_timm_keeps_its_dropout():
    timm = real_timm()
    if not hasattr(timm, "VisionTransformer"):
        pytest.skip("timm cannot be imported, a stand-in is in its place")
    model = timm.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, proj_drop_rate=0.5
    )
    dense = copy.deepcopy(model)
    made = moefold.upcycle(model, UpcycleConfig(sites="all"), inputs=False)
    assert "dropout of 0.5 between the two maps is left out" in made.sites[0].reason
    assert model.blocks[0].moe_dropout is not None
    assert type(dense.blocks[0]) is type(model.blocks[0]).__bases__[1]
