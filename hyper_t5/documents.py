"""Documents with generated parts: the tables of docs/ are made of what was computed."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hyper_t5.errors import UserError


def fill(text: str, parts: Mapping[str, str]) -> str:
    """A document with its generated parts, between `<!-- NAME -->` and `<!-- end NAME -->`.

    Raises:
        UserError: a part that has no place in it.
    """
    for name, part in parts.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not marks.search(text):
            raise UserError(f"the document has no <!-- {name} --> ... <!-- end {name} -->")
        escaped = part.replace("\\", r"\\")
        text = marks.sub(rf"\g<1>{escaped}\n\g<2>", text)
    return text
