"""Hyperdecoders (Ivison & Peters 2022): adapters for each input, generated from its encoding.

The frozen backbone's encoder, with learned adapters, reads the input; the mean of its states goes
through an MLP; one generator for all layers emits the bottleneck adapters of the decoder for that
input. The decoder memory is the same encoding: nothing is encoded twice, and adapters are generated
once for all decoding steps.

The options ``encoder`` and ``decoder`` name the origin of their adapters: ``learned`` (shared by
all tasks), ``generated``, ``per_task`` (learned for each), ``none``. An encoder with generated
adapters encodes twice: with learned adapters, then with those generated from that encoding.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.hypermodels.learned import Learned
from hyper_t5.hypermodels.parts import specs
from hyper_t5.hypermodels.parts.heads import dense
from hyper_t5.hypermodels.parts.readers import mean_pool
from hyper_t5.t5 import T5, T5Config
from hyper_t5.utils.overrides import choose

Array = jax.Array
SOURCES = ("learned", "generated", "per_task", "none")
SITES = {"encoder": "enc_mlp", "decoder": "dec_mlp"}
OPTIONS = {
    "encoder": "learned",
    "decoder": "generated",
    "generator_size": 128,  # the generator's hidden width
    "pooled_mlp": True,  # an MLP between mean and generator
}


def build(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """Build it; ``adapter.bottleneck_sizes`` are those of encoder and decoder."""
    options, spec = config.hyperdecoder, specs.bottleneck(config)
    for stack in SITES:
        choose(f"hyperdecoder.{stack}", options[stack], SOURCES)
    per_task = "per_task" in (options.encoder, options.decoder)
    slots = specs.task_slots(config) if per_task else 0
    return Hyperdecoder(sizes, spec, task_slots=slots, **options.to_dict())


class Generator(nn.Module):
    """One vector per input, [B, D] -> bottleneck adapters of all layers of a stack.

    Initialized at 1e-3 of hyperfan-in: generated weights are as large as weights initialized by
    their own fan-in at a thousandth of the usual scale.
    """

    config: T5Config
    shapes: dict[str, tuple[int, ...]]  # of the leaves, [N, B, ...]
    width: int

    @nn.compact
    def __call__(self, features: Array) -> dict[str, Array]:
        """Map features [B, D] to the leaves."""
        n, b = self.shapes["down"][:2]
        normal = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("layers", None))
        layer = self.param("layer_embedding", normal, (n, 10), jnp.float32).astype(features.dtype)
        x = jnp.concatenate(
            [
                jnp.broadcast_to(features, (n, *features.shape)),
                jnp.broadcast_to(layer[:, None], (n, b, layer.shape[-1])),
            ],
            -1,
        )
        x = nn.relu(_dense(self.width, self.config, 1 / 3, "hidden")(x))
        leaves = {}
        for name, shape in self.shapes.items():
            fan_in = shape[-2] if name in ("down", "up") else 1
            leaves[name] = _dense(math.prod(shape[2:]), self.config, 1e-6 / fan_in, name)(
                x
            ).reshape(shape)
        return leaves


def _dense(features: int, config: T5Config, scale: float, name: str) -> nn.Dense:
    """Return a dense layer with uniform weights of variance ``scale / fan_in`` and zero bias."""
    init = nn.initializers.variance_scaling(scale, "fan_in", "uniform")
    return dense(features, config, ("embed", "mlp"), init, name)


class Hyperdecoder(nn.Module):
    """Input ids [B, L] and task numbers [B] -> decoder adapters and memory of L positions."""

    config: T5Config
    spec: ad.BottleneckSpec
    encoder: str = "learned"
    decoder: str = "generated"
    generator_size: int = 128
    pooled_mlp: bool = True
    task_slots: int = 0

    @nn.compact
    def __call__(self, ids: Array, tasks: Array, deterministic: bool = True) -> ad.Adapters:
        backbone, mask = T5(self.config, name="backbone"), ids > 0

        def encode(adapters: ad.Adapters | None) -> Array:
            return backbone.encode(ids, adapters, deterministic=deterministic)

        first = "learned" if self.encoder == "generated" else self.encoder
        states = encode(self._adapters("encoder", first, ids, tasks))
        if self.encoder == "generated":
            pooled = mean_pool(states, mask)
            states = encode(self._adapters("encoder", "generated", ids, tasks, pooled))
        pooled = mean_pool(states, mask)
        adapters = self._adapters("decoder", self.decoder, ids, tasks, pooled)
        tree = {} if adapters is None else dict(adapters.tree)
        tree[ad.MEMORY] = {"states": states[None], "mask": mask[None]}
        spec = ad.AdapterSpec() if adapters is None else adapters.spec
        return ad.Adapters(tree, dataclasses.replace(spec, memory=ids.shape[1]))

    def _adapters(
        self, stack: str, source: str, ids: Array, tasks: Array, pooled: Array | None = None
    ) -> ad.Adapters | None:
        """Return a stack's adapters for B inputs (one set where the encoder's are learned)."""
        site = SITES[stack]
        if source == "none" or site not in self.spec.sites:
            return None
        sizes = (self.spec.sizes[self.spec.sites.index(site)],)
        spec = ad.AdapterSpec(bottleneck=dataclasses.replace(self.spec, sites=(site,), sizes=sizes))
        if source != "generated":
            slots = self.task_slots if source == "per_task" else 0
            if stack == "encoder" and not slots:
                ids, tasks = ids[:1], tasks[:1]
            return Learned(self.config, spec, slots, name=f"{stack}_adapters")(ids, tasks)
        assert pooled is not None
        if self.pooled_mlp:
            width = pooled.shape[-1]
            hidden = _dense(width, self.config, 1 / 3, f"{stack}_mlp_in")(pooled)
            pooled = _dense(width, self.config, 1 / 3, f"{stack}_mlp_out")(nn.relu(hidden))
        shapes = ad.shapes(spec, self.config, len(ids))[site]["bottleneck"]
        generator = Generator(self.config, shapes, self.generator_size, name=f"{stack}_generator")
        return ad.Adapters({site: {"bottleneck": generator(pooled)}}, spec)
