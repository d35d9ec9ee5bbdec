"""Benchmark of predict against Hugging Face's `generate` with `peft` adapters, on CPU."""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from hyper_t5 import adapters as ad
from hyper_t5 import export, serve, t5, weights
from hyper_t5.bench import Options, measure
from hyper_t5.bench.against_torch import missing, set_up
from hyper_t5.bench.steps import random_backbone
from hyper_t5.vocab import EOS_ID, PAD_ID, Vocabulary

OURS, THEIRS = "predict", "generate with peft"
TASKS = 8
# Tokens of an input, EOS included: a tenth of the rows each, of Super-NaturalInstructions' official
# test tasks (104 of the 119, 100 rows each, T5's vocabulary). Their outputs are of 9 tokens on
# average, half of them of 3 or fewer, a twentieth of 28 or more.
INPUT_LENGTHS = (11, 14, 20, 28, 35, 43, 62, 86, 124, 252)
# The logit of EOS is so many times what a random network makes it, so that answers end by
# themselves, many soon and some late; the notes of the table say when.
ENDS = 5.0


@dataclasses.dataclass(frozen=True)
class Work:
    """Rows to answer: the ids of each with EOS, its task; rows of a batch, the longest answer."""

    ids: list[list[int]]
    tasks: list[int]
    batch: int
    steps: int


class Arm(Protocol):
    """Answers all rows, in their order.

    Attribute idle: the share of the decoder's places that the last call left idle.
    """

    idle: float

    def __call__(self, work: Work) -> list[list[int]]: ...


def predict(options: Options) -> measure.Result:
    """One task's rows and rows of 8 tasks mixed; of one length, and of real lengths.

    Raises RuntimeError when the two do not answer the same.
    """
    title = "predict against transformers' generate with peft's LoRA, float32"
    if absent := missing():
        return measure.Result("predict", title, [], skipped=absent)
    size = "tiny" if options.tiny else "small"
    sizes = t5.preset(size)
    result = measure.Result(
        "predict",
        title,
        [
            f"{measure.machine()}; {set_up()}; JAX {jax.__version__}",
            f"T5 1.1 {size}, LoRA of rank 16 on every query and value, {TASKS} of them in the "
            "rows' order at random where tasks are mixed; greedy, the encoder included",
            "generate has rows sorted by length in its batches; a token counts up to EOS",
        ],
    )
    backbone, lora = random_backbone(sizes), _random_lora(sizes)
    for ends in (False, True):
        params = _with_ends(backbone, ENDS if ends else 0.0)
        ours, theirs = _Ours(sizes, params, lora), _Theirs(sizes, params, lora)
        for mixed in (False, True):
            work = _work(sizes.vocab_size, ends, mixed, options.tiny)
            what = f"{TASKS} tasks mixed" if mixed else "one task"
            _compare(result, f"{what}, {_lengths(work, ends)}", work, ours, theirs, options.tiny)
    return result


def _compare(
    result: measure.Result, what: str, work: Work, ours: Arm, theirs: Arm, tiny: bool
) -> None:
    """Add a row, and what was seen of the answers."""
    arms: dict[str, Arm] = {OURS: ours, THEIRS: theirs}
    made = {name: arm(work) for name, arm in arms.items()}
    same = float(np.mean([a == b for a, b in zip(*made.values(), strict=True)]))
    if same < 0.9:  # in float32 a near tie may be decided either way, and then all that follows
        raise RuntimeError(f"{what}: only {same:.1%} of the answers are the same")
    tokens = {name: float(sum(map(len, answers))) for name, answers in made.items()}
    calls = {name: functools.partial(arm, work) for name, arm in arms.items()}
    seconds = measure.in_turns(calls, 2 if tiny else 3, warm_up=0)
    result.rows.append(measure.rate_row(what, "tokens/s", seconds, tokens, OURS, THEIRS))
    lengths = [len(answer) for answer in made[OURS]]
    result.notes.append(
        f"{what}: {len(lengths)} rows, answers of {np.mean(lengths):.1f} tokens, the middle one of "
        f"{np.median(lengths):.0f}, the longest of {max(lengths)}; {same:.1%} of them the same; "
        f"of {OURS}'s places {ours.idle:.0%} idle, of {THEIRS}'s {theirs.idle:.0%}"
    )


def _lengths(work: Work, ends: bool) -> str:
    return "real lengths" if ends else f"{len(work.ids[0])} + {work.steps} tokens"


def _work(vocab_size: int, ends: bool, mixed: bool, tiny: bool) -> Work:
    """Random rows: a batch of one length, or three batches of the lengths of INPUT_LENGTHS."""
    rng = np.random.default_rng(0)
    batch, length, steps = (8, 16, 4) if tiny else (32, 128, 32)
    lengths = [length] * batch
    if ends:
        rows = 2 * batch if tiny else 3 * batch
        each = [n // 8 + 2 if tiny else n for n in INPUT_LENGTHS]
        lengths, steps = [each[i % len(each)] for i in rng.permutation(rows)], 8 if tiny else 64
    ids = [[*rng.integers(3, vocab_size, n - 1).tolist(), EOS_ID] for n in lengths]
    tasks = rng.permutation(len(ids)) % TASKS if mixed else np.zeros(len(ids), int)
    return Work(ids, tasks.tolist(), batch, steps)


def _random_lora(sizes: t5.T5Config) -> ad.Adapters:
    """For all tasks, of the size of the queries that it changes.

    Eight times as large the attentions of a random network are so sharp that rounding decides what
    follows: of 32 rows of 32 tokens a third then differed from PyTorch's.
    """
    targets = ad.targets_of(ad.ATTENTION_SITES, sizes, ("query", "value"))
    spec = ad.AdapterSpec(lora=ad.LoraSpec(targets, 16, 2.0))
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return (rng.normal(size=shape) * shape[-2] ** -0.5).astype(np.float32)

    shapes = ad.shapes(spec, sizes, TASKS)
    return ad.Adapters(jax.tree.map(draw, shapes, is_leaf=lambda x: type(x) is tuple), spec)


def _with_ends(backbone: Any, scale: float) -> Any:
    """The backbone with its logit of EOS so many times as large; 0: no row ever ends."""
    kernel = jnp.asarray(backbone["decoder"]["logits_dense"]["kernel"])
    kernel = kernel.at[:, EOS_ID].multiply(scale)
    return {**backbone, "decoder": {**backbone["decoder"], "logits_dense": {"kernel": kernel}}}


def _answer(ids: list[int]) -> list[int]:
    """The ids up to EOS, which is kept."""
    return ids[: ids.index(EOS_ID) + 1] if EOS_ID in ids else ids


class _Ids:
    """A vocabulary whose texts are ids as numbers: it costs nearly nothing, and loses nothing."""

    pad_id, eos_id = PAD_ID, EOS_ID

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in re.findall(r"\d+", text)]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))


class _Ours:
    def __init__(self, sizes: t5.T5Config, params: Any, lora: ad.Adapters) -> None:
        self._vocab = cast("Vocabulary", _Ids(sizes.vocab_size))  # of its parts that are asked for
        self._model = serve.Model(sizes, params, self._vocab, None, "bench")
        self.idle = 0.0
        tasks = (ad.take(lora, [task]) for task in range(lora.num_tasks))
        self._adapters = [serve.Adapter(jax.tree.map(np.asarray, one), {}) for one in tasks]

    def __call__(self, work: Work) -> list[list[int]]:
        texts = (" ".join(map(str, ids[:-1])) for ids in work.ids)
        rows = [
            (i, text, self._adapters[task])
            for i, (text, task) in enumerate(zip(texts, work.tasks, strict=True))
        ]
        options = serve.Options(batch=work.batch, max_decode_length=work.steps)
        report = serve.Report()
        made = dict(self._model.answers(rows, options, report))
        self.idle = report.work.idle
        return [_answer(self._vocab.encode(made[i])) for i in range(len(rows))]


class _Theirs:
    def __init__(self, sizes: t5.T5Config, params: Any, lora: ad.Adapters) -> None:
        import torch
        from peft import PeftModel
        from transformers import T5ForConditionalGeneration

        self._torch, self.idle = torch, 0.0
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers 5, about peft
            weights.save_hf(f"{folder}/t5", sizes, jax.tree.map(np.asarray, params))
            model = T5ForConditionalGeneration.from_pretrained(f"{folder}/t5")
            for task in range(lora.num_tasks):
                path = export.export_peft(f"{folder}/{task}", lora, sizes, f"{folder}/t5", task)
                if task:
                    model.load_adapter(path, adapter_name=str(task))
                else:
                    model = PeftModel.from_pretrained(model, path, adapter_name="0")
        self._model = model.eval()

    def __call__(self, work: Work) -> list[list[int]]:
        order = sorted(range(len(work.ids)), key=lambda i: len(work.ids[i]))
        made: dict[int, list[int]] = {}
        places = 0
        for first in range(0, len(order), work.batch):
            numbers = order[first : first + work.batch]
            ids = self._decode(
                [work.ids[i] for i in numbers], [work.tasks[i] for i in numbers], work
            )
            made |= {i: _answer(row) for i, row in zip(numbers, ids.tolist(), strict=True)}
            places += ids.size
        self.idle = 1 - sum(map(len, made.values())) / places
        return [made[i] for i in range(len(order))]

    def _decode(self, rows: list[list[int]], tasks: list[int], work: Work) -> np.ndarray:
        padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row)] = row
        ids = self._torch.from_numpy(padded)
        # Without names peft takes the active adapter for all rows, which costs it less.
        mixed = {"adapter_names": [str(t) for t in tasks]} if any(work.tasks) else {}
        with self._torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = self._model.generate(
                input_ids=ids,
                attention_mask=(ids > 0).long(),
                max_new_tokens=work.steps,
                do_sample=False,
                num_beams=1,
                **mixed,
            )
        return made[:, 1:].numpy()
