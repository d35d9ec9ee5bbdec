"""Files of predictions: our own form, and the official one of Super-NaturalInstructions.

predictions.jsonl     one row of `benchmarks` per line, all that scoring needs
submission.jsonl      {"id": ..., "prediction": ...} per line, as the official script and
                      leaderboard read it, with a file of references beside it: {"id": ...,
                      "references": [...], "task_id": ..., "task_category": ..., "track": ...}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hyper_t5.scoring.benchmarks import Row
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError


def to_submission(rows: Iterable[Row]) -> list[dict[str, str]]:
    """Return the official lines of rows of predictions."""
    return [{"id": row["id"], "prediction": row["prediction"]} for row in rows]


def read_predictions(file: files.File, references: files.File | None = None) -> list[Row]:
    """Read the rows of a predictions.jsonl, or of a submission and its references.

    As in the official script, an instance without a prediction has an empty one. Such instances,
    and predictions of unknown instances, are counted in a printed line.

    Raises:
      UserError: names file, line and field; or no prediction has a reference.
    """
    lines = list(_read_lines(file))
    if references is None:
        return [_own_row(row, location) for location, row in lines]
    predictions = {
        _text(row, "id", location): _text(row, "prediction", location) for location, row in lines
    }
    rows = [_reference(row, location) for location, row in _read_lines(references)]
    if missing := sum(row["id"] not in predictions for row in rows):
        print(f"{file}: no prediction for {missing} of {len(rows)} instances; scored as ''")
    if unknown := len(predictions.keys() - {row["id"] for row in rows}):
        print(f"{file}: {unknown} predictions are of no instance of {references}; left out")
    if missing == len(rows):
        raise UserError(f"{file}: has no prediction for any instance of {references}")
    return [{**row, "prediction": predictions.get(row["id"], "")} for row in rows]


def _own_row(row: Mapping[str, Any], location: str) -> Row:
    if "split" not in row:
        raise UserError(
            f"{location}: lacks field split; pass a submission together with --references"
        )
    for field in ("split", "task", "id", "prediction"):
        _text(row, field, location)
    _check_references(row, location)
    if "options" in row:
        _check_options(row, location)
    return dict(row)


def _check_options(row: Mapping[str, Any], location: str) -> None:
    sizes = set()
    for field in ("options", "option_log_probs", "option_tokens"):
        if not isinstance(row.get(field), list):
            raise UserError(f"{location}: field {field} must be a list")
        sizes.add(len(row[field]))
    if len(sizes) > 1 or 0 in sizes:
        raise UserError(f"{location}: options, option_log_probs and option_tokens differ in length")


def _reference(row: Mapping[str, Any], location: str) -> Row:
    """Convert an official line of references, or a row of a predictions.jsonl."""
    _check_references(row, location)
    track = row.get("track", "default")
    if track not in ("default", "xlingual"):
        raise UserError(f"{location}: field track must be default or xlingual, this is {track!r}")
    return {
        "split": row.get("split", "test" if track == "default" else "xlingual_test"),
        "mixture": row.get("mixture", "sni"),
        "task": row.get("task_id", row.get("task", "")),
        "category": row.get("task_category", row.get("category", "")),
        "id": _text(row, "id", location),
        "input": row.get("input", ""),
        "references": row["references"],
    }


def _check_references(row: Mapping[str, Any], location: str) -> None:
    texts = row.get("references")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{location}: field references must be a list of one or more texts")


def _text(row: Mapping[str, Any], field: str, location: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise UserError(f"{location}: field {field} must be text, this is {value!r:.60}")
    return value


def _read_lines(file: files.File) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE, line N", object) of each line that is not blank."""
    lines = files.read_file(file).split(b"\n")
    if not any(line.strip() for line in lines):
        raise UserError(f"{file}: is empty; it needs one JSON object per line")
    for number, line in enumerate(lines, 1):
        if line.strip():
            location = f"{file}, line {number}"
            yield location, files.json_object(line, location)
