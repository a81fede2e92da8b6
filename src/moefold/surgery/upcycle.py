"""Surgery itself: all or nothing, in place, and back again.

plan = moefold.upcycle(model, moefold.UpcycleConfig(sites="last:3"))
moefold.revert(model)
"""

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from moefold.surgery.births import born
from moefold.surgery.config import UpcycleConfig
from moefold.surgery.encoder import MINILM, MINILM_SHA256, sha256_of
from moefold.surgery.hosts import Changes, Site, find_host
from moefold.surgery.inputs import made_up_inputs
from moefold.surgery.plan import Plan, draft
from moefold.surgery.receipt import Before, measure_dense, measure_upcycled

SCHEMA = 1
"""Version of the section that is saved with a model."""

_CHANGES = "_moefold_changes"


def upcycle(
    model: nn.Module,
    config: UpcycleConfig | None = None,
    *,
    inputs: Mapping[str, Any] | bool = True,
) -> Plan:
    """Turns the chosen MLPs of the model into mixtures of experts, in place.

    Everything that can fail happens before the model is touched. It is run for the receipt, once
    before and once after, and hooks on it run as well. Modules keep their identity: the
    layers stay the same objects, with their hooks, and attention, norms and embeddings are not
    copied. An optimiser made before knows the dense weights only: make it afterwards, or carry its
    state over with `carry_optimizer`. Experts are frozen where the MLP they copy is; the router is
    new, and trainable in a frozen host too.

    Args:
        model: a dense host, for instance a BertModel, a LlamaForCausalLM or a SentenceTransformer.
        config: what to do; the defaults of `UpcycleConfig` if None.
        inputs: arguments of the model's forward that the receipt is measured on, as a tokenizer
            returns them; True for made-up ones, False for no receipt.

    Returns:
        The plan that was carried out, with its receipt.

    Raises:
        ValueError: whatever `moefold.plan` refuses; the model is then untouched.
    """
    config = config or UpcycleConfig()
    made, host, taken = draft(model, config)
    before = _run_dense(model, taken, inputs)
    if isinstance(before, str):
        made, before = dataclasses.replace(made, unmeasured=before), None
    mixtures = {site.name: born(made.mixtures[site.name].moe, site, config.birth) for site in taken}
    section = {
        "schema": SCHEMA,
        "moefold": version("moefold"),
        "upcycle": config.to_dict(),
        "sites": {name: mixture.moe.to_dict() for name, mixture in made.mixtures.items()},
        "source": provenance(host.source(model)),
    }
    changes = Changes()
    try:
        for site in taken:
            mixtures[site.name].train(site.layer.training)
            host.install(model, site, mixtures[site.name], changes)
        if before is not None:
            made = dataclasses.replace(made, receipt=measure_upcycled(model, mixtures, before))
            assert made.receipt is not None
            section["receipt"] = made.receipt.to_dict()
        host.sign(model, section, changes)
    except BaseException:
        changes.undo()
        raise
    model.__dict__[_CHANGES] = changes
    return made


def _run_dense(
    model: nn.Module, taken: list[Site], inputs: Mapping[str, Any] | bool
) -> Before | str | None:
    """The half of the receipt that must be measured before surgery; a reason if it cannot be."""
    if inputs is False:
        return None
    if any(p.device.type == "meta" for p in model.parameters()):
        return "the weights are on the device 'meta'"
    if inputs is not True:
        return measure_dense(model, taken, inputs, "the inputs given")
    made_up = made_up_inputs(model)
    if made_up is None:
        return "the model does not say what it takes; pass `inputs`"
    try:
        return measure_dense(model, taken, *made_up)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        return f"the dense model cannot be run on {made_up[1]} ({reason}); pass `inputs`"


def revert(model: nn.Module) -> None:
    """Undoes `upcycle`: the dense MLPs come back, as the same objects with the same values.

    Weights that surgery left alone (attention, norms, embeddings) keep what training made of them.

    Args:
        model: the object that was passed to `upcycle`.

    Raises:
        ValueError: it was not upcycled in this process, so its dense weights are not there.
    """
    changes = model.__dict__.pop(_CHANGES, None)
    if changes is not None:
        changes.undo()
        return
    section = find_host(model).section(model)
    if section is None:
        raise ValueError(
            f"{type(model).__name__} is not upcycled, there is nothing to revert; pass the object "
            f"that was given to moefold.upcycle"
        )
    raise ValueError(
        f"{type(model).__name__} holds mixtures but not the dense MLPs they were made from (it was "
        f"loaded, or upcycled inside another model); load the dense model instead: "
        f"{section['source'].get('name') or 'its origin is not known'}"
    )


def provenance(source: str) -> dict[str, Any]:
    """Where a dense model came from, as far as it can be known.

    Args:
        source: a folder, a name on the hub, or an empty string.

    Returns:
        `name` and, for a folder with safetensors, the `sha256` of each such file. A folder is named
        without the path that leads to it, which is nobody else's business.
    """
    folder = Path(source)
    if not source or not folder.is_dir():
        return {"name": source, "sha256": {}}
    hashes = {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}
    name = MINILM if MINILM_SHA256 in hashes.values() else folder.name
    return {"name": name, "sha256": hashes}
