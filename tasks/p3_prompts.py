"""Prompts of P3's templates with their fields masked, in the format of HINT's code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from etils import epath

from hyper_t5.utils.errors import UserError

SCORE_EVAL = "_score_eval"  # suffix of the tasks for rank classification


def read_prompts(file: str) -> dict[str, str]:
    """Read prompts with their fields masked, by the task's name in lower case.

    The format is that of all_edited_prompts.txt (allenai/hyper-task-descriptions): entries
    ``dataset |||| template |||| text`` of one or more lines, separated by lines of asterisks. A
    field is a name in brackets and becomes ``[MASK]``. As in HINT's code, a field with a space is
    kept, and the last of several entries with one name counts.

    Raises:
      UserError: names file and line.
    """
    try:
        text = epath.Path(file).expanduser().read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"data.p3_prompts={file}: cannot read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: not UTF-8; save it as UTF-8") from None
    prompts: dict[str, str] = {}
    repeated: list[str] = []
    for line, entry in _entries(text):
        parts = [part.strip() for part in entry.split("||||", 2)]
        if len(parts) < 3 or not all(parts):
            raise UserError(
                f"{file}, line {line}: an entry must be 'dataset |||| template |||| text', and end "
                "in a line of asterisks"
            )
        name = re.sub(r"[^\w.]+", "_", f"{parts[0]}_{parts[1]}").lower()
        prompt = re.sub(r"\[[A-Za-z0-9_]+\]", "[MASK]", parts[2])
        if prompts.get(name, prompt) != prompt:
            repeated.append(name)
        prompts[name] = prompt
    if repeated:
        print(f"{file}: {len(repeated)} name(s) occur twice, the last counts: {repeated[0]}, ...")
    return prompts


def _entries(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number of its first line, text) of each entry that is not blank."""
    begin, lines = 1, list[str]()
    for number, line in enumerate([*text.split("\n"), "*" * 10], 1):
        if not re.fullmatch(r"\s*\*{10,}\s*", line):
            lines.append(line)
            continue
        if any(map(str.strip, lines)):
            yield begin, "\n".join(lines)
        begin, lines = number + 1, []


def find_prompt(prompts: Mapping[str, str], task: str) -> str | None:
    """Return a task's prompt. All rounds of ANLI share the one of the first."""
    name = task.removesuffix(SCORE_EVAL).lower()
    first_round = re.sub(r"^(anli_.*)_r[23]$", r"\1_r1", name)
    return prompts.get(name, prompts.get(first_round))
