"""LoRA merged into the weights of the backbone."""

from __future__ import annotations

import numpy as np
from flax import traverse_util

from hyper_t5.adapters import Adapters, AdapterSpec
from hyper_t5.export.peft_names import kernel_path
from hyper_t5.utils.errors import UserError
from hyper_t5.weights.param_names import Params


def merge_lora(params: Params, adapters: Adapters, task: int = 0, dtype: str = "") -> Params:
    """Add one task's LoRA to the kernels of a backbone; `params` are not changed.

    Args:
      params: The backbone, layers stacked (see `param_names.param_shapes`).
      adapters: LoRA only; leaves `[N, T, ...]`.
      task: Index of the task.
      dtype: Of all returned arrays; empty keeps each array's own. In bfloat16 a small update is
        partly lost to rounding, and the loss is printed.

    Returns:
      The merged backbone.

    Raises:
      UserError: The adapters have prefixes or biases, for which T5 has no parameters, or no such
        task.
    """
    lora = adapters.spec.lora
    if lora is None or adapters.spec != AdapterSpec(lora=lora):
        raise UserError(
            "merge: only LoRA is an update of the weights; prefixes, bottleneck adapters and memory"
            " cannot be merged into a T5; keep them as an adapter folder"
        )
    check_task(adapters, task)
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    worst = (0.0, "")  # rounding error relative to the update, and its target
    for target in lora.targets:
        delta = _update(adapters, target, task)  # [N, in, out]
        path = kernel_path(target)
        kernel = np.asarray(flat[path])
        if delta.shape != kernel.shape:
            raise UserError(
                f"merge: {target} has an update of shape {list(delta.shape)}, the backbone's {path}"
                f" is {list(kernel.shape)}; use the backbone of the adapters"
            )
        exact = kernel.astype(np.float32) + delta
        flat[path] = exact.astype(dtype or kernel.dtype)
        error = float(np.linalg.norm(flat[path].astype(np.float32) - exact))
        if delta.any():
            worst = max(worst, (error / float(np.linalg.norm(delta)), target))
    error, target = worst
    if error > 0.01:
        print(
            f"merge: rounding to {flat[kernel_path(target)].dtype} changes the update of {target}"
            f" by {error:.0%}, the most of all targets; --dtype float32 avoids it",
            flush=True,
        )
    if dtype:
        flat = {path: np.asarray(leaf).astype(dtype, copy=False) for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def _update(adapters: Adapters, target: str, task: int) -> np.ndarray:
    """Compute the update of a target's kernels: float32 `[N, in, out]`."""
    lora = adapters.spec.lora
    assert lora
    site, _, projection = target.partition(".")
    leaf = adapters.tree[site][projection]
    if "bias" in leaf and np.any(np.asarray(leaf["bias"][:, task])):
        raise UserError(
            f"merge: {target} has a LoRA bias, and T5's projections have no bias to add it to;"
            " export with --format=peft, or train with adapter.lora_bias=False"
        )
    a, b = (np.asarray(leaf[name][:, task], np.float32) for name in ("a", "b"))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"merge: {target} of task {task} has non-finite values")
    return lora.scale_of(target) * np.matmul(a, b)


def check_task(adapters: Adapters, task: int) -> None:
    """Raise a UserError if the adapters have no such task."""
    if not 0 <= task < adapters.num_tasks:
        raise UserError(
            f"export: task {task} does not exist; the adapters have {adapters.num_tasks} (from 0)"
        )
