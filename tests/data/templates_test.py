"""Templates and conditioning: variants, dropped examples, Tk-Instruct's and MetaICL's text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from sentencepiece import SentencePieceProcessor

from hyper_t5 import config as config_lib
from hyper_t5 import pipeline
from hyper_t5.data.batch import CONCAT, FUSION, SEPARATE, Layout
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.data.eval_tasks import build_eval_tasks
from hyper_t5.data.task_rows import Example, TaskData, TaskRow, text_key
from hyper_t5.data.templates import (
    Conditioning,
    OnLong,
    format_example,
    join_chunks,
    join_concat,
    join_conditioning,
)
from hyper_t5.data.vocab import EOS_ID, load_vocab
from hyper_t5.utils.errors import UserError
from tests.support import tiny_model, tiny_runs, toy_tasks
from tests.support.toy_tasks import BYTES, shown_inputs, texts_at_eos


def make_config(**fields: Any) -> ConfigDict:
    lengths = {"hyper_length": 400, "input_length": 300, "target_length": 20}
    config = toy_tasks.make_config(
        **{**lengths, "tasks_per_batch": 2, "examples_per_task": 3, **fields}
    )
    config.eval.max_rows_per_task = 4
    return config


def text_of(ids: np.ndarray) -> str:
    return BYTES.decode(ids[ids > 0].tolist())


# ------------------------------------------------------------------------------- conditioning

EXAMPLES = [("one", "1"), ("two", "2"), ("three", "3")]


def condition(
    instruction: str,
    max_length: int,
    examples: list[Example] = EXAMPLES,
    on_long: OnLong = "raise",
    layout: Layout = SEPARATE,
) -> Conditioning:
    shown = [BYTES.encode(format_example(example)) for example in examples]
    return join_conditioning(BYTES.encode(instruction), shown, max_length, on_long, "T", layout)


def test_whole_examples_are_dropped_last_first() -> None:
    texts = list(map(format_example, EXAMPLES))
    whole, dropped, _ = condition("Count.", 1000)
    assert dropped == 0
    assert BYTES.decode(whole) == "Count." + "".join(texts)
    assert whole[-1] == EOS_ID
    for length in range(len(whole), 6, -1):
        ids, dropped, _ = condition("Count.", length)
        assert len(ids) <= length
        assert BYTES.decode(ids) == "Count." + "".join(texts[: 3 - dropped])
        if dropped:
            assert len(condition("Count.", 1000, EXAMPLES[: 4 - dropped]).ids) > length
    cut, dropped, _ = condition("Count.", 6, on_long="truncate")
    assert (BYTES.decode(cut), cut[-1], dropped) == ("Count", EOS_ID, 3)


@pytest.mark.parametrize("instruction", ["Count.", ""])
def test_layout_fusion_ends_every_part_in_eos(instruction: str) -> None:
    texts = [text for text in (instruction, *map(format_example, EXAMPLES)) if text]
    sizes = [len(BYTES.encode(text)) + 1 for text in texts]
    for length in range(sum(sizes), sizes[0] - 1, -1):
        fit = int(np.sum(np.cumsum(sizes) <= length))
        ids, dropped, _ = condition(instruction, length, layout=FUSION)
        assert texts_at_eos(ids) == texts[:fit]
        assert dropped == len(texts) - fit
    cut, dropped, _ = condition("Count.", 6, on_long="truncate", layout=FUSION)
    assert (texts_at_eos(cut), dropped) == (["Count"], 3)


@pytest.mark.parametrize(
    ("instruction", "examples", "length", "layout", "message"),
    [
        ("Count.", EXAMPLES, 6, SEPARATE, r"T: the instruction alone is 6 tokens .* holds 6"),
        ("", [], 100, SEPARATE, "neither instruction nor example"),
        ("", EXAMPLES, 10, SEPARATE, "the first example alone"),
        ("", EXAMPLES, 21, FUSION, "the first example alone is 21 tokens"),
    ],
)
def test_an_impossible_conditioning_is_refused(
    instruction: str, examples: list[Example], length: int, layout: Layout, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        condition(instruction, length, examples, layout=layout)


def test_join_concat_drops_examples_before_it_cuts() -> None:
    def join(
        instruction: list[int], examples: list[list[int]], query: list[int], *rest: Any
    ) -> Any:
        ids, *shown = (np.array(part, np.int32) for part in (instruction, *examples))
        joined = join_concat(ids, shown, np.array(query, np.int32), *rest)
        return joined.ids.tolist(), joined.dropped, joined.truncated

    assert join([2, 3], [[4], [5, 6]], [7, 1], 6) == ([2, 3, 4, 7, 1], 1, False)
    assert join([2, 3], [[4]], [7, 8, 9, 1], 4) == ([2, 3, 7, 1], 1, True)
    assert join([], [[4], [5, 6]], [7, 1], 5, 1, "cut_left") == ([5, 6, 7, 1], 0, True)


def test_concat_length_drops_examples_for_each_input() -> None:
    """Of two inputs of one task the longer loses an example; the instruction stays."""
    rows = (TaskRow("0", "short", ("a",)), TaskRow("1", "long " * 8, ("b",)))
    config = make_config(variant="def_pos_2", concat_length=90)
    shown = (("in one", "out one"), ("in two", "out two"))
    task = TaskData("t", ("Say it.",), shown, rows)
    [eval_task] = build_eval_tasks([task], BYTES, config, CONCAT)
    first = "Say it.\nInput: in one\nOutput: out one"
    assert list(map(text_of, eval_task.inputs)) == [
        f"{first}\nInput: in two\nOutput: out two\nInput: short",
        f"{first}\nInput: " + "long " * 8,
    ]
    assert (eval_task.truncated_inputs, eval_task.dropped) == (0, 1)


# ------------------------------------------------------------------------------- variants


@pytest.mark.parametrize(
    ("variant", "instruction", "first"),
    [
        ("def", True, 0),
        ("def_pos_1", True, 1),
        ("def_pos_2", True, 2),
        ("def_pos_9", True, 3),
        ("pos_2", False, None),
    ],
)
def test_a_variant_overrides_shots_and_use_instruction(
    variant: str, instruction: bool, first: int | None
) -> None:
    """def_pos_k shows the first k examples, pos_k draws k."""
    config = make_config(
        variant=variant, shots=(1, 1), use_instruction=not instruction, tasks_per_batch=1
    )
    task = toy_tasks.task_data("t")
    sampler = EpisodeSampler([task], BYTES, config.data, 0)
    drawn = set()
    for step in range(12):
        ids = sampler.batch(step)["hyper_inputs"][0]
        assert text_of(ids).startswith("Definition of t.") == instruction
        texts = shown_inputs(ids)
        drawn.add(tuple(texts))
        if first is None:
            assert len(texts) == len(set(texts)) == 2
        else:
            assert [int(x[-1]) for x in texts if "shown" in x] == list(range(first))
    assert first is not None or len(drawn) > 3, "not drawn"
    [eval_task] = build_eval_tasks([task], BYTES, config)
    shown = [int(text[-1]) for text in shown_inputs(eval_task.hyper_ids) if "shown" in text]
    assert shown == list(range(2 if first is None else first))


@pytest.mark.parametrize(
    "variant", ["de", "pos_0", "pos", "def_", "defpos_1", "def_pos_x", "pos_1_"]
)
def test_unknown_variants_are_refused(variant: str) -> None:
    config = make_config(variant=variant)
    config.backbone.path = "x"
    with pytest.raises(UserError, match=r"data\.variant='.*' is unknown: 'def'"):
        config_lib.validate(config)


# ------------------------------------------------------------------------------- Tk-Instruct

# From Tk-Instruct's own collator, with bytes as tokens (tests/golden/README.md).
GOLDEN = json.loads((tiny_model.GOLDEN / "tk_instruct.json").read_text())


@pytest.mark.parametrize("definition", [True, False])
@pytest.mark.parametrize("examples", [0, 1, 2, 3])
def test_tk_instruct_equals_the_official_text(examples: int, definition: bool) -> None:
    variant = "_".join(["def"] * definition + [f"pos_{examples}"] * bool(examples))
    cases = [
        c for c in GOLDEN["cases"] if (c["examples"], c["definition"]) == (examples, definition)
    ]
    assert len(cases) > 10
    shown = tuple((e["input"], e["output"]) for e in GOLDEN["task"]["Positive Examples"])
    for case in cases:
        config = make_config(
            variant=variant,
            shots=(0, 0),
            use_instruction=definition,
            template="tk_instruct",
            concat_length=case["length"],
            input_length=1000,
            on_long_instruction="truncate",
            tasks_per_batch=1,
            examples_per_task=1,
        )
        config.eval.shots = 0
        row = TaskRow("0", case["input"], ("x",))
        task = TaskData("t", tuple(GOLDEN["task"]["Definition"]), shown, (row,))
        [eval_task] = build_eval_tasks([task], BYTES, config, CONCAT)
        assert text_of(eval_task.inputs[0]) == case["source"], case
        assert eval_task.inputs.shape == (1, case["length"])
        assert eval_task.truncated_inputs == (not case["whole"])
        if definition or not examples:  # else training draws them
            batch = EpisodeSampler([task], BYTES, config.data, 0, CONCAT).batch(0)
            assert text_of(batch["inputs"][0, 0]) == case["source"]


# SHA-256 of the collator's output for the first 100 rows of the test tasks of the reference data,
# as T5's ids and decoded again: in 7 rows "###" is "##", "#" as one text and "#", "##" in parts.
DIGESTS = {
    ("def", 1024): "293349548b130ee544594ada30eaecadbfcc5cdb6c5e6a931121b1fd2c9fee4f",
    ("def_pos_1", 1024): "388df5637c9b644e93ff73fcaed2cdbda3e71b8d80f32ca898e00a656dcbaa0b",
    ("def_pos_2", 1024): "13f9ac3ae2694c6839c896ebdb1e2f25b6979a782ef326583c5d1592fde598ff",
    ("def_pos_2", 256): "35cae4015440077fb9e8ae98656b9fcb18978136e23245ed8f090a7fd5666185",
}


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "length"), DIGESTS)
def test_tk_instruct_equals_the_official_text_of_real_rows(
    variant: str, length: int, shared_dir: Any, real_data: Any
) -> None:
    model = str(shared_dir / "data" / "tokenizer" / "spiece.model")
    vocab, pieces = load_vocab(model), SentencePieceProcessor(model)
    config = make_config(
        variant=variant,
        template="tk_instruct",
        concat_length=length,
        sni_dir=str(real_data("sni")),
        on_missing_task="skip",
        empty_targets="keep",
        input_length=10_000,
        on_long_instruction="truncate",
    )
    config.eval.max_rows_per_task = 100
    tasks = []
    for task in pipeline.load_tasks("sni", config.data, "test", vocab):
        # The collator shows evaluated rows, or an example twice, and we do not: such tasks differ.
        shown = [text_key(text) for text, _ in task.examples]
        evaluated = {text_key(row.input) for row in task.rows[:100]}
        if len(set(shown)) == len(shown) and not evaluated & set(shown):
            tasks.append(task)
    digest, rows = hashlib.sha256(), 0
    for eval_task in build_eval_tasks(tasks, vocab, config, CONCAT):
        for name, ids in zip(eval_task.ids, eval_task.inputs, strict=True):
            text = pieces.decode(ids[ids > 0][:-1].tolist())
            digest.update(repr((eval_task.name, name, text)).encode())
            rows += 1
    assert rows == 10010
    assert digest.hexdigest() == DIGESTS[variant, length]


# ------------------------------------------------------------------------------- MetaICL


def metaicl_config(k: int, max_length: int, example_length: int) -> ConfigDict:
    return make_config(
        variant=f"pos_{k}",
        template="metaicl",
        on_long_examples="cut_left",
        example_length=example_length,
        hyper_length=max_length,
        input_length=example_length,
        concat_length=max_length,
    )


def official_ids(demos: list[Example], row: TaskRow, most: int, example: int) -> list[int]:
    """Return the ids of MetaICL's data.py (method direct), written independently of the product.

    An example's input is cut to what 2 and its output leave of ``example``; demonstrations and
    input are joined, and the first ids go until they, the output and 2 marks are ``most``.
    """
    encode = tiny_runs.vocabulary().encode
    ids: list[int] = []
    for text, output in demos:
        tail = encode(output)
        ids += encode(text)[: example - 2 - len(tail)] + tail
    longest = max(len(encode(option)) for option in row.options or row.outputs)
    ids += encode(row.input)[: example - 2 - longest]
    return ids[max(0, len(ids) + longest + 2 - most) :]


@pytest.mark.parametrize("most", [1000, 60, 25])
@pytest.mark.parametrize("example", [256, 12, 8])
def test_metaicl_truncates_as_the_official_code(most: int, example: int) -> None:
    rng = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), length))

    demos = tuple((text(4 * i + 1), text(i % 2 + 1)) for i in range(5))
    row = TaskRow("0", text(15), ("y",), ("y", "n o t"))
    task = TaskData("t", ("",), demos, (row,))
    config = metaicl_config(5, most, example)
    [eval_task] = build_eval_tasks([task], tiny_runs.vocabulary(), config, CONCAT)
    ids = eval_task.inputs[0][eval_task.inputs[0] > 0].tolist()
    expected = official_ids(list(demos), row, most, example)
    assert ids == [*expected, EOS_ID]
    assert len(expected) > 20 or most < 100


def test_metaicl_conditioning_is_cut_at_its_start() -> None:
    """Of 16 demonstrations of at most 30 ids, 2 of them left free, the last 200 ids are kept."""
    rows = tuple(TaskRow(f"{i}", f"{i:02d} " + "x" * 40, ("yes",)) for i in range(40))
    task = TaskData("t", ("",), (), rows)
    sampler = EpisodeSampler([task], BYTES, metaicl_config(16, 200, 30).data, 0)
    batch = sampler.batch(0)
    for ids, inputs in zip(batch["hyper_inputs"], batch["inputs"], strict=True):
        assert (ids > 0).all()
        assert ids[-1] == EOS_ID
        text = text_of(ids)
        assert text.endswith("x yes")
        assert 6 <= text.count(" yes") <= 7
        numbers = {text_of(row)[:2] for row in inputs}
        assert not numbers & {part.split()[0] for part in text.split(" yes ")[1:]}
    assert sampler.stats["truncated_conditionings"] == 2
    assert sampler.stats["dropped_examples"] == 0


# ------------------------------------------------------------------------------- chunks


def chunk_texts(instruction: str, count: int, length: int, chunks: int) -> tuple[list[str], int]:
    """Return the text of each chunk of ``count`` examples, and the number of dropped ones."""
    shown = [BYTES.encode(format_example((f"{i}", f"{i}"))) for i in range(count)]
    joined = join_chunks(BYTES.encode(instruction), shown, length, chunks)
    return [text_of(ids) for ids in joined.ids.reshape(chunks, length)], joined.dropped


def test_examples_fill_chunks_in_order_and_unused_chunks_come_first() -> None:
    example_length = len(format_example(("0", "0")))
    texts, dropped = chunk_texts("do", 5, 3 + 2 * example_length, 4)
    shown = [format_example((f"{i}", f"{i}")) for i in range(5)]
    chunks = ["".join(["do", *part]) for part in (shown[:2], shown[2:4], shown[4:])]
    assert (texts, dropped) == (["", *chunks], 0)
    texts, dropped = chunk_texts("do", 5, 3 + 2 * example_length, 2)
    assert (texts, dropped) == (chunks[:2], 1)
    texts, dropped = chunk_texts("do", 0, 3 + 2 * example_length, 2)
    assert (texts, dropped) == (["", "do"], 0)
    # An example that fits beside no instruction ends the list, as without chunks.
    texts, dropped = chunk_texts("do", 2, 4, 3)
    assert (texts, dropped) == (["", "", "do"], 2)
