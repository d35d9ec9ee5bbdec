"""Task files in both forms, their errors, and lazy rows."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper_t5.data.task_rows import (
    LazyRows,
    parse_sni_task,
    read_sni_task,
    read_task_file,
    select_rows,
)
from hyper_t5.utils.errors import UserError
from tests.support.toy_tasks import result_or_error, sni_object, task_data


def write(folder: Path, content: Any) -> Path:
    path = folder / "task9_bad.json"
    path.write_text(json.dumps(content))
    return path


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("Definition"), "field Definition is missing"),
        (lambda d: d.update(Definition=[" "]), "field Definition is empty"),
        (lambda d: d.update(Definition=3), "field Definition must be text"),
        (lambda d: d.pop("Instances"), "field Instances is missing"),
        (lambda d: d.update(Instances=[]), "Instances holds no usable row"),
        (lambda d: d.update(Instances={}), "Instances must be a list, this is an object"),
        (lambda d: d["Instances"][2].pop("output"), r"Instances\[2\] lacks field output"),
        (lambda d: d["Instances"][2].pop("input"), r"Instances\[2\] lacks field input"),
        (
            lambda d: d["Instances"][2].update(output=[]),
            r"Instances\[2\]: field output is an empty",
        ),
        (lambda d: d["Instances"][2].update(output=[1]), r"Instances\[2\]: field output must be"),
        (lambda d: d["Instances"][2].update(input=None), r"\[2\]: field input must be .* null"),
        (lambda d: d["Instances"].append("x"), r"Instances\[8\] must be an object .* is text"),
        (lambda d: d["Positive Examples"][1].pop("output"), r"Positive Examples\[1\] lacks field"),
        (
            lambda d: d["Instances"][6].update(id="t-row-2"),
            r"Instances\[6\]: field id is t-row-2, as in an earlier row",
        ),
    ],
)
def test_an_invalid_field_is_named_with_its_file(change: Any, message: str, tmp_path: Path) -> None:
    raw = sni_object("t")
    change(raw)
    with pytest.raises(UserError, match=rf"task9_bad\.json(, line 1)?: .*{message}") as error:
        read_sni_task(write(tmp_path, raw))
    assert "\n" not in str(error.value)


def test_invalid_json_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    whole = json.dumps(sni_object("t"), indent=1)
    path.write_text(whole[: whole.index("row 3")])
    last = whole[: whole.index("row 3")].count("\n") + 1
    with pytest.raises(UserError, match=rf"task\.json, line {last}: not valid JSON"):
        read_sni_task(path)
    path.write_bytes(whole.encode().replace(b"row 3", b"row \xff"))
    with pytest.raises(UserError, match=rf"task\.json, line {last}: not UTF-8"):
        read_task_file(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match="must be a JSON object"):
        read_sni_task(path)
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        read_task_file(tmp_path / "none.json")


@pytest.mark.parametrize(("indent", "newline"), [(1, "\n"), (4, "\r\n")])
def test_a_bad_row_is_reported_with_its_line(indent: int, newline: str, tmp_path: Path) -> None:
    raw = sni_object("t")
    raw["Instances"][5]["output"] = 7
    text = json.dumps(raw, indent=indent).replace("\n", newline)
    path = tmp_path / "task.json"
    path.write_text(text, newline="")
    line = text[: text.index('"t-row-5"')].count("\n")
    with pytest.raises(UserError, match=rf"task\.json, line {line}: Instances\[5\]: .*'skip'"):
        read_sni_task(path)


def test_skipped_rows_are_counted_by_field(tmp_path: Path) -> None:
    raw = sni_object("t")
    del raw["Instances"][0]["output"]
    raw["Instances"][5]["input"] = 4
    raw["Instances"][6]["id"] = raw["Instances"][2]["id"]
    raw["Positive Examples"][0] = None
    task = read_sni_task(write(tmp_path, raw), on_bad_row="skip")
    assert (len(task.rows), len(task.examples)) == (5, 2)
    assert task.skipped == {"Instances": 3, "Positive Examples": 1}
    assert task.category == "Kind of t"


def test_empty_targets_are_refused_skipped_or_kept(tmp_path: Path) -> None:
    raw = sni_object("t")
    raw["Instances"][3]["output"] = [" "]
    raw["Instances"][4]["output"] = ["a", ""]
    raw["Positive Examples"][1]["output"] = ""
    path = write(tmp_path, raw)
    with pytest.raises(UserError, match=r"Examples\[1\]: field output is empty;.*empty_targets"):
        read_sni_task(path)
    task = read_sni_task(path, on_empty="skip")
    assert (len(task.rows), len(task.examples)) == (6, 2)
    assert task.skipped == {"Instances, empty output": 2, "Positive Examples, empty output": 1}
    task = read_sni_task(path, on_empty="keep")
    assert (len(task.rows), task.skipped) == (8, {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
def test_any_json_is_a_task_or_a_one_line_error(draw: st.DataObject) -> None:
    """With 'skip', every row of the file is either kept or counted."""
    raw = sni_object("t", rows=4)
    slots: list[tuple[Any, Any]] = [(raw, key) for key in raw]
    for field in ("Instances", "Positive Examples"):
        slots += [(raw[field], i) for i in range(len(raw[field]))]
        slots += [(row, key) for row in raw[field] for key in row]
    for container, key in draw.draw(st.lists(st.sampled_from(slots), max_size=3)):
        container[key] = draw.draw(JSON)
    on_empty: Any = draw.draw(st.sampled_from(["skip", "keep"]))
    instances = raw["Instances"]
    task, _ = result_or_error(
        lambda: parse_sni_task(raw, "t", on_bad_row="skip", on_empty=on_empty)
    )
    if task is not None:
        lost = sum(n for field, n in task.skipped.items() if field.startswith("Instances"))
        assert len(task.rows) + lost == len(instances)
        assert all(isinstance(text, str) for row in task.rows for text in (row.input, *row.outputs))


@given(st.binary(max_size=4), st.integers(0, 2000), st.booleans())
def test_a_damaged_file_is_a_task_or_a_one_line_error(damage: bytes, at: int, cut: bool) -> None:
    whole = json.dumps(sni_object("t", rows=4), indent=1).encode()
    at = min(at, len(whole))
    damaged = whole[:at] if cut else whole[:at] + damage + whole[at + len(damage) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.json"
        path.write_bytes(damaged)
        task, message = result_or_error(lambda: read_sni_task(path))
        assert message.startswith(str(path)) if task is None else len(task.rows) == 4


# ------------------------------------------------------------------------------- both forms


def test_a_task_file_has_one_of_two_forms(tmp_path: Path) -> None:
    raw = sni_object("t", examples=1)
    for has_instances in (True, False):
        if not has_instances:
            del raw["Instances"]
        assert read_task_file(write(tmp_path, raw)) == ("Definition of t.", [("t shown 0", "s0")])
    short = {"instruction": " Do. ", "examples": [{"input": "x", "output": "y"}]}
    assert read_task_file(write(tmp_path, short)) == ("Do.", [("x", "y")])
    del short["instruction"]
    assert read_task_file(write(tmp_path, short)) == ("", [("x", "y")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"instruction": "", "examples": []}, "both empty"),
        (
            {"instruction": "x", "exmples": []},
            "unknown field exmples, the nearest is examples; rename or remove it",
        ),
        (
            {"Definition": "x", "examples": []},
            "field examples belongs to the short form, field Definition to Super-Natural",
        ),
        ({"prompt": "x"}, "neither Definition"),
        ({"instruction": 3}, "instruction must be text"),
        ({"instruction": "x", "examples": [{"input": "y"}]}, r"examples\[0\] lacks field output"),
    ],
)
def test_an_invalid_short_form_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_task_file(write(tmp_path, content))


def test_a_users_task_file_is_not_sent_to_fields_of_a_config(tmp_path: Path) -> None:
    raw = sni_object("t")
    raw["Instances"][0].pop("output")
    path = write(tmp_path, raw)
    with pytest.raises(UserError, match=r"data\.on_bad_row='skip'"):
        read_sni_task(path)
    with pytest.raises(UserError, match=r"Instances\[0\] lacks field output; fix the row$"):
        read_task_file(path)


# ------------------------------------------------------------------------------- lazy rows


def test_lazy_rows_are_a_sequence() -> None:
    rows = task_data("a", rows=10).rows
    lazy = LazyRows(rows.__getitem__, range(10))
    assert list(lazy) == list(rows)
    assert list(lazy[2:8][1:-1]) == list(rows[3:7])
    assert lazy[-1] == rows[-1]
    with pytest.raises(IndexError):
        lazy[10]
    selected = select_rows(lazy[2:], [3, 0])
    assert isinstance(selected, LazyRows)
    assert list(selected) == [rows[5], rows[2]]
    assert select_rows(rows, [3, 0]) == (rows[3], rows[0])
