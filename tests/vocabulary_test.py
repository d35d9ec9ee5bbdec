"""The words of names and prose: standard terms, the same ones everywhere.

`docs/contributing.md` says why. A name or phrase on these lists is one that a reader would have to
decode; beside it is the term to use.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Parts of identifiers, split at underscores and capitals -> the term to use.
NAMES = {
    "asked": "request",
    "found": "the thing: params, match, files",
    "given": "passed, or fixed_adapter",
    "judged": "evaluated, eval_tasks",
    "made": "the thing: params, built, generated",
    "mend": "fix",
    "said": "logged",
    "told": "logged",
    "heard": "received",
    "kits": "paper_runs",
    "relay": "jax.distributed",
    "teach": "decoder_states",
    "hosts": "processes",
}
# Whole identifiers -> the term to use.
WHOLE_NAMES = {
    "one": "the thing: row, request",
    "where": "path, field, shardings",
    "place": "index, path, slot",
    "what": "the thing: kind, field",
    "hand_over": "load_hypermodel",
    "check_resume": "write_or_check_config",
    "settle": "resolve",
    "by_rule": "perturb",
    "show_rule": "show_conditioning",
    "key_of": "cache_key",
    "slots_of": "process_share",
}
# Phrases of docstrings, comments, messages and pages -> what to write.
PHRASES = {
    r"(?:is|are|was|were|been|be|being) (?:told|asked|said|heard|judged|mended)": (
        "logged, requested, received, evaluated, fixed"
    ),
    r"what is (?:said|asked|told|read)": "predictions, requests",
    r"at hand": "available",
    r"goes? on (?:from|with|where|at)": "resumes",
    r"lies? on disk": "stored, saved",
    r"by its maker's word": "published",
    r"told apart": "listed separately",
    r"hand(?:s|ed)? over": "load, hyperpretraining to fine-tuning",
    r"makes? place": "is replaced",
    r"mends?": "fix",
    r"whole or do not count": "atomic",
}
# (file, phrase or name): why it stays. At most 20.
ALLOWED: dict[tuple[str, str], str] = {}


def files(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split() if not (ROOT / name).is_symlink()]


def defined_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, identifier) of everything that a module defines or assigns."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name


def words(identifier: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", identifier)}


def prose(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the comments and strings of a module; lines of a comment block joined."""
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != last + 1:
                yield last, "\n".join(block)
                block = []
            block.append(token.string)
            last = token.start[0]
        elif token.type in (tokenize.STRING, FSTRING):
            yield token.start[0], token.string
    yield last, "\n".join(block)


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of the paragraphs of a page."""
    line = 1
    for part in text.split("\n\n"):
        yield line, part
        line += part.count("\n") + 2


FSTRING = getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)  # Python 3.12's parts of f-strings


def banned_names(text: str) -> list[tuple[int, str, str]]:
    return [
        (line, name, remedy)
        for line, name in defined_names(ast.parse(text))
        for remedy in (
            *(NAMES[word] for word in words(name) & NAMES.keys()),
            *([WHOLE_NAMES[name]] if name in WHOLE_NAMES else []),
        )
    ]


def banned_phrases(pieces: Iterator[tuple[int, str]]) -> list[tuple[int, str, str]]:
    return [
        (line, match[0], remedy)
        for line, text in pieces
        for phrase, remedy in PHRASES.items()
        for match in re.finditer(rf"\b{phrase}\b", re.sub(r"\s+#? *", " ", text), re.IGNORECASE)
    ]


def python_files() -> list[Path]:
    return [f for f in files("*.py") if f != Path(__file__).resolve()]


@pytest.mark.parametrize("folder", ["hyper_t5", "tasks", "configs", "tests"])
def test_no_banned_name_is_defined(folder: str) -> None:
    problems = [
        f"{name}:{line}: {identifier}; use {remedy}"
        for file in python_files()
        for name in [str(file.relative_to(ROOT))]
        if name.startswith(f"{folder}/")
        for line, identifier, remedy in banned_names(file.read_text())
        if (name, identifier) not in ALLOWED
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("folder", ["hyper_t5", "tasks", "configs", "tests", "docs"])
def test_no_banned_phrase_is_written(folder: str) -> None:
    problems = []
    for file in [*python_files(), *files("*.md", "*.sh")]:
        name = str(file.relative_to(ROOT))
        if not name.startswith(f"{folder}/") and not (folder == "docs" and "/" not in name):
            continue
        text = file.read_text()
        pieces = prose(text) if file.suffix == ".py" else paragraphs(text)
        problems += [
            f"{name}:{line}: {phrase!r}; write {remedy}"
            for line, phrase, remedy in banned_phrases(pieces)
            if (name, phrase) not in ALLOWED
        ]
    assert not problems, "\n".join(problems)


def test_the_allowlist_is_short_and_each_line_is_needed() -> None:
    assert len(ALLOWED) <= 20
    for (name, word), reason in ALLOWED.items():
        assert reason, name
        assert word in (ROOT / name).read_text(), f"{name} has no {word!r} any more"


def test_the_lists_match_what_they_should() -> None:
    assert [n for _, n, _ in banned_names("def judged(asked, ok):\n    foundIt = ok\n")] == [
        "judged",
        "asked",
        "foundIt",
    ]
    assert not banned_names("foundation = maker = wherever = 1")
    text = '"""Rows that are\n    told to it."""\n# a file goes on\n# from there\n'
    assert {p.lower() for _, p, _ in banned_phrases(prose(text))} == {"are told", "goes on from"}
