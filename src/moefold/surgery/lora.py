"""What peft's LoRA may adapt in a mixture, by the names of parameters.

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_parameters=moefold.lora_targets(model))
    model = get_peft_model(model, config)

Shapes: a stack `experts out in` gets one product of two thin matrices for each expert, the router's
`experts dim` one product.
"""

from torch import nn

from moefold.moe import MoE


def lora_targets(model: nn.Module) -> list[str]:
    """Names of the matrices of experts and routers, for `target_parameters` of a `LoraConfig`.

    They begin at the layer, as in `moe.experts.up_proj`, and mean every mixture of the model. Leave
    out those of the router to keep it as it is. Biases are no matrices, and a soft router's slots
    are no stack of them: `modules_to_save=["router"]` trains a router as a whole.

    Args:
        model: a model with mixtures.

    Raises:
        ValueError: it has none.
    """
    found = set()
    for name, moe in model.named_modules():
        if not isinstance(moe, MoE):
            continue
        place = name.rpartition(".")[2]
        for part, dims in (("experts", 3), ("shared", 3), ("router", 2)):
            module = getattr(moe, part)
            for key, parameter in () if module is None else module.named_parameters():
                if parameter.ndim == dims:
                    found.add(f"{place}.{part}.{key}" if place else f"{part}.{key}")
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no mixture of experts; call moefold.upcycle(model) first, "
            f"or name the modules of a dense model in target_modules"
        )
    return sorted(found)
