"""Commands, overrides and paths in README.md, docs/ and config docstrings parse and exist."""

from __future__ import annotations

import ast
import functools
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hyper_t5 import cli
from hyper_t5 import config as config_lib
from hyper_t5.utils.flags import GIN
from hyper_t5.utils.overrides import read_overrides
from tests.support import tiny_runs

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
COMMANDS = cli.COMMANDS.choices
PROGRAM = re.compile(r"^(?:\S+=\S+ )*(?:\S*bin/|\S*python[\d.]* -m )?hyper[-_]t5 (?=[a-z-])")


class Block(NamedTuple):
    """Fenced code block; the language is '' if none is named."""

    language: str
    text: str


def blocks(text: str) -> list[Block]:
    """Return the fenced code blocks of a Markdown text."""
    pairs = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [Block(*pair) for pair in pairs]


def spans(text: str) -> list[str]:
    """Return the inline code of a Markdown text, without the escapes of table cells."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.replace(r"\|", "|").split()) for span in re.findall(r"`([^`]+)`", prose)]


def lines(code: str) -> Iterator[str]:
    """Yield lines of shell: continuations joined, variables substituted, comments removed."""
    variables: dict[str, str] = {}
    for line in re.sub(r"\s*\\\n\s*", " ", code).splitlines():
        line = re.sub(r"\s+#.*", "", line.strip().removeprefix("$ "))
        for name, value in variables.items():
            line = re.sub(rf"\$\{{?{name}\b\}}?", value.replace("\\", r"\\"), line)
        if assigned := re.fullmatch(r'(\w+)="([^"]*)"', line):
            variables[assigned[1]] = assigned[2]
        yield line


def texts() -> dict[str, tuple[str, list[str]]]:
    """Return file -> (shell code, inline code) of README, docs and configs."""
    result = {}
    for file in [README, *sorted((ROOT / "docs").glob("*.md"))]:
        text = file.read_text(encoding="utf-8")
        shell = [b.text for b in blocks(text) if b.language in ("", "bash", "sh", "console")]
        result[str(file.relative_to(ROOT))] = ("\n".join(shell), spans(text))
    for file in sorted((ROOT / "configs").glob("*.py")):
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        result[str(file.relative_to(ROOT))] = (doc, [])
    return result


TEXTS = texts()


def commands() -> list[tuple[str, str]]:
    """Return (file, command line) of every complete command."""
    return [
        (name, line)
        for name, (code, _) in TEXTS.items()
        for line in lines(code)
        if PROGRAM.match(line)
    ]


def mentions() -> list[tuple[str, str]]:
    """Return (file, text) of inline code that names a command, perhaps without its flags."""
    result = []
    for name, (_, inline) in TEXTS.items():
        for span in inline:
            text = PROGRAM.sub("", span)
            if text != span or text.split()[0] in COMMANDS:
                result.append((name, text))
    return result


def words(line: str) -> list[str]:
    """Split a command into its arguments, with `DIR...` as one DIR and `a|b` as a."""
    plain = PROGRAM.sub("", line).replace("...", "")
    return [re.sub(r"(?<=\w)\|.*", "", word) for word in shlex.split(plain)]


def test_commands_are_extracted() -> None:
    whole, inline = commands(), mentions()
    assert {name for name, _ in whole} >= {"README.md", "configs/mtf.py", "configs/laptop.py"}
    assert any("--gin.data.vocab" in line for name, line in whole if "laptop" in name)
    assert {text.split()[0] for _, text in inline} & COMMANDS.keys()
    assert [*lines('a="x y"  # why\nb $a \\\n   c')] == ['a="x y"', "b x y c"]
    assert words("python -m hyper_t5 predict --adapter DIR... --format a|b") == [
        *("predict", "--adapter", "DIR", "--format", "a")
    ]


@functools.cache
def load_config(config: str) -> Any:
    """Load the config of a `--config` flag of the repository, or the defaults for ''."""
    path, colon, arg = config.partition(":")
    if path == "configs/peft.py":  # loads the run of `init` and the file of `task`
        arg = ",".join(a for a in arg.split(",") if not a.startswith(("init=", "task=")))
    return config_lib.load(f"{ROOT / path}{colon}{arg}") if config else config_lib.defaults()


@pytest.mark.parametrize(("name", "line"), commands())
def test_complete_command_parses(name: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyper_t5.utils.hub.local_folder", str)  # nothing is downloaded
    args = cli.parse_args(words(line))  # raises UserError for an unknown or a missing flag
    config = load_config(getattr(args, "config", None) or "").copy_and_resolve_references()
    config_lib.apply(config, read_overrides(args.gin))


@pytest.mark.parametrize(("name", "text"), mentions())
def test_mentioned_flags_exist(name: str, text: str) -> None:
    command, *rest = words(text)
    assert command in COMMANDS
    flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
    assert {flag for flag in flags if not flag.startswith(GIN)} <= set(COMMANDS[command].flags())


def test_mentioned_overrides_are_fields() -> None:
    count = 0
    for name, (code, inline) in TEXTS.items():
        for field, value in re.findall(r"--gin\.([\w.]+)=([^\s\"'`]+)", "\n".join([code, *inline])):
            if field == "path.to.field":
                continue
            config = config_lib.defaults()
            if re.fullmatch("[A-Z]+", value) is None:
                config_lib.apply(config, read_overrides([f"{field}={value}"]))
            else:
                functools.reduce(getattr, field.split("."), config)
            count += 1
        assert count or name != "README.md"
    assert count >= 5


def test_mentioned_scripts_and_folders_exist() -> None:
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", ".venv", "build"}
    checked = set()
    for name, (code, inline) in TEXTS.items():
        for text in [code, *inline]:
            for path in re.findall(r"(?<![\w./-])([\w.-]+(?:/[\w.-]+)+)", text):
                path = path.rstrip(".")
                if path.split("/")[0] in tops and not re.search("[A-Z]{2}", path):
                    assert (ROOT / path).exists(), f"{name}: {path}"
                    checked.add(path)
            for path in re.findall(r"\bbash (\S+)", text):
                assert (ROOT / path).is_file(), f"{name}: bash {path}"
                checked.add(path)
    assert {"launch/local_run.sh", "launch/test.sh", ".ci/run"} <= checked


def test_layout_lists_every_package() -> None:
    text = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    layout = text[text.index("## Layout") : text.index("## Add a system")]
    cells = "".join(re.findall(r"^\| (`.+?) \|", layout, re.MULTILINE))
    listed = set(re.findall(r"`([\w./]+)`", cells))
    entries = (path for path in (ROOT / "hyper_t5").iterdir() if not path.name.startswith("__"))
    modules = {p.name for p in entries if p.suffix == ".py"}
    packages = {
        f"{p.name}/"
        for p in (ROOT / "hyper_t5").iterdir()
        if p.is_dir() and any(p.glob("*.py")) and p.name != "configs"
    }
    assert listed == modules | packages


@pytest.mark.slow
def test_readme_path_to_peft_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fenced = blocks(README.read_text(encoding="utf-8"))
    programs = [b.text for b in fenced if b.language == "python"]
    assert all(name in "".join(programs) for name in ("PeftModel", "hyper_t5.load"))
    monkeypatch.chdir(tmp_path)
    tiny_runs.quickstart_steps(Path("runs/quickstart"), monkeypatch)
    shell = "\n".join(b.text for b in fenced if b.language == "bash")
    for line in lines(shell):
        if not PROGRAM.match(line):
            continue
        argv = words(line)
        args = cli.parse_args(argv)
        if args.command in ("adapt", "export", "predict") or "configs/peft.py" in line:
            assert cli.main(argv) == 0, capsys.readouterr().err
    for program in programs:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip()


def test_python_blocks_are_valid() -> None:
    for file in itertools.chain([README], sorted((ROOT / "docs").glob("*.md"))):
        for block in blocks(file.read_text(encoding="utf-8")):
            if block.language == "python":
                compile(block.text, str(file), "exec")
