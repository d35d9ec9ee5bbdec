"""What generated adapters are like: how large, of what rank, and how alike those of two tasks.

Each adapter is taken as the matrices that it adds to what the frozen backbone does, so that numbers
do not hang on how a matrix is factored:

* LoRA: ``[a b; bias] * alpha / R``, what is added to a projection (its bias as one more row);
* bottleneck: ``down up``, what it would add without its activation and biases;
* prefix: its keys and its values, [P, H*K] each; memory: its states [M, D]; masked rows are zero.

Shapes: N layers, T tasks, and [X, Y] the matrix of a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hyper_t5 import adapters as ad

LARGEST = 4 * 2**30  # bytes of adapters in memory at once
Array = np.ndarray


class Effect(NamedTuple):
    """The matrices ``left @ right`` of one place; left is None where right is the whole.

    Attributes:
        place: site and part, as "dec_self.query" or "enc_self.prefix.key".
        left: [N, T, X, R] or None.
        right: [N, T, R, Y], or [N, T, X, Y].
    """

    place: str
    left: Array | None
    right: Array


def effects(adapters: ad.Adapters) -> Iterator[Effect]:
    """What the adapters of T tasks add, place by place, in float32."""
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
    """The factors of ``[a b; bias] * scale``."""
    a, b = leaf["a"] * scale, leaf["b"]
    if "bias" not in leaf:
        return a, b
    left = np.pad(a, ((0, 0), (0, 0), (0, 1), (0, 1)))
    left[..., -1, -1] = scale
    return left, np.concatenate([b, leaf["bias"][:, :, None]], 2)


def singular_values(effect: Effect) -> Array:
    """Of each matrix, the largest first: [N, T, min(X, R, Y)]; no [X, Y] is made of factors."""
    if effect.left is not None:
        left = np.linalg.qr(effect.left, mode="r")
        right = np.linalg.qr(np.swapaxes(effect.right, 2, 3), mode="r")
        return np.linalg.svd(left @ np.swapaxes(right, 2, 3), compute_uv=False)
    wide = effect.right.astype(np.float64)
    if wide.shape[2] > wide.shape[3]:
        wide = np.swapaxes(wide, 2, 3)
    # Of a prefix of hundreds of positions many times faster than its own decomposition.
    squares = np.linalg.eigvalsh(wide @ np.swapaxes(wide, 2, 3))[..., ::-1]
    return np.sqrt(np.maximum(squares, 0))


def effective_rank(values: Array) -> Array:
    """exp of the entropy of singular values [..., R] as shares (Roy & Vetterli 2007); 0 of 0."""
    total = values.sum(-1, keepdims=True)
    share = values / np.where(total, total, 1)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def inner_products(effect: Effect) -> Array:
    """Of the matrices of every two tasks, summed over layers: float64 [T, T]."""
    made = np.zeros((effect.right.shape[1],) * 2)
    for n, right in enumerate(effect.right):
        if effect.left is None:
            flat = right.reshape(len(right), -1)
            made += flat @ flat.T
            continue
        left = effect.left[n]
        for t in range(len(right)):  # <l r, l' r'> is the sum of (l.T l') * (r r'.T)
            ours = np.einsum("xr,sxq->srq", left[t], left, optimize=True)
            made[t] += (ours * np.einsum("ry,sqy->srq", right[t], right, optimize=True)).sum((1, 2))
    return made


def cosines(products: Array) -> Array:
    """Of inner products [T, T]; 0 where one of the two is nothing."""
    size = np.sqrt(np.maximum(products.diagonal(), 0))
    size = np.where(size > 1e-6 * size.max(initial=0), size, np.inf)
    return products / size / size[:, None]


def centred(products: Array) -> Array:
    """Inner products [T, T] of what is left when the mean of all tasks is taken from each."""
    without = products - products.mean(0)
    without -= without.mean(1, keepdims=True)
    # Equal adapters leave nothing but rounding.
    noise = 1e-6 * products.diagonal().mean()
    return np.where(without.diagonal().mean() > noise, without, 0.0)


def statistics(adapters: ad.Adapters, tasks: Sequence[str]) -> dict[str, Any]:
    """Sizes, ranks and likeness of the adapters of ``tasks``, as JSON can hold them.

    Returns:
        tasks: their names; norms: of all of each one's matrices together [T];
        places: {place: {"norm": a layer's, the mean over tasks [N]; "effective_rank": the same,
            "rank": the largest it could be}};
        similarity: cosines of every two tasks [T, T]; similarity_centred: of what differs from the
            tasks' mean; differing: the share of the squared norm that does, 0 where all tasks get
            the same adapter and the text is ignored.
    """
    products, places = np.zeros((len(tasks),) * 2), {}
    for effect in effects(adapters):
        values = singular_values(effect)
        places[effect.place] = {
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


def of_tasks(
    generate: Callable[[int], ad.Adapters], tasks: Sequence[str], largest: int = LARGEST
) -> dict[str, Any]:
    """`statistics` of what is generated for the tasks, one after the other.

    Of so many, evenly chosen, as take ``largest`` bytes together; two at the least.
    """
    first = jax.device_get(generate(0))
    size = sum(x.nbytes for x in jax.tree.leaves(first))
    count = min(len(tasks), max(2, largest // max(size, 1)))
    chosen = np.linspace(0, len(tasks) - 1, count).round().astype(int).tolist()
    made = [jax.device_get(generate(i)) if i else first for i in chosen]
    tree = jax.tree.map(lambda *x: np.concatenate(x, 1), *(one.tree for one in made))
    return statistics(ad.Adapters(tree, first.spec), [tasks[i] for i in chosen])
