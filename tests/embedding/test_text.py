"""From texts to ids: templates and cleaning as published, cutting, padding."""

import pytest

from moefold.embedding import EmbeddingConfig
from moefold.embedding.text import prepared, tokens_of
from tests.embedding.tiny import WORDS, tokenizer

EOL = 'This sentence : "{text}" means in one word:"'


def words(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def as_released(text: str, template: str) -> str:
    """The clean-up of MoEE's released code, in its own order of steps."""
    if len(text) > 0 and text[-1] not in ".?!\"'":
        text = text + "."
    text = text.replace('"', "'")
    return template.replace("{text}", text).replace("_", " ").strip()


def test_templates():
    assert prepared("rain", EmbeddingConfig()) == "rain"
    assert prepared("rain", EmbeddingConfig(prompt="quotes")) == '"rain"'
    eol = EmbeddingConfig(prompt="prompteol", instruction="Tone: ")
    assert prepared("rain", eol) == 'This sentence : "Tone: rain" means in one word:"'
    assert prepared("rain", eol, "Style: ") == 'This sentence : "Style: rain" means in one word:"'
    assert prepared("a{b}", EmbeddingConfig(prompt="Word of {text}:")) == "Word of a{b}:"


@pytest.mark.parametrize("template", ['"{text}"', EOL, "{text}", " a_b {text}", "{text} _c_ "])
def test_cleaning_is_the_released_one(template):
    config = EmbeddingConfig(prompt=template, clean_text=True)
    for text in ("rain", "Rain!", 'say "no"', "snake_case_", "", " a ", "it's '", "_", "x?"):
        assert prepared(text, config) == as_released(text, template)
    assert prepared('say_"no"', config).count('"') == template.count('"')


def test_padding_has_the_id_zero_and_a_mask():
    #   the rain falls      7 9 13
    #   sun                 0 0 10
    texts, tok = ["the rain falls", "sun"], tokenizer()
    assert tok.pad_token is None
    left = tokens_of(texts, tok, EmbeddingConfig())
    assert left["input_ids"].tolist() == [[7, 9, 13], [0, 0, 10]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    right = tokens_of(texts, tok, EmbeddingConfig(padding="right"))
    assert right["input_ids"].tolist() == [[7, 9, 13], [10, 0, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_long_text_is_cut_and_its_template_is_not():
    config = EmbeddingConfig(prompt="This sentence : {text} means in one word :")
    text = "the rain falls on the sea"
    cut = tokens_of([text, "sun"], tokenizer(), config, longest=10)
    rows = [
        words(ids[mask.bool()].tolist())
        for ids, mask in zip(cut["input_ids"], cut["attention_mask"], strict=True)
    ]
    assert rows == [
        "This sentence : the rain means in one word :",
        "This sentence : sun means in one word :",
    ]
    assert len(rows[0].split()) == 10
    with pytest.raises(ValueError, match=r"at most 8 tokens are allowed, but 8 stand around the"):
        tokens_of([text], tokenizer(), config, longest=8)
    bare = tokens_of([text], tokenizer(), EmbeddingConfig(), longest=2)
    assert words(bare["input_ids"][0].tolist()) == "the rain"


def test_special_tokens_around_a_text_are_kept():
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer()
    tok.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    cut = tokens_of(["the rain falls on"], tok, EmbeddingConfig(), longest=4)
    assert words(cut["input_ids"][0].tolist()) == "<s> the rain </s>"
    config = EmbeddingConfig(prompt="a {text} :")
    cut = tokens_of(["the rain falls on"], tok, config, longest=6)
    assert words(cut["input_ids"][0].tolist()) == "<s> a the rain : </s>"


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"text 1 \(' '\) has no token; leave it out, or give a"):
        tokens_of(["sun", " "], tokenizer(), EmbeddingConfig())
    quoted = tokens_of([" "], tokenizer(), EmbeddingConfig(prompt="quotes"))
    assert words(quoted["input_ids"][0].tolist()) == '" "'
