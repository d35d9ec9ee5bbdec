"""Many shots: a conditioning that is read in chunks, whose adapters are composed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import hyper_t5
from hyper_t5 import adapters as ad
from hyper_t5 import cli, export, runs
from hyper_t5.evaluation import evaluate
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs

INPUTS = ["a b c", "d e", "f g h i"]
CHUNKS = ["data.chunks=4"]


def task(examples: int) -> dict[str, Any]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(letters[i % 26], letters[-1 - i % 26]) for i in range(examples)]
    shown = [{"input": f"{x} {y}", "output": x} for x, y in pairs]
    return {"instruction": "copy the letters", "examples": shown}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save_backbone(tmp_path_factory.mktemp("chunks") / "t5")


@pytest.fixture(scope="module", params=tiny_runs.marked(["hyper_lora", "hint"]))
def workdir(
    request: pytest.FixtureRequest, backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Write a run as if trained, without chunks; about four examples fit its conditioning."""
    config = tiny_runs.make_config(
        system=request.param,
        backbone__path=str(backbone),
        adapter__lora_targets=("enc_self.value", "dec_mlp.wo"),
        data__hyper_length=32,
        data__shots=(0, 64),
    )
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return tiny_runs.untrained_run(config, folder, noise=0.3)


def test_a_short_conditioning_is_read_as_without_chunks(workdir: Path) -> None:
    plain, chunked = hyper_t5.load(workdir), hyper_t5.load(workdir, overrides=CHUNKS)
    expected = plain.adapt(task(2)).adapters
    composed = chunked.adapt(task(2)).adapters
    np.testing.assert_allclose(ad.norms(composed), ad.norms(expected), rtol=1e-5)
    answers = [p.predict(INPUTS, p.adapt(task(2)), max_decode_length=4) for p in (plain, chunked)]
    assert answers[0] == answers[1]


def test_more_examples_than_one_chunk_holds_change_the_adapter(workdir: Path) -> None:
    predictor = hyper_t5.load(workdir, overrides=CHUNKS)
    shown = {n: predictor.adapt(task(n)).meta["examples_shown"] for n in (4, 8, 64)}
    assert shown[4] == 4
    assert shown[8] == 8
    assert 8 < shown[64] < 64  # four chunks of the lengths of this run
    norms = [float(ad.norms(predictor.adapt(task(n)).adapters)[0]) for n in (4, 8, 64)]
    assert len(set(norms)) == 3
    assert hyper_t5.load(workdir).adapt(task(64)).meta["examples_shown"] < 8


def test_one_program_serves_any_number_of_examples(workdir: Path) -> None:
    predictor = hyper_t5.load(workdir, overrides=CHUNKS)
    predictor.adapt(task(4))
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        adapters = [predictor.adapt(task(n)) for n in (1, 8, 16, 64)]
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled
    assert len({a.adapters.spec for a in adapters}) == 1


def test_evaluation_reads_chunks(workdir: Path, tmp_path: Path) -> None:
    sni = tiny_runs.save_sni(tmp_path / "sni", rows=16)
    overrides = [f"data.sni_dir={sni}", "eval.shots=8", "eval.max_rows_per_task=4"]
    shown = {}
    for chunks in (1, 4):
        run = runs.open(workdir, [*overrides, f"data.chunks={chunks}"])
        [split] = evaluate.evaluate(run)[0]["splits"].values()
        shown[chunks] = [task["examples_shown"] for task in split["per_task"].values()]
    assert shown[4] == [8, 8]
    assert max(shown[1]) < 8


def test_a_composed_lora_loads_into_peft_trimmed(workdir: Path, tmp_path: Path) -> None:
    predictor = hyper_t5.load(workdir, overrides=CHUNKS)
    adapter = predictor.adapt(task(8))
    spec = adapter.adapters.spec
    if spec.lora is None:
        return  # HINT emits no LoRA here
    trimmed = ad.trim(adapter.adapters)
    assert trimmed.spec.lora
    assert trimmed.spec.lora.rank == spec.lora.rank // 2  # two of four chunks are used
    assert trimmed.spec.lora.scale_of("enc_self.value") == spec.lora.scale_of("enc_self.value")
    for site, projection in (("enc_self", "value"), ("dec_mlp", "wo")):
        whole, part = (x.tree[site][projection] for x in (adapter.adapters, trimmed))
        products = [np.einsum("ntir,ntro->ntio", x["a"], x["b"]) for x in (whole, part)]
        np.testing.assert_allclose(products[0], products[1], atol=1e-6)
    folder = export.export_peft(tmp_path / "peft", adapter.adapters, tiny_runs.SIZES, "")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == trimmed.spec.lora.rank


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"system": "concat"}, "system=concat reads no task in chunks"),
        ({"system": "hint", "stage": "hyperpretrain"}, "stage=hyperpretrain has none to split"),
        (
            {"system": "hint", "data__on_long_examples": "cut_left"},
            "data.on_long_examples=cut_left",
        ),
    ],
)
def test_chunks_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_runs.make_config(data__chunks=2, **fields)


def test_adapt_takes_the_override(workdir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "task.json").write_text(json.dumps(task(8)))
    argv = ["adapt", "--workdir", str(workdir), "--task", str(tmp_path / "task.json")]
    assert cli.main([*argv, "--out", str(tmp_path / "out"), "--gin.data.chunks=4"]) == 0
    assert "8 of 8 examples shown, 0 dropped" in capsys.readouterr().err
