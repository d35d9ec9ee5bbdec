"""Files of predictions: our own, and the official form of Super-NaturalInstructions.

predictions.jsonl     a row a line, as `protocols` has them: all that scoring needs
submission.jsonl      {"id": ..., "prediction": ...}, which the official script and leaderboard
                      read beside their file of references, a line {"id": ..., "references":
                      [...], "task_id": ..., "task_category": ..., "track": ...}
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hyper_t5 import files
from hyper_t5.errors import UserError

Path = str | os.PathLike[str]
Row = dict[str, Any]


def submission(rows: Iterable[Row]) -> list[dict[str, str]]:
    """The official lines of rows of Super-NaturalInstructions."""
    return [
        {"id": row["id"], "prediction": row["prediction"]}
        for row in rows
        if row.get("mixture") == "sni"
    ]


def read_predictions(file: Path, references: Path | None = None) -> list[Row]:
    """Rows to score: of a predictions.jsonl, or of a submission and its references.

    As in the official script, an instance without a prediction has an empty one, which is told, and
    so are predictions of instances that the references lack.

    Raises:
        UserError: names file, line and field; or there are no references.
    """
    predictions = list(_lines(file))
    if references is None:
        return [_own_row(row, where) for where, row in predictions]
    said = {_text(row, "id", where): _text(row, "prediction", where) for where, row in predictions}
    wanted = [_reference(row, where) for where, row in _lines(references)]
    if missing := sum(row["id"] not in said for row in wanted):
        print(f"{file}: no prediction for {missing} of {len(wanted)} instances; '' is taken")
    if beyond := len(said.keys() - {row["id"] for row in wanted}):
        print(f"{file}: {beyond} predictions are of no instance of {references}, left out")
    if missing == len(wanted):
        raise UserError(f"{file}: holds no prediction for any instance of {references}")
    return [{**row, "prediction": said.get(row["id"], "")} for row in wanted]


def _own_row(row: Mapping[str, Any], where: str) -> Row:
    for field in ("split", "task", "id", "prediction"):
        if field == "split" and field not in row:
            raise UserError(
                f"{where}: lacks field split; a submission needs its references beside it, with "
                "--references"
            )
        _text(row, field, where)
    _check_references(row, where)
    if "options" in row:
        _check_options(row, where)
    return dict(row)


def _check_options(row: Mapping[str, Any], where: str) -> None:
    sizes = []
    for field in ("options", "option_log_probs", "option_tokens"):
        if not isinstance(row.get(field), list):
            raise UserError(f"{where}: field {field} must be a list")
        sizes.append(len(row[field]))
    if len(set(sizes)) > 1 or not sizes[0]:
        raise UserError(f"{where}: options, option_log_probs and option_tokens differ in length")


def _reference(row: Mapping[str, Any], where: str) -> Row:
    """An official line of references, or a row of a predictions.jsonl, as a row to score."""
    _check_references(row, where)
    track = row.get("track", "default")
    if track not in ("default", "xlingual"):
        raise UserError(f"{where}: field track must be default or xlingual, this is {track!r}")
    return {
        "split": row.get("split", "test" if track == "default" else "xlingual_test"),
        "mixture": row.get("mixture", "sni"),
        "task": row.get("task_id", row.get("task", "")),
        "category": row.get("task_category", row.get("category", "")),
        "id": _text(row, "id", where),
        "input": row.get("input", ""),
        "references": row["references"],
    }


def _check_references(row: Mapping[str, Any], where: str) -> None:
    found = row.get("references")
    if not isinstance(found, list) or not found or not all(isinstance(t, str) for t in found):
        raise UserError(f"{where}: field references must be a list of texts, one or more")


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field} must be text, this is {value!r:.60}")
    return value


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a jsonl file that is not blank."""
    try:
        raw = files.read_bytes(files.as_path(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    found = False
    for number, line in enumerate(raw.split(b"\n"), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        found = True
        yield where, files.json_object(line, where)
    if not found:
        raise UserError(f"{file}: is empty; it needs one JSON object a line")
