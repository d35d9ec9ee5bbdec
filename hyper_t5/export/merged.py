"""A backbone with one task's LoRA added to its weights."""

from __future__ import annotations

import numpy as np
from flax import traverse_util

from hyper_t5.adapters import Adapters, AdapterSpec
from hyper_t5.errors import UserError
from hyper_t5.export.peft_names import kernel_path
from hyper_t5.names import Params


def merge_lora(params: Params, adapters: Adapters, task: int = 0, dtype: str = "") -> Params:
    """The backbone with one task's LoRA added to its kernels; `params` stay as they are.

    Args:
      params: a backbone, layers stacked (see `names.param_shapes`).
      adapters: LoRA only; leaves `[N, T, ...]`.
      task: which of the T tasks.
      dtype: of all arrays returned; '' keeps each one's own. Where that is bfloat16, what rounding
        takes from the update is printed: it has 8 bits, and a small update can fall below them.

    Raises:
      UserError: prefixes or biases, which a T5 has no parameters for; no such task.
    """
    lora = adapters.spec.lora
    if lora is None or adapters.spec != AdapterSpec(lora=lora):
        raise UserError(
            "merge: only LoRA is a change of the weights; prefixes, bottleneck adapters and memory"
            " cannot be merged into a T5; keep them as an adapter folder"
        )
    check_task(adapters, task)
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    lost: dict[str, float] = {}
    for target in lora.targets:
        delta = _update(adapters, target, task)  # [N, in, out]
        path = kernel_path(target)
        kernel = np.asarray(flat[path])
        if delta.shape != kernel.shape:
            raise UserError(
                f"merge: {target} gives {list(delta.shape)}, the backbone's {path} is"
                f" {list(kernel.shape)}; use the backbone the adapters were made for"
            )
        exact = kernel.astype(np.float32) + delta
        flat[path] = exact.astype(dtype or kernel.dtype)
        off = float(np.linalg.norm(flat[path].astype(np.float32) - exact))
        lost[target] = off / float(np.linalg.norm(delta)) if off and delta.any() else 0.0
    worst = max(lost, key=lambda target: lost[target])
    if lost[worst] > 0.01:
        print(
            f"merge: rounding to {flat[kernel_path(worst)].dtype} changes the update of {worst} by "
            f"{lost[worst]:.0%}, the most of all; --dtype float32 keeps it",
            flush=True,
        )
    if dtype:
        flat = {path: np.asarray(leaf).astype(dtype, copy=False) for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def _update(adapters: Adapters, target: str, task: int) -> np.ndarray:
    """What a target's LoRA adds to its kernels: float32 [N, in, out]."""
    lora = adapters.spec.lora
    assert lora
    site, _, projection = target.partition(".")
    leaf = adapters.tree[site][projection]
    if "bias" in leaf and np.any(np.asarray(leaf["bias"][:, task])):
        raise UserError(
            f"merge: {target} has a LoRA bias, and T5's projections have none to add it to;"
            " export with --format=peft, or train with adapter.lora_bias=False"
        )
    a, b = (np.asarray(leaf[name][:, task], np.float32) for name in ("a", "b"))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"merge: {target} of task {task} has non-finite numbers")
    return lora.scale_of(target) * np.matmul(a, b)


def check_task(adapters: Adapters, task: int) -> None:
    """UserError where the adapters have no such task."""
    if not 0 <= task < adapters.num_tasks:
        raise UserError(
            f"export: there is no task {task}; the adapters hold {adapters.num_tasks} (from 0)"
        )
