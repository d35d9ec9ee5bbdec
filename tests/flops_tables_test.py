"""The tables of docs/compute.md: lengths, relative FLOPs, and what the document says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runs
from hyper_t5 import documents, flops_tables
from hyper_t5.cost import Lengths
from hyper_t5.errors import UserError
from hyper_t5.files import read_json
from hyper_t5.vocab import load_vocab

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return read_json(DOCS / flops_tables.JSON)


def test_the_document_is_what_was_counted(content: dict[str, Any]) -> None:
    text = (DOCS / "compute.md").read_text(encoding="utf-8")
    assert documents.fill(text, flops_tables.tables(content)) == text
    assert len(content["tasks"]) == 104
    for variant, found in content["variants"].items():
        mean = flops_tables.mean_lengths(flops_tables.lengths_of(content["tasks"], variant))
        assert found["lengths"] == pytest.approx(vars(mean))


def test_published_relative_flops(content: dict[str, Any]) -> None:
    """Def and Def+2Pos at 100 inputs a task, on average: 0.34 (HyperTuning) to 0.37 (HINT)."""
    both = [flops_tables.estimates(content, variant) for variant in flops_tables.VARIANTS]
    together, each = (sum(values) / 2 for values in zip(*both, strict=True))
    assert each == pytest.approx(0.34, abs=0.02)
    assert together == pytest.approx(0.37, abs=0.01)
    for name in ("HyperT5-LoRA", "HyperT5-Prefix", "HINT"):
        found = [flops_tables.carried(content, v, name) for v in flops_tables.VARIANTS]
        published = flops_tables.SYSTEMS[name].published
        assert sum(found) / 2 == pytest.approx(published, abs=0.016)


def test_counts_are_carried_to_a_tasks_lengths() -> None:
    """As counted there: HINT has all parts, of which the generators' is the same for every task."""
    here, there = Lengths(150, 80, 12), Lengths(60, 110, 20)
    content: dict[str, Any] = {"size": "small", "tasks": {"a": [*vars(there).values()]}}
    content["tasks"]["a"].insert(1, 0)
    found = flops_tables.count("small", here, ["HINT"])
    content["variants"] = {"def": {"lengths": vars(here), "xla": found}}
    true = flops_tables.count("small", there, ["HINT"])["HINT"]
    carried = flops_tables.carried(content, "def", "HINT")
    assert carried == pytest.approx(flops_tables.relative(true, 100), rel=0.03)
    assert carried != pytest.approx(flops_tables.relative(found["HINT"], 100), rel=0.1)


def test_xla_and_the_closed_form_agree_at_xl(content: dict[str, Any]) -> None:
    from hyper_t5 import cost, t5

    for found in content["variants"].values():
        lengths, xla = Lengths(**found["lengths"]), found["xla"]["HyperT5-LoRA"]
        made = cost.closed_form(t5.preset("xl"), lengths, 100)
        assert 100 * xla["concatenated"] == pytest.approx(made["concat"], rel=0.10)
        whole = xla["per_task"] + 100 * xla["per_example"]
        assert whole == pytest.approx(made["adapters"], rel=0.10)


def test_what_is_counted_at_small(tmp_path: Path) -> None:
    found = flops_tables.count("small", Lengths(20, 9, 3))
    concat = found["text concatenated"]
    assert flops_tables.relative(concat, 1) == flops_tables.relative(concat, 100) == 1
    lora = found["HyperT5-LoRA"]
    assert lora["concatenated"] == concat["concatenated"]
    assert flops_tables.relative(lora, 1) > 1 > flops_tables.relative(lora, 100)
    # Read with every input: nothing is made once a task.
    assert found["Hyperdecoder"]["per_task"] == 0
    assert found["HINT"]["per_task"] > 0
    content = {
        "size": "small",
        "tasks": {"a": [10, 10, 9, 3]},
        "variants": {
            v: {"lengths": vars(Lengths(20, 9, 3)), "xla": found} for v in flops_tables.VARIANTS
        },
    }
    assert Path(flops_tables.draw(content, tmp_path / "compute.png")).stat().st_size > 1000
    assert (
        "| text concatenated, XLA | 1.00 | 1.00 | 1.00 | 1.00 |"
        in flops_tables.tables(content)["relative"]
    )


def test_lengths_of_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, vocab = runs.save_sni(tmp_path / "sni"), load_vocab("bytes")
    found = flops_tables.measure(folder, vocab)
    assert set(found) == set(runs.HELD_OUT)
    definition, shown, read, wrote = found["task4_first"]
    assert definition == len("Definition: first the letters.\n\n")
    task = json.loads((folder / "tasks" / "task4_first.json").read_text())
    pairs = [(e["input"], e["output"]) for e in task["Positive Examples"]]
    assert shown == sum(
        len(f" Positive Example {i} -\nInput: {x}.\n Output: {y}.\n\n")
        for i, (x, y) in enumerate(pairs, 1)
    )
    assert (read, wrote) == (len("a z") + 1, len("a") + 1)  # and EOS
    by_definition, both = (flops_tables.lengths_of(found, v)[0] for v in ("def", "def_pos_2"))
    assert both.text - by_definition.text == shown
    with pytest.raises(UserError, match="--sni_dir"):
        flops_tables.measure(tmp_path, vocab)
    assert flops_tables.main(["--sni_dir=x", f"--vocab={tmp_path}", "--doc=x.md"]) == 2
    assert capsys.readouterr().err.startswith("flops_tables: error: ")


def test_lengths_of_the_real_tasks(
    real_data: Callable[[str], Path], shared_dir: Path, content: dict[str, Any]
) -> None:
    vocab = load_vocab(str(shared_dir / "data" / "tokenizer" / "spiece.model"))
    assert flops_tables.measure(real_data("sni"), vocab) == content["tasks"]
