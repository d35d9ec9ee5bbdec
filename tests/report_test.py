"""The page that is made of evaluated runs' files."""

from __future__ import annotations

import base64
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

import tiny
from hyper_t5 import adapter_stats, cli, protocols, report
from hyper_t5.errors import UserError

CATEGORIES = {
    "task_a": "Title_Generation",
    "task_b": "Title_Generation",
    "task_c": "<Other & more>",
}
ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = tiny.random_adapters(tiny.LORA, len(CATEGORIES))


def make_run(folder: Path, system: str, right: int, *, generated: bool = False) -> Path:
    """A workdir as evaluate and train leave it: of 4 rows a task the first ``right`` are right.

    Of task_c one more is.
    """
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
    marked = protocols.mark(rows)
    costs = {
        "trained_parameters": 1234,
        "generated_parameters": 56,
        "flops": {"concatenated": 9e6, "per_example": 2e6 + right, "per_task": 5e6},
        "seconds": {"train": 1.0, "evaluate": 2.0},
    }
    place = folder / "eval" / "7"
    place.mkdir(parents=True)
    made = {"system": system, **protocols.report(marked), **costs}
    (place / "metrics.json").write_text(json.dumps(made))
    (place / "predictions.jsonl").write_text("\n".join(map(json.dumps, marked)))
    steps = ({"step": s, "loss": 3.0 / s, "exact": 0.1 * s} for s in (1, 2, 4))
    torn = '{"step": 5, "lo'
    (folder / "metrics.jsonl").write_text("\n".join([*map(json.dumps, steps), torn]))
    if generated:
        stats = {"test": adapter_stats.statistics(ADAPTERS, list(CATEGORIES))}
        (place / "adapters.json").write_text(json.dumps(stats))
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
    """The page's tables by the heading above them, and its pictures."""

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
    found = {name: float(line["exact_match"].split()[0]) for name, line in quality.items()}
    assert found == pytest.approx({"hyper_lora": 58.3, "concat": 83.3, "none": 8.3})
    assert quality["none"]["exact_match"] == "8.3 [0.0, 25.0]"
    assert page.tables["test: rougeL"] == [  # the gaps to concat
        ["system", "tasks", "difference", "better", "worse"],
        ["hyper_lora", "3", "-25.0 [-25.0, -25.0]", "0", "3"],
        ["none", "3", "-75.0 [-75.0, -75.0]", "0", "3"],
    ]
    tasks = page.tables["Task by task"]
    assert tasks[0] == ["task", "category", "hyper_lora", "concat", "none"]
    assert tasks[3] == ["task_c", "<Other & more>", "75.0", "100.0", "25.0"]
    assert "no <none>" in {cell for line in page.tables["What was said"] for cell in line}
    costs = page.tables["Quality and compute"]
    assert costs[1][:4] == ["hyper_lora", "1,234", "56", "2.0"]
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
    assert "<b>" not in text  # what tasks say is text


def test_what_is_missing_has_no_section(runs: list[Path], tmp_path: Path) -> None:
    """Of a metrics.json alone there is no training, no rows, no adapters, nothing to compare."""
    content = json.loads((runs[2] / "eval" / "7" / "metrics.json").read_text())
    alone = tmp_path / "alone" / "metrics.json"
    alone.parent.mkdir()
    alone.write_text(json.dumps({k: content[k] for k in ("system", "splits")}))
    page = report.write_report([alone], tmp_path / "out").read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == ["Quality", "Quality by category", "Quality and compute", "Task by task"]


def test_runs_of_one_system_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    again = make_run(tmp_path / "again", "hyper_lora", 1)
    page = Page(report.write_report([runs[0], again], tmp_path / "out").read_text())
    names = [line[0] for line in page.tables["Quality"][1:]]
    assert names == ["hyper_lora (hyper)", "hyper_lora (again)"]


def test_whether_the_text_is_read(runs: list[Path], tmp_path: Path) -> None:
    """Of the committed runs one ignores its text."""
    asked, out = ROOT / "docs" / "robustness.json", tmp_path / "out"
    words = ["report", "--workdir", str(runs[0]), "--robustness", str(asked), "--out", str(out)]
    assert cli.main(words) == 0
    page = Page(text := (out / "report.html").read_text())
    assert text.count("<li>IGNORES its ") == 3
    told = json.loads(asked.read_text())["runs"]
    assert len(re.findall("<li>reads its conditioning ", text)) == len(told) - 1
    columns, *lines = page.tables["hyper_lora"]
    assert columns == ["change", "examples", "quality", "difference", "same answers", "to"]
    assert lines[0] == ["unchanged", "0.0", "91.9", "-", "-", "-"]
    assert len(lines) == len(told[0]["askings"])
    assert "robustness" in page.images


def test_mistakes(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no eval/\*/metrics.json in it; run `hyper-t5 evaluate"):
        report.write_report([tmp_path], tmp_path / "out")
    broken = make_run(tmp_path / "broken", "none", 1)
    with (broken / "eval" / "7" / "predictions.jsonl").open("r+") as stream:
        stream.write("{{{")
    with pytest.raises(UserError, match=r"predictions.jsonl, line 1: not JSON; evaluate again"):
        report.write_report([runs[0], broken], tmp_path / "out")
    silent = json.loads((ROOT / "docs" / "robustness.json").read_text())
    del silent["runs"][1]["verdicts"]
    for content in (silent, {"runs": [{"askings": {"unchanged": 1}}]}):
        (other := tmp_path / "other.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"other.json: not what `hyper-t5 robustness` wrote"):
            report.write_report([runs[0]], tmp_path / "out", asked=other)
    assert not (tmp_path / "out").exists()
