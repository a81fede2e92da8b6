"""Surgery itself: all or nothing, in place, and back again.

plan = moefold.upcycle(model, moefold.UpcycleConfig(sites="last:3"))
moefold.revert(model)
"""

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moefold.surgery.births import born
from moefold.surgery.config import UpcycleConfig
from moefold.surgery.encoder import MINILM, MINILM_SHA256, sha256_of
from moefold.surgery.hosts import Changes, Site, find_host, refuse_adapters
from moefold.surgery.inputs import made_up_inputs
from moefold.surgery.plan import Plan, draft
from moefold.surgery.receipt import Before, measure_dense, measure_upcycled
from moefold.surgery.restored import restore

SCHEMA = 1
"""Version of the section that is saved with a model."""

CHANGES = "_moefold_changes"
"""The attribute of an upcycled model that holds what surgery altered."""


@torch.inference_mode(False)  # in which weights would be made that can never be trained
def upcycle(
    model: nn.Module,
    config: UpcycleConfig | None = None,
    *,
    inputs: Mapping[str, Any] | bool = True,
    inputs_are: str = "the inputs given",
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
        inputs_are: what the receipt calls them.

    Returns:
        The plan that was carried out, with its receipt.

    Raises:
        ValueError: whatever `moefold.plan` refuses; the model is then untouched.
    """
    config = config or UpcycleConfig()
    made, host, taken = draft(model, config)
    before = _run_dense(model, taken, inputs, inputs_are)
    if isinstance(before, str):
        made, before = dataclasses.replace(made, unmeasured=before), None
    mixtures = {site.name: born(made.mixtures[site.name].moe, site, config.birth) for site in taken}
    section = section_of(made, host.source(model))
    values = config.birth.complete(model, mixtures, taken)
    changes = Changes()
    try:
        for name, value in values.items():
            changes.set_value(model, name, value)
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
    model.__dict__[CHANGES] = changes
    return made


def section_of(made: Plan, source: str) -> dict[str, Any]:
    """What a model says of itself once a plan was carried out: the section that is saved with it.

    Args:
        made: the plan.
        source: where the dense model came from, see `provenance`.
    """
    return {
        "schema": SCHEMA,
        "moefold": version("moefold"),
        "upcycle": {**made.config.to_dict(), "birth": made.config.birth.signed()},
        "sites": {name: mixture.moe.to_dict() for name, mixture in made.mixtures.items()},
        "source": provenance(source),
    }


def _run_dense(
    model: nn.Module, taken: list[Site], inputs: Mapping[str, Any] | bool, inputs_are: str
) -> Before | str | None:
    """The half of the receipt that must be measured before surgery; a reason if it cannot be."""
    if inputs is False:
        return None
    if any(p.device.type == "meta" for p in model.parameters()):
        return "the weights are on the device 'meta'"
    if inputs is not True:
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f"inputs is a {type(inputs).__name__}; it must be True, False, or the arguments of "
                f"the model's forward by name, as in inputs={{'input_ids': ids}}"
            )
        return measure_dense(model, taken, inputs, inputs_are)
    made_up = made_up_inputs(model)
    if made_up is None:
        return "the model does not say what it takes; pass `inputs`"
    try:
        return measure_dense(model, taken, *made_up)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        return f"the dense model cannot be run on {made_up[1]} ({reason}); pass `inputs`"


@torch.inference_mode(False)
def revert(model: nn.Module, dense: nn.Module | None = None, *, any_source: bool = False) -> None:
    """Undoes `upcycle`: the dense MLPs come back.

    Weights that surgery left alone (attention, norms, embeddings) keep what training made of them;
    those it set (the average of several fine-tunes) are again what they were before it.
    The object that was passed to `upcycle` still has its MLPs: the same objects with the same
    values. A loaded mixture has none, and gets copies of those of `dense`.

    Args:
        model: an upcycled host, or a loaded one.
        dense: for a loaded one, the model it was made from; it is not changed.
        any_source: take the MLPs of `dense` though its files are not those that were upcycled.

    Raises:
        ValueError: it is not upcycled, or carries adapters; it was loaded and `dense` is missing,
            is of another architecture, or was read from other files than the model that was
            upcycled; it has its own MLPs and `dense` is given all the same.
    """
    refuse_adapters(model)
    changes = model.__dict__.get(CHANGES)
    if changes is not None and dense is not None:
        raise ValueError(
            f"{type(model).__name__} still has the MLPs it was upcycled with; call "
            f"moefold.revert(model) without a dense model"
        )
    if changes is not None:
        del model.__dict__[CHANGES]
        changes.undo()
        return
    if dense is not None:
        source = provenance(find_host(dense).source(dense))
        restore(model, dense, came_from=source, any_source=any_source)
        return
    section = find_host(model).section(model)
    if section is None:
        raise ValueError(
            f"{type(model).__name__} is not upcycled, there is nothing to revert; pass the object "
            f"that was given to moefold.upcycle"
        )
    origin = section["source"].get("name") or "its origin is not known"
    raise ValueError(
        f"{type(model).__name__} holds mixtures but not the dense MLPs they were made from (it was "
        f"loaded, or upcycled inside another model); load the dense model and pass it, "
        f"moefold.revert(model, dense): {origin}"
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
