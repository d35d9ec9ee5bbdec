"""Commands on damaged and unusual files: exit 0 with every row, or exit 2 with one line.

Never a traceback, fewer rows than there were, or a changed input.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hyper_t5 import cli
from tests.support import tiny_runs

EXAMPLES = 30  # of each test; each takes milliseconds, after the first
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "latin-1")
FILE_NAMES = st.sampled_from(["rows.jsonl", "with space.jsonl", "ünï✓.jsonl", "-rows.jsonl", "a,b"])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
texts = st.text(st.sampled_from("abc xyz \t\u2028\u00e4\u4e2d\U0001f600"), max_size=20)


def run_command(*argv: object) -> tuple[int, str]:
    """Run a command in this process; return its exit code and standard error."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main([str(arg) for arg in argv])
    return code, stderr.getvalue()


def assert_refused_in_one_line(code: int, stderr: str) -> None:
    assert code == 2, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("hyper-t5: error: ")]
    assert len(errors) == 1
    assert stderr.endswith(f"{errors[0]}\n")
    assert "Traceback" not in stderr


@st.composite
def damaged(draw: st.DrawFn, content: str) -> bytes:
    """Encode a text in some encoding and line ending, sometimes cut or with a byte changed."""
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    encoding = draw(st.sampled_from(ENCODINGS))
    data = content.replace("\n", newline).encode(encoding, errors="replace")
    kind = draw(st.sampled_from(["whole", "whole", "cut", "changed", "appended"]))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    if kind == "cut":
        return data[:at]
    if kind == "changed" and data:
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    return data + draw(st.binary(max_size=4)) if kind == "appended" else data


# ------------------------------------------------------------------------------- predict


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a backbone, a run as if trained, and an adapter of it."""
    folder = tmp_path_factory.mktemp("fuzz")
    tiny_runs.save_backbone(folder / "t5")
    lora = {"adapter__lora_targets": ("enc_self.value",), "data__shots": (0, 2)}
    config = tiny_runs.make_config(system="hyper_lora", backbone__path=str(folder / "t5"), **lora)
    tiny_runs.untrained_run(config, folder / "run")
    task = {"instruction": "copy the letters", "examples": [{"input": "a z", "output": "a"}]}
    (folder / "task.json").write_text(json.dumps(task))
    code, stderr = run_command(
        "adapt", f"--workdir={folder / 'run'}", f"--task={folder / 'task.json'}",
        f"--out={folder / 'adapter'}",
    )  # fmt: skip
    assert code == 0, stderr
    return folder


rows = st.lists(
    st.fixed_dictionaries({"input": texts}, optional={"id": st.integers(0, 9), "note": json_values})
    | st.dictionaries(st.sampled_from(["input", "inputs", "adapter", "task"]), json_values),
    max_size=4,
)


@st.composite
def row_files(draw: st.DrawFn) -> bytes:
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in draw(rows)]
    if draw(st.booleans()):
        other = draw(st.sampled_from(["", " ", "[1]", "{}"]))
        lines.insert(draw(st.integers(0, len(lines))), other)
    return draw(damaged("\n".join(lines) + draw(st.sampled_from(["", "\n"]))))


@settings(max_examples=EXAMPLES)
@given(content=row_files(), name=FILE_NAMES)
@example(content=b'{"input": "a", "input": "b"}\n', name="rows.jsonl")
@example(content=b'{"input": "a"}\n{"input": ', name="rows.jsonl")
@example(content=b'{"input": "a b"}\r\n\r\n{"input": "c"}', name="rows.jsonl")
def test_predict_writes_every_row_or_refuses_in_one_line(
    root: Path, content: bytes, name: str
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary, name), Path(temporary, "out.jsonl")
        source.write_bytes(content)
        code, stderr = run_command(
            "predict", f"--backbone={root / 't5'}", f"--adapter={root / 'adapter'}",
            f"--input={source}", f"--output={target}", "--max-decode-length=2", "--batch=4",
        )  # fmt: skip
        assert source.read_bytes() == content
        if code:
            assert_refused_in_one_line(code, stderr)
            assert not target.exists()
            return
        text = content.decode("utf-8-sig")
        expected = [json.loads(line) for line in text.split("\n") if line.strip()]
        written = [json.loads(line) for line in target.read_text("utf-8").split("\n")[:-1]]
        assert [row["input"] for row in written] == [row["input"] for row in expected]


# ------------------------------------------------------------------------------- task files

TASK: dict[str, Any] = {
    "instruction": "copy the letters",
    "examples": [{"input": "a z", "output": "a"}],
}
SNI_TASK = tiny_runs.sni_task("task9_copy")


@st.composite
def task_files(draw: st.DrawFn) -> bytes:
    task = json.loads(json.dumps(draw(st.sampled_from([TASK, SNI_TASK]))))
    change = draw(st.sampled_from(["none", "none", "drop", "rename", "replace"]))
    key = draw(st.sampled_from(sorted(task)))
    if change == "drop":
        del task[key]
    elif change == "rename":
        task[draw(st.sampled_from([key.lower(), key + "s", key[1:], "x"]))] = task.pop(key)
    elif change == "replace":
        task[key] = draw(json_values)
    return draw(damaged(json.dumps(task, indent=draw(st.sampled_from([None, 1])))))


@settings(max_examples=EXAMPLES)
@given(content=task_files())
def test_adapt_writes_an_adapter_or_refuses_in_one_line(root: Path, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        task, out = Path(temporary, "task.json"), Path(temporary, "adapter")
        task.write_bytes(content)
        code, stderr = run_command(
            "adapt", f"--workdir={root / 'run'}", f"--task={task}", f"--out={out}"
        )
        assert task.read_bytes() == content
        if code:
            assert_refused_in_one_line(code, stderr)
            assert not out.exists()
        else:
            assert (out / "adapter.safetensors").exists()


@settings(max_examples=EXAMPLES // 2)
@given(content=task_files())
def test_data_describes_or_refuses_in_one_line(root: Path, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        sni = tiny_runs.save_sni(Path(temporary, "sni"))
        (sni / "tasks" / f"{tiny_runs.TASKS[0]}.json").write_bytes(content)
        code, stderr = run_command(
            "data", "--mixture=sni", f"--gin.data.sni_dir={sni}", "--episodes=1", "--steps=1",
            f"--gin.data.vocab={root / 't5' / 'spiece.model'}", "--gin.data.tasks_per_batch=2",
        )  # fmt: skip
        if code:
            assert_refused_in_one_line(code, stderr)


# ------------------------------------------------------------------------------- convert


@pytest.fixture(scope="module")
def folders(root: Path) -> dict[str, Path]:
    """Write the same weights in both of the formats that users copy around."""
    code, stderr = run_command(
        "convert", f"--input={root / 't5'}", "--to=hf", f"--out={root / 'hf'}"
    )
    assert code == 0, stderr
    return {"native": root / "t5", "hf": root / "hf"}


@settings(max_examples=EXAMPLES)
@given(data=st.data(), name=st.sampled_from(["native", "hf"]))
def test_convert_refuses_damaged_weights_in_one_line(
    folders: dict[str, Path], data: st.DataObject, name: str
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary, "source"), Path(temporary, "out")
        shutil.copytree(folders[name], source)
        file = source / data.draw(
            st.sampled_from(sorted(path.name for path in source.iterdir())), label="file"
        )
        content = file.read_bytes()
        at = data.draw(st.integers(0, len(content) - 1), label="cut at")
        file.write_bytes(content[:at])
        to = data.draw(st.sampled_from(["native", "hf", "t5x"]), label="to")
        code, stderr = run_command("convert", f"--input={source}", f"--to={to}", f"--out={out}")
        assert file.read_bytes() == content[:at]
        if code:
            assert_refused_in_one_line(code, stderr)
            assert not out.exists()
        else:  # a file that the weights do not need
            assert "safetensors" not in file.name
