"""Relative FLOPs: lengths, counts, and the tables of docs/compute.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper_t5 import flops, t5
from hyper_t5.data.vocab import load_vocab
from hyper_t5.experiments import doc_tables, flops_tables
from hyper_t5.flops import Lengths
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import read_json
from tests.support import tiny_runs

DOCS = Path(__file__).resolve().parents[2] / "docs"
VARIANTS = flops_tables.VARIANTS


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return read_json(DOCS / flops_tables.JSON)


def test_the_document_is_generated_from_the_counts(content: dict[str, Any]) -> None:
    text = (DOCS / "compute.md").read_text(encoding="utf-8")
    assert doc_tables.fill_sections(text, flops_tables.tables(content)) == text
    assert len(content["tasks"]) == 104
    for variant, counts in content["variants"].items():
        mean = flops_tables.mean_lengths(flops_tables.task_lengths(content["tasks"], variant))
        assert counts["lengths"] == pytest.approx(vars(mean))


def test_published_relative_flops(content: dict[str, Any]) -> None:
    """Def and Def+2Pos at 100 inputs a task, on average: 0.34 (HyperTuning) to 0.37 (HINT)."""
    both = [flops_tables.closed_form_ratios(content, variant) for variant in VARIANTS]
    at_mean, over_tasks = (sum(values) / 2 for values in zip(*both, strict=True))
    assert over_tasks == pytest.approx(0.34, abs=0.02)
    assert at_mean == pytest.approx(0.37, abs=0.01)
    for name in ("HyperT5-LoRA", "HyperT5-Prefix", "HINT"):
        ratios = [flops_tables.xla_ratios(content, v, name)[1] for v in VARIANTS]
        assert sum(ratios) / 2 == pytest.approx(flops_tables.PUBLISHED[name], abs=0.016)


def test_xla_and_the_closed_form_agree_at_xl(content: dict[str, Any]) -> None:
    for counts in content["variants"].values():
        lengths, xla = Lengths(**counts["lengths"]), counts["xla"]["HyperT5-LoRA"]
        estimate = flops.closed_form(t5.preset("xl"), lengths, 100)
        assert 100 * xla["concatenated"] == pytest.approx(estimate["concat"], rel=0.10)
        total = xla["per_task"] + 100 * xla["per_example"]
        assert total == pytest.approx(estimate["adapters"], rel=0.10)


SMALL_LENGTHS = Lengths(150, 80, 12)


@pytest.fixture(scope="module")
def small_content() -> dict[str, Any]:
    """Count a small T5 at mean lengths that are not those of its only task."""
    counts = flops_tables.count_flops("small", SMALL_LENGTHS)
    variants = {v: {"lengths": vars(SMALL_LENGTHS), "xla": counts} for v in VARIANTS}
    return {"size": "small", "tasks": {"a": [60, 0, 110, 20]}, "variants": variants}


def test_counts_are_extrapolated_to_the_lengths_of_a_task(small_content: dict[str, Any]) -> None:
    """HINT is the system with all parts."""
    exact = flops_tables.count_flops("small", Lengths(60, 110, 20), ["HINT"])["HINT"]
    at_mean, extrapolated = flops_tables.xla_ratios(small_content, "def", "HINT")
    assert extrapolated == pytest.approx(flops_tables.relative_flops(exact, 100), rel=0.03)
    assert extrapolated != pytest.approx(at_mean, rel=0.1)


def test_counts_tables_and_plot(small_content: dict[str, Any], tmp_path: Path) -> None:
    counts = small_content["variants"]["def"]["xla"]
    concat, lora = counts["text concatenated"], counts["HyperT5-LoRA"]
    relative = flops_tables.relative_flops
    assert relative(concat, 1) == relative(concat, 100) == 1
    assert lora["concatenated"] == concat["concatenated"]
    assert relative(lora, 1) > 1 > relative(lora, 100)
    assert counts["Hyperdecoder"]["per_task"] == 0  # it reads the task with every input
    assert counts["HINT"]["per_task"] > 0
    plot = flops_tables.plot(small_content, tmp_path / "compute.png")
    assert Path(plot).stat().st_size > 1000
    row = "| text concatenated, XLA | 1.00 | 1.00 | 1.00 | 1.00 |"
    assert row in flops_tables.tables(small_content)["relative"]


def test_lengths_of_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, vocab = tiny_runs.save_sni(tmp_path / "sni"), load_vocab("bytes")
    tasks = flops_tables.measure_lengths(folder, vocab)
    assert set(tasks) == set(tiny_runs.HELD_OUT)
    definition, examples, inputs, outputs = tasks["task4_first"]
    assert definition == len("Definition: first the letters.\n\n")
    task = json.loads((folder / "tasks" / "task4_first.json").read_text())
    pairs = [(e["input"], e["output"]) for e in task["Positive Examples"]]
    assert examples == sum(
        len(f" Positive Example {i} -\nInput: {x}.\n Output: {y}.\n\n")
        for i, (x, y) in enumerate(pairs, 1)
    )
    assert (inputs, outputs) == (len("a z") + 1, len("a") + 1)  # and EOS
    by_definition, both = (flops_tables.task_lengths(tasks, v)[0] for v in VARIANTS)
    assert both.text - by_definition.text == examples
    with pytest.raises(UserError, match="no such split file"):
        flops_tables.measure_lengths(tmp_path, vocab)
    assert flops_tables.main(["--sni_dir=x", f"--vocab={tmp_path}", "--doc=x.md"]) == 2
    assert capsys.readouterr().err.startswith("flops_tables: error: ")


def test_lengths_of_the_real_tasks(
    real_data: Callable[[str], Path], shared_dir: Path, content: dict[str, Any]
) -> None:
    vocab = load_vocab(str(shared_dir / "data" / "tokenizer" / "spiece.model"))
    assert flops_tables.measure_lengths(real_data("sni"), vocab) == content["tasks"]
