"""Embeddings of any causal mixture of experts, without training.

encoder = moefold.embedding.embedder(model, tokenizer)      a SentenceTransformer
vectors = encoder.encode(texts)
"""

from moefold.embedding.config import PROMPTS, EmbeddingConfig
from moefold.embedding.embedder import embedder, fit, open_embedder
from moefold.embedding.module import MixtureEmbedding

__all__ = ["PROMPTS", "EmbeddingConfig", "MixtureEmbedding", "embedder", "fit", "open_embedder"]
