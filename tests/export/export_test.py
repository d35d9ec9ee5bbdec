"""The command `hyper-t5 export`: every format, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from hyper_t5 import adapters as ad
from hyper_t5 import cli, export, weights
from tests.support import tiny_runs
from tests.support.tiny_peft import GATED, TASK, lora, patterned, random_adapters

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Save a native backbone, and a native adapter for it."""
    root = tmp_path_factory.mktemp("native")
    base = tiny_runs.save_backbone(root / "t5")
    config, params, vocab = weights.load_backbone(base)
    meta = {"backbone": weights.backbone_meta(config, vocab, params), "encoding": "labelled"}
    adapters = ad.take(random_adapters(patterned(config), config), [0])
    return base, export.native.save(root / "adapter", adapters, meta)


Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, adapter: Path, base: Path, out: Path, *flags: str) -> None:
    capsys.readouterr()
    argv = ["export", f"--adapter={adapter}", f"--backbone={base}", f"--out={out}", *flags]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == f"{out}\n"


def test_to_peft_and_back(folders: Any, tmp_path: Path, capsys: Capture) -> None:
    base, folder = folders
    run(capsys, folder, base, tmp_path / "peft", "--format=peft")
    run(capsys, tmp_path / "peft", base, tmp_path / "back", "--format=native")
    before, meta, _ = export.native.load(folder, tiny_runs.SIZES)
    after, new_meta, _ = export.native.load(tmp_path / "back", tiny_runs.SIZES)
    assert after.spec == before.spec
    jax.tree.map(np.testing.assert_array_equal, after.tree, before.tree)
    assert new_meta["backbone"] == meta["backbone"]
    assert new_meta["source"] == {"format": "peft", "base_model": None}

    rows, outputs = tmp_path / "rows.jsonl", []
    rows.write_text('{"input": "a b c"}\n{"input": "d e"}\n')
    for adapter in (folder, tmp_path / "back"):
        out = tmp_path / f"{adapter.name}.jsonl"
        argv = [f"--backbone={base}", f"--adapter={adapter}", f"--input={rows}"]
        assert cli.main(["predict", *argv, f"--output={out}", "--max-decode-length=4"]) == 0
        outputs.append([json.loads(line)["output"] for line in out.read_text().splitlines()])
    assert outputs[0] == outputs[1]
    assert any(outputs[0])


def test_a_peft_folder_names_only_a_base_model_that_transformers_can_load(
    folders: Any, tmp_path: Path, capsys: Capture
) -> None:
    base, folder = folders
    weights.convert(base, tmp_path / "hf", "hf")
    digest = json.loads((tmp_path / "hf/convert.json").read_text())["digest"]
    command = f"hyper-t5 convert --input {base} --to hf --out base_model"
    argv = ["export", f"--adapter={folder}", "--format=peft"]
    for backbone, flags, name in (
        (tmp_path / "hf", [], str(tmp_path / "hf")),
        (base, ["--base-model=me/t5"], "me/t5"),
        (base, [], None),
    ):
        out = tmp_path / f"peft_{name is None}_{len(flags)}"
        assert cli.main([*argv, f"--backbone={backbone}", f"--out={out}", *flags]) == 0
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == name
        err, readme = capsys.readouterr().err, (out / "README.md").read_text()
        assert digest in readme
        assert (command in readme, command in err) == (name is None,) * 2
        assert (name or "base_model") in readme
        assert ("--base-model" in err) == (name is None)


def test_the_present_folder_has_its_own_name(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = folders
    rows, output, peft = (tmp_path / name for name in ("rows.jsonl", "out.jsonl", "mine"))
    rows.write_text('{"input": "a b", "adapter": "adapter"}\n')
    monkeypatch.chdir(folder)
    argv = [f"--backbone={base}", "--adapter=."]
    files = [f"--input={rows}", f"--output={output}"]
    assert cli.main(["predict", *argv, *files, "--max-decode-length=2"]) == 0
    peft.mkdir()
    monkeypatch.chdir(peft)
    argv = ["export", f"--backbone={base}", f"--adapter={folder}", "--format=peft", "--out=."]
    assert cli.main(argv) == 0
    assert (peft / "README.md").read_text().startswith("# mine\n")


def test_merged_and_bfloat16(folders: Any, tmp_path: Path, capsys: Capture) -> None:
    base, folder = folders
    run(capsys, folder, base, tmp_path / "half", "--format=native", "--dtype=bfloat16")
    leaves = jax.tree.leaves(export.native.load(tmp_path / "half")[0].tree)
    assert {leaf.dtype for leaf in leaves} == {BFLOAT16}
    run(capsys, folder, base, tmp_path / "peft", "--format=peft")
    for name, adapter in (("of_native", folder), ("of_peft", tmp_path / "peft")):
        run(capsys, adapter, base, tmp_path / name, "--format=merged")
    digests = [
        weights.digest(weights.load_backbone(path)[1])
        for path in (tmp_path / "of_native", tmp_path / "of_peft", base)
    ]
    assert digests[0] == digests[1] != digests[2]
    argv = ["export", f"--adapter={folder}", f"--backbone={base}", f"--out={tmp_path / 'short'}"]
    assert cli.main([*argv, "--format=merged", "--dtype=bfloat16"]) == 0
    stored = load_file(tmp_path / "short" / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {BFLOAT16}


def test_refusals_write_nothing(folders: Any, tmp_path: Path, capsys: Capture) -> None:
    base, adapter = folders
    other = random_adapters(lora("enc_self.query", "dec_self.query"), GATED)
    folder = export.export_peft(tmp_path / "good", other, GATED, "base", TASK)
    argv = ["export", f"--backbone={base}", f"--out={tmp_path / 'out'}"]
    for form in ("native", "merged", "peft"):  # the adapter of another backbone
        error = tiny_runs.fails(capsys, *argv, f"--adapter={folder}", f"--format={form}")
        assert "which adapter_config.json requires" in error
    (folder / export.native.SPEC_FILE).write_text("{}")
    error = tiny_runs.fails(capsys, *argv, f"--adapter={folder}", "--format=native")
    assert "holds both" in error
    adapters, meta, _ = export.native.load(adapter)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"encoding": "../x"}, "encoding '../x' is not one of"),
        ({"backbone": 3}, "does not name its backbone"),
        ({"backbone": meta["backbone"] | {"dtype": "float128"}}, "float128"),
        ({"backbone": meta["backbone"] | {"digest": "0" * 64}}, "other weights"),
        ({"text": [5, 1]}, "in front of every input, which an adapter file cannot express"),
    ]
    for change, message in changes:
        bad = export.native.save(tmp_path / "bad", adapters, meta | change)
        assert message in tiny_runs.fails(capsys, *argv, f"--adapter={bad}", "--format=peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]
