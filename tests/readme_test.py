"""What README.md, docs/ and the configs' docstrings tell to type: it parses, and it is there."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import runs
from hyper_t5 import cli
from hyper_t5 import config as config_lib
from hyper_t5.overrides import read_overrides

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PROGRAM = re.compile(r"^(?:\S+=\S+ )*(?:\S*bin/|\S*python[\d.]* -m )?hyper[-_]t5 (?=[a-z-])")


class Block(NamedTuple):
    """Fenced code: its language ('' for none) and text."""

    language: str
    text: str


def blocks(text: str) -> list[Block]:
    """The fenced code of a Markdown text."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [Block(*parts) for parts in found]


def spans(text: str) -> list[str]:
    """The inline code of a Markdown text; what it takes from a table, without the escapes."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.replace(r"\|", "|").split()) for span in re.findall(r"`([^`]+)`", prose)]


def lines(code: str) -> Iterator[str]:
    """Lines of shell: continued ones joined, variables set before filled in, no comments."""
    variables: dict[str, str] = {}
    for line in re.sub(r"\s*\\\n\s*", " ", code).splitlines():
        line = re.sub(r"\s+#.*", "", line.strip().removeprefix("$ "))
        for name, value in variables.items():
            line = re.sub(rf"\$\{{?{name}\b\}}?", value.replace("\\", r"\\"), line)
        if assigned := re.fullmatch(r'(\w+)="([^"]*)"', line):
            variables[assigned[1]] = assigned[2]
        yield line


def texts() -> dict[str, tuple[str, list[str]]]:
    """Name -> (code, inline code) of all that tells what to type."""
    found = {}
    for file in [README, *sorted((ROOT / "docs").glob("*.md"))]:
        text = file.read_text(encoding="utf-8")
        shell = [b.text for b in blocks(text) if b.language in ("", "bash", "sh", "console")]
        found[str(file.relative_to(ROOT))] = ("\n".join(shell), spans(text))
    for file in sorted((ROOT / "configs").glob("*.py")):
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[str(file.relative_to(ROOT))] = (doc, [])
    return found


TEXTS = texts()


def commands() -> list[tuple[str, str]]:
    """(file, command line) of every whole command."""
    return [
        (name, line)
        for name, (code, _) in TEXTS.items()
        for line in lines(code)
        if PROGRAM.match(line)
    ]


def mentions() -> list[tuple[str, str]]:
    """(file, text) of inline code that names a command, which may be without its flags."""
    found = []
    for name, (_, inline) in TEXTS.items():
        for span in inline:
            text = PROGRAM.sub("", span)
            if text != span or text.split()[0] in cli.COMMANDS:
                found.append((name, text))
    return found


def words(line: str) -> list[str]:
    """The arguments of a command, with `DIR...` as one DIR and `a|b` as a."""
    plain = PROGRAM.sub("", line).replace("...", "")
    return [re.sub(r"(?<=\w)\|.*", "", word) for word in shlex.split(plain)]


def test_something_is_found() -> None:
    whole, inline = commands(), mentions()
    assert {name for name, _ in whole} >= {"README.md", "configs/mtf.py", "configs/laptop.py"}
    assert any("--gin.data.vocab" in line for name, line in whole if "laptop" in name)
    assert {text.split()[0] for _, text in inline} & set(cli.COMMANDS)
    assert [*lines('a="x y"  # why\nb $a \\\n   c')] == ['a="x y"', "b x y c"]
    assert words("python -m hyper_t5 predict --adapter DIR... --format a|b") == [
        *("predict", "--adapter", "DIR", "--format", "a")
    ]


@functools.cache
def overridden(config: str) -> Any:
    """The config of a `--config`, from the repository's root; the defaults for ''."""
    path, colon, arg = config.partition(":")
    if path == "configs/peft.py":  # which reads the run and the task that it is given
        arg = ",".join(a for a in arg.split(",") if not a.startswith(("init=", "task=")))
    return config_lib.load(f"{ROOT / path}{colon}{arg}") if config else config_lib.defaults()


@pytest.mark.parametrize(("name", "line"), commands())
def test_a_whole_command_parses(name: str, line: str) -> None:
    args = cli._parse(words(line))  # raises UserError for an unknown or a missing flag
    config = overridden(getattr(args, "config", None) or "").copy_and_resolve_references()
    config_lib.apply(config, read_overrides(args.gin))


@pytest.mark.parametrize(("name", "text"), mentions())
def test_a_mentioned_command_has_these_flags(name: str, text: str) -> None:
    command, *rest = words(text)
    assert command in cli.COMMANDS
    known = {"--help", *(flag for flag, _ in cli.COMMANDS[command].flags)}
    flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
    assert {flag for flag in flags if not flag.startswith(cli.GIN)} <= known


def test_every_override_mentioned_is_a_field() -> None:
    found = 0
    for name, (code, inline) in TEXTS.items():
        for field, value in re.findall(r"--gin\.([\w.]+)=([^\s\"'`]+)", "\n".join([code, *inline])):
            if field == "path.to.field":
                continue
            config = config_lib.defaults()
            if re.fullmatch("[A-Z]+", value) is None:
                config_lib.apply(config, read_overrides([f"{field}={value}"]))
            else:
                functools.reduce(getattr, field.split("."), config)
            found += 1
        assert found or name != "README.md"
    assert found >= 5


def test_scripts_and_folders_named_are_there() -> None:
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", ".venv", "build"}
    found = set()
    for name, (code, inline) in TEXTS.items():
        for text in [code, *inline]:
            for path in re.findall(r"(?<![\w./-])([\w.-]+(?:/[\w.-]+)+)", text):
                place = path.rstrip(".")
                if place.split("/")[0] in tops and not re.search("[A-Z]{2}", place):
                    assert (ROOT / place).exists(), f"{name}: {place}"
                    found.add(place)
            for path in re.findall(r"\bbash (\S+)", text):
                assert (ROOT / path).is_file(), f"{name}: bash {path}"
                found.add(path)
    assert {"launch/local_run.sh", "launch/test.sh", ".ci/run"} <= found


def has_module(folder: str, name: str) -> bool:
    return (ROOT / folder / f"{name}.py").exists() or (ROOT / folder / name).is_dir()


def test_the_layout_is_that_of_the_repository() -> None:
    text = README.read_text(encoding="utf-8")
    layout = blocks(text[text.index("## Layout") :])[0].text
    folder, named = "", []
    for line in layout.splitlines():
        first = re.match(r"([\w.]+)/\s", line)
        folder = first[1] if first else folder
        # "losses.py" and "hypermodels/", but no NAME that stands for many.
        for word in re.findall(r"[\w./-]+\.(?:py|sh|md)\b|[\w.-]+/(?=\s)", line):
            if not re.search("[A-Z]{2}", word):
                named.append(word)
                assert (ROOT / folder / word).exists() or (ROOT / word).exists(), word
        if re.fullmatch(r"\s+[a-z_]+(, [a-z_]+)+,?", line):  # modules without ".py"
            missing = [w for w in re.findall("[a-z_]+", line) if not has_module(folder, w)]
            assert not missing
    assert len(named) > 5


# ------------------------------------------------------------------------------- to be run


@pytest.mark.slow
def test_the_way_to_peft_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = blocks(README.read_text(encoding="utf-8"))
    programs = [b.text for b in every if b.language == "python"]
    assert all(name in "".join(programs) for name in ("PeftModel", "hyper_t5.load"))
    monkeypatch.chdir(tmp_path)
    runs.quickstart_steps(Path("runs/quickstart"), monkeypatch)
    shell = "\n".join(b.text for b in every if b.language == "bash")
    for line in lines(shell):
        if not PROGRAM.match(line):
            continue
        argv = words(line)
        args = cli._parse(argv)
        if args.command in ("adapt", "export", "predict") or "configs/peft.py" in line:
            if args.command == "adapt" and not Path(args.task).exists():
                task = next(b.text for b in every if b.language == "json")
                Path(args.task).write_text(json.dumps(json.loads(task)))
            assert cli.main(argv) == 0, capsys.readouterr().err
    for program in programs:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip()


def test_python_is_python() -> None:
    for file in itertools.chain([README], sorted((ROOT / "docs").glob("*.md"))):
        for block in blocks(file.read_text(encoding="utf-8")):
            if block.language == "python":
                compile(block.text, str(file), "exec")
            if block.language == "json":
                json.loads(block.text)
