"""The report of ``hyper-t5 data``, as lines in a terminal and as a plot; ``describe`` makes it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5 import plots

NAMES_SHOWN = 3  # of the tasks that a warning is about; data.json has them all
EXAMPLES_SHOWN = 2  # of an episode
TASKS_SHOWN = 5  # with the largest shares, and as many with the smallest
CHARACTERS_SHOWN = 360  # of a text; its middle is left out
WIDTH = 100

Report = dict[str, Any]


def lines(report: Report, most_rows: int) -> Iterator[str]:
    """The report in at most WIDTH columns; `most_rows` of a task were measured."""
    yield from _head(report)
    yield from _episode_lines(report["episodes"])
    yield from _length_lines(report, most_rows)
    yield from _padding_lines(report)
    if "by_task" in report:
        yield from _rate_lines(report)
        yield from _warning_lines(report)
    yield from _speed_lines(report["speed"])


def _head(report: Report) -> Iterator[str]:
    vocab, limits = report["vocabulary"], report["limits"]
    named = f"{vocab['kind']} {vocab.get('file', '')}".strip()
    yield report["name"]
    if "mixture" in report:
        yield f"  mixture     {report['mixture']}, split {report['split']}"
        yield f"  tasks       {report['tasks']:,}"
        yield f"  rows        {report['rows']:,}"
        bad = ", ".join(f"{field} {n:,}" for field, n in sorted(report["skipped"].items()))
        yield f"  skipped     {bad or 'no row'}"
    else:
        chunks = report["chunks"]
        counted = f"{chunks:,}" if chunks is not None else "number unknown"
        yield f"  chunks      {counted}, {report['chunk_tokens']:.0f} tokens on average"
    yield f"  vocabulary  {named}, {vocab['size']:,} ids"
    yield f"  system      {report['system']}, layout {report['layout']!r}"
    yield (
        f"  batch       {report['tasks_per_batch']} episodes x {report['rows_per_task']} rows x "
        f"{report['examples_per_row']:.2f} examples"
    )
    yield "  lengths     " + ", ".join(
        f"{k.removesuffix('_length')} {n}" for k, n in limits.items()
    )


def _episode_lines(episodes: Sequence[Report]) -> Iterator[str]:
    if not episodes:
        return
    yield "\nepisodes as the model reads them"
    for number, episode in enumerate(episodes, 1):
        yield f"\n  {number}. {episode['task']}".rstrip()
        for name, text in episode.items():
            if name not in ("task", "examples"):
                yield from _field(name, text)
        examples = episode["examples"]
        for example in examples[:EXAMPLES_SHOWN]:
            for name, text in example.items():
                yield from _field(name, text)
        if len(examples) > EXAMPLES_SHOWN:
            yield f"    ({len(examples) - EXAMPLES_SHOWN} more examples)"


def _field(name: str, text: str) -> list[str]:
    start = f"    {name:<13} "
    shown = short(visible(text), CHARACTERS_SHOWN)
    rest = " " * len(start)
    wrapped = textwrap.wrap(
        shown, WIDTH, initial_indent=start, subsequent_indent=rest, break_on_hyphens=False
    )
    return wrapped or [start.rstrip()]


def visible(text: str) -> str:
    """On one line: what is no printable character, a line break for one, is written escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def short(text: str, most: int) -> str:
    """At most about `most` characters: its middle is left out."""
    if len(text) <= most:
        return text
    mark = " ... " if most > 60 else "..."
    kept = most - len(mark)
    return text[: kept - kept // 2] + mark + text[len(text) - kept // 2 :]


def _length_lines(report: Report, most_rows: int) -> Iterator[str]:
    yield "\nlengths in tokens, EOS included"
    yield f"  {'':<16}{'p50':>8}{'p95':>8}{'max':>8}{'limit':>8}{'cut':>9}"
    for name, found in report["lengths"].items():
        if found["n"]:
            limit = found["limit"] or "-"
            yield (
                f"  {name:<16}{found['p50']:>8,}{found['p95']:>8,}{found['max']:>8,}"
                f"{limit:>8}{_percent(found['cut']):>9}"
            )
    if "by_task" not in report:
        return
    batches = report["speed"]["batches"]
    yield (f"  before any cut, of at most {most_rows} rows a task, weighted as tasks are drawn;")
    yield f"  conditioning, and text and input in one, as {batches} batches had them"
    yield (
        f"  of examples to show {_percent(report['examples_dropped'])} were dropped for length, "
        f"and {report['examples_missing']:.2f} an episode were missing"
    )


def _percent(share: float) -> str:
    """A share as text; what is not nothing never reads as 0.0 %."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    return f"{100 * share:.1f} %"


def _padding_lines(report: Report) -> Iterator[str]:
    yield f"\npadding in {report['speed']['batches']} batches"
    yield f"  {'':<16}{'real':>14}{'size':>14}{'padding':>10}"
    for name, p in report["padding"].items():
        yield f"  {name:<16}{p['real']:>14,}{p['size']:>14,}{_percent(p['share']):>10}"


def _rate_lines(report: Report) -> Iterator[str]:
    tasks = sorted(report["by_task"], key=lambda t: (-t["rate_share"], t["name"]))
    never = sum(not task["drawn_share"] for task in tasks)
    yield "\ntasks by share of episodes"
    yield f"  {'':<62}{'rows':>10}{'share':>10}{'drawn':>10}"
    few = len(tasks) <= 2 * TASKS_SHOWN
    for place, task in enumerate(tasks):
        if few or place < TASKS_SHOWN or place >= len(tasks) - TASKS_SHOWN:
            yield (
                f"  {short(task['name'], 60):<62}{task['rows']:>10,}"
                f"{_percent(task['rate_share']):>10}{_percent(task['drawn_share']):>10}"
            )
        elif place == TASKS_SHOWN:
            yield f"  ... {len(tasks) - 2 * TASKS_SHOWN} more"
    yield (
        f"  effective number of tasks {report['effective_tasks']:,.1f} of {len(tasks)}; not drawn "
        f"in {report['speed']['batches']} batches: {never}"
    )


def _warning_lines(report: Report) -> Iterator[str]:
    yield "\nwarnings"
    for warning in report["warnings"]:
        pairs = list(zip(warning["tasks"], warning["notes"], strict=True))[:NAMES_SHOWN]
        shown = [short(name, 48) + (f" ({note})" if note else "") for name, note in pairs]
        number = len(warning["tasks"])
        more = f" and {number - len(shown)} more" if number > len(shown) else ""
        noun = "task" if number == 1 else "tasks"
        text = f"{number} {noun}: {warning['text']}: {', '.join(shown)}{more}"
        yield from textwrap.wrap(
            text, WIDTH, initial_indent="  ! ", subsequent_indent="    ", break_on_hyphens=False
        )
    if not report["warnings"]:
        yield "  none"
    names = ", ".join(report["compared_with"]) or "no other split: none is there"
    yield f"  task names were compared with {names}"


def _speed_lines(speed: Report) -> Iterator[str]:
    start = speed["start_up_seconds"]
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start.items())
    yield "\nspeed here"
    yield f"  start-up    {sum(start.values()):.1f} s ({parts})"
    yield (
        f"  batches     {speed['episodes_per_second']:,.0f} episodes/s, "
        f"{speed['examples_per_second']:,.0f} examples/s, "
        f"{speed['real_tokens_per_second']:,.0f} real tokens/s"
    )
    yield f"  memory      {speed['peak_rss_mb']:,.0f} MB at most (resident)"


# ------------------------------------------------------------------------------------------ plot


def plot_lengths(report: Report, file: Path) -> str | Path:
    """A histogram of lengths for each kind of text, with the config's limit as a line.

    Raises:
        UserError: the file cannot be written.
    """
    pyplot = plots.headless()
    kinds = {name: found for name, found in report["lengths"].items() if found["n"]}
    figure, rows = pyplot.subplots(len(kinds), 1, figsize=(8, 1.7 * len(kinds)), squeeze=False)
    for axes, (name, found) in zip(rows[:, 0], kinds.items(), strict=True):
        edges, shares = (np.array(found["histogram"][key]) for key in ("edges", "shares"))
        axes.bar(edges[:-1], 100 * shares, np.diff(edges), align="edge")
        if found["limit"]:
            axes.axvline(found["limit"], color="black", linewidth=0.8)
        cut = f", {_percent(found['cut'])} cut" if found["limit"] else ""
        axes.set_title(f"{name}{cut}", fontsize=9, loc="left")
        axes.set_ylabel("%")
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1, 0].set_xlabel("tokens; the last bar has all that are longer; line: the config's limit")
    figure.tight_layout()
    return plots.save(figure, file)
