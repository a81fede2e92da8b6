"""What is peculiar to some families: two stacks, two towers, windows, SentenceTransformers.

Layouts: 1 is a real token, . is padding.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import moefold
from moefold import MoEConfig, UpcycleConfig, routers
from moefold.surgery import Copies
from moefold.surgery.hosts import find_host
from moefold.testing.host_probe import distance, pad_right, spread_experts
from tests.surgery.hosts.cases import CASES, VOCABULARY

TOKENS = MoEConfig(num_experts=3, router=routers.config("token-choice", k=2, renormalize=True))
EXPERTS = MoEConfig(num_experts=4, router=routers.config("expert-choice", capacity_factor=1.5))
SOFT = MoEConfig(num_experts=4, router=routers.config("soft", slots=2))


def by_part(pattern: str, moe: MoEConfig) -> UpcycleConfig:
    """The mixture where the pattern matches, token choice elsewhere."""
    return UpcycleConfig(
        moe=TOKENS, moe_at={pattern: moe}, sites="all", birth=Copies(router_std=1.0)
    )


def routers_at(model: nn.Module) -> dict[str, str]:
    sites = find_host(model).section(model)
    assert sites is not None
    return {name: moe["router"]["name"] for name, moe in sites["sites"].items()}


# Encoder-decoders.


@pytest.mark.parametrize("name", ["t5", "t5-gated", "umt5", "umt5-gated"])
@pytest.mark.parametrize("moe", [EXPERTS, SOFT], ids=lambda moe: moe.router.name)
def test_encoder_and_decoder_have_routers_of_their_own(name, moe, tmp_path):
    case = CASES[name]
    head = case.head
    assert head is not None
    model = case.build(head[0])
    with pytest.raises(ValueError, match=r"a causal host cannot use it. Causal routers: token-ch"):
        moefold.plan(model, by_part(r"decoder\..*", moe))
    made = moefold.upcycle(model, by_part(r"encoder\..*", moe), inputs=case.inputs())
    assert "(causal)" in str(made)
    assert routers_at(model) == {
        "encoder.block.0": moe.router.name,
        "encoder.block.1": moe.router.name,
        "decoder.block.0": "token-choice",
        "decoder.block.1": "token-choice",
    }
    spread_experts(model)
    moefold.save(model, tmp_path / "moe")
    loaded = moefold.load(tmp_path / "moe")
    assert routers_at(loaded) == routers_at(model)
    inputs = case.inputs()
    # Written one token at a time with a cache, and all at once without one: the same text, whatever
    # the padding of the questions.
    asked = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}
    text = model.generate(**asked, **settings)  # pyright: ignore[reportCallIssue]
    for other, given in (
        (model, pad_right(asked, 3)),
        (loaded, asked),
    ):
        again = other.generate(**given, **settings)  # pyright: ignore[reportCallIssue]
        assert torch.equal(again, text)
    uncached = model.generate(**asked, **settings, use_cache=False)  # pyright: ignore
    assert torch.equal(uncached, text)
    # And the text is that of the best logits of one pass over all of it.
    with torch.no_grad():
        logits = model(**asked, decoder_input_ids=text[:, :-1]).logits
    best = logits.argmax(-1)
    written = text[:, 1:] != model.config.pad_token_id  # pyright: ignore
    assert torch.equal(best[written], text[:, 1:][written])
    assert len(set(text.flatten().tolist())) > 2


def test_a_later_word_of_the_answer_changes_no_earlier_one():
    case = CASES["t5"]
    model = case.build()
    moefold.upcycle(model, by_part(r"encoder\..*", EXPERTS), inputs=False)
    spread_experts(model)
    inputs = {**case.inputs(), "decoder_attention_mask": None}
    changed = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][:, 3:] = 9
    with torch.no_grad():
        one, other = model(**inputs)[0], model(**changed)[0]
    assert (one[:, :3] - other[:, :3]).abs().max() < 1e-5  # an expert may sum in another order
    assert (one[:, 3:] - other[:, 3:]).abs().max() > 1e-3


# Towers.


def test_the_text_tower_of_clip_is_causal_and_the_images_are_not():
    model = CASES["clip"].build()
    causal = {site.name: site.causal for site in find_host(model).sites(model)}
    assert causal == {
        **{f"text_model.encoder.layers.{i}": True for i in range(2)},
        **{f"vision_model.encoder.layers.{i}": False for i in range(2)},
    }
    with pytest.raises(ValueError, match="a causal host cannot use it"):
        moefold.plan(model, by_part(r"text_model\..*", EXPERTS))
    moefold.upcycle(model, by_part(r"vision_model\..*", EXPERTS))
    assert routers_at(model) == {
        **{f"text_model.encoder.layers.{i}": "token-choice" for i in range(2)},
        **{f"vision_model.encoder.layers.{i}": "expert-choice" for i in range(2)},
    }


@pytest.mark.parametrize(
    ("name", "tower", "causal"),
    [
        ("clip", "CLIPTextModel", True),
        ("clip", "CLIPTextModelWithProjection", True),
        ("clip", "CLIPVisionModel", False),
        ("siglip", "SiglipTextModel", False),
        ("siglip", "SiglipVisionModel", False),
    ],
)
def test_a_tower_by_itself(name, tower, causal, tmp_path):
    case = CASES[name]
    kind = getattr(transformers, tower)
    settings = case.settings["text_config" if "Text" in tower else "vision_config"]
    model = kind(kind.config_class(**settings)).double().eval()
    assert [site.causal for site in find_host(model).sites(model)] == [causal, causal]
    inputs = case.inputs()
    wanted = {"pixel_values"} if "Vision" in tower else {"input_ids", "attention_mask"}
    if name == "siglip":
        wanted -= {"attention_mask"}  # it knows no padding
    inputs = {key: value for key, value in inputs.items() if key in wanted}
    made = moefold.upcycle(model, UpcycleConfig(moe=TOKENS, sites="all"), inputs=inputs)
    assert made.receipt is not None
    assert made.receipt.error < 1e-10  # renormalised copies in float64
    moefold.save(model, tmp_path / "moe")
    if tower != "SiglipTextModel":  # of which transformers' own AutoModel knows nothing
        opened = transformers.AutoModel.from_pretrained(tmp_path / "moe", dtype=torch.float64)
        assert type(opened).__name__ == f"Moefold{tower.removesuffix('WithProjection')}"
    loaded = moefold.load(tmp_path / "moe")
    assert type(loaded).__name__ == f"Moefold{tower}"
    with torch.no_grad():
        assert distance(loaded(**inputs)[0], model(**inputs)[0]) < 1e-12


def test_of_a_model_whose_parts_are_causal_or_not_the_part_decides():
    # What is called a decoder layer decodes by its own attention: EmbeddingGemma looks both ways.
    both = CASES["gemma3"].build(use_bidirectional_attention=True)
    one = CASES["gemma3"].build()
    assert {site.causal for site in find_host(one).sites(one)} == {True}
    assert {site.causal for site in find_host(both).sites(both)} == {False}
    moefold.upcycle(both, UpcycleConfig(moe=EXPERTS), inputs=False)


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_an_encoder_that_decodes_is_causal(name):
    model = CASES[name].build(is_decoder=True)
    assert {site.causal for site in find_host(model).sites(model)} == {True}
    with pytest.raises(ValueError, match="a causal host cannot use it"):
        moefold.plan(model, UpcycleConfig(moe=EXPERTS))


# Windows.


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_window_hides_no_real_token_from_the_router(attention):
    # The second layer of this ModernBERT attends to two tokens on each side: of 7 tokens, the mask
    # of the first shows three. All 7 are real.
    case = CASES["modernbert"]
    model = case.build(attn_implementation=attention)
    kinds = [layer.attention_type for layer in model.get_submodule("layers")]  # pyright: ignore
    assert kinds == ["full_attention", "sliding_attention"]
    moefold.upcycle(model, UpcycleConfig(moe=EXPERTS, sites="all"), inputs=False)
    inputs = case.inputs()
    with moefold.record_routing(model) as record:
        model(**inputs)
    for site in record:
        (routing,) = record[site]
        assert routing.mask is not None
        assert torch.equal(routing.mask, inputs["attention_mask"].bool())


# Whole SentenceTransformers.

WORDS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefgh")


def save_dense(name: str, folder: Path) -> None:
    """A transformer and a tokenizer of a dozen words, as their classes save them."""
    model = CASES[name].build()
    assert isinstance(model, transformers.PreTrainedModel)
    model.float().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=16,
    ).save_pretrained(folder)


SENTENCES = ["a b c d e f", "g", "h a d"]
READ = """
import sys
import moefold
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

found = {}
for folder in sys.argv[2:]:
    model = SentenceTransformer(folder, device="cpu")
    name = folder.rpartition("/")[2]
    found[name] = model.encode(%r, convert_to_tensor=True).contiguous()
    found[name + " mixtures"] = torch.tensor(
        sum(isinstance(module, moefold.MoE) for module in model.modules())
    )
save_file(found, sys.argv[1])
"""


def test_whole_sentence_transformers_open_in_a_new_process(tmp_path):
    assert len(WORDS) <= VOCABULARY
    expected, folders = {}, []
    for name in ("bert", "xlm-roberta", "mpnet", "modernbert"):
        save_dense(name, tmp_path / f"{name}-dense")
        inner = Transformer(str(tmp_path / f"{name}-dense"))
        model = SentenceTransformer(modules=[inner, Pooling(16)], device="cpu").eval()
        before = model.encode(SENTENCES, convert_to_tensor=True)
        made = moefold.upcycle(model, UpcycleConfig(moe=TOKENS, sites="all"))
        assert len(made.chosen) == 2
        assert made.receipt is not None
        assert made.layers == (name,)
        after = model.encode(SENTENCES, convert_to_tensor=True)
        # Renormalised copies in float32, a few hundred roundings of 6e-8 in each number.
        assert distance(after, before) < 1e-5
        moefold.revert(model)
        assert torch.equal(model.encode(SENTENCES, convert_to_tensor=True), before)
        moefold.upcycle(model, UpcycleConfig(moe=EXPERTS, sites="all"), inputs=False)
        spread_experts(model)
        expected[name] = model.encode(SENTENCES, convert_to_tensor=True)
        # A sentence is the same whatever it is padded to, with experts that compete for tokens.
        alone = torch.cat([model.encode([s], convert_to_tensor=True) for s in SENTENCES])
        assert distance(alone, expected[name]) < 1e-5
        assert distance(expected[name], before) > 1e-2
        moefold.save(model, tmp_path / name)
        folders.append(str(tmp_path / name))
        assert (tmp_path / name / "tokenizer.json").is_file()
    subprocess.run(
        [sys.executable, "-c", READ % SENTENCES, str(tmp_path / "found"), *folders],
        check=True,
        capture_output=True,
    )
    found = load_file(tmp_path / "found")
    for name, embeddings in expected.items():
        assert found[f"{name} mixtures"] == 2
        assert distance(found[name], embeddings) < 1e-5
