"""Settings of embeddings: what is allowed, what is published, and back from JSON."""

import json
import re

import pytest

from moefold.embedding import EmbeddingConfig

REFUSED = {
    "kind": ("states", "kind is 'states'; choose one of hidden, routing, concat, sum"),
    "pooling": ("cls", "pooling is 'cls'; choose one of last, mean, weighted-mean"),
    "routing_of": ("probs", "routing_of is 'probs'; choose one of logits, softmax"),
    "routing_pooling": ("all", "routing_pooling is 'all'; choose one of last, mean, weighted-mean"),
    "standardize": ("yes", "standardize is 'yes'; choose one of none, batch, fitted"),
    "padding": ("both", "padding is 'both'; choose one of left, right"),
    "similarity_weight": (-1.0, "similarity_weight is -1.0; it must be a finite number, zero"),
    "max_length": (0, "max_length is 0; it must be at least 1, or None"),
    "prompt": (
        "prompt-eol",
        "prompt 'prompt-eol' has no place for the text; give one of quotes, prompteol, or a "
        "template that holds {text} once",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_are_named(name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        EmbeddingConfig(**{name: value})


def test_a_weight_that_is_no_number_is_refused():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"similarity_weight is (nan|inf)"):
            EmbeddingConfig(similarity_weight=value)


def test_it_comes_back_from_json():
    config = EmbeddingConfig(kind="sum", prompt="Word of {text}:", max_length=9, layer=1)
    told = json.loads(json.dumps(config.to_dict()))
    assert EmbeddingConfig.from_dict(told) == config
    with pytest.raises(ValueError, match=r"EmbeddingConfig has no setting 'pool'; it has clean_t"):
        EmbeddingConfig.from_dict({"pool": "mean"})


def test_the_published_protocol():
    # Hidden states are published as they are, everything else standardized by the batch.
    assert EmbeddingConfig.published() == EmbeddingConfig(prompt="quotes", clean_text=True)
    assert EmbeddingConfig.published("sum", prompteol=True) == EmbeddingConfig(
        kind="sum", prompt="prompteol", clean_text=True, standardize="batch"
    )
