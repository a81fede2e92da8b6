"""The model of an embedding on disk: a folder of its own inside the encoder's.

    encoder/modules.json, ...       as SentenceTransformer writes them
    encoder/moefold_embedding.json  how vectors are made
    encoder/model/                  what moefold.save writes of an upcycled or a rerouted model, and
                                    save_pretrained of any other: transformers opens it

Nothing but JSON and safetensors is read, and no code from the folder is run.
"""

from pathlib import Path
from typing import Any

from moefold.moe import MoE
from moefold.rerouting.layer import Rerouter
from moefold.rerouting.saved import load, save
from moefold.surgery.encoder import refuse_pickles
from moefold.surgery.hosts.checkpoint import open_whole
from moefold.surgery.saved import MANIFEST, REROUTED

MODEL = "model"
"""The folder of the model."""


def write_model(model: Any, folder: Path) -> None:
    """Writes the model into the encoder's folder."""
    if any(isinstance(module, MoE | Rerouter) for module in model.modules()):
        save(model, folder / MODEL)
    else:
        model.save_pretrained(folder / MODEL)


def read_model(folder: Path) -> Any:
    """Opens the model in the encoder's folder: on the CPU, in evaluation mode.

    Raises:
        ValueError: its files are not there, or not what was saved.
    """
    inner = folder / MODEL
    if (inner / MANIFEST).is_file() or (inner / REROUTED).is_file():
        return load(inner)
    if not (inner / "config.json").is_file():
        raise ValueError(f"{folder} lacks {MODEL}/config.json; copy the whole folder again")
    refuse_pickles(inner)
    model, found = open_whole(inner)
    if wrong := {k: sorted(map(str, found[k])) for k in found if found[k]}:
        raise ValueError(
            f"the weights in {inner} are not those of the model it describes: {wrong}; save the "
            f"encoder again"
        )
    return model.eval()
