"""`moefold evaluate`: what a model is worth as an encoder of texts, on tasks of mteb."""

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import tyro
from rich.console import Console
from sentence_transformers import SentenceTransformer
from torch import nn

from moefold.cli.options import parse, router_of
from moefold.cli.texts import read_texts
from moefold.embedding import EmbeddingConfig, embedder, fit, open_embedder
from moefold.embedding.config import Kind, Pooling, RoutingOf, Standardize
from moefold.embedding.module import SETTINGS
from moefold.rerouting import reroute
from moefold.rerouting.reroute import rerouting_of
from moefold.rerouting.saved import load
from moefold.surgery.encoder import pretrained_encoder, source_folder
from moefold.surgery.hosts.checkpoint import open_tokenizer
from moefold.surgery.saved import MANIFEST, REROUTED

EXAMPLE = "moefold evaluate minilm"

DATA = "MOEFOLD_DATA"
"""The variable that says where data are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """How a causal model makes vectors; an encoder has its own way.

    Attributes:
        kind: a hidden state, routing weights, both one after the other, or both so that their
            cosines add.
        pooling: of hidden states.
        layer: which hidden states; -1 for the last.
        routing_of: what a router says of a token.
        routing_pooling: of routing weights.
        similarity_weight: weight of the cosine of routing weights, for the kind sum.
        prompt: quotes, prompteol, or a template that holds {text}.
        clean_text: as published: a full stop at the end, no double quotes, no underscores.
        standardize: features by their mean and deviation: in the batch, as published, or in the
            texts of --fit.
        max_length: most tokens of a text.
    """

    kind: Kind = "hidden"
    pooling: Pooling = "last"
    layer: int = -1
    routing_of: RoutingOf = "logits"
    routing_pooling: Pooling = "last"
    similarity_weight: float = 1.0
    prompt: str | None = None
    clean_text: bool = False
    standardize: Standardize = "none"
    max_length: int | None = None

    def config(self) -> EmbeddingConfig:
        """As `moefold.embedding` takes it."""
        return EmbeddingConfig(**{name: getattr(self, name) for name in self.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Measure what a model is worth as an encoder of texts; without --mteb, say what there is.

    Attributes:
        model: a local folder of a SentenceTransformer, of an upcycled or rerouted model or of a
            causal one, or minilm for the packaged encoder.
        mteb: names of tasks of mteb.
        data: folder to take the tasks' data from; the variable MOEFOLD_DATA if not said, and mteb
            fetches them if that is not set either.
        output: folder for a JSON file of each task; what is finished there is not run again.
        router: another router for the mixtures of a causal model, before it is measured.
        set: a setting of the router, name=value; may be repeated.
        faithful: reroute as the released code of USMoE does it, where padding competes.
        fit: texts that --standardize fitted learns mean and deviation from, a few hundred lines:
            plain, .jsonl, or .xz of either.
        instructions: put every task's instruction before its texts, in the form of GritLM.
        batch_size: texts in a batch.
        device: where to run, such as cpu or cuda; the first accelerator if not said.
        force: run what is finished too.
        vectors: how a causal model makes vectors.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    mteb: tuple[str, ...] = ()
    data: Path | None = None
    output: Path = Path("evaluation")
    router: str | None = None
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    faithful: bool = False
    fit: Path | None = None
    instructions: bool = False
    batch_size: int = 32
    device: str | None = None
    force: bool = False
    vectors: Vectors = field(default_factory=Vectors)


def main(arguments: Sequence[str]) -> None:
    """Runs the verb.

    Raises:
        ValueError: no such model, task or data, or settings that do not go together.
    """
    asked = parse(Arguments, arguments, verb="evaluate", example=EXAMPLE)
    config = asked.vectors.config()
    if asked.set and asked.router is None:
        raise ValueError("--set is a setting of --router, which is not given")
    if (asked.fit is None) == (config.standardize == "fitted"):
        raise ValueError(
            "--standardize fitted learns from texts, and --fit FILE says which: give both or none"
        )
    lines = [] if asked.fit is None else _lines(asked.fit)
    if asked.batch_size < 1:
        raise ValueError(f"--batch-size is {asked.batch_size}; it must be at least 1")
    data = asked.data or (Path(os.environ[DATA]) if os.environ.get(DATA) else None)
    if data is not None and not data.is_dir():
        raise ValueError(f"no folder at {data}; give one that holds the tasks' data")
    if importlib.util.find_spec("mteb") is None:
        raise ValueError("the verb needs mteb; install it: pip install 'moefold[eval]'")
    if not asked.mteb:
        print("\n".join(_offer(asked.model, data)))
        return
    console = Console(stderr=True)  # progress is not what the verb has to say
    # Now, for it takes seconds.
    from moefold.evaluate.mteb_runs import INSTRUCTION, run_tasks

    tasks = [_task(name, data) for name in asked.mteb]
    transformers.utils.logging.disable_progress_bar()
    console.print(f"opening {asked.model}")
    encoder, about = _open(asked, config)
    encoder.to(asked.device or _best_device())
    if lines:
        console.print(f"learning mean and deviation from {len(lines)} texts")
        fit(encoder, lines, batch_size=asked.batch_size)
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        about["fitted_on"] = {"texts": len(lines), "sha256": digest}
    scores = run_tasks(
        encoder,
        tasks,
        asked.output,
        model=about,
        batch_size=asked.batch_size,
        instruction=INSTRUCTION if asked.instructions else None,
        force=asked.force,
        bars=console.is_terminal,
        said=lambda name: console.print(f"running {name}"),
    )
    longest = max(len(score.task) for score in scores)
    print(f"{asked.model}, {about['what']}")
    for score in scores:
        when = "finished before" if score.again else f"{score.seconds:.1f} s"
        shown = f"{100 * score.main_score:6.2f}  {score.metric:<16}  {when}"
        print(f"  {score.task:<{longest}}  {shown}")
    if len(scores) > 1:
        mean = sum(score.main_score for score in scores) / len(scores)
        print(f"  {'mean':<{longest}}  {100 * mean:6.2f}")
    print(f"wrote {asked.output}/TASK.json")


def _lines(file: Path) -> list[str]:
    """The lines of a file's texts that hold something."""
    lines = [line for text in read_texts(file) for line in text.split("\n") if line.strip()]
    if len(lines) < 2:
        raise ValueError(f"{file} holds {len(lines)} line of text; give at least 2 to --fit")
    return lines


def _offer(model: str, data: Path | None) -> list[str]:
    """What can be evaluated, and how."""
    from moefold.evaluate.mteb_tasks import TASKS, files_of

    lines = ["tasks of mteb whose data a folder may hold"]
    for name in TASKS:
        files = [path.name for path in files_of(name, data or Path())]
        missing = [file for file in files if data is not None and not (data / file).is_file()]
        there = f"  {'lacks' if missing else 'there:' if data else 'from'} "
        lines.append(f"  {name:<24}{there}{', '.join(missing or files)}")
    lines.append(f"data from               {data or 'nowhere: give --data FOLDER, or set ' + DATA}")
    lines.append("with a network, mteb fetches the data of any of its tasks (no --data then)")
    lines.append(f"next: moefold evaluate {model} --mteb STSBenchmark --data {data or 'FOLDER'}")
    return lines


def _task(name: str, data: Path | None) -> Any:
    if data is not None:
        from moefold.evaluate.mteb_tasks import offline

        return offline(name, data)
    import mteb

    try:
        task = mteb.get_task(name)
    except KeyError as error:
        raise ValueError(f"mteb has no task {name!r}: {error.args[0]}") from error
    try:
        task.load_data()
    except (OSError, ConnectionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the data of {name} cannot be fetched ({reason}); give --data FOLDER, or set {DATA}; "
            f"without --mteb the verb says what can be there"
        ) from error
    return task


def _open(asked: Arguments, config: EmbeddingConfig) -> tuple[SentenceTransformer, dict[str, Any]]:
    """The encoder, and what it is, in plain data."""
    folder = source_folder(asked.model)
    model: Any = None
    if folder is not None and any((folder / name).is_file() for name in (MANIFEST, REROUTED)):
        model = load(folder)
    elif folder is not None and (folder / SETTINGS).is_file():
        model = open_embedder(folder)
    elif folder is None or (folder / "modules.json").is_file():
        model = pretrained_encoder(asked.model)
    if isinstance(model, SentenceTransformer):
        _refuse_settings(asked, config)
        own = getattr(model[0], "config", None)
        kind = own.to_dict() if isinstance(own, EmbeddingConfig) else None
        what = "as it encodes" if kind is None else f"{kind['kind']} of a causal model, as saved"
        return model, {"model": asked.model, "what": what, "embedding": kind, **_routed(model)}
    assert folder is not None
    if model is None:
        from moefold.cli.models import open_model

        model = open_model(str(folder)).model
    if not _is_causal(model):
        _refuse_settings(asked, config)
        about = {"model": asked.model, "what": "mean of its last hidden states"}
        return pretrained_encoder(folder), {**about, "embedding": None, **_routed(model)}
    tokenizer = open_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer; save the model's own beside it")
    if asked.router is not None:
        if rerouting_of(model) is not None:
            raise ValueError(
                f"{folder} holds a rerouted model; leave --router out, or give the model it was "
                f"made from"
            )
        reroute(model, router_of(asked.router, asked.set), faithful=asked.faithful)
    done = rerouting_of(model)
    about = {
        "model": asked.model,
        "what": f"{config.kind} of {type(model).__name__}, {done.router if done else 'as it is'}",
        "embedding": config.to_dict(),
        **_routed(model),
    }
    return embedder(model, tokenizer, config), about


def _routed(model: nn.Module) -> dict[str, Any]:
    """How the model, or the one inside it, was rerouted, in plain data."""
    found = next(filter(None, map(rerouting_of, model.modules())), None)
    config = None if found is None else found.config
    return {
        "router": None if config is None else config.to_dict(),
        "faithful": found is not None and found.faithful,
    }


def _refuse_settings(asked: Arguments, config: EmbeddingConfig) -> None:
    if asked.router is not None:
        raise ValueError(
            f"{asked.model} is an encoder with mixtures or none of its own; --router is for a "
            f"causal mixture of experts"
        )
    if config != EmbeddingConfig():
        own, none = config.to_dict(), EmbeddingConfig().to_dict()
        given = ", ".join(f"--{k.replace('_', '-')}" for k in own if own[k] != none[k])
        raise ValueError(
            f"{asked.model} is an encoder that pools in its own way; {given} is for a causal model"
        )


def _is_causal(model: Any) -> bool:
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    return any(getattr(module, "is_causal", None) is True for module in model.modules())


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
