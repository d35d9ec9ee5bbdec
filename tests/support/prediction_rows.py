"""Rows of predictions, and the official scripts' cases in tests/golden/metric_cases.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CASES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden/metric_cases.json").read_text()
)


def row(task: str, prediction: str, *references: str, **fields: Any) -> Row:
    """Return a row of Super-NaturalInstructions' test split, or as ``fields`` say."""
    origin = {"split": "test", "mixture": "sni", "task": task, "category": "", "id": "1"}
    return {**origin, "prediction": prediction, "references": list(references), **fields}


def rows_of(task: str, predictions: Iterable[str], references: Iterable[str], **fields: Any) -> Any:
    """Return a row per prediction."""
    return [row(task, p, r, **fields) for p, r in zip(predictions, references, strict=True)]


def ranked(
    task: str, reference: str, log_probs: list[float], tokens: list[int], **fields: Any
) -> Row:
    """Return a row with the options a, b, c, ..."""
    options = {"options": list("abcdef"[: len(tokens)])}
    scores = {"option_log_probs": log_probs, "option_tokens": tokens}
    return row(task, "", reference, **options, **scores, **fields)


def sni_rows() -> list[Row]:
    """Return the rows of the official script's case."""
    return [{"split": "test", "mixture": "sni", **case} for case in CASES["sni"]["rows"]]


def p3_rows(hits: dict[str, int], rows: int = 4) -> list[Row]:
    """Return ranked rows of templates, `DATASET/TEMPLATE` -> number of correct ones."""
    return [
        ranked(template, "a" if i < correct else "b", [-1.0, -2.0], [1, 1])
        | {"mixture": "p3", "category": dataset}
        for name, correct in hits.items()
        for dataset, template in [name.split("/")]
        for i in range(rows)
    ]
