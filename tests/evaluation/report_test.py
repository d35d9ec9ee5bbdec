"""The HTML report of evaluated runs."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hyper_t5 import cli
from hyper_t5.checkpoints import workdir
from hyper_t5.evaluation import adapter_stats, aggregation, report
from hyper_t5.utils.errors import UserError
from tests.support import tiny_model

CATEGORIES = {
    "task_a": "Title_Generation",
    "task_b": "Title_Generation",
    "task_c": "<Other & more>",
}
ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = tiny_model.random_adapters(tiny_model.LORA, len(CATEGORIES))


def make_run(folder: Path, system: str, right: int, *, generated: bool = False) -> Path:
    """Write a workdir as evaluate and train do: ``right`` of 4 rows per task, 1 more in task_c."""
    rows = [
        {
            "split": "test",
            "mixture": "sni",
            "task": task,
            "category": category,
            "id": f"{task}-{i}",
            "input": f"<b>input</b> {i}",
            "references": ["yes"],
            "prediction": "yes" if i < right + (task == "task_c") else f"no <{system}>",
        }
        for task, category in CATEGORIES.items()
        for i in range(4)
    ]
    scored = aggregation.score_rows(rows)
    costs = {
        "trained_parameters": 1234,
        "generated_parameters": 56,
        "flops": {"concatenated": 9e6, "per_example": 2e6 + right, "per_task": 5e6},
        "seconds": {"train": 1.0, "evaluate": 2.0},
    }
    evaluation = folder / "eval" / "7"
    evaluation.mkdir(parents=True)
    metrics = {"system": system, **aggregation.aggregate(scored), **costs}
    (evaluation / "metrics.json").write_text(json.dumps(metrics))
    (evaluation / "predictions.jsonl").write_text("\n".join(map(json.dumps, scored)))
    steps = ({"step": s, "loss": 3.0 / s, "exact": 0.1 * s} for s in (1, 2, 4))
    incomplete = '{"step": 5, "lo'
    lines = "\n".join([*map(json.dumps, steps), incomplete])
    (folder / workdir.METRICS_FILE).write_text(lines)
    if generated:
        stats = {"test": adapter_stats.statistics(ADAPTERS, list(CATEGORIES))}
        (evaluation / "adapters.json").write_text(json.dumps(stats))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        make_run(folder / "hyper", "hyper_lora", 2, generated=True),
        make_run(folder / "concat", "concat", 3),
        make_run(folder / "none", "none", 0),
    ]


class Page(html.parser.HTMLParser):
    """Tables of a page by the heading above them, and its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.images: dict[str, str] = {}
        self.open: list[str] = []
        self.heading, self.text = "", ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images[values["alt"] or ""] = values["src"] or ""
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        self.text = ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append(self.text)
        if tag in ("h2", "h3"):
            self.heading = self.text

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_of_three_runs(runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    flags = [word for run in runs for word in ("--workdir", str(run))]
    assert cli.main(["report", *flags, "--out", str(tmp_path)]) == 0
    file = Path(capsys.readouterr().out.strip())
    assert file == tmp_path / "report.html"
    text = file.read_text()
    page = Page(text)

    columns, *lines = page.tables["Quality"]
    quality = {line[0]: dict(zip(columns, line, strict=True)) for line in lines}
    # 2, 2 and 3 of 4 right; 3, 3 and 4; 0, 0 and 1.
    scores = {name: float(line["exact_match"].split()[0]) for name, line in quality.items()}
    assert scores == pytest.approx({"hyper_lora": 58.3, "concat": 83.3, "none": 8.3})
    assert quality["none"]["exact_match"] == "8.3 [0.0, 25.0]"
    columns, *lines = page.tables["Difference to the concatenated text"]
    assert columns == ["system", "less", "split", "tasks", "exact_match", "strict_match", "rougeL"]
    assert [[*line[:4], line[6]] for line in lines] == [
        ["hyper_lora", "concat", "test", "3", "-25.0 [-25.0, -25.0]"],
        ["none", "concat", "test", "3", "-75.0 [-75.0, -75.0]"],
    ]
    assert "Headline metric for test: rougeL." in text
    tasks = page.tables["Scores by task"]
    assert tasks[0] == ["task", "category", "hyper_lora", "concat", "none"]
    assert tasks[3] == ["task_c", "<Other & more>", "75.0", "100.0", "25.0"]
    samples = page.tables["Sample predictions"]
    assert samples[0] == ["task", "input", "references", "hyper_lora", "concat", "none"]
    assert samples[1] == ["task_a", "<b>input</b> 0", "yes", "yes", "yes", "no <none>"]
    costs = page.tables["Quality and compute"]
    assert costs[0][4] == "MFLOPs per example, text in adapters"
    assert costs[1][:5] == ["hyper_lora", "1,234", "56", "9.0", "2.0"]
    share = adapter_stats.statistics(ADAPTERS, list(CATEGORIES))["differing"]
    assert f"{share:.1%} of the squared norm differs" in text

    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html",
        *(f"{name}.png" for name in page.images),
    }
    assert page.images.keys() == {
        "quality",
        "categories_test",
        "gaps_test",
        "training",
        "cost",
        "layers_0_test",
        "alike_0_test",
    }
    for name, source in page.images.items():  # the page needs no other file
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (tmp_path / f"{name}.png").read_bytes()
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<b>" not in text  # text of tasks is escaped


def test_sections_without_data_are_left_out(runs: list[Path], tmp_path: Path) -> None:
    """A metrics.json alone has no training, rows, adapters or baseline."""
    content = json.loads((runs[2] / "eval" / "7" / "metrics.json").read_text())
    alone = tmp_path / "alone" / "metrics.json"
    alone.parent.mkdir()
    alone.write_text(json.dumps({k: content[k] for k in ("system", "splits")}))
    page = report.write_report([alone], tmp_path / "out").read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == ["Quality", "Quality by category", "Quality and compute", "Scores by task"]


def test_runs_of_one_system_have_unique_names(runs: list[Path], tmp_path: Path) -> None:
    again = make_run(tmp_path / "again", "hyper_lora", 1)
    page = Page(report.write_report([runs[0], again], tmp_path / "out").read_text())
    names = [line[0] for line in page.tables["Quality"][1:]]
    assert names == ["hyper_lora (hyper)", "hyper_lora (again)"]


def test_robustness_section(runs: list[Path], tmp_path: Path) -> None:
    """Exactly one of the committed runs ignores its text."""
    file, out = ROOT / "docs" / "robustness.json", tmp_path / "out"
    words = ["report", "--workdir", str(runs[0]), "--robustness", str(file), "--out", str(out)]
    assert cli.main(words) == 0
    page = Page(text := (out / "report.html").read_text())
    assert text.count("<li>IGNORES its ") == 3
    committed = json.loads(file.read_text())["runs"]
    assert len(re.findall("<li>reads its conditioning ", text)) == len(committed) - 1
    columns, *lines = page.tables["hyper_lora"]
    assert columns[:4] == ["condition", "examples", "quality", "difference"]
    assert lines[0][:4] == ["unchanged", "0.0", "91.9", ""]
    assert len(lines) == len(committed[0]["conditions"])
    assert "robustness" in page.images


def test_invalid_input(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no eval/\*/metrics.json in it; run `hyper-t5 evaluate"):
        report.write_report([tmp_path], tmp_path / "out")
    broken = make_run(tmp_path / "broken", "none", 1)
    with (broken / "eval" / "7" / "predictions.jsonl").open("r+") as stream:
        stream.write("{{{")
    with pytest.raises(UserError, match=r"predictions.jsonl, line 1: not JSON; evaluate again"):
        report.write_report([runs[0], broken], tmp_path / "out")
    incomplete = json.loads((ROOT / "docs" / "robustness.json").read_text())
    del incomplete["runs"][1]["verdicts"]
    for content in (incomplete, {"runs": [{"conditions": {"unchanged": 1}}]}):
        (other := tmp_path / "other.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"other.json: not what `hyper-t5 robustness` wrote"):
            report.write_report([runs[0]], tmp_path / "out", robustness=other)
    assert not (tmp_path / "out").exists()


def test_report_imports_no_jax() -> None:
    code = "import sys; import hyper_t5.evaluation.report; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
