"""The report of ``hyper-t5 data`` as lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

# Limits of what is printed; data.json has everything.
NAMES_SHOWN = 3  # of the tasks of a warning
EXAMPLES_SHOWN = 2  # of an episode
TASKS_SHOWN = 5  # with the largest shares, and as many with the smallest
CHARACTERS_SHOWN = 360  # of a text; its middle is left out
WIDTH = 100

Report = dict[str, Any]


def lines(report: Report, measured_rows: int) -> Iterator[str]:
    """Yield the report in at most WIDTH columns; ``measured_rows`` is the limit per task."""
    yield from _head(report)
    yield from _episode_lines(report["episodes"])
    yield from _length_lines(report, measured_rows)
    batches = report["speed"]["batches"]
    yield f"\npadding in {batches} batches"
    yield f"  {'':<16}{'real':>14}{'size':>14}{'padding':>10}"
    for name, p in report["padding"].items():
        yield f"  {name:<16}{p['real']:>14,}{p['size']:>14,}{_percent(p['share']):>10}"
    if "by_task" in report:
        yield from _rate_lines(report)
        yield from _warning_lines(report)
    yield from _speed_lines(report["speed"])


def _head(report: Report) -> Iterator[str]:
    vocab, limits = report["vocabulary"], report["limits"]
    yield report["name"]
    if "mixture" in report:
        skipped = ", ".join(f"{field} {n:,}" for field, n in sorted(report["skipped"].items()))
        yield f"  mixture     {report['mixture']}, split {report['split']}"
        yield f"  tasks       {report['tasks']:,}"
        yield f"  rows        {report['rows']:,}"
        yield f"  skipped     {skipped or 'no row'}"
    else:
        count = "unknown number" if report["chunks"] is None else f"{report['chunks']:,}"
        yield f"  chunks      {count}, {report['chunk_tokens']:.0f} tokens on average"
    name = f"{vocab['kind']} {vocab.get('file', '')}".strip()
    yield f"  vocabulary  {name}, {vocab['size']:,} ids"
    yield f"  system      {report['system']}, layout {report['layout']!r}"
    yield (
        f"  batch       {report['tasks_per_batch']} episodes x {report['rows_per_task']} rows x "
        f"{report['examples_per_row']:.2f} examples"
    )
    yield "  lengths     " + ", ".join(
        f"{k.removesuffix('_length')} {n}" for k, n in limits.items()
    )


def _episode_lines(episodes: Sequence[Report]) -> Iterator[str]:
    if episodes:
        yield "\nepisodes as the model reads them"
    for number, episode in enumerate(episodes, 1):
        yield f"\n  {number}. {episode['task']}".rstrip()
        yield from _text_lines("hyper_inputs", episode["hyper_inputs"])
        examples = episode["examples"]
        for example in examples[:EXAMPLES_SHOWN]:
            for name, text in example.items():
                yield from _text_lines(name, text)
        if len(examples) > EXAMPLES_SHOWN:
            yield f"    ({len(examples) - EXAMPLES_SHOWN} more examples)"


def _text_lines(name: str, text: str) -> list[str]:
    start = f"    {name:<13} "
    return _wrapped(start, shorten(visible(text), CHARACTERS_SHOWN)) or [start.rstrip()]


def _wrapped(start: str, text: str) -> list[str]:
    """Return the lines of a text: ``start`` precedes the first one, the others are indented."""
    indent = " " * len(start)
    return textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False
    )


def visible(text: str) -> str:
    """Return a text on one line: characters that are not printable are escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def shorten(text: str, most: int) -> str:
    """Return a text of at most ``most`` characters: its middle is left out."""
    if len(text) <= most:
        return text
    mark = " ... " if most > 60 else "..."
    length = most - len(mark)
    return text[: length - length // 2] + mark + text[len(text) - length // 2 :]


def _length_lines(report: Report, measured_rows: int) -> Iterator[str]:
    yield "\nlengths in tokens, EOS included"
    yield f"  {'':<16}{'p50':>8}{'p95':>8}{'max':>8}{'limit':>8}{'cut':>9}"
    for name, stats in report["lengths"].items():
        if stats["n"]:
            yield (
                f"  {name:<16}{stats['p50']:>8,}{stats['p95']:>8,}{stats['max']:>8,}"
                f"{stats['limit'] or '-':>8}{_percent(stats['cut']):>9}"
            )
    if "by_task" in report:
        batches = report["speed"]["batches"]
        yield f"  before truncation, of at most {measured_rows} rows a task, weighted by rate;"
        yield f"  conditioning, and text and input, as in {batches} batches"
        yield (
            f"  of the examples to show {_percent(report['examples_dropped'])} were dropped for "
            f"length, and {report['examples_missing']:.2f} an episode were missing"
        )


def _percent(share: float) -> str:
    """Return a share as text; a positive share is never 0.0 %."""
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _rate_lines(report: Report) -> Iterator[str]:
    tasks = sorted(report["by_task"], key=lambda t: (-t["rate_share"], t["name"]))
    never = sum(not task["drawn_share"] for task in tasks)
    hidden = max(0, len(tasks) - 2 * TASKS_SHOWN)
    yield "\ntasks by share of episodes"
    yield f"  {'':<62}{'rows':>10}{'share':>10}{'drawn':>10}"
    for index, task in enumerate(tasks):
        if not hidden or not TASKS_SHOWN <= index < TASKS_SHOWN + hidden:
            yield (
                f"  {shorten(task['name'], 60):<62}{task['rows']:>10,}"
                f"{_percent(task['rate_share']):>10}{_percent(task['drawn_share']):>10}"
            )
        elif index == TASKS_SHOWN:
            yield f"  ... {hidden} more"
    yield (
        f"  effective number of tasks {report['effective_tasks']:,.1f} of {len(tasks)}; not drawn "
        f"in {report['speed']['batches']} batches: {never}"
    )


def _warning_lines(report: Report) -> Iterator[str]:
    yield "\nwarnings"
    for warning in report["warnings"]:
        pairs = list(zip(warning["tasks"], warning["notes"], strict=True))
        names = [shorten(n, 48) + (f" ({note})" if note else "") for n, note in pairs[:NAMES_SHOWN]]
        more = f" and {len(pairs) - NAMES_SHOWN} more" if len(pairs) > NAMES_SHOWN else ""
        count = f"{len(pairs)} task{'s' if len(pairs) > 1 else ''}"
        yield from _wrapped("  ! ", f"{count}: {warning['text']}: {', '.join(names)}{more}")
    if not report["warnings"]:
        yield "  none"
    names = report["compared_with"]
    yield f"  task names were compared with {', '.join(names) or 'no split: no other is available'}"


def _speed_lines(speed: Report) -> Iterator[str]:
    start = speed["start_up_seconds"]
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start.items())
    yield "\nspeed on this machine"
    yield f"  start-up    {sum(start.values()):.1f} s ({parts})"
    yield (
        f"  batches     {speed['episodes_per_second']:,.0f} episodes/s, "
        f"{speed['examples_per_second']:,.0f} examples/s, "
        f"{speed['real_tokens_per_second']:,.0f} real tokens/s"
    )
    yield f"  memory      {speed['peak_rss_mb']:,.0f} MB at most (resident)"
