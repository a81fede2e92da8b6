"""What a forward pass costs, counted from the matrices of a model.

Shapes: `tokens` is the length of a sequence.
"""

from torch import nn

from moefold.surgery.hosts.forms import known_layers, weights


def dense_flops(model: nn.Module, tokens: int) -> float:
    """Floating-point operations of a forward pass for each token, two for each multiply-add.

    Every matrix of every layer is a product with the token; attention adds two products of the
    token with all tokens, `2 * tokens * dim` multiply-adds where its heads together are as wide as
    the token. Embeddings, norms, heads and the mask of a decoder (which halves attention where a
    kernel uses it) are left out; of an encoder-decoder, a token is counted on both sides.
    """
    total = 0.0
    for _, layer, form in known_layers(model):
        for module in layer.modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding):
                total += 2.0 * weight.numel()
        total += 4.0 * tokens * weights(layer, form).up.shape[1]
    return total
