"""Tasks of mteb on data from a folder: mteb's own numbers, one file each, nothing run twice."""

import json
import lzma
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from moefold.surgery import pretrained_encoder
from tests.train.tiny import tiny_folder

pytest.importorskip("mteb")

from moefold.evaluate import mteb_runs
from moefold.evaluate.mteb_runs import INSTRUCTION, run_tasks
from moefold.evaluate.mteb_tasks import TASKS, offline

DATA = Path(
    os.environ.get("MOEFOLD_DATA", Path(__file__).parents[3].joinpath("shared", "data").resolve())
)
needs_data = pytest.mark.skipif(
    not (DATA / "sts12_16.jsonl.xz").is_file(),
    reason="no sts12_16.jsonl.xz; set MOEFOLD_DATA to the folder that holds the tasks' data",
)
# Published for all-MiniLM-L6-v2, as main scores times 100.
PUBLISHED = {"STSBenchmark": 82.03, "STS12": 72.37, "STS13": 80.60, "SICK-R": 77.58}

NOUNS = [
    *("rain", "sun", "sea", "hill", "house", "tree"),
    *("road", "fish", "bird", "stone", "cloud", "river"),
]
PAIRS = [
    [f"the {a}", f"a {b}{s}", float(n % 6), 2012 + n % 5, "made up"]
    for n, (a, b, s) in enumerate(zip(NOUNS * 2, NOUNS[3:] * 3, "s " * 12, strict=False))
]


def write(folder: Path, name: str, rows: list) -> None:
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    (folder / f"{name}.jsonl.xz").write_bytes(lzma.compress(text.encode()))


@pytest.fixture
def data(tmp_path):
    """A few rows in the form of every file that the tests ask for."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, "stsb_test", PAIRS)
    write(folder, "sick", PAIRS)
    write(folder, "sts12_16", PAIRS)
    for split in ("train", "test"):
        rows = [[f"{noun} {split} {n}", "wet" if n % 2 else "dry"] for n, noun in enumerate(NOUNS)]
        write(folder, f"emotion_{split}", rows)
    write(
        folder, "scifact_corpus", [[str(n), noun, f"is here {n}"] for n, noun in enumerate(NOUNS)]
    )
    claims = [["7", "the sun", ["1"]], ["9", "a river and a sea", ["11", "2"]]]
    write(folder, "scifact_claims_validation", claims)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> SentenceTransformer:
    folder = tiny_folder(tmp_path_factory.mktemp("tiny") / "e")
    return SentenceTransformer(str(folder), device="cpu")


def unit(encoder: SentenceTransformer, texts: list[str]) -> np.ndarray:
    made = np.asarray(encoder.encode(texts), np.float64)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_similarity_is_what_scipy_says(data, encoder, tmp_path):
    (score,) = run_tasks(encoder, [offline("STSBenchmark", data)], tmp_path / "out", model={})
    left, right = (unit(encoder, [row[i] for row in PAIRS]) for i in (0, 1))
    wanted: Any = spearmanr((left * right).sum(1), [row[2] for row in PAIRS])
    assert score.metric == "cosine_spearman"
    # A correlation of ranks: equal, unless two cosines are closer than float32 can tell.
    assert score.main_score == pytest.approx(wanted.statistic, abs=1e-6)


def test_retrieval_joins_title_and_text(data, encoder, tmp_path):
    (score,) = run_tasks(encoder, [offline("SciFact", data)], tmp_path / "out", model={})
    documents = unit(encoder, [f"{noun} is here {n}" for n, noun in enumerate(NOUNS)])
    queries, relevant = ["the sun", "a river and a sea"], [{1}, {11, 2}]
    values = []
    for vector, wanted in zip(unit(encoder, queries), relevant, strict=True):
        order = np.argsort(-documents @ vector)[:10].tolist()
        gain = sum(1 / np.log2(2 + place) for place, d in enumerate(order) if d in wanted)
        values.append(gain / sum(1 / np.log2(2 + place) for place in range(len(wanted))))
    assert score.metric == "ndcg_at_10"
    assert score.main_score == pytest.approx(np.mean(values), abs=1e-5)  # mteb rounds to 5 digits


def test_labels_are_numbers_and_the_task_keeps_its_settings(data, encoder, tmp_path):
    task: Any = offline("EmotionClassification", data)
    assert task.dataset["test"]["label"] == [0, 1] * 6  # "dry", "wet"
    assert task.dataset["train"]["text"][1] == "sun train 1"
    assert (task.samples_per_label, task.n_experiments) == (16, 10)
    (score,) = run_tasks(encoder, [task], tmp_path / "out", model={})
    assert score.metric == "accuracy"
    assert 0 <= score.main_score <= 1
    told = json.loads((tmp_path / "out" / "EmotionClassification.json").read_text())
    assert told["mteb"]["task_name"] == "EmotionClassification"
    assert told["mteb"]["scores"]["test"][0]["main_score"] == score.main_score
    assert told["versions"]["mteb"] == told["mteb"]["mteb_version"]


def test_a_year_is_taken_by_its_column(data):
    # In the real file one part of 2012 stands at the end.
    for year in range(2012, 2017):
        task: Any = offline(f"STS{year - 2000}", data)
        assert task.dataset["test"]["sentence1"] == [row[0] for row in PAIRS if row[3] == year]


@needs_data
def test_the_real_years_have_the_published_numbers_of_pairs():
    counts = {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186}
    for name, count in counts.items():
        task: Any = offline(name, DATA)
        assert len(task.dataset["test"]) == count


def test_what_is_finished_is_not_run_again(data, encoder, tmp_path, monkeypatch):
    names, said = ("STSBenchmark", "STS12"), []

    def run(**changes: Any) -> list:
        said.clear()
        settings: dict[str, Any] = {"model": {"model": "tiny"}, "said": said.append, **changes}
        return run_tasks(encoder, [offline(n, data) for n in names], tmp_path / "out", **settings)

    stop = monkeypatch.context
    with stop() as patch:  # the second task dies, what was finished stays
        real = mteb_runs.mteb.evaluate

        def dies(model: Any, task: Any, **settings: Any) -> Any:
            if task.metadata.name == "STS12":
                raise KeyboardInterrupt
            return real(model, task, **settings)

        patch.setattr(mteb_runs.mteb, "evaluate", dies)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["STSBenchmark.json"]
    first, second = run(model={"model": "./tiny"})  # however it is called
    assert said == ["STS12"]
    assert (first.again, second.again) == (True, False)
    with stop() as patch:
        patch.setattr(mteb_runs.mteb, "evaluate", lambda *_, **__: pytest.fail("ran again"))
        assert [score.again for score in run()] == [True, True]
        with pytest.raises(ValueError, match=r"STSBenchmark.json is the result of another model,"):
            run(model={"model": "tiny", "router": "unified"})
        with pytest.raises(ValueError, match=r"\(batch_size differ\); give another output folder"):
            run(batch_size=7)
        write(data, "stsb_test", PAIRS[1:])
        with pytest.raises(ValueError, match=r"\(data_sha256 differ\); give another output folder"):
            run()
        (tmp_path / "out" / "STSBenchmark.json").write_text("{")
        with pytest.raises(ValueError, match=r"STSBenchmark.json is no result of moefold"):
            run()
    assert [score.again for score in run(force=True)] == [False, False]


def test_other_weights_are_another_model(data, encoder, tmp_path):
    tasks = [offline("STSBenchmark", data)]
    run_tasks(encoder, tasks, tmp_path, model={})
    weight = next(encoder.parameters())
    weight.data[0, 0] += 1.0
    try:
        with pytest.raises(ValueError, match=r"\(weights_sha256 differ\)"):
            run_tasks(encoder, tasks, tmp_path, model={})
    finally:
        weight.data[0, 0] -= 1.0


def test_instructions_come_before_the_texts(data, encoder, tmp_path, monkeypatch):
    heard: dict[str, set] = {}

    def listen(inputs: list[str], prompt: str | None = None, **_: Any) -> Any:
        heard.setdefault(task, set()).add(prompt)
        return real(inputs)  # so short an encoder would see nothing else

    real = encoder.preprocess
    monkeypatch.setattr(encoder, "preprocess", listen)
    before = dict(encoder.prompts)
    for instruction in (None, INSTRUCTION):
        for task in ("EmotionClassification", "SciFact", "SICK-R"):
            heard.clear()
            settings: Any = {"model": {}, "instruction": instruction, "force": True}
            run_tasks(encoder, [offline(task, data)], tmp_path, **settings)
            told = [prompt for prompt in heard[task] if prompt]
            if instruction is None:
                assert told == []
            else:  # in retrieval, queries only
                assert len(told) == 1
                assert re.fullmatch(r"<\|user\|>\n[A-Z].*\n<\|embed\|>\n", told[0])
    assert encoder.prompts == before


def test_data_that_are_not_there_are_named(data):
    with pytest.raises(ValueError, match=r"task 'STS17' cannot be taken from a folder; there are:"):
        offline("STS17", data)
    with pytest.raises(ValueError, match=r"lacks imdb_train.jsonl.xz, imdb_test.jsonl.xz, which"):
        offline("ImdbClassification", data)
    (data / "sick.jsonl.xz").write_bytes(b"rain")
    with pytest.raises(ValueError, match=r"sick.jsonl.xz is no xz file of JSON lines"):
        offline("SICK-R", data)
    write(data, "sick", [["only one sentence"]])
    with pytest.raises(ValueError, match=r"sick.jsonl.xz in .* do not hold the rows of SICK-R \("):
        offline("SICK-R", data)


def test_every_task_is_one_of_mteb():
    assert [mteb_runs.mteb.get_task(name).metadata.name for name in TASKS] == list(TASKS)


def test_the_page_shows_what_was_measured():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "how-to" / "embed.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| ([\w-]+) \| (\d\d\.\d\d) \| (\d\d\.\d\d) \|$", page, re.MULTILINE)
    files = (root / "benchmarks" / "results" / "mteb-minilm").iterdir()
    assert {name for name, _, _ in shown} == {file.stem for file in files}
    for name, published, here in shown:
        file = root / "benchmarks" / "results" / "mteb-minilm" / f"{name}.json"
        found = json.loads(file.read_text(encoding="utf-8"))
        assert f"{100 * found['score']['main_score']:.2f}" == here
        assert found["mteb"]["scores"]["test"][0]["main_score"] == found["score"]["main_score"]
        assert float(here) == pytest.approx(float(published), abs=0.0101)  # both are rounded


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_packaged_encoder_has_its_published_scores(name, tmp_path):
    (score,) = run_tasks(pretrained_encoder(), [offline(name, DATA)], tmp_path, model={})
    assert round(100 * score.main_score, 2) == PUBLISHED[name]
