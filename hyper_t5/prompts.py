"""How a task is written for a model: instruction, shown examples, and the input that is asked.

The same for training, evaluation and `adapt`. `data.encoding` chooses the words:

labelled (ours)     {instruction}
                    Input: {input of example 1}
                    Output: {output of example 1}
                    Input: ...
    The labels are those of the published instruction-tuned T5s and nothing else is added, because
    with a byte vocabulary every label costs length. The asked input stands as it is; where it
    follows the text (system=concat), behind another "Input:".
tk_instruct         "Definition: ...", " Positive Example 1 -", "Now complete the following example
    -" and so on: Tk-Instruct's (Wang et al. 2022, its collator DataCollatorForNI), character for
    character. HINT's "mimic" variant where hypermodel and backbone share it.
metaicl             input and output one after the other, without any label (Min et al. 2022,
    direct method).

Each part is encoded on its own and the ids are joined, so that an example can be dropped whole.
With a SentencePiece vocabulary of words that gives the ids of the whole text, for parts meet at
spaces.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from hyper_t5.errors import UserError
from hyper_t5.taskfile import Example
from hyper_t5.vocab import EOS_ID, Vocabulary

# Where the conditioning goes: "apart", to the hypermodel; "concat", in front of each input;
# "parts", to the hypermodel with an EOS after the instruction and after each example, so that a
# reader can tell them apart and encode each alone (FiD-ICL, Ye et al. 2023).
LAYOUTS = ("apart", "concat", "parts")

OnLong = Literal["raise", "truncate"]
OnLongExamples = Literal["drop", "cut_left"]


# ---------------------------------------------------------------------------------- the words


class Encoding(NamedTuple):
    """How the parts of a task are written.

    Attributes:
        instruction: text -> text.
        example: place among the shown ones, from 0, and example -> text up to the output, and the
            rest.
        asked: an input -> the text that the backbone reads.
        label: in front of that where it follows instruction or examples in the same text.
    """

    instruction: Callable[[str], str]
    example: Callable[[int, Example], tuple[str, str]]
    asked: Callable[[str], str]
    label: str = ""


def _stopped(text: str) -> str:
    """Tk-Instruct ends every part in a punctuation mark."""
    return text if text[-1] in string.punctuation else text + "."


def _tk_example(place: int, example: Example) -> tuple[str, str]:
    head = f" Positive Example {place + 1} -\n" + _stopped(f"Input: {example[0].strip()}") + "\n"
    return head, _stopped(f" Output: {example[1].strip()}") + "\n\n"


ENCODINGS = {
    "labelled": Encoding(
        instruction=str.strip,
        example=lambda _, e: (f"\nInput: {e[0].strip()}", f"\nOutput: {e[1].strip()}"),
        asked=lambda text: text,
        label="\nInput: ",
    ),
    "tk_instruct": Encoding(
        # An empty one is left out, as where the collator adds no definition.
        instruction=lambda t: t.strip() and _stopped(f"Definition: {t.strip()}") + "\n\n",
        example=_tk_example,
        asked=lambda text: (
            "Now complete the following example -\n"
            + _stopped(f"Input: {text.strip()}")
            + "\nOutput: "
        ),
    ),
    "metaicl": Encoding(
        instruction=str.strip,
        example=lambda place, e: ((" " if place else "") + e[0], " " + e[1]),
        asked=lambda text: text,
        label=" ",
    ),
}


def example_text(example: Example, place: int = 0, encoding: str = "labelled") -> str:
    """How one shown example is written."""
    return "".join(ENCODINGS[encoding].example(place, example))


# ------------------------------------------------------------------------------- what is shown


class ShowRule(NamedTuple):
    """What of a task the conditioning holds."""

    instruction: bool
    fewest: int  # examples
    most: int
    first: bool  # the task's first examples in their order, or drawn ones


def show_rule(data_config: Any, concat: bool = False) -> ShowRule:
    """The rule of `data.variant`, or else of `data.shots` and `data.use_instruction`.

    Where nothing else says the task, at least one example is shown; `concat` inputs may say it.

    Raises:
        UserError: an unknown variant; shots out of order; nothing to condition on.
    """
    c = data_config
    if variant := c.get("variant", ""):
        found = re.fullmatch(r"(def)(?:_pos_([1-9]\d*))?|pos_([1-9]\d*)", variant)
        if not found:
            raise UserError(
                f"data.variant={variant!r} is unknown: 'def', 'def_pos_1', 'def_pos_2', 'pos_16' "
                "(any number), or '' for data.shots and data.use_instruction"
            )
        count = int(found[2] or found[3] or 0)
        return ShowRule(bool(found[1]), count, count, bool(found[1]))
    fewest, most = int(c.shots[0]), int(c.shots[1])
    if not 0 <= fewest <= most:
        raise UserError(
            f"data.shots={tuple(c.shots)} must be (fewest, most) with 0 <= fewest <= most"
        )
    if concat and most == 0:
        return ShowRule(c.use_instruction, 0, 0, False)
    if not c.use_instruction and most == 0:
        raise UserError(
            "data.shots=(0, 0) with data.use_instruction=False leaves nothing to condition on"
        )
    return ShowRule(c.use_instruction, fewest if c.use_instruction else max(fewest, 1), most, False)


# ------------------------------------------------------------------------------- as ids


class Conditioning(NamedTuple):
    """`ids` [<= max_len] int32 ending in EOS, how many examples went, and whether text was cut."""

    ids: np.ndarray
    dropped: int
    truncated: bool


def cut_example(head: np.ndarray, tail: np.ndarray, most: int) -> np.ndarray:
    """An example's ids up to its output, and the rest, as at most `most` - 2 ids.

    MetaICL's rule for `data.example_length`: what is before the output is cut at its end, and two
    places are left for its marks. A longer output alone is cut to fit.
    """
    tail = tail[: most - 2]
    return np.concatenate([head[: most - 2 - len(tail)], tail])


def join_conditioning(
    instruction: Sequence[int] | np.ndarray,
    examples: Sequence[Sequence[int] | np.ndarray],
    max_len: int,
    on_long: OnLong = "raise",
    where: str = "the task",
    layout: str = "apart",
    on_long_examples: OnLongExamples = "drop",
) -> Conditioning:
    """Joins encoded instruction and examples, dropping whole examples, last first, to fit.

    Args:
        instruction: ids without EOS; empty when no instruction is shown.
        examples: ids of each `example_text`, in order.
        max_len: the most ids there may be, EOS included.
        on_long: what to do when the instruction alone (or, without one, the first example alone)
            does not fit: raise, or cut it.
        where: what errors call the task: its name or file.
        layout: one of LAYOUTS. With "parts" the instruction and each example end in an EOS of
            their own; with "concat" there may be nothing but that EOS, for inputs that say their
            task themselves.
        on_long_examples: "cut_left" keeps the last ids instead, as MetaICL does.

    Raises:
        UserError: nothing to condition on, or over-long and `on_long` is 'raise'.
    """
    if layout == "concat" and not len(instruction) and not examples:
        return Conditioning(np.array([EOS_ID], np.int32), 0, False)
    if layout == "parts":
        # Between the parts; the last one's is the EOS that ends every conditioning.
        alone = 0 if len(instruction) else 1
        ended = [np.append(np.int32(EOS_ID), ids) for ids in examples[alone:]]
        examples = [*examples[:alone], *ended]
    if on_long_examples == "cut_left" and examples:
        ids = _joined([instruction, *examples])
        cut = ids[max(0, len(ids) - (max_len - 1)) :]
        return Conditioning(np.append(cut, np.int32(EOS_ID)), 0, len(cut) < len(ids))
    kept = _fitting(examples, max_len - 1 - len(instruction))
    parts = [instruction, *examples[:kept]]
    truncated = False
    if not len(instruction) and not kept:
        if not examples:
            raise UserError(f"{where}: neither instruction nor example to condition on")
        parts, kept, truncated = [examples[0]], 1, True
    truncated = truncated or len(instruction) > max_len - 1
    if truncated and on_long == "raise":
        what = "instruction" if len(instruction) else "first example"
        raise UserError(
            f"{where}: the {what} alone is {len(parts[0])} tokens and EOS, and the conditioning "
            f"holds {max_len}; shorten it, raise data.hyper_length, or cut it in training with "
            "data.on_long_instruction='truncate'"
        )
    ids = _joined(parts)[: max_len - 1]
    return Conditioning(np.append(ids, np.int32(EOS_ID)), len(examples) - kept, truncated)


def join_asked(
    instruction: np.ndarray,
    examples: Sequence[np.ndarray],
    asked: np.ndarray,
    max_len: int,
    reserve: int = 0,
    on_long_examples: OnLongExamples = "drop",
) -> Conditioning:
    """One text of a task and an asked input (`asked`, EOS included), for `data.concat_length`.

    "drop" is Tk-Instruct's rule: an example is kept where all before it, it and the input fit, and
    if instruction and input alone do not, the end is cut. "cut_left" is MetaICL's: the last ids of
    all are kept, so many that `reserve` (the target and its EOS) fit too.
    """
    if on_long_examples == "cut_left":
        ids = _joined([instruction, *examples, asked])
        cut = ids[max(0, len(ids) + reserve - max_len) :]
        return Conditioning(cut, 0, len(cut) < len(ids))
    kept = _fitting(examples, max_len - len(instruction) - len(asked))
    ids = _joined([instruction, *examples[:kept], asked])
    if len(ids) <= max_len:
        return Conditioning(ids, len(examples) - kept, False)
    return Conditioning(np.append(ids[: max_len - 1], np.int32(EOS_ID)), len(examples) - kept, True)


def _fitting(examples: Sequence[Sequence[int] | np.ndarray], room: int) -> int:
    """How many of the examples, in order, have room together."""
    kept = 0
    for ids in examples:
        room -= len(ids)
        if room < 0:
            break
        kept += 1
    return kept


def _joined(parts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(part, np.int32) for part in parts)])


def format_conditioning(
    instruction: str,
    examples: Sequence[Example],
    vocab: Vocabulary,
    data_config: Any,
    where: str = "the task",
    layout: str = "apart",
) -> Conditioning:
    """`join_conditioning` of texts, by the fields of a run's `data` section.

    An instruction or example that is too long is refused, never cut, where a user gave it.
    """
    c = data_config
    encoding = ENCODINGS[c.encoding]
    return join_conditioning(
        np.array(vocab.encode(encoding.instruction(instruction)), np.int32),
        [encode_example(vocab, e, i, c) for i, e in enumerate(examples)],
        c.hyper_length,
        "raise",
        where,
        layout,
        c.on_long_examples,
    )


def encode_example(vocab: Vocabulary, example: Example, place: int, data_config: Any) -> np.ndarray:
    """Ids of a shown example, int32 without EOS, by `data.encoding` and `data.example_length`."""
    head, tail = ENCODINGS[data_config.encoding].example(place, example)
    if not data_config.example_length:
        return np.array(vocab.encode(head + tail), np.int32)
    parts = [np.array(ids, np.int32) for ids in vocab.encode_batch([head, tail])]
    return cut_example(parts[0], parts[1], data_config.example_length)
