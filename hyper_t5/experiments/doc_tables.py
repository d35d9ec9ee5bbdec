"""Documents with generated sections: tab-separated input, Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError


def read_tsv(file: Path, row: Any) -> list[Any]:
    """Read the lines below the header as named tuples; a cell ``-`` is empty.

    Raises:
      UserError: the file does not exist, or a line has a wrong number of fields.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as e:
        raise UserError(f"{file}: {e.strerror}; put it beside --doc") from e
    rows = []
    for number, line in enumerate(lines, 1):
        cells = ["" if cell == "-" else cell for cell in line.split("\t")]
        if len(cells) != len(row._fields):
            count = f"{len(cells)} fields instead of {len(row._fields)}"
            raise UserError(f"{file}:{number}: {count}; separate them by tabs")
        rows.append(row(*cells))
    return rows[1:]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def fill_sections(document: str, sections: Mapping[str, str]) -> str:
    """Replace the text between ``<!-- NAME -->`` and ``<!-- end NAME -->`` for each section.

    Raises:
      UserError: the document lacks the markers of a section.
    """
    for name, section in sections.items():
        markers = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not markers.search(document):
            raise UserError(f"the document has no <!-- {name} --> ... <!-- end {name} -->; add it")
        escaped = section.replace("\\", r"\\")
        document = markers.sub(rf"\g<1>{escaped}\n\g<2>", document)
    return document


def update_document(file: Path, sections: Mapping[str, str]) -> None:
    """Rewrite the generated sections of a document."""
    files.write_text(file, fill_sections(file.read_text(encoding="utf-8"), sections))
