"""Measure that a real encoder is unchanged by upcycling, before any training.

    python benchmarks/encoder/sts_unchanged.py                    # all-MiniLM-L6-v2, STS-B test
    python benchmarks/encoder/sts_unchanged.py --sites all --experts 16

With top-2 routing whose weights are renormalised and experts that are copies, an upcycled encoder
computes the function of the dense one (Komatsuzaki et al. 2023, appendix B). What is measured:

- the least cosine, over the first 1,000 different sentences, between what the two make of one;
- Spearman's correlation of the cosine of two sentences with people's scores, over all pairs.

Data: `stsb_test.jsonl.xz`, one `[sentence, sentence, score]` a line, from the folder `--data`, or
MOEFOLD_DATA, or `shared/data` beside the repository.
"""

import argparse
import json
import lzma
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

import moefold
from moefold.surgery import pretrained_encoder
from moefold.surgery.encoder import MINILM_SHA256

HERE = Path(__file__).resolve()
DATA = HERE.parents[3] / "shared" / "data"
FILE = "stsb_test.jsonl.xz"
SENTENCES = 1000
RESULTS = HERE.parents[1] / "results" / "local"

Vectors = np.ndarray
"""`sentences dim`, each row of length one."""


def read_pairs(folder: Path) -> list[tuple[str, str, float]]:
    """Return the pairs of sentences with people's scores."""
    file = folder / FILE
    if not file.is_file():
        raise SystemExit(f"no {file}; give the folder that holds {FILE} with --data")
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        # On "\n" only: some texts contain other line separators.
        return [tuple(json.loads(line)) for line in lines.read().split("\n") if line]


def encode(encoder: SentenceTransformer, sentences: list[str]) -> tuple[Vectors, float]:
    """Return the vectors in float64, of length one, and the seconds it took."""
    started = time.perf_counter()
    made = encoder.encode(sentences, batch_size=64, show_progress_bar=False)
    seconds = time.perf_counter() - started
    vectors = np.asarray(made, dtype=np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), seconds


def spearman(vectors: Vectors, place: dict[str, int], pairs: list[tuple[str, str, float]]) -> float:
    """Return the correlation of cosines with scores."""
    first = [place[one] for one, _, _ in pairs]
    second = [place[other] for _, other, _ in pairs]
    cosines = (vectors[first] * vectors[second]).sum(axis=1)
    found = spearmanr(cosines, [score for *_, score in pairs])
    return float(found.statistic)  # pyright: ignore


def measure(options: argparse.Namespace) -> list[dict]:
    """Return one record for the dense encoder and one for each setting of sites."""
    pairs = read_pairs(options.data)
    sentences = list(dict.fromkeys(text for one, other, _ in pairs for text in (one, other)))
    place = {text: index for index, text in enumerate(sentences)}
    dense, seconds = encode(pretrained_encoder(), sentences)
    found = [
        {
            "model": "dense",
            "sentences": len(sentences),
            "pairs": len(pairs),
            "spearman": spearman(dense, place, pairs),
            "seconds": seconds,
        }
    ]
    for sites in options.sites:
        torch.manual_seed(options.seed)
        encoder = pretrained_encoder()
        router = moefold.routers.config("token-choice", k=2, renormalize=True)
        moe = moefold.MoEConfig(num_experts=options.experts, router=router)
        started = time.perf_counter()
        plan = moefold.upcycle(encoder, moefold.UpcycleConfig(moe=moe, sites=sites))
        surgery = time.perf_counter() - started
        vectors, seconds = encode(encoder, sentences)
        cosines = (vectors * dense).sum(axis=1)
        found.append(
            {
                "model": f"{len(plan.chosen)} mixtures",
                "sites": sites,
                "experts": options.experts,
                "spearman": spearman(vectors, place, pairs),
                "least_cosine_of_1000": float(cosines[:SENTENCES].min()),
                "least_cosine_of_all": float(cosines.min()),
                "receipt_error": None if plan.receipt is None else plan.receipt.error,
                "surgery_seconds": surgery,
                "seconds": seconds,
            }
        )
    return found


def surroundings(options: argparse.Namespace) -> dict:
    """Return what a number means nothing without."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], capture_output=True, text=True, check=False, cwd=HERE.parent
        )
        return done.stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    packages = ("moefold", "torch", "transformers", "sentence-transformers", "scipy", "numpy")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--", "../../src")),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "cpu": model or platform.processor(),
        "load_before": os.getloadavg(),
        "weights_sha256": MINILM_SHA256,
        "options": {key: value for key, value in vars(options).items() if key not in _PATHS},
    }


_PATHS = ("data", "out")


def main() -> int:
    """Parse the options, measure, print and write; 1 if the encoder is not unchanged."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    data = Path(os.environ.get("MOEFOLD_DATA", DATA))
    parser.add_argument("--data", type=Path, default=data, help=f"folder that holds {FILE}")
    parser.add_argument("--sites", nargs="+", default=["every-other", "last:3", "all"])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write; results/local/sts-unchanged.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = surroundings(options)
    records = measure(options)
    dense, *others = records
    print(f"dense        Spearman {dense['spearman']:.6f}  over {dense['pairs']} pairs")
    for record in others:
        record["unchanged"] = (
            round(record["spearman"], 4) == round(dense["spearman"], 4)
            and record["least_cosine_of_1000"] >= 1 - 1e-6
        )
        print(
            f"{record['sites']:<12} Spearman {record['spearman']:.6f}  least cosine 1 - "
            f"{1 - record['least_cosine_of_1000']:.1e}  "
            f"{'unchanged' if record['unchanged'] else 'CHANGED'}"
        )
    out = options.out or RESULTS / "sts-unchanged.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about, "records": records}, indent=2) + "\n")
    print(f"wrote {out}")
    return 0 if all(record["unchanged"] for record in others) else 1


if __name__ == "__main__":
    raise SystemExit(main())
