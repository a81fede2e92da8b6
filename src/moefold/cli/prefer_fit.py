"""`moefold prefer fit`: learn from an expert's choices, and save what was learnt."""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import tyro
from rich.console import Console

from moefold.cli.options import named_text, parse, router_of
from moefold.cli.prefer import EXAMPLE, in_words, moving, write_json
from moefold.preference import Groups, collapsed
from moefold.preference.model import PreferenceConfig, PreferenceModel
from moefold.preference.reading import read_all
from moefold.preference.report import Report, calibrate, measure
from moefold.preference.saved import is_saved, refuse_foreign_folder, save
from moefold.preference.scorers import NetConfig
from moefold.preference.trainer import FitConfig, History, fit, steps_of

_EPOCHS, _STEPS, _LOOKS = 8, 1000, 20
"""Passes and steps at least, and looks at held-out decisions at most, if nothing is said."""

REPORT, PAGE = "report.json", "report.html"
"""What is written beside the model."""

NETS = {"consistent": "mlp", "antisymmetric": "mirror", "free": "pair-mlp"}
"""The net of each comparator, if none is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Learn from an expert's choices to choose as the expert does.

    Part of the decisions is held out, to say how good the model is and to make its probabilities
    frequencies. A run that was interrupted goes on when the same line is run again.

    Attributes:
        data: decisions, a line each, as {"candidates": [[0.1, 2], [0.3, 1]], "chosen": 0}; or
            "ranking" or "utilities" in place of "chosen". Candidates may be texts (--encoder).
            .jsonl, .jsonl.xz, .jsonl.gz or .parquet.
        output: folder for the model, a report and a page.
        held_out: decisions to judge by, in such a file.
        hold_out: share of the decisions to judge by if there is no such file, 0 for none; those
            with the same "split" stay together.
        comparator: consistent never goes in circles and needs one evaluation for a candidate.
        net: linear, mlp or mixture; for comparators that are not consistent mirror or pair-mlp.
        hidden: hidden units.
        set: another setting of the net, name=value; may be repeated.
        loss: pair-logistic, pair-squared, listwise, plackett-luce or lambda-rank.
        loss_set: a setting of the loss, name=value; may be repeated.
        standardize: bring features to mean 0 and deviation 1 first; yes if not said, but not if the
            encoder is trained.
        encoder: for texts: a folder of a SentenceTransformer, or minilm for the packaged one.
        train_encoder: train the encoder too; else its vectors are made once, and kept.
        epochs: passes over the decisions; 8, and more of them where those are not 1000 steps, but 3
            if the encoder is trained.
        batch_size: decisions of a step; 128, or 16 if the encoder is trained.
        learning_rate: of Adam, at its highest; 0.002, or 0.00002 if the encoder is trained.
        warmup: share of the steps over which the rate grows.
        weight_decay: of AdamW.
        evaluate_every: steps between looks at what is held out; if not said an epoch, or more for
            twenty looks at most.
        save_every: steps between checkpoints; a tenth of all if not said.
        seed: of first weights, of the order and of what is held out.
        device: where to train: cpu, cuda.
        force: replace the output if it holds such a model, and begin anew; to go on with a run that
            was begun so, leave it out.
    """

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    output: Annotated[Path, tyro.conf.arg(aliases=["--out"])]
    held_out: Path | None = None
    hold_out: float = 0.1
    comparator: Literal["consistent", "antisymmetric", "free"] = "consistent"
    net: str | None = None
    hidden: int | None = None
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    loss: str = "pair-logistic"
    loss_set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    standardize: bool | None = None
    encoder: str | None = None
    train_encoder: bool = False
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0
    evaluate_every: int | None = None
    save_every: int | None = None
    seed: int = 0
    device: str = "cpu"
    force: bool = False

    def model(self) -> PreferenceConfig:
        """What is trained, without its sizes.

        Raises:
            ValueError: there is no such net, loss or comparator, or they do not go together.
        """
        settings = _settings("--set", self.set, "activation=relu")
        if self.hidden is not None:
            settings["hidden"] = self.hidden
        if "router" in settings:
            settings["router"] = router_of(str(settings["router"]), [])
        return PreferenceConfig(
            net=NetConfig(self.net or NETS[self.comparator], settings),
            comparator=self.comparator,
            loss=self.loss,
            loss_settings=_settings("--loss-set", self.loss_set, "margin=0.5"),
            standardize=not self.train_encoder if self.standardize is None else self.standardize,
        )

    def training(self, groups: int = 0) -> FitConfig:
        """How it is trained.

        Args:
            groups: to be trained on; 0 if that is not known yet.

        Raises:
            ValueError: names the value that cannot be.
        """
        own, learning_rate = (16, 2e-5) if self.train_encoder else (128, 2e-3)
        batch_size = own if self.batch_size is None else self.batch_size
        epochs = self.epochs
        if epochs is None:
            enough = max(_EPOCHS, math.ceil(_STEPS * batch_size / max(groups, 1)))
            epochs = 3 if self.train_encoder else enough
        an_epoch = math.ceil(groups / batch_size)
        looks = max(1, an_epoch, math.ceil(an_epoch * epochs / _LOOKS))
        return FitConfig(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate if self.learning_rate is None else self.learning_rate,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            evaluate_every=looks if self.evaluate_every is None else self.evaluate_every,
            save_every=self.save_every,
            device=self.device,
            seed=self.seed,
        )


def main(arguments: Sequence[str]) -> None:
    """Runs `moefold prefer fit`.

    Raises:
        ValueError: settings that do not go together, or whatever reading, training and saving
            refuse.
    """
    asked = parse(Fit, arguments, verb="prefer fit", example=EXAMPLE)
    config = asked.model()
    asked.training()
    _check(asked)
    transformers.utils.logging.disable_progress_bar()
    train, held_out = _data(asked)
    encoder, training = _encoder(asked, train), asked.training(len(train))
    model, history, report = _fitted(asked, config, training, train, held_out, encoder)
    save(model, asked.output)
    _write(asked, report, history)
    shutil.rmtree(_checkpoints(asked.output), ignore_errors=True)
    print("\n".join(in_words(report) if report else ["nothing was held out to judge the model by"]))
    print(f"wrote {asked.output}, with {PAGE} and {REPORT}")
    print(f"next: moefold prefer rank {asked.output} CANDIDATES.jsonl")


def _fitted(
    asked: Fit,
    config: PreferenceConfig,
    training: FitConfig,
    train: Groups,
    held_out: Groups | None,
    encoder: Any,
) -> tuple[PreferenceModel, History, Report | None]:
    """The model as it will be saved, how it was trained, and what it is worth."""
    torch.manual_seed(asked.seed)
    if encoder is not None and not asked.train_encoder:
        train = _embedded(encoder, train)
        held_out = None if held_out is None else _embedded(encoder, held_out)
    if encoder is not None and asked.train_encoder:
        from moefold.preference.text import text_model

        model = text_model(encoder, train, config)
    else:
        model = config.build(train)
    steps = steps_of(len(train), training)
    with _bars("training") as bars:
        move = moving(bars)
        history = fit(
            model,
            train,
            training,
            held_out=held_out,
            folder=_checkpoints(asked.output),
            resume=True,
            advance=lambda step: move(step, steps),
            say=bars.say,
        )
    report = None
    if held_out is not None:
        calibrate(model, held_out)
        report = measure(model, held_out, known=train)
    if encoder is not None and not asked.train_encoder:
        from moefold.preference.text import with_encoder

        model = with_encoder(model, encoder)
    return model, history, report


def _data(asked: Fit) -> tuple[Groups, Groups | None]:
    """What is learnt from, and what is judged by, without candidates that are the same twice.

    Raises:
        ValueError: nothing is left, or texts and no encoder.
    """
    groups = _read(asked.data)
    if not groups.is_labelled:
        raise ValueError(
            f'{asked.data} says nothing of what the expert chose; add "chosen", "ranking" or '
            f'"utilities" to every line'
        )
    other = None if asked.held_out is None else _read(asked.held_out)
    if other is None and asked.hold_out:
        groups, other = groups.split_by(asked.hold_out, seed=asked.seed)
    parts = []
    for what, part in (("to learn from", groups), ("held out", other)):
        if part is not None:
            part, away = collapsed(part)
            more = f", {away.duplicates:,} duplicates left out" if away.duplicates else ""
            told = f"{len(part):,} decisions {what}, {len(part.candidates):,} candidates{more}"
            print(told, file=sys.stderr)
            if not len(part):
                raise ValueError(f"no decision {what} has two candidates that differ; give others")
        parts.append(part)
    return parts[0], parts[1]


def _read(file: Path) -> Groups:
    with _bars(f"reading {file}") as bars:
        return read_all(file, forced="drop", advance=moving(bars))


def _encoder(asked: Fit, train: Groups) -> Any:
    """The encoder, None for candidates of numbers.

    Raises:
        ValueError: it is missing, or not asked for by the data.
    """
    texts = isinstance(train.candidates, list)
    if texts and asked.encoder is None:
        raise ValueError(
            f"the candidates of {asked.data} are texts; name what makes vectors of them, as in "
            f"--encoder minilm"
        )
    if not texts and asked.encoder is not None:
        raise ValueError(f"the candidates of {asked.data} are numbers; leave --encoder out")
    if not texts:
        return None
    from moefold.surgery.encoder import pretrained_encoder

    return pretrained_encoder(str(asked.encoder)).to(asked.device)


def _embedded(encoder: Any, groups: Groups) -> Groups:
    from moefold.preference.text import embed

    with _bars("vectors of texts") as bars:
        return embed(encoder, groups, advance=moving(bars))


def _bars(title: str) -> Any:
    from moefold.demo.bars import Bars  # its package trains models, for which libraries are read

    return Bars(Console(stderr=True), title)


def _check(asked: Fit) -> None:
    """Refuses what does not go together, before anything is read.

    Raises:
        ValueError: says which, and what to do.
    """
    from moefold.surgery.saved import refuse_unwritable_folder

    if not 0 <= asked.hold_out < 1:
        raise ValueError(f"--hold-out is {asked.hold_out}; it must be 0 or more, and below 1")
    if asked.train_encoder and asked.encoder is None:
        raise ValueError("--train-encoder needs an encoder; add --encoder minilm, or a folder")
    if asked.encoder is not None and asked.comparator != "consistent":
        raise ValueError(
            f"--encoder scores texts one by one, which a comparator that is {asked.comparator} "
            f"does not; leave --comparator out"
        )
    refuse_foreign_folder(asked.output)
    refuse_unwritable_folder(asked.output)
    if is_saved(asked.output) and not (asked.force or _checkpoints(asked.output).is_dir()):
        raise ValueError(f"{asked.output} holds a model; add --force to replace it")
    if asked.force:
        shutil.rmtree(_checkpoints(asked.output), ignore_errors=True)


def _checkpoints(output: Path) -> Path:
    """Beside the output, which is replaced whole."""
    return output.with_name(f"{output.name}-checkpoints")


def _write(asked: Fit, report: Report | None, history: History) -> None:
    """The report as JSON, and the page."""
    from moefold.inspect import Page
    from moefold.preference.page import add_history, add_report, add_settings

    told = None if report is None else report.to_dict()
    write_json(asked.output / REPORT, {"held_out": told, "history": history.to_dict()})
    lead = "How far its choices are those of the expert it learnt from."
    page = Page(asked.output.name, lead)
    if report is None:
        page.verdict("No decisions were held out, so that nothing says how good its choices are.")
    else:
        add_report(page, report)
    add_history(page, history)
    names = [name for name in asked.__dataclass_fields__ if name not in ("output", "force")]
    add_settings(page, {name.replace("_", "-"): _said(getattr(asked, name)) for name in names})
    page.write(asked.output / PAGE)


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return "not said" if value is None else str(value)


def _settings(flag: str, pairs: Sequence[str], example: str) -> dict[str, Any]:
    """Settings by name; a value that is no JSON is text.

    Raises:
        ValueError: a pair without `=`.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, text = named_text(flag, pair, example)
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found
