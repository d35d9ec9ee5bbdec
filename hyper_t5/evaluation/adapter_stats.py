"""Statistics of generated adapters: norms, effective ranks, similarity between tasks.

Each adapter is represented by the matrices that it adds to the frozen backbone, so that numbers do
not depend on how a matrix is factored:

* LoRA: ``[a b; bias] * alpha / R``, the update of a projection (its bias as one more row);
* bottleneck: ``down up``, without activation and biases;
* prefix: its keys and its values, [P, H*K] each; memory: its states [M, D]; masked rows are zero.

Shapes: N layers, T tasks, and [X, Y] the matrix that is added at a site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hyper_t5 import adapters as ad

LARGEST = 4 * 2**30  # bytes of sampled adapters
Array = np.ndarray


class Effect(NamedTuple):
    """Added matrices ``left @ right``, or ``right`` where left is None.

    Attributes:
      name: site and part, as "dec_self.query" or "enc_self.prefix.key".
      left: [N, T, X, R] or None.
      right: [N, T, R, Y], or [N, T, X, Y].
    """

    name: str
    left: Array | None
    right: Array


def effects(adapters: ad.Adapters) -> Iterator[Effect]:
    """Yield the matrices that adapters of T tasks add, in float32, by site and part."""
    tree = jax.tree.map(lambda x: np.asarray(x, None if x.dtype == bool else np.float32), adapters)
    for site, parts in tree.tree.items():
        if site == ad.MEMORY:
            yield Effect(site, None, _visible(parts["states"], parts["mask"]))
            continue
        for part, leaf in parts.items():
            if part == "prefix":
                for name in ("key", "value"):
                    rows = leaf[name].reshape(*leaf[name].shape[:3], -1)
                    yield Effect(f"{site}.prefix.{name}", None, _visible(rows, leaf.get("mask")))
            elif part == "bottleneck":
                yield Effect(f"{site}.bottleneck", leaf["down"], leaf["up"])
            else:
                assert adapters.spec.lora is not None
                target = f"{site}.{part}"
                yield Effect(target, *_lora(leaf, adapters.spec.lora.scale_of(target)))


def _visible(rows: Array, mask: Array | None) -> Array:
    return rows if mask is None else rows * mask[..., None]


def _lora(leaf: dict[str, Array], scale: float) -> tuple[Array, Array]:
    """Return the factors of ``[a b; bias] * scale``."""
    a, b = leaf["a"] * scale, leaf["b"]
    if "bias" not in leaf:
        return a, b
    left = np.pad(a, ((0, 0), (0, 0), (0, 1), (0, 1)))
    left[..., -1, -1] = scale
    return left, np.concatenate([b, leaf["bias"][:, :, None]], 2)


def singular_values(effect: Effect) -> Array:
    """Return singular values, descending, [N, T, min(X, R, Y)]; factors are not multiplied out."""
    if effect.left is not None:
        left = np.linalg.qr(effect.left, mode="r")
        right = np.linalg.qr(np.swapaxes(effect.right, 2, 3), mode="r")
        return np.linalg.svd(left @ np.swapaxes(right, 2, 3), compute_uv=False)
    wide = effect.right.astype(np.float64)
    if wide.shape[2] > wide.shape[3]:
        wide = np.swapaxes(wide, 2, 3)
    # For a prefix of hundreds of positions many times faster than an SVD.
    squares = np.linalg.eigvalsh(wide @ np.swapaxes(wide, 2, 3))[..., ::-1]
    return np.sqrt(np.maximum(squares, 0))


def effective_rank(values: Array) -> Array:
    """Return exp(entropy of normalized singular values [..., R]) (Roy & Vetterli 2007); 0 for 0."""
    total = values.sum(-1, keepdims=True)
    share = values / np.where(total, total, 1)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def inner_products(effect: Effect) -> Array:
    """Return inner products of every two tasks' matrices, summed over layers: float64 [T, T]."""
    products = np.zeros((effect.right.shape[1],) * 2)
    for n, right in enumerate(effect.right):
        if effect.left is None:
            flat = right.reshape(len(right), -1)
            products += flat @ flat.T
            continue
        left = effect.left[n]
        for t in range(len(right)):  # <l r, l' r'> is the sum of (l.T l') * (r r'.T)
            left_products = np.einsum("xr,sxq->srq", left[t], left, optimize=True)
            right_products = np.einsum("ry,sqy->srq", right[t], right, optimize=True)
            products[t] += (left_products * right_products).sum((1, 2))
    return products


def cosines(products: Array) -> Array:
    """Return cosines from inner products [T, T]; 0 where one of the two is zero."""
    size = np.sqrt(np.maximum(products.diagonal(), 0))
    size = np.where(size > 1e-6 * size.max(initial=0), size, np.inf)
    return products / size / size[:, None]


def centred(products: Array) -> Array:
    """Return inner products [T, T] after subtracting the mean over tasks."""
    without = products - products.mean(0)
    without -= without.mean(1, keepdims=True)
    # Equal adapters leave only rounding errors.
    noise = 1e-6 * products.diagonal().mean()
    return np.where(without.diagonal().mean() > noise, without, 0.0)


def statistics(adapters: ad.Adapters, tasks: Sequence[str]) -> dict[str, Any]:
    """Compute sizes, ranks and similarity of the adapters of ``tasks``, as JSON values.

    Returns:
      ``tasks``: their names. ``norms`` [T]: of all matrices of a task. ``places``: {`Effect`
      name: {"norm" [N]: per layer, mean over tasks; "effective_rank" [N]; "rank": its maximum}}.
      ``similarity`` [T, T]: cosines. ``similarity_centred``: after subtracting the mean over tasks.
      ``differing``: the share of the squared norm that differs from that mean; 0 where all tasks
      have the same adapter and the text is ignored.
    """
    products, places = np.zeros((len(tasks),) * 2), {}
    for effect in effects(adapters):
        values = singular_values(effect)
        places[effect.name] = {
            "norm": np.sqrt(np.square(values).sum(-1)).mean(1).tolist(),
            "effective_rank": effective_rank(values).mean(1).tolist(),
            "rank": values.shape[-1],
        }
        products += inner_products(effect)
    rest, total = centred(products), products.trace()
    return {
        "tasks": list(tasks),
        "norms": np.sqrt(np.maximum(products.diagonal(), 0)).tolist(),
        "places": places,
        "similarity": cosines(products).round(6).tolist(),
        "similarity_centred": cosines(rest).round(6).tolist(),
        "differing": float(rest.trace() / total) if total else 0.0,
    }


def sample(tasks: int, size: int, largest: int = LARGEST) -> list[int]:
    """Return evenly spaced indices of as many tasks as take ``largest`` bytes, at least two.

    Args:
      tasks: the number of tasks.
      size: bytes of one task's adapters.
      largest: bytes of all sampled adapters.
    """
    count = min(tasks, max(2, largest // max(size, 1)))
    return np.linspace(0, tasks - 1, count).round().astype(int).tolist()
