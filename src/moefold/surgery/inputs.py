"""Made-up inputs of a model, to measure it on where none are given.

Shapes: 4 sequences of 16 tokens, padded; 2 images of the size the config says.
"""

from typing import Any

import torch
from torch import nn

SEQUENCES, TOKENS = 4, 16


def made_up_inputs(model: nn.Module) -> tuple[dict[str, Any], str] | None:
    """Arguments for a model's forward, made from its config, and what they are in words.

    Random token ids with padding on the right, random pixels, or both. The random state is left
    alone.

    Returns:
        None where the model says too little of what it takes.
    """
    inner = _transformer_in(model)
    config = getattr(inner, "config", None)
    if inner is None or config is None:
        return None
    wanted = [getattr(inner, "main_input_name", "input_ids")]
    # On the CPU, whatever device is the default one, where the generator is.
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    device = next(inner.parameters()).device
    inputs: dict[str, Any] = {}
    text, vision = getattr(config, "text_config", None), getattr(config, "vision_config", None)
    if text is not None and vision is not None:
        wanted = ["input_ids"] if hasattr(text, "image_token_id") else ["input_ids", "pixel_values"]
    if "pixel_values" in wanted:
        of = vision or config
        size, channels = getattr(of, "image_size", None), getattr(of, "num_channels", 3)
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        dtype = next(inner.parameters()).dtype
        pixels = torch.randn(2, channels, height, width, generator=generator, device=cpu)
        inputs["pixel_values"] = pixels.to(device, dtype)
    if "input_ids" in wanted:
        of = text or config
        vocabulary = getattr(of, "vocab_size", None)
        if vocabulary is None:
            return None
        longest = min(TOKENS, int(getattr(of, "max_position_embeddings", None) or TOKENS) - 2)
        sequences = 2 if "pixel_values" in inputs else SEQUENCES
        ids = torch.randint(
            min(5, vocabulary - 1),
            vocabulary,
            (sequences, longest),
            generator=generator,
            device=cpu,
        )
        lengths = [longest, longest - longest // 4, max(1, longest // 2), 1][:sequences]
        mask = torch.arange(longest, device=cpu) < torch.tensor(lengths, device=cpu).unsqueeze(1)
        inputs["input_ids"] = ids.to(device)
        inputs["attention_mask"] = mask.long().to(device)
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"]
    if not inputs:
        return None
    what = {"input_ids": "random tokens", "pixel_values": "random pixels"}
    return inputs, " and ".join(what[name] for name in what if name in inputs)


def _transformer_in(model: nn.Module) -> nn.Module | None:
    """The model itself, or the one transformer in a SentenceTransformer."""
    if hasattr(model, "config"):
        return model
    inside = [m for m in model.modules() if hasattr(m, "config") and hasattr(m, "main_input_name")]
    return inside[0] if inside else None
