"""Measure what a text encoder is worth: retrieval per query, intervals over seeds and queries."""

from moefold.evaluate.intervals import Interval, bootstrap, crossed_bootstrap
from moefold.evaluate.retrieval import (
    METRICS,
    encode,
    rank,
    retrieval_metrics,
)

__all__ = [
    "METRICS",
    "Interval",
    "bootstrap",
    "crossed_bootstrap",
    "encode",
    "rank",
    "retrieval_metrics",
]
