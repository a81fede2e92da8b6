"""A tiny random sentence encoder: the real classes, a vocabulary of letters, quick steps."""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789_()[]:.,=+-*/'\"#%<>"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_folder(folder: Path, **changes: object) -> Path:
    """Save a BERT of 4 layers and width 16 with its tokenizer, as a hub model would be."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    settings = {
        "vocab_size": len(pieces),
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        # Larger than usual, so that the MLPs matter to the output of so small a model.
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    BertModel(BertConfig(**{**settings, **changes})).save_pretrained(folder)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    transformer = Transformer(str(folder))
    dim = transformer.get_embedding_dimension()
    encoder = SentenceTransformer(modules=[transformer, Pooling(dim)], device="cpu")
    encoder.max_seq_length = 24
    encoder.save_pretrained(str(folder), create_model_card=False)
    return folder


def tiny_encoder(folder: Path, **changes: object) -> SentenceTransformer:
    """The encoder itself, in evaluation mode."""
    return SentenceTransformer(str(tiny_folder(folder, **changes)), device="cpu").eval()


# "k3 v": the text that belongs to "k3", and so on; easy to learn, so a few steps show.
PAIRS = [(f"k{i} {'ab' * (i % 5)}", f"{'xyz'[i % 3]}{i} k{i}" * (1 + i % 4)) for i in range(24)]
