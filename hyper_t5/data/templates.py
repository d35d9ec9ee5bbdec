"""Templates: how instruction, shown examples and input of a task are written.

The same code serves training, evaluation, `adapt` and the SeqIO Tasks. ``data.template`` is one of

labelled (ours)     {instruction}
                    Input: {input of example 1}
                    Output: {output of example 1}
                    Input: ...
    The labels of the published instruction-tuned T5s and nothing else, because with a byte
    vocabulary every label costs length. The input itself is written as it is; where it follows the
    conditioning (system=concat), behind another "Input:".
tk_instruct         "Definition: ...", " Positive Example 1 -", "Now complete the following example
    -" and so on: Tk-Instruct's text (Wang et al. 2022, `DataCollatorForNI`), character for
    character. HINT's "mimic" variant where hypermodel and backbone share it.
metaicl             input and output one after the other, without labels (Min et al. 2022, direct
    method).

Each part is encoded on its own and the ids are joined, so that an example can be dropped whole.
With a SentencePiece vocabulary of words that gives the ids of the whole text, since parts meet at
spaces.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from hyper_t5.data.batch import SEPARATE, Layout
from hyper_t5.data.task_rows import Example
from hyper_t5.data.vocab import EOS_ID, Vocabulary
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import choose

OnLong = Literal["raise", "truncate", "refuse"]  # refuse: a user's own task, without a config
OnLongExamples = Literal["drop", "cut_left"]


# ------------------------------------------------------------------------------- templates


class Template(NamedTuple):
    """The text of each part of a task.

    Attributes:
      instruction: text -> text.
      example: (index among the shown ones, example) -> (text up to the output, the rest).
      query: the input to answer -> the text that the backbone reads.
      label: precedes the query where it follows instruction or examples in one text.
    """

    instruction: Callable[[str], str]
    example: Callable[[int, Example], tuple[str, str]]
    query: Callable[[str], str]
    label: str = ""


def _with_full_stop(text: str) -> str:
    """Tk-Instruct ends every part in a punctuation mark."""
    return text if text[-1] in string.punctuation else text + "."


def _tk_example(index: int, example: Example) -> tuple[str, str]:
    head = f" Positive Example {index + 1} -\n"
    head += _with_full_stop(f"Input: {example[0].strip()}") + "\n"
    return head, _with_full_stop(f" Output: {example[1].strip()}") + "\n\n"


TEMPLATES = {
    "labelled": Template(
        instruction=str.strip,
        example=lambda _, e: (f"\nInput: {e[0].strip()}", f"\nOutput: {e[1].strip()}"),
        query=lambda text: text,
        label="\nInput: ",
    ),
    "tk_instruct": Template(
        # An empty one is left out, as where the collator adds no definition.
        instruction=lambda t: t.strip() and _with_full_stop(f"Definition: {t.strip()}") + "\n\n",
        example=_tk_example,
        query=lambda text: (
            "Now complete the following example -\n"
            + _with_full_stop(f"Input: {text.strip()}")
            + "\nOutput: "
        ),
    ),
    "metaicl": Template(
        instruction=str.strip,
        example=lambda index, e: ((" " if index else "") + e[0], " " + e[1]),
        query=lambda text: text,
        label=" ",
    ),
}


def format_example(example: Example, index: int = 0, template: str = "labelled") -> str:
    """Return the text of one shown example."""
    return "".join(TEMPLATES[template].example(index, example))


# ------------------------------------------------------------------------ what is shown


CONDITIONINGS = ("instruction", "examples", "both")  # kinds of data.conditioning


class ConditioningRule(NamedTuple):
    """The parts of a task that its conditioning holds.

    Attributes:
      instruction: whether the instruction is shown.
      fewest: the smallest number of examples.
      most: the largest number of examples.
      first: the task's first examples in their order, or drawn ones.
    """

    instruction: bool
    fewest: int
    most: int
    first: bool


def conditioning_rule(data_config: Any, layout: Layout = SEPARATE) -> ConditioningRule:
    """Return the rule of ``data.variant``, or else of ``data.shots`` and ``data.use_instruction``.

    Without an instruction at least one example is shown, unless the inputs may say the task
    (``layout.in_inputs``).

    Raises:
      UserError: an unknown variant; shots out of order; nothing to condition on.
    """
    c = data_config
    if variant := c.get("variant", ""):
        match = re.fullmatch(r"(def)(?:_pos_([1-9]\d*))?|pos_([1-9]\d*)", variant)
        if not match:
            raise UserError(
                f"data.variant={variant!r} is unknown: 'def', 'def_pos_1', 'def_pos_2', 'pos_16' "
                "(any number), or '' for data.shots and data.use_instruction"
            )
        count = int(match[2] or match[3] or 0)
        return ConditioningRule(bool(match[1]), count, count, bool(match[1]))
    fewest, most = int(c.shots[0]), int(c.shots[1])
    if not 0 <= fewest <= most:
        raise UserError(
            f"data.shots={tuple(c.shots)} must be (fewest, most) with 0 <= fewest <= most"
        )
    if layout.in_inputs and most == 0:
        return ConditioningRule(c.use_instruction, 0, 0, False)
    if not c.use_instruction and most == 0:
        raise UserError(
            "data.shots=(0, 0) with data.use_instruction=False leaves nothing to condition on"
        )
    return ConditioningRule(
        c.use_instruction, fewest if c.use_instruction else max(fewest, 1), most, False
    )


def conditioning_mix(
    data_config: Any, layout: Layout = SEPARATE
) -> tuple[list[ConditioningRule], np.ndarray]:
    """Return the rules that training draws from for each episode, and their probabilities.

    These are of ``data.conditioning``, such as "instruction=1,examples=2,both=1", or the one of
    `conditioning_rule` where that is empty.

    Raises:
      UserError: an unknown kind, a rate that is no positive number, or no examples to show.
    """
    c, kinds, rates = data_config, [], []
    if not c.conditioning:
        return [conditioning_rule(c, layout)], np.ones(1)
    for part in c.conditioning.split(","):
        kind, _, text = (x.strip() for x in part.partition("="))
        choose("data.conditioning", kind, CONDITIONINGS)
        try:
            rate = float(text)
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf or kind in kinds:
            raise UserError(
                f"data.conditioning: {part!r} is not KIND=RATE with a rate above 0, one for each "
                f"kind of {', '.join(CONDITIONINGS)}"
            )
        kinds.append(kind)
        rates.append(rate)
    most = int(c.shots[1])
    if c.variant or (not most and kinds != ["instruction"]):
        remedy = "set data.variant to ''" if c.variant else "raise the second number of data.shots"
        raise UserError(f"data.conditioning={c.conditioning} draws the number of shots; {remedy}")
    fewest = max(1, int(c.shots[0]))
    rules = {
        "instruction": ConditioningRule(True, 0, 0, False),
        "examples": ConditioningRule(False, fewest, most, False),
        "both": ConditioningRule(True, fewest, most, False),
    }
    return [rules[kind] for kind in kinds], np.array(rates) / sum(rates)


# ------------------------------------------------------------------------ joining ids


class Conditioning(NamedTuple):
    """Ids [<= length] int32 ending in EOS, the number of dropped examples, whether text was cut."""

    ids: np.ndarray
    dropped: int
    truncated: bool


def join_conditioning(
    instruction: Sequence[int] | np.ndarray,
    examples: Sequence[Sequence[int] | np.ndarray],
    max_length: int,
    on_long: OnLong = "raise",
    location: str = "the task",
    layout: Layout = SEPARATE,
    on_long_examples: OnLongExamples = "drop",
) -> Conditioning:
    """Join an encoded instruction and examples; drop whole examples, last first, to fit.

    Args:
      instruction: ids without EOS; empty when no instruction is shown.
      examples: ids of each example, in order.
      max_length: the largest number of ids, EOS included.
      on_long: raise, or cut, where the instruction alone (or, without one, the first example alone)
        does not fit.
      location: the name or file of the task, for errors.
      layout: whether parts end in EOS, and whether an empty conditioning is allowed.
      on_long_examples: "cut_left" keeps the last ids instead, as MetaICL does.

    Raises:
      UserError: nothing to condition on, or too long and ``on_long`` is 'raise'.
    """
    if layout.in_inputs and not len(instruction) and not examples:
        return Conditioning(np.array([EOS_ID], np.int32), 0, False)
    if layout.eos_after_parts:
        # Between the parts; the last one's is the EOS that ends every conditioning.
        alone = 0 if len(instruction) else 1
        ended = [np.append(np.int32(EOS_ID), ids) for ids in examples[alone:]]
        examples = [*examples[:alone], *ended]
    if on_long_examples == "cut_left" and examples:
        ids = _concatenate([instruction, *examples])
        cut = ids[max(0, len(ids) - (max_length - 1)) :]
        return Conditioning(np.append(cut, np.int32(EOS_ID)), 0, len(cut) < len(ids))
    count = _count_fitting(examples, max_length - 1 - len(instruction))
    parts = [instruction, *examples[:count]]
    truncated = False
    if not len(instruction) and not count:
        if not examples:
            raise UserError(f"{location}: neither instruction nor example to condition on")
        parts, count, truncated = [examples[0]], 1, True
    truncated = truncated or len(instruction) > max_length - 1
    if truncated and on_long != "truncate":
        part = "instruction" if len(instruction) else "first example"
        fields = ", raise data.hyper_length, or set data.on_long_instruction='truncate'"
        raise UserError(
            f"{location}: the {part} alone is {len(parts[0])} tokens and EOS, and the conditioning "
            f"holds {max_length}; shorten it{fields if on_long == 'raise' else ''}"
        )
    ids = _concatenate(parts)[: max_length - 1]
    return Conditioning(np.append(ids, np.int32(EOS_ID)), len(examples) - count, truncated)


def join_chunks(
    instruction: Sequence[int] | np.ndarray,
    examples: Sequence[Sequence[int] | np.ndarray],
    max_length: int,
    chunks: int,
    *options: Any,
) -> Conditioning:
    """Join a conditioning in at most ``chunks`` chunks of ``max_length`` ids (`join_conditioning`).

    Each chunk has the instruction and the next examples that fit. Returns the ids of all chunks
    [chunks * max_length], padded, with the unused ones in front (`adapters.compose`); of one chunk,
    its ids as they are.
    """
    if chunks == 1:
        return join_conditioning(instruction, examples, max_length, *options)
    joined: list[Conditioning] = []
    remaining = list(examples)
    while len(joined) < chunks and (remaining or not joined):
        chunk = join_conditioning(instruction, remaining, max_length, *options)
        count = len(remaining) - chunk.dropped
        if count or not joined:
            joined.append(chunk)
        if not count:
            break  # the next example does not fit
        remaining = remaining[count:]
    ids = np.zeros((chunks, max_length), np.int32)
    for row, chunk in zip(ids[chunks - len(joined) :], joined, strict=True):
        row[: len(chunk.ids)] = chunk.ids
    return Conditioning(ids.reshape(-1), len(remaining), any(c.truncated for c in joined))


def join_concat(
    instruction: np.ndarray,
    examples: Sequence[np.ndarray],
    query: np.ndarray,
    max_length: int,
    reserve: int = 0,
    on_long_examples: OnLongExamples = "drop",
) -> Conditioning:
    """Join conditioning and query (EOS included) in one text, for ``data.concat_length``.

    "drop" is Tk-Instruct's rule: an example is kept where all before it, it and the query fit, and
    if instruction and query alone do not, the end is cut. "cut_left" is MetaICL's: the last ids are
    kept, as many as leave ``reserve`` (the target and its EOS).
    """
    if on_long_examples == "cut_left":
        ids = _concatenate([instruction, *examples, query])
        cut = ids[max(0, len(ids) + reserve - max_length) :]
        return Conditioning(cut, 0, len(cut) < len(ids))
    count = _count_fitting(examples, max_length - len(instruction) - len(query))
    dropped = len(examples) - count
    ids = _concatenate([instruction, *examples[:count], query])
    if len(ids) <= max_length:
        return Conditioning(ids, dropped, False)
    return Conditioning(np.append(ids[: max_length - 1], np.int32(EOS_ID)), dropped, True)


def _count_fitting(examples: Sequence[Sequence[int] | np.ndarray], room: int) -> int:
    """Return how many of the examples, in order, fit together."""
    count = 0
    for ids in examples:
        room -= len(ids)
        if room < 0:
            break
        count += 1
    return count


def _concatenate(parts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(part, np.int32) for part in parts)])


# ------------------------------------------------------------------------ text to ids


def format_conditioning(
    instruction: str,
    examples: Sequence[Example],
    vocab: Vocabulary,
    data_config: Any,
    location: str = "the task",
    layout: Layout = SEPARATE,
) -> Conditioning:
    """Encode and join the texts of a task that a user supplies.

    An instruction or example that is too long is refused, never cut.
    """
    c = data_config
    return join_chunks(
        np.array(vocab.encode(TEMPLATES[c.template].instruction(instruction)), np.int32),
        [encode_example(vocab, e, i, c) for i, e in enumerate(examples)],
        c.hyper_length,
        c.chunks,
        "refuse",
        location,
        layout,
        c.on_long_examples,
    )


def encode_example(vocab: Vocabulary, example: Example, index: int, data_config: Any) -> np.ndarray:
    """Return the ids of a shown example, int32 without EOS, cut to ``data.example_length``."""
    head, tail = TEMPLATES[data_config.template].example(index, example)
    if not data_config.example_length:
        return np.array(vocab.encode(head + tail), np.int32)
    parts = [np.array(ids, np.int32) for ids in vocab.encode_batch([head, tail])]
    return cut_example(parts[0], parts[1], data_config.example_length)


def cut_example(head: np.ndarray, tail: np.ndarray, most: int) -> np.ndarray:
    """Join an example's ids up to its output with the rest, at most ``most`` - 2 ids.

    MetaICL's rule for ``data.example_length``: the part before the output is cut at its end, and
    two positions are left for its marks. A longer output alone is cut to fit.
    """
    tail = tail[: most - 2]
    return np.concatenate([head[: most - 2 - len(tail)], tail])
