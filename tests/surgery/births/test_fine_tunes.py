"""Experts from several fine-tunes: what goes where, what is averaged, that all of it is undone."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import (
    BertModel,
    BertTokenizer,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import moefold
from moefold import FromFineTunes, MoEConfig, UpcycleConfig, routers
from moefold.surgery.births import birth_from_dict
from moefold.surgery.births.base import weight_of
from moefold.testing.host_surgery import Photograph
from tests.surgery.births.test_groups import llama

IDS = (((5, 6, 7),), ((9, 3), (4,)))


def fine_tuned(model: Any, *, seed: int, std: float = 0.1) -> Any:
    """A copy whose weights are all somewhat different."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return other


@pytest.fixture
def base(tiny):
    return tiny(num_hidden_layers=2)


@pytest.fixture
def folders(base, tmp_path):
    """Two fine-tunes of the base, saved by the real class."""
    for number in (1, 2):
        fine_tuned(base, seed=number).save_pretrained(tmp_path / f"tune{number}")
    return tuple(str(tmp_path / f"tune{number}") for number in (1, 2))


def config(folders, **settings) -> UpcycleConfig:
    router = settings.pop("choice", routers.config("mixtral", k=1))
    moe = MoEConfig(num_experts=len(folders), router=router)
    return UpcycleConfig(moe=moe, sites="last:1", birth=FromFineTunes(models=folders, **settings))


def test_experts_are_the_mlps_and_the_rest_is_the_mean(base, folders):
    tunes: list[Any] = [BertModel.from_pretrained(folder) for folder in folders]
    dense = base.encoder.layer[1].output.dense.weight
    before = dense.clone()
    made = moefold.upcycle(base, config(folders))
    assert torch.equal(dense, before)  # it waits to come back, and is averaged with nothing
    assert not made.kept_at_birth
    assert made.why == "the experts are the MLPs of tune1, tune2"
    experts = base.encoder.layer[1].moe.experts
    for number, tune in enumerate(tunes):
        layer = tune.encoder.layer[1]
        assert torch.equal(experts.up_proj[number], layer.intermediate.dense.weight)
        assert torch.equal(experts.up_proj_bias[number], layer.intermediate.dense.bias)
        assert torch.equal(experts.down_proj[number], layer.output.dense.weight)
        assert torch.equal(experts.down_proj_bias[number], layer.output.dense.bias)
    one, two = (dict(tune.named_parameters()) for tune in tunes)
    averaged = [name for name in one if name in dict(base.named_parameters())]
    assert any(name.startswith("encoder.layer.0.intermediate") for name in averaged)
    assert "encoder.layer.1.output.LayerNorm.weight" in averaged
    for name in averaged:
        # Two roundings of numbers below 4.
        torch.testing.assert_close(
            base.get_parameter(name), (one[name] + two[name]) / 2, rtol=0, atol=1e-6
        )


def test_the_rest_of_the_base_can_stay(base, folders):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    moefold.upcycle(base, config(folders, rest="base"))
    kept = [name for name in base.state_dict() if name in before]
    assert kept
    assert all(torch.equal(base.state_dict()[name], before[name]) for name in kept)


@pytest.mark.parametrize("rest", ["average", "base"])
def test_the_mixture_of_one_expert_is_its_fine_tune(base, folders, batch, rest):
    # Of two fine-tunes that differ in the MLP of the site only, a mixture that takes expert 1 for
    # every token is fine-tune 1, whatever becomes of the rest.
    tunes = []
    for number, folder in enumerate(folders):
        tune = copy.deepcopy(base)
        torch.manual_seed(number)
        torch.nn.init.normal_(tune.encoder.layer[1].output.dense.weight, std=0.3)
        tune.save_pretrained(folder)
        tunes.append(tune)
    moefold.upcycle(base, config(folders, rest=rest))
    layer = base.encoder.layer[1].moe
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        for number, tune in enumerate(tunes):
            twin = copy.deepcopy(base)
            stack = twin.encoder.layer[1].moe.experts.down_proj
            stack.copy_(layer.experts.down_proj[number].expand_as(stack))
            # float32 and outputs of about 1.
            torch.testing.assert_close(
                twin(**batch)[0][real], tune(**batch)[0][real], rtol=0, atol=1e-5
            )


def test_the_mean_of_equal_models_is_that_model(base, tmp_path):
    # Three times a number, divided by three, may be its neighbour; the running mean is not.
    for number in range(3):
        base.save_pretrained(tmp_path / f"same{number}")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    folders = tuple(str(tmp_path / f"same{number}") for number in range(3))
    with pytest.warns(UserWarning, match=r"one expert twice: \S+same0 and \S+same1; "):
        moefold.upcycle(base, config(folders))
    after = base.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name in before)


@pytest.mark.parametrize("settings", [{}, {"rest": "base"}, {"router": "hidden", "prompts": IDS}])
def test_revert_brings_every_bit_back(base, folders, settings):
    before = Photograph(base)
    moefold.upcycle(base, config(folders, **settings))
    moefold.revert(base)
    before.compare(base)


def test_revert_of_a_copy_leaves_the_original(base, folders):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    moefold.upcycle(base, config(folders))
    upcycled = {name: value.clone() for name, value in base.state_dict().items()}
    twin = copy.deepcopy(base)
    moefold.revert(twin)
    assert all(torch.equal(twin.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(base.state_dict()[name], value) for name, value in upcycled.items())


def test_a_failure_after_the_average_was_set_leaves_the_model_untouched(base, folders, monkeypatch):
    before = Photograph(base)
    value = base.embeddings.word_embeddings.weight.clone()
    seen = []

    def fail(*_: object) -> None:
        seen.append(torch.equal(base.embeddings.word_embeddings.weight, value))
        raise RuntimeError("stop")

    from moefold.surgery.hosts.transformer import TransformersHost

    monkeypatch.setattr(TransformersHost, "sign", fail)
    with pytest.raises(RuntimeError, match="stop"):
        moefold.upcycle(base, config(folders), inputs=False)
    assert seen == [False]  # the average was in place
    before.compare(base)


def test_a_fine_tune_that_cannot_be_read_leaves_the_model_untouched(base, folders, tiny):
    tiny(num_hidden_layers=2, vocab_size=61).save_pretrained(folders[1])
    before = Photograph(base)
    with pytest.raises(
        ValueError,
        match=r"tune2 is no fine-tune of this BertModel: embeddings.word_embeddings.weight is "
        r"\[60, 16\] here, and there \[61, 16\]",
    ):
        moefold.upcycle(base, config(folders))
    before.compare(base)


def test_rows_of_the_router_are_where_the_prompts_are(base, folders):
    # The input of the second layer's MLP, seen by a hook, of the base: the mean over all tokens of
    # the two prompts of the second model, made one long.
    seen = []
    handle = base.encoder.layer[1].intermediate.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].detach()[0])
    )
    base(torch.tensor([[9, 3]]))
    base(torch.tensor([[4]]))
    handle.remove()
    mean = torch.cat(seen).mean(0)
    state = torch.get_rng_state()
    moefold.plan(base, config(folders, router="hidden", prompts=IDS))
    assert torch.equal(torch.get_rng_state(), state)
    moefold.upcycle(base, config(folders, router="hidden", prompts=IDS))
    weight = base.encoder.layer[1].moe.router.weight
    # float32, of length 1.
    torch.testing.assert_close(weight[1], mean / mean.norm(), rtol=0, atol=1e-6)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(2), rtol=0, atol=1e-6)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rain", "snow", "sun"]


def test_prompts_may_be_texts(base, folders, tmp_path):
    texts = (("rain snow",), ("sun",))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    with pytest.raises(ValueError, match=r"none of \S+tune1, \S+tune2 holds a tokenizer; save one"):
        moefold.plan(base, config(folders, router="hidden", prompts=texts))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folders[1])
    by_text, by_ids = copy.deepcopy(base), base
    moefold.upcycle(by_text, config(folders, router="hidden", prompts=texts))
    ids = (((2, 5, 6, 3),), ((2, 7, 3),))  # [CLS] ... [SEP]
    moefold.upcycle(by_ids, config(folders, router="hidden", prompts=ids))
    rows: list[Any] = [weight_of(m.encoder.layer[1].moe.router) for m in (by_text, by_ids)]
    assert torch.equal(*rows)


def test_a_sentence_transformer(base, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    base.save_pretrained(tmp_path / "base")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "base")
    inner = Transformer(str(tmp_path / "base"))
    model: Any = SentenceTransformer(modules=[inner, Pooling(16)], device="cpu").eval()
    folders = []
    for number in (1, 2):
        tune = fine_tuned(model, seed=number)
        tune.save(str(tmp_path / f"tune{number}"), create_model_card=False)
        folders.append(str(tmp_path / f"tune{number}"))
    before = Photograph(model)
    asked = config(tuple(folders), router="hidden", prompts=("rain", "sun"))
    moefold.upcycle(model, asked)
    layer = model[0].model.encoder.layer[1]
    assert torch.equal(
        layer.moe.experts.down_proj[1], tune[0].model.encoder.layer[1].output.dense.weight
    )
    assert model.encode(["rain"]).shape == (1, 16)
    moefold.revert(model)
    before.compare(model)


def test_a_decoder_with_tied_weights(batch, tmp_path):
    model = llama(tie_word_embeddings=True)
    folders = tuple(str(tmp_path / f"tune{number}") for number in (1, 2))
    for number, folder in enumerate(folders):
        fine_tuned(model, seed=number).save_pretrained(folder)
    before = Photograph(model)
    moefold.upcycle(model, config(folders, router="hidden", prompts=IDS))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    one, two = (LlamaForCausalLM.from_pretrained(f).lm_head.weight for f in folders)
    # Two roundings of numbers below 4.
    torch.testing.assert_close(model.lm_head.weight, (one + two) / 2, rtol=0, atol=1e-6)
    moefold.revert(model)
    before.compare(model)


def test_a_saved_mixture_names_no_path(base, folders, tmp_path):
    moefold.upcycle(base, config(folders, router="hidden", prompts=IDS))
    moefold.save(base, tmp_path / "out")
    for file in ("config.json", "moefold.json"):
        text = (tmp_path / "out" / file).read_text()
        assert str(tmp_path) not in text
    said = json.loads((tmp_path / "out" / "moefold.json").read_text())["upcycle"]["birth"]
    assert said["models"] == ["tune1", "tune2"]
    loaded: Any = moefold.load(tmp_path / "out")
    assert torch.equal(
        loaded.encoder.layer[1].moe.router.weight, base.encoder.layer[1].moe.router.weight
    )
    born = birth_from_dict(said)
    assert isinstance(born, FromFineTunes)
    assert born.prompts == IDS


def test_another_architecture_is_refused(base, folders, tmp_path):
    sizes = {k: getattr(base.config, k) for k in ("hidden_size", "intermediate_size", "vocab_size")}
    other = RobertaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    RobertaModel(other).save_pretrained(folders[1])
    message = r"tune2 holds a model of type 'roberta', the host is one of type 'bert'; experts"
    with pytest.raises(ValueError, match=message):
        moefold.plan(base, config(folders))


def test_a_fine_tune_with_fewer_layers_is_refused(base, folders, tiny):
    tiny(num_hidden_layers=1).save_pretrained(folders[0])
    with pytest.raises(
        ValueError, match=r"tune1 is no fine-tune .*layer\.1\S+ is .* no such weight"
    ):
        moefold.upcycle(base, config(folders))


def test_a_folder_without_weights_of_the_model(base, folders, tmp_path):
    from safetensors.torch import load_file, save_file

    file = f"{folders[0]}/model.safetensors"
    state = {n: v for n, v in load_file(file).items() if not n.startswith("pooler")}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"tune1 lacks weights of a BertModel: pooler.dense.bias"):
        moefold.upcycle(base, config(folders))


def test_folders_that_are_none(base, folders, tmp_path):
    gone = (folders[0], str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"no folder at \S+gone; give one that save_pretrained"):
        moefold.plan(base, config(gone))
    (tmp_path / "gone").mkdir()
    with pytest.raises(ValueError, match=r"gone has no config.json; give a folder"):
        moefold.plan(base, config(gone))
    (tmp_path / "gone" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read the configuration in \S+gone"):
        moefold.plan(base, config(gone))
    (tmp_path / "gone" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, which is never opened"):
        moefold.plan(base, config(gone))


def test_the_number_of_models_is_that_of_experts(base, folders):
    asked = UpcycleConfig(moe=MoEConfig(num_experts=3), birth=FromFineTunes(models=folders))
    message = r"num_experts is 3, but there are 2 fine-tunes \(tune1, tune2\); say num_experts=2"
    with pytest.raises(ValueError, match=message):
        moefold.plan(base, asked)


@pytest.mark.parametrize("name", ["soft", "cosine", "hash"])
def test_a_router_without_rows_of_tokens(base, folders, name):
    asked = config(
        folders,
        router="hidden",
        prompts=IDS,
        choice=routers.config(name, **{"hash": {"by": "position"}}.get(name, {})),
    )
    with pytest.raises(ValueError, match=rf"row of width 16 .* router '{name}' does not have"):
        moefold.plan(base, asked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ()}, "models names 0 fine-tunes; give at least 2 folders"),
        ({"models": ("one",)}, "models names 1 fine-tunes"),
        ({"models": "one"}, "models is a text; give a tuple"),
        ({"rest": "mean"}, "rest is 'mean'; allowed: 'average', 'base'"),
        ({"router": "hid"}, "router is 'hid'; allowed: 'random', 'hidden'"),
        (
            {"router": "hidden"},
            "router='hidden' needs prompts for each of 2 models, and there are 0",
        ),
        ({"prompts": IDS}, "there are prompts, but router is 'random'; say router='hidden'"),
        (
            {"router": "hidden", "prompts": ("rain", ())},
            r"prompts of a model are \(\); give at least",
        ),
        (
            {"router": "hidden", "prompts": ("rain", "")},
            r"prompts of a model are ''; give at least",
        ),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, message):
    from tests.routers.common import untyped

    with untyped(), pytest.raises(ValueError, match=message):
        FromFineTunes(**{"models": ("one", "two"), **settings})


def test_a_module_of_no_library_is_refused(folders):
    from moefold.surgery.hosts.fine_tunes import check_folder
    from moefold.surgery.hosts.plain import PlainHost

    with pytest.raises(ValueError, match=r"a Linear is of neither \(host 'plain'\)"):
        check_folder(PlainHost(), torch.nn.Linear(2, 2), Path(folders[0]))


def test_streaming_refuses_it(base, folders, tmp_path):
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match="birth 'fine-tunes' reads whole models, which are not in memory here"
    ):
        moefold.upcycle_folder(tmp_path / "base", tmp_path / "out", config(folders))
    assert not (tmp_path / "out").exists()


def test_revert_of_a_model_in_another_dtype(base, folders):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    moefold.upcycle(base, config(folders))
    moefold.revert(base.to(torch.bfloat16))
    for name, value in base.state_dict().items():
        wanted = before[name].to(torch.bfloat16) if value.is_floating_point() else before[name]
        assert torch.equal(value, wanted), name


def test_a_loaded_average_does_not_become_dense(base, folders, tmp_path):
    # The MLPs of the base belong among the weights of the base; with `rest="base"` they are there.
    dense = copy.deepcopy(base)
    moefold.upcycle(base, config(folders))
    moefold.save(base, tmp_path / "average")
    loaded = moefold.load(tmp_path / "average")
    with pytest.raises(ValueError, match="all weights of this MoefoldBertModel were set when it"):
        moefold.revert(loaded, dense)
    other = copy.deepcopy(dense)
    moefold.upcycle(other, config(folders, rest="base"))
    moefold.save(other, tmp_path / "base")
    loaded = moefold.load(tmp_path / "base")
    moefold.revert(loaded, dense)
    assert all(map(torch.equal, loaded.state_dict().values(), dense.state_dict().values()))


def test_an_encoder_decoder(tmp_path):
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=60, **sizes)).eval()
    folders = tuple(str(tmp_path / f"tune{number}") for number in (1, 2))
    for number, folder in enumerate(folders):
        fine_tuned(model, seed=number).save_pretrained(folder)
    before = Photograph(model)
    asked = dataclasses.replace(config(folders, router="hidden", prompts=IDS), sites="all")
    moefold.upcycle(model, asked)
    moefold.revert(model)
    before.compare(model)


def test_a_model_that_reads_no_text(tmp_path):
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "image_size": 8,
        "patch_size": 4,
    }
    model = ViTModel(ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).eval()
    folders = tuple(str(tmp_path / f"tune{number}") for number in (1, 2))
    for number, folder in enumerate(folders):
        fine_tuned(model, seed=number).save_pretrained(folder)
    with pytest.raises(ValueError, match="a ViTModel takes pixel_values, no prompts; say router="):
        moefold.plan(model, config(folders, router="hidden", prompts=IDS))
    moefold.upcycle(model, config(folders))


def test_a_prompt_that_the_model_cannot_read(base, folders):
    before = Photograph(base)
    ids = (((5, 6),), ((61,),))  # a vocabulary of 60
    with pytest.raises(
        ValueError, match=r"cannot be run on a prompt, tensor\(\[\[61\]\]\) \(index"
    ):
        moefold.upcycle(base, config(folders, router="hidden", prompts=ids))
    before.compare(base)


def test_a_site_that_no_prompt_reaches(base, folders, monkeypatch):
    place = "moefold.surgery.births.fine_tunes.first_tensor_of"
    monkeypatch.setattr(place, lambda *_: None)  # runs nothing
    with pytest.raises(
        ValueError, match=r"layer\.1 sees nothing of a prompt \(\(5, 6, 7\), \.\.\.\)"
    ):
        moefold.upcycle(base, config(folders, router="hidden", prompts=IDS))
