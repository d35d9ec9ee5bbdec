"""Benchmarks against Hugging Face's T5 in PyTorch and peft: same weights and cores, on CPU."""

from __future__ import annotations

import functools
import importlib.util
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyper_t5 import adapters as ad
from hyper_t5 import export, runs, t5, weights
from hyper_t5.bench import Options, measure, steps
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.inference import predictor
from hyper_t5.t5.decoding import decode

OURS, PYTORCH = "hyper_t5", "PyTorch"
REQUIRED = ("torch", "transformers", "peft")
FORWARD, DECODING = "forward", "greedy decoding"
RANK, ALPHA, LEARNING_RATE = 8, 16.0, 1e-3
TASKS, PREDICT_RANK = 8, 16
# Deciles of the input lengths, EOS included, in Super-NaturalInstructions' official test tasks
# (T5's vocabulary). Outputs have 9 tokens on average; half have 3 or fewer, 5 % have 28 or more.
INPUT_LENGTHS = (11, 14, 20, 28, 35, 43, 62, 86, 124, 252)
EOS_SCALE = 5.0  # of the EOS logit; a random network's outputs then end by themselves, most early

Arms = dict[str, Callable[[], Any]]
Predict = Callable[[list[int]], list[list[int]]]  # tasks of all inputs -> output ids up to EOS


def torch(options: Options, result: measure.Result) -> None:
    """Compare our T5 with Hugging Face's T5 in PyTorch, float32."""
    if not _set_up_torch(result):
        return
    size, length, rounds, shapes = "small", 32, 5, steps.Shapes(1, 8, 1, 256, 64)
    if options.tiny:
        size, length, rounds, shapes = "tiny", 4, 2, steps.Shapes(1, 4, 1, 16, 8)
    sizes = t5.preset(size, scan_unroll=8)  # PyTorch does not loop over layers either
    backbone = steps.random_backbone(sizes)
    batch = steps.random_batch(shapes, sizes.vocab_size)
    ours = _our_arms(sizes, backbone, batch, shapes, length)
    theirs = _torch_arms(sizes, backbone, batch, length)
    logits, expected = ours[FORWARD](), theirs[FORWARD]()
    error = float(np.max(np.abs(logits - expected)) / np.max(np.abs(expected)))
    if error > 1e-3:
        raise RuntimeError(f"logits differ by {error} of the largest")
    same = _check_same(ours[DECODING]().ravel(), theirs[DECODING]().ravel())
    result.notes += [
        f"T5 1.1 {size}, model.scan_unroll=8, no dropout; {shapes}",
        f"a step is loss, gradient and AdamW; the LoRA has rank {RANK} on every query and value; "
        f"decoding is the encoder and {length} tokens",
        f"logits agree within {error:.0e} of the largest, decoded ids in {same:.1%}",
    ]
    for quantity in ours:
        seconds = measure.time_arms(
            {OURS: ours[quantity], PYTORCH: theirs[quantity]}, rounds, warm_up=2
        )
        result.add(quantity, "s", seconds, PYTORCH)


def predict(options: Options, result: measure.Result) -> None:
    """Compare `predict` with transformers' `generate` and peft's LoRA, float32."""
    if not _set_up_torch(result):
        return
    size, rounds, batch, length = ("tiny", 2, 8, 8) if options.tiny else ("small", 3, 32, 64)
    sizes = t5.preset(size)
    backbone, lora = steps.random_backbone(sizes), _random_lora(sizes)
    logits = backbone["decoder"]["logits_dense"]
    logits["kernel"] = logits["kernel"].at[:, EOS_ID].multiply(EOS_SCALE)
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.resize(INPUT_LENGTHS, 3 * batch))
    lengths = lengths // 8 + 2 if options.tiny else lengths
    ids = [steps.random_ids(sizes.vocab_size, n, seed=i).tolist() for i, n in enumerate(lengths)]
    result.notes.append(
        f"T5 1.1 {size}, LoRA of rank {PREDICT_RANK} on every query and value; {len(ids)} inputs "
        f"of real lengths, batches of {batch}; tokens count up to EOS, at most {length}"
    )
    arms = {
        OURS: _our_predictor(sizes, backbone, lora, ids, batch, length),
        PYTORCH: _peft_predictor(sizes, backbone, lora, ids, batch, length),
    }
    for quantity, count in {"one task": 1, f"{TASKS} mixed tasks": TASKS}.items():
        tasks = (rng.permutation(len(ids)) % count).tolist()
        calls = {name: functools.partial(arm, tasks) for name, arm in arms.items()}
        outputs = {name: call() for name, call in calls.items()}  # also the warm-up
        same = _check_same(*outputs.values())
        tokens = {name: sum(map(len, rows)) for name, rows in outputs.items()}
        seconds = measure.time_arms(calls, rounds, warm_up=0)
        result.add(quantity, "tokens/s", seconds, PYTORCH, tokens)
        result.notes.append(f"{quantity}: {same:.1%} of the outputs are the same")


def _set_up_torch(result: measure.Result) -> bool:
    """Note the versions and silence transformers; return False if a package is missing."""
    if missing := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
        result.skipped = f"{', '.join(missing)} not installed; pip install {' '.join(REQUIRED)}"
        return False
    import torch
    import transformers

    warnings.simplefilter("ignore")  # in this process, of libraries about each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    result.notes.append(f"{versions} on {torch.get_num_threads()} threads")
    return True


def _check_same(outputs: Iterable[Any], expected: Iterable[Any]) -> float:
    """Return the share of equal items; raise RuntimeError if it is below 90 %."""
    same = float(np.mean([a == b for a, b in zip(outputs, expected, strict=True)]))
    if same < 0.9:  # near ties are decided by rounding, and change all tokens after them
        raise RuntimeError(f"only {same:.1%} of the outputs are the same")
    return same


# ------------------------------------------------------------------------------------------ torch


def _our_arms(
    sizes: t5.T5Config, backbone: Any, batch: Any, shapes: steps.Shapes, length: int
) -> Arms:
    inputs, targets = jnp.asarray(batch["inputs"][0]), jnp.asarray(batch["targets"][0])

    @jax.jit
    def forward(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return t5.T5(sizes).apply({"params": params}, inputs, targets)

    def step(system: str, **fields: Any) -> steps.TrainingStep:
        fields |= {"train__z_loss": 0.0, "optimizer__clip_norm": 0.0}
        fields["optimizer__learning_rate"] = LEARNING_RATE
        config = steps.make_config(system, shapes, **fields)
        return steps.TrainingStep(config, sizes, backbone, batch)

    lora = {
        "adapter__lora_rank": RANK,
        "adapter__lora_alpha": ALPHA,
        "adapter__lora_targets": ad.targets_of(ad.ATTENTION_SITES, sizes, ("query", "value")),
    }
    return {
        FORWARD: lambda: np.asarray(forward(backbone, inputs, targets)),
        DECODING: lambda: np.asarray(decode(sizes, backbone, inputs, steps=length, eos_id=-1)[0]),
        "training step": step("concat"),
        "LoRA step": step("shared_lora", **lora),
    }


def _torch_arms(sizes: t5.T5Config, backbone: Any, batch: Any, length: int) -> Arms:
    import peft
    import torch

    inputs = torch.tensor(batch["inputs"][0], dtype=torch.long)
    labels = torch.tensor(batch["targets"][0], dtype=torch.long)
    shifted = torch.nn.functional.pad(labels, (1, 0))[:, :-1]
    encoder = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    with tempfile.TemporaryDirectory() as folder:
        model, full, base = (_hf_model(folder, sizes, backbone) for _ in range(3))
    lora = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=RANK, lora_alpha=int(ALPHA), target_modules=["q", "v"]
    )

    def forward() -> np.ndarray:
        with torch.inference_mode():
            return model(**encoder, decoder_input_ids=shifted).logits.numpy()

    def step(trained: Any) -> Callable[[], float]:
        trained.train()
        parameters = [p for p in trained.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True)

        def run() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = trained(**encoder, labels=labels).loss
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return run

    return {
        FORWARD: forward,
        DECODING: lambda: _generate(model, length, eos_token_id=None, **encoder),
        "training step": step(full),
        "LoRA step": step(peft.get_peft_model(base, lora)),
    }


def _hf_model(folder: str, sizes: t5.T5Config, params: Any) -> Any:
    """Load parameters into transformers, without dropout, through a folder."""
    from transformers import T5ForConditionalGeneration

    weights.save_hf(folder, sizes, jax.tree.map(np.asarray, params))
    return T5ForConditionalGeneration.from_pretrained(folder).eval()


def _generate(model: Any, length: int, **arguments: Any) -> np.ndarray:
    """Decode greedily with transformers; return ids without the start token."""
    import torch

    with torch.inference_mode():
        ids = model.generate(max_new_tokens=length, do_sample=False, num_beams=1, **arguments)
    return ids[:, 1:].numpy()


# ---------------------------------------------------------------------------------------- predict


def _random_lora(sizes: t5.T5Config) -> ad.Adapters:
    """Draw a LoRA for each task, about as large as the query that it is added to.

    With larger ones attention is so sharp that rounding decides the output.
    """
    targets = ad.targets_of(ad.ATTENTION_SITES, sizes, ("query", "value"))
    zeros = ad.zeros(ad.AdapterSpec(lora=ad.LoraSpec(targets, PREDICT_RANK, 2.0)), sizes, TASKS)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * x.shape[-2] ** -0.5).astype(np.float32), zeros
    )


class _NumberVocabulary:
    """Vocabulary whose text is ids in decimal: nearly free, and lossless."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in re.findall(r"\d+", text)] for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))


def _our_predictor(
    sizes: t5.T5Config,
    params: Any,
    lora: ad.Adapters,
    ids: list[list[int]],
    batch: int,
    length: int,
) -> Predict:
    vocab: Any = _NumberVocabulary()
    model = predictor.Predictor(runs.Backbone(sizes, params, vocab, "bench"))
    texts = [vocab.decode(row[:-1]) for row in ids]
    each = [jax.tree.map(np.asarray, ad.take(lora, [task])) for task in range(TASKS)]
    adapters = [predictor.Adapter(task, {}) for task in each]

    def predict(tasks: list[int]) -> list[list[int]]:
        mixed = [adapters[task] for task in tasks]
        outputs = model.predict(texts, mixed, batch=batch, max_decode_length=length)
        return list(map(_until_eos, vocab.encode_batch(outputs)))

    return predict


def _peft_predictor(
    sizes: t5.T5Config,
    params: Any,
    lora: ad.Adapters,
    ids: list[list[int]],
    batch: int,
    length: int,
) -> Predict:
    import torch
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        model = _hf_model(f"{folder}/t5", sizes, params)
        for task in range(TASKS):
            path = export.export_peft(f"{folder}/{task}", lora, sizes, f"{folder}/t5", task)
            if task:
                model.load_adapter(path, adapter_name=str(task))
            else:
                model = PeftModel.from_pretrained(model, path, adapter_name="0")
    model.eval()
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))

    def predict(tasks: list[int]) -> list[list[int]]:
        outputs: dict[int, list[int]] = {}
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            tensors = [torch.tensor(ids[row]) for row in rows]
            inputs = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
            arguments = {"input_ids": inputs, "attention_mask": (inputs > 0).long()}
            if any(tasks):  # without names peft applies one adapter, which is faster
                arguments["adapter_names"] = [str(tasks[row]) for row in rows]
            generated = _generate(model, length, **arguments).tolist()
            outputs |= zip(rows, map(_until_eos, generated), strict=True)
        return [outputs[row] for row in range(len(ids))]

    return predict


def _until_eos(ids: list[int]) -> list[int]:
    """Return the ids up to EOS, which is included."""
    return ids[: ids.index(EOS_ID) + 1] if EOS_ID in ids else ids
