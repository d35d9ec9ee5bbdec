"""Benchmark against Hugging Face's PyTorch T5 and peft, on the same weights and inputs, on CPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyper_t5 import decoding, losses, t5, weights
from hyper_t5.bench import Options, measure
from hyper_t5.bench.steps import Shapes, TrainingStep, make_config, random_backbone, random_batch

Arms = dict[str, Callable[[], Any]]
OURS, THEIRS = "hyper_t5", "PyTorch"
NEEDED = ("torch", "transformers", "peft")
RANK, ALPHA, RATE = 8, 16.0, 1e-3


def torch(options: Options) -> measure.Result:
    """Forward, gradient, training step, LoRA step and greedy decoding, both on the same cores.

    Raises RuntimeError when the two do not compute the same thing.
    """
    title = "our T5 against Hugging Face's in PyTorch, float32"
    if absent := missing():
        return measure.Result("torch", title, [], skipped=absent)
    # PyTorch has no loop over layers either.
    sizes = t5.preset("tiny" if options.tiny else "small", scan_unroll=8)
    shapes = Shapes(1, 4, 1, 16, 8) if options.tiny else Shapes(1, 8, 1, 256, 64)
    steps = 4 if options.tiny else 32
    backbone, batch = random_backbone(sizes), random_batch(shapes, sizes.vocab_size)
    theirs = _Theirs(sizes, backbone, batch)
    ours = _Ours(sizes, backbone, batch, shapes)
    agreement = _compare(ours, theirs, steps)
    note = f"{theirs.versions}; JAX {jax.__version__}"
    result = measure.Result(
        "torch",
        title,
        [
            f"{measure.machine()}; {note}",
            f"T5 1.1 {'tiny' if options.tiny else 'small'}, {shapes.rows} rows of "
            f"{shapes.inputs} + {shapes.targets} tokens without padding, no dropout, "
            "model.scan_unroll=8",
            "the steps are loss, gradient and AdamW; the LoRA step is peft's, rank "
            f"{RANK} on every query and value; decoding includes the encoder",
            agreement,
        ],
    )
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "forward": (ours.forward, theirs.forward),
        "forward and backward": (ours.gradient, theirs.gradient),
        f"greedy decoding, {steps} tokens": (
            functools.partial(ours.decode, steps),
            functools.partial(theirs.decode, steps),
        ),
        "training step": (ours.full_step(), theirs.full_step()),
        "LoRA step": (ours.lora_step(), theirs.lora_step()),
    }
    for what, (a, b) in pairs.items():
        seconds = measure.in_turns({OURS: a, THEIRS: b}, 2 if options.tiny else 5, warm_up=2)
        result.rows.append(measure.time_row(what, seconds, OURS, THEIRS))
    return result


def missing() -> str:
    """What of PyTorch's side is not installed, and the remedy; empty where all is."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed; pip install {' '.join(NEEDED)}" if absent else ""


def set_up() -> str:
    """Give PyTorch as many threads as there are cores; a line that says its versions."""
    import torch
    import transformers

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or 1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return (
        f"both on {threads} threads; torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )


def _compare(ours: _Ours, theirs: _Theirs, steps: int) -> str:
    """A line that says how far the two agree; RuntimeError where they do not."""
    a, b = ours.forward(), theirs.forward()
    logits = float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    same = float(np.mean(ours.decode(steps) == theirs.decode(steps)))
    if logits > 1e-3 or same < 0.9:  # in float32 a near tie may be decided either way
        raise RuntimeError(f"not the same network: logits differ by {logits}, {same} of ids agree")
    return f"logits agree within {logits:.0e} of the largest, decoded ids in {same:.1%}"


class _Ours:
    def __init__(self, sizes: t5.T5Config, backbone: Any, batch: Any, shapes: Shapes) -> None:
        self._sizes, self._shapes, self._backbone, self._batch = sizes, shapes, backbone, batch
        self._inputs = jnp.asarray(batch["inputs"][0])
        self._targets = jnp.asarray(batch["targets"][0])

        def logits(params: Any, inputs: Any, targets: Any) -> Any:
            return t5.T5(sizes).apply({"params": params}, inputs, targets)

        def loss(params: Any, inputs: Any, targets: Any) -> Any:
            made = logits(params, inputs, targets)
            sums = losses.token_loss(made, targets, targets > 0, z_loss=0.0)
            return sums["loss"] / sums["tokens"]

        self._logits, self._gradient = jax.jit(logits), jax.jit(jax.value_and_grad(loss))

    def forward(self) -> np.ndarray:
        return np.asarray(self._logits(self._backbone, self._inputs, self._targets))

    def gradient(self) -> Any:
        return jax.block_until_ready(self._gradient(self._backbone, self._inputs, self._targets))

    def decode(self, steps: int) -> np.ndarray:
        ids, _ = decoding.decode(self._sizes, self._backbone, self._inputs, steps=steps, eos_id=-1)
        return np.asarray(ids)

    def full_step(self) -> TrainingStep:
        return self._step("concat")

    def lora_step(self) -> TrainingStep:
        sites = ("enc_self", "dec_self", "dec_cross")
        targets = tuple(f"{site}.{name}" for site in sites for name in ("query", "value"))
        return self._step(
            "shared_lora",
            adapter__lora_rank=RANK,
            adapter__lora_alpha=ALPHA,
            adapter__lora_targets=targets,
        )

    def _step(self, system: str, **fields: Any) -> TrainingStep:
        config = make_config(
            system,
            self._shapes,
            train__z_loss=0.0,
            optimizer__clip_norm=0.0,
            optimizer__learning_rate=RATE,
            **fields,
        )
        return TrainingStep(config, self._sizes, self._backbone, self._batch)


class _Theirs:
    def __init__(self, sizes: t5.T5Config, backbone: Any, batch: Any) -> None:
        import torch

        self._torch, self.versions = torch, set_up()
        self._folder = tempfile.TemporaryDirectory()
        weights.save_hf(self._folder.name + "/t5", sizes, jax.tree.map(np.asarray, backbone))
        self._model = self._load()
        self._inputs = torch.tensor(batch["inputs"][0], dtype=torch.long)
        self._labels = torch.tensor(batch["targets"][0], dtype=torch.long)
        self._mask = torch.ones_like(self._inputs)

    def _load(self) -> Any:
        from transformers import T5ForConditionalGeneration

        return T5ForConditionalGeneration.from_pretrained(self._folder.name + "/t5").eval()

    def _loss(self, model: Any) -> Any:
        return model(input_ids=self._inputs, attention_mask=self._mask, labels=self._labels).loss

    def forward(self) -> np.ndarray:
        with self._torch.inference_mode():
            shifted = self._torch.nn.functional.pad(self._labels, (1, 0))[:, :-1]
            return self._model(
                input_ids=self._inputs, attention_mask=self._mask, decoder_input_ids=shifted
            ).logits.numpy()

    def gradient(self) -> None:
        self._model.zero_grad(set_to_none=True)
        self._loss(self._model).backward()

    def decode(self, steps: int) -> np.ndarray:
        with self._torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = self._model.generate(
                input_ids=self._inputs,
                attention_mask=self._mask,
                max_new_tokens=steps,
                do_sample=False,
                num_beams=1,
                eos_token_id=None,
            )
        return ids[:, 1:].numpy()

    def full_step(self) -> Callable[[], float]:
        return self._step(self._load())

    def lora_step(self) -> Callable[[], float]:
        import peft

        lora = peft.LoraConfig(
            task_type="SEQ_2_SEQ_LM",
            r=RANK,
            lora_alpha=int(ALPHA),
            lora_dropout=0.0,
            target_modules=["q", "v"],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers 5, about peft
            return self._step(peft.get_peft_model(self._load(), lora))

    def _step(self, model: Any) -> Callable[[], float]:
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = self._torch.optim.AdamW(trained, RATE, weight_decay=0.0, fused=True)

        def step() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(model)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step
