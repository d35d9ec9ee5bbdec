"""Commands adapt, predict and export: task text to adapter, outputs and PEFT folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from hyper_t5 import adapters as ad
from hyper_t5 import cli, model, runs, t5, weights
from hyper_t5.checkpoints import workdir
from hyper_t5.data.vocab import EOS_ID, ByteVocabulary
from hyper_t5.export import native as native_folder
from hyper_t5.inference import predictor as predictor_lib
from hyper_t5.t5.decoding import decode
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs

INSTRUCTIONS = {"copy": "copy the letters", "swap": "swap the first and last", "one": "drop"}
INPUTS = ["a b c", "d e", "f", "g h i j", "k l", "m n o", "p q", "r s t u v w"]
SYSTEMS = ("hyper_prefix", "hyper_lora")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save_backbone(tmp_path_factory.mktemp("backbone") / "t5")


@pytest.fixture(scope="module")
def make(backbone: Path) -> Callable[..., ConfigDict]:
    def make_config(**fields: Any) -> ConfigDict:
        lora = {
            "adapter__lora_bias": True,
            "adapter__lora_targets": ("enc_self.value", "dec_mlp.wo"),
        }
        here = {"backbone__path": str(backbone), "data__shots": (0, 2)}
        return tiny_runs.make_config(**here | lora | fields)

    return make_config


@pytest.fixture(scope="module")
def run_of(make: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a workdir of each kind of hypermodel, as if trained."""
    root = tmp_path_factory.mktemp("runs")
    return {name: tiny_runs.untrained_run(make(system=name), root / name) for name in SYSTEMS}


def task_file(folder: Path, name: str, **more: Any) -> Path:
    """Write a task file in the short form."""
    examples = [{"input": "a z", "output": "a"}, {"input": "b y", "output": "b"}]
    content = {"instruction": INSTRUCTIONS[name], "examples": examples} | more
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content, indent=1))
    return file


@pytest.fixture(scope="module")
def adapter_folders(
    run_of: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Path]]:
    """Adapter folders that the command generated, by system and task."""
    root = tmp_path_factory.mktemp("adapters")
    folders: dict[str, dict[str, Path]] = {}
    for system, run in run_of.items():
        for name in INSTRUCTIONS:
            out = root / system / name
            adapt(run, task_file(root, name), out)
            folders.setdefault(system, {})[name] = out
    return folders


def adapt(run: Path, task: Path, out: Path, *flags: str) -> Path:
    argv = ["adapt", "--workdir", str(run), "--task", str(task), "--out", str(out), *flags]
    assert cli.main(argv) == 0
    return out


def predict(
    backbone: Path, adapters: list[Path], rows: list[dict[str, Any]], folder: Path, *flags: str
) -> list[dict[str, Any]]:
    """Return the rows that the command writes."""
    folder.mkdir(exist_ok=True)
    source, output = folder / "rows.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [f"--adapter={path}" for path in adapters]
    argv += [f"--backbone={backbone}", f"--input={source}", f"--output={output}"]
    assert cli.main(["predict", *argv, "--max-decode-length=4", "--batch=6", *flags]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def same(a: ad.Adapters, b: ad.Adapters) -> bool:
    leaves = zip(jax.tree.leaves(a.tree), jax.tree.leaves(b.tree), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


# ------------------------------------------------------------------------------------- adapt


def expected_adapters(run: Path, *parts: str) -> ad.Adapters:
    """Return the adapters of a conditioning text of an instruction and examples."""
    opened = runs.open(run)
    m, params = opened.model, opened.params
    ids = np.zeros((1, opened.config.data.hyper_length), np.int32)
    encoded = [*(i for part in parts for i in opened.backbone.vocab.encode(part)), EOS_ID]
    ids[0, : len(encoded)] = encoded
    adapters = model.generate_adapters(m, params, jnp.asarray(ids), jnp.zeros(1, jnp.int32))
    assert adapters is not None
    return adapters


SHOWN = ("\nInput: a z\nOutput: a", "\nInput: b y\nOutput: b")


@pytest.mark.parametrize("system", SYSTEMS)
def test_both_forms_of_task_file_give_the_same_adapter(
    run_of: Any,
    adapter_folders: Any,
    tmp_path: Path,
    system: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_of[system]
    short, meta, _ = native_folder.load(adapter_folders[system]["copy"])
    assert same(short, expected_adapters(run, INSTRUCTIONS["copy"], *SHOWN))
    assert (meta["system"], meta["instruction"]) == (system, INSTRUCTIONS["copy"])
    assert meta["examples_shown"] == 2
    assert short.num_tasks == 1

    official = tiny_runs.sni_task("task1_copy")
    official["Definition"] = [INSTRUCTIONS["copy"]]
    file = tmp_path / "task1_copy.json"
    file.write_text(json.dumps(official))
    capsys.readouterr()
    out = adapt(run, file, tmp_path / "official")
    assert capsys.readouterr().out == f"{out}\n"
    assert sorted(p.name for p in out.iterdir()) == ["adapter.safetensors", "adapter_spec.json"]
    assert same(native_folder.load(out)[0], short)
    assert not same(native_folder.load(adapter_folders[system]["swap"])[0], short)


def test_shows_as_many_examples_as_training_and_as_fit(run_of: Any, tmp_path: Path) -> None:
    run = run_of["hyper_lora"]
    three = [{"input": x, "output": x} for x in ("a", "b", "c")]
    long = [{"input": "a", "output": "a"}, {"input": "b " * 40, "output": "b"}]
    for examples, shown in {"three": three, "long": long}.items():
        file = task_file(tmp_path, "copy", examples=shown)
        adapters, meta, _ = native_folder.load(adapt(run, file, tmp_path / examples))
        kept = 2 if examples == "three" else 1
        assert meta["examples_shown"] == kept
        parts = [f"\nInput: {e['input']}\nOutput: {e['output']}" for e in shown[:kept]]
        assert same(adapters, expected_adapters(run, INSTRUCTIONS["copy"], *parts))
    file = task_file(tmp_path, "copy", instruction="")
    assert same(
        native_folder.load(adapt(run, file, tmp_path / "none"))[0], expected_adapters(run, *SHOWN)
    )


def test_replaces_an_adapter_but_no_other_folder(
    run_of: Any, adapter_folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = run_of["hyper_lora"], tmp_path / "adapter"
    adapt(run, task_file(tmp_path, "copy"), out)
    adapt(run, task_file(tmp_path, "swap"), out)
    assert same(
        native_folder.load(out)[0], native_folder.load(adapter_folders["hyper_lora"]["swap"])[0]
    )
    (out / "notes.txt").write_text("mine")
    argv = ["adapt", f"--workdir={run}", f"--task={tmp_path / 'copy.json'}", f"--out={out}"]
    assert "already holds notes.txt" in tiny_runs.fails(capsys, *argv)
    (out / "notes.txt").unlink()
    assert same(
        native_folder.load(out)[0], native_folder.load(adapter_folders["hyper_lora"]["swap"])[0]
    )


# ----------------------------------------------------------------------------------- predict


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_mixed_batch_equals_separate_runs(
    backbone: Path, adapter_folders: Any, tmp_path: Path, system: str
) -> None:
    names, folders = list(INSTRUCTIONS), adapter_folders[system]
    # 8 rows of "copy", 3 of "swap" and 1 of "one": the queues end at different times.
    order = [0, 0, 1, 0, 0, 2, 0, 1, 0, 0, 1, 0]
    rows = [
        {"input": INPUTS[i % len(INPUTS)], "adapter": names[k], "note": i}
        for i, k in enumerate(order)
    ]
    mixed = predict(backbone, list(folders.values()), rows, tmp_path / "mixed")
    assert [{k: v for k, v in row.items() if k != "output"} for row in mixed] == rows

    base, params, _ = weights.load_backbone(backbone)
    vocab = tiny_runs.vocabulary()
    for name in names:
        mine = [row for row in mixed if row["adapter"] == name]
        plain = [{"input": row["input"], "note": row["note"]} for row in mine]
        alone = predict(backbone, [folders[name]], plain, tmp_path / name)
        assert alone == mine  # the name of the only adapter is filled in
        ids = np.zeros((6, 16), np.int32)
        encoded = [*vocab.encode(mine[0]["input"]), EOS_ID]
        ids[3, : len(encoded)] = encoded
        actual, _ = decode(
            base, params, jnp.asarray(ids), native_folder.load(folders[name])[0], steps=4
        )
        assert vocab.decode(np.asarray(actual)[3].tolist()) == mine[0]["output"]
    # The outputs depend on the adapter.
    every = [{"input": text, "adapter": name} for text in INPUTS for name in names]
    outputs = predict(backbone, list(folders.values()), every, tmp_path / "every")
    by_name = [[row["output"] for row in outputs if row["adapter"] == name] for name in names]
    assert len({tuple(texts) for texts in by_name}) == 3


def test_adapters_of_several_kinds_share_a_file(
    backbone: Path, adapter_folders: Any, tmp_path: Path
) -> None:
    shutil.copytree(adapter_folders["hyper_prefix"]["swap"], tmp_path / "prefix")
    folders = [adapter_folders["hyper_lora"]["copy"], tmp_path / "prefix"]
    names = [folder.name for folder in folders]
    rows = [{"input": text, "adapter": names[i % 2]} for i, text in enumerate(INPUTS)]
    mixed = predict(backbone, folders, rows, tmp_path / "mixed")
    for folder in folders:
        mine = [{"input": r["input"]} for r in rows if r["adapter"] == folder.name]
        alone = predict(backbone, [folder], mine, tmp_path / f"{folder.name}_alone")
        assert alone == [row for row in mixed if row["adapter"] == folder.name]


def test_predict_of_an_empty_file_is_empty(
    backbone: Path, adapter_folders: Any, tmp_path: Path
) -> None:
    assert predict(backbone, [adapter_folders["hyper_lora"]["copy"]], [], tmp_path / "none") == []


ROWS: dict[str, tuple[str, str]] = {
    "not JSON": ('{"input": "a", "adapter": "copy"}\n{"input": ', "rows.jsonl:2: not valid JSON"),
    "no input": ('\n{"text": "a"}', 'rows.jsonl:2: needs a field "input" with text'),
    "a number": ('{"input": 3}', 'rows.jsonl:1: needs a field "input" with text'),
    "a list": ('["a"]', "rows.jsonl:1: must be a JSON object"),
    "no adapter": ('{"input": "a"}', 'rows.jsonl:1: field "adapter" is None'),
    "other adapter": ('{"input": "a", "adapter": "x"}', "names one of copy, swap"),
    "surrogate": ('{"input": "\\ud800", "adapter": "copy"}', "rows.jsonl:1: holds half a"),
}


@pytest.mark.parametrize(("content", "expected"), ROWS.values(), ids=ROWS)
def test_invalid_rows_are_refused_with_file_and_line(
    backbone: Path,
    adapter_folders: Any,
    content: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text(content)
    output.write_text("earlier")
    adapters = [f"--adapter={adapter_folders['hyper_lora'][name]}" for name in ("copy", "swap")]
    argv = ["predict", f"--backbone={backbone}", *adapters]
    assert expected in tiny_runs.fails(capsys, *argv, f"--input={source}", f"--output={output}")
    assert output.read_text() == "earlier"


def test_incompatible_adapters_and_backbones_are_refused(
    backbone: Path,
    run_of: Any,
    adapter_folders: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes, params, _ = weights.load_backbone(backbone)
    weights.save_native(tmp_path / "bytes", sizes, params, ByteVocabulary())
    tiny_runs.save_backbone(tmp_path / "wide", 0, tiny_runs.replace(emb_dim=20))
    tiny_runs.save_backbone(tmp_path / "other", 1)
    shutil.copytree(backbone, tmp_path / "cut")
    tensors = tmp_path / "cut" / "model.safetensors"
    os.truncate(tensors, tensors.stat().st_size // 2)
    good = adapter_folders["hyper_lora"]["copy"]
    shutil.copytree(good, tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / "adapter.safetensors", 100)
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"input": "a", "adapter": "copy"}')
    cases: list[tuple[Path, list[Path], str]] = [
        (tmp_path / "wide", [good], "copy: belongs to a backbone with emb_dim=16, but"),
        (tmp_path / "other", [good], "copy: belongs to a backbone of this size with other"),
        (tmp_path / "bytes", [good], "copy: belongs to the vocabulary (sentencepiece"),
        (tmp_path / "cut", [good], "cut/model.safetensors: is truncated"),
        (tmp_path / "no", [good], "no: does not exist"),
        (run_of["hyper_lora"], [good], "this run exported no backbone"),
        (backbone, [tmp_path / "damaged"], "damaged/adapter.safetensors: is truncated"),
        (backbone, [tmp_path / "no"], "no/adapter_spec.json: no such file"),
        (backbone, [good, adapter_folders["hyper_prefix"]["copy"]], "two are named copy"),
    ]
    for base, adapters, expected in cases:
        flags = [f"--adapter={path}" for path in adapters]
        if adapters[0].name != "copy":
            rows.write_text('{"input": "a"}')
        argv = ["predict", f"--backbone={base}", *flags, f"--input={rows}", f"--output={output}"]
        assert expected in tiny_runs.fails(capsys, *argv)
        if len(adapters) == 1:
            for form in ("peft", "merged"):
                argv = [f"--adapter={adapters[0]}", f"--backbone={base}", f"--format={form}"]
                assert expected in tiny_runs.fails(
                    capsys, "export", *argv, f"--out={tmp_path / 'x'}"
                )
        rows.write_text('{"input": "a", "adapter": "copy"}')
    assert not output.exists()
    assert not (tmp_path / "x").exists()
    argv = ["export", f"--backbone={backbone}", "--format=peft", f"--out={tmp_path / 'x'}"]
    assert "required: --adapter" in tiny_runs.fails(capsys, *argv)


# ------------------------------------------------------------------------------------ export


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("command", ["adapt", "export"])
def test_peft_loads_the_adapter_onto_the_exported_backbone(
    backbone: Path, run_of: Any, adapter_folders: Any, tmp_path: Path, command: str
) -> None:
    import peft
    import torch
    import transformers

    hf, folder, native = tmp_path / "hf", tmp_path / "peft", adapter_folders["hyper_lora"]["swap"]
    assert cli.main(["convert", f"--input={backbone}", f"--out={hf}", "--to=hf"]) == 0
    if command == "adapt":
        flags = ["--format=peft", f"--base-model={hf}"]
        adapt(run_of["hyper_lora"], task_file(tmp_path, "swap"), folder, *flags)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(hf)
    else:
        argv = [f"--adapter={native}", f"--backbone={backbone}", f"--out={folder}"]
        assert cli.main(["export", *argv, "--format=peft"]) == 0

    sizes, params, _ = weights.load_backbone(backbone)
    inputs = np.array([[*tiny_runs.vocabulary().encode(INPUTS[3]), EOS_ID]])
    targets = np.array([[7, 30, 5, EOS_ID]])
    ours = [
        np.asarray(t5.T5(sizes).apply({"params": params}, inputs, targets, adapters))
        for adapters in (native_folder.load(native)[0], None)
    ]
    base = transformers.T5ForConditionalGeneration.from_pretrained(hf).eval()
    shifted = torch.tensor([[0, *targets[0, :-1]]])

    def logits(module: Any) -> np.ndarray:
        with torch.no_grad():
            out = module(input_ids=torch.tensor(inputs), decoder_input_ids=shifted)
        return out.logits.numpy()

    limit = 1e-4 * np.abs(ours[1]).max()
    assert np.abs(logits(base) - ours[1]).max() <= limit
    tuned = peft.PeftModel.from_pretrained(base, folder).eval()
    assert np.abs(logits(tuned) - ours[0]).max() <= limit
    assert np.abs(ours[0] - ours[1]).max() > 100 * limit


def test_merged_is_the_backbone_with_the_adapter_inside(
    backbone: Path, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(system="hyper_lora", adapter__lora_bias=False)
    run = tiny_runs.untrained_run(config, tmp_path / "run")
    native = adapt(run, task_file(tmp_path, "swap"), tmp_path / "native")
    argv = ["export", f"--adapter={native}", f"--backbone={backbone}", f"--out={tmp_path / 'hf'}"]
    capsys.readouterr()
    assert cli.main([*argv, "--format=merged"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'hf'}\n"
    sizes, params, _ = weights.load_backbone(backbone)
    whole, merged, identity = weights.load_backbone(tmp_path / "hf")
    assert identity is not None
    assert identity["sha256"] == tiny_runs.vocabulary().identity()["sha256"]
    ids = jnp.asarray([[5, 60, 7, EOS_ID]])
    plain, applied, inside = (
        np.asarray(t5.T5(c).apply({"params": p}, ids, ids, a))
        for c, p, a in [
            (sizes, params, None),
            (sizes, params, native_folder.load(native)[0]),
            (whole, merged, None),
        ]
    )
    np.testing.assert_allclose(inside, applied, atol=1e-4 * np.abs(applied).max())
    assert np.abs(applied - plain).max() > 0.01 * np.abs(plain).max()


def test_adapters_that_peft_cannot_represent_are_refused(
    run_of: Any,
    adapter_folders: Any,
    backbone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, out = task_file(tmp_path, "copy"), f"--out={tmp_path / 'out'}"
    argv = ["adapt", f"--workdir={run_of['hyper_prefix']}", f"--task={task}", out]
    assert "decoder's self-attention only" in tiny_runs.fails(capsys, *argv, "--format=peft")
    adapter = f"--adapter={adapter_folders['hyper_lora']['copy']}"
    argv = ["export", adapter, f"--backbone={backbone}", out, "--format=merged"]
    assert "export with --format=peft" in tiny_runs.fails(capsys, *argv)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- invalid input


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], str]:
    def text(task: dict[str, Any]) -> str:
        change(task)
        return json.dumps(task, indent=1)

    return text


TASK_FILES: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "no Definition": (
        edited(lambda t: t.pop("Definition")),
        "task.json: field Definition is missing",
    ),
    "no output": (
        edited(lambda t: t["Instances"][3].pop("output")),
        "task.json: Instances[3] lacks field output",
    ),
    "no output shown": (
        edited(lambda t: t["Positive Examples"][1].pop("output")),
        "task.json: Positive Examples[1] lacks field output",
    ),
    "truncated": (lambda t: json.dumps(t, indent=1)[:60], "task.json, line 5: not valid JSON"),
    "empty": (lambda t: "", "task.json, line 1: not valid JSON"),
    "a list": (lambda t: "[]", "task.json: must be a JSON object"),
    "neither form": (lambda t: '{"task": 1}', "task.json: has neither Definition"),
    "nothing to read": (
        lambda t: '{"instruction": " ", "examples": []}',
        "task.json: fields instruction and examples are both empty",
    ),
    "too long": (
        edited(lambda t: t.update(Definition=["much too long " * 50])),
        "task.json: the instruction alone is",
    ),
    "too long an example": (
        lambda t: json.dumps({"examples": [{"input": "a " * 50, "output": "b"}]}),
        "task.json: the first example alone is",
    ),
}


@pytest.mark.parametrize(("change", "expected"), TASK_FILES.values(), ids=TASK_FILES)
def test_an_invalid_task_file_keeps_the_earlier_adapter(
    run_of: Any,
    adapter_folders: Any,
    change: Callable[[dict[str, Any]], str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, out = tmp_path / "task.json", tmp_path / "adapter"
    shutil.copytree(adapter_folders["hyper_lora"]["copy"], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    task.write_text(change(tiny_runs.sni_task("task1_copy")))
    argv = ["adapt", f"--workdir={run_of['hyper_lora']}", f"--task={task}", f"--out={out}"]
    assert expected in tiny_runs.fails(capsys, *argv)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    task.unlink()
    assert "task.json: cannot be read (No such file" in tiny_runs.fails(capsys, *argv)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own
def test_unusable_workdirs_are_refused(
    make: Any,
    run_of: Any,
    backbone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = task_file(tmp_path, "copy")

    def fails(run: Path) -> str:
        argv = ["adapt", f"--workdir={run}", f"--task={task}", f"--out={tmp_path / 'out'}"]
        line = tiny_runs.fails(capsys, *argv)
        assert not (tmp_path / "out").exists()
        return line

    def changed(name: str, change: Callable[[ConfigDict], Any]) -> Path:
        """Copy the run and edit its config.json."""
        folder = tmp_path / name
        shutil.copytree(run_of["hyper_lora"], folder)
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    missing = tmp_path / "missing"
    assert f"{missing}/config.json: No such file" in fails(missing)
    workdir.write_or_check_config(tmp_path / "fresh", make(system="hyper_lora"))
    assert f"no usable checkpoint at {tmp_path / 'fresh'}" in fails(tmp_path / "fresh")

    cut = changed("cut", lambda c: None)
    state = [p for p in (cut / "checkpoints" / "1" / "state").rglob("*") if p.is_file()]
    largest = max(state, key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    assert f"no usable checkpoint at {cut}" in fails(cut)

    wide = tiny_runs.save_backbone(tmp_path / "wide", 0, tiny_runs.replace(emb_dim=20))
    line = fails(changed("wide_run", lambda c: c["backbone"].update(path=str(wide))))
    assert "belongs to a backbone with emb_dim=16, but backbone.path has emb_dim=20" in line
    sizes, params, _ = weights.load_backbone(backbone)
    weights.save_native(tmp_path / "bytes", sizes, params, ByteVocabulary())
    path = str(tmp_path / "bytes")
    line = fails(changed("bytes_run", lambda c: c["backbone"].update(path=path)))
    assert "belongs to the vocabulary (sentencepiece" in line
    line = fails(changed("rank", lambda c: c["adapter"].update(lora_rank=5)))
    assert "use the same " in line
    line = fails(changed("field", lambda c: c["adapter"].update(lora_rnak=5)))
    assert "config.json" in line
    assert "lora_rnak" in line
    line = fails(changed("type", lambda c: c["adapter"].update(lora_rank="five")))
    assert "adapter.lora_rank" in line


def test_a_full_disk_keeps_the_earlier_files(
    backbone: Path,
    run_of: Any,
    adapter_folders: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    native, hf, out = tmp_path / "native", tmp_path / "hf", tmp_path / "out.jsonl"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "a"}')
    task = task_file(tmp_path, "copy")
    adapter = f"--adapter={adapter_folders['hyper_lora']['copy']}"
    commands = [
        ["adapt", f"--workdir={run_of['hyper_lora']}", f"--task={task}", f"--out={native}"],
        ["convert", f"--input={backbone}", "--to=hf", f"--out={hf}"],
        ["predict", f"--backbone={backbone}", adapter, f"--input={rows}", f"--output={out}"],
    ]
    for argv in commands:
        assert cli.main(argv) == 0

    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    before = content()

    def full(*args: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for argv in commands[:2]:
        assert "No space left on device" in tiny_runs.fails(capsys, *argv)
    monkeypatch.setattr(Path, "write_text", full)
    assert f"cannot write {out}: No space left" in tiny_runs.fails(capsys, *commands[2])
    after = content()
    assert len(after.pop(f"{out}.partial").splitlines()) == 2  # computed rows are kept
    assert after == before
    monkeypatch.undo()
    assert cli.main(commands[2]) == 0
    assert content() == before


def test_needs_no_tensorflow_and_no_torch(
    backbone: Path, run_of: Any, adapter_folders: Any, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"input": "a"}\n')
    task, native = task_file(tmp_path, "copy"), adapter_folders["hyper_lora"]["copy"]
    commands = [
        ["adapt", f"--workdir={run_of['hyper_lora']}", f"--task={task}", "--out=a"],
        ["predict", f"--backbone={backbone}", f"--adapter={native}", "--input=rows.jsonl"],
        ["export", f"--adapter={native}", f"--backbone={backbone}", "--format=peft", "--out=p"],
        ["convert", f"--input={backbone}", "--to=t5x", "--out=checkpoint_0"],
    ]
    commands[1] += ["--output=out.jsonl", "--max-decode-length=4", "--batch=6"]
    code = (
        "import sys\n"
        "from hyper_t5 import cli\n"
        f"for argv in {commands!r}:\n"
        "    assert cli.main(argv) == 0\n"
        "print(sorted({'tensorflow', 'seqio', 'torch', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert load_file(tmp_path / "p" / "adapter_model.safetensors")


def test_an_unwritable_output_is_refused_before_the_work(
    backbone: Path, adapter_folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"input": "a"}\n')
    argv = [
        "predict",
        f"--backbone={backbone}",
        f"--adapter={adapter_folders['hyper_lora']['copy']}",
    ]
    for output, expected in ((tmp_path, "is a folder"), (source / "x", "Not a directory")):
        assert expected in tiny_runs.fails(capsys, *argv, f"--input={source}", f"--output={output}")


def test_a_peft_folder_names_the_base_model_of_the_flag(
    backbone: Path, adapter_folders: Any, tmp_path: Path
) -> None:
    argv = ["export", "--format=peft", f"--backbone={backbone}", f"--out={tmp_path / 'peft'}"]
    argv += [f"--adapter={adapter_folders['hyper_lora']['copy']}", "--base-model=google/t5-v1_1-xl"]
    assert cli.main(argv) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/t5-v1_1-xl"


def test_examples_shown_and_dropped_are_counted(
    run_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = predictor_lib.load(run_of["hyper_lora"])
    pairs = [{"input": "a b", "output": "a"}, {"input": "c " * 30, "output": "d"}]
    model.adapt({"name": "copy", "instruction": "copy the letters", "examples": pairs[:1]})
    assert "copy: 1 of 1 examples shown, 0 dropped (length)\n" in capsys.readouterr().err
    model.adapt({"instruction": "copy the letters", "examples": pairs})
    assert "task: 1 of 2 examples shown, 1 dropped (length)\n" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"the conditioning holds 40; shorten it$"):
        model.adapt({"instruction": "a " * 50})
