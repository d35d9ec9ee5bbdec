"""HyperT5: a T5 of the backbone's size reads the task and emits prefixes or LoRA.

HyperTuning (Phang et al. 2022), with two readers:

- ``decoder_queries``, the paper's: a bidirectional T5 decoder over learned queries; one MLP per
  tensor maps its output to adapters.
- ``layerwise``, ours: the encoder's keys and values of the text (or of gist tokens appended to it)
  are the encoder prefixes; its output, projected by the decoder's cross-attention, is the decoder
  prefix. Initialized from the backbone it is that backbone reading the text, before any training.
  LoRA heads read the states of the same encoder.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.hypermodels.parts import specs
from hyper_t5.hypermodels.parts.heads import LoraHeads, PrefixHeads
from hyper_t5.hypermodels.parts.readers import (
    CrossKeysValues,
    LayerFeatures,
    LayerwiseReader,
    QueryReader,
)
from hyper_t5.t5 import T5Config
from hyper_t5.utils.errors import UserError

Array = jax.Array


def hyper_prefix(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """Build HyperT5-Prefix."""
    h, length = config.hypermodel, 0
    if h.reader == "layerwise":
        if "dec_self" in config.adapter.prefix_sites:
            raise UserError(
                "adapter.prefix_sites: hypermodel.reader=layerwise has no keys and values for "
                "dec_self; remove it, or set hypermodel.reader to decoder_queries"
            )
        length = h.gist_tokens or config.data.hyper_length
    spec = ad.AdapterSpec(prefix=specs.prefix(config, length))
    return HyperT5(sizes, spec, h.reader, h.gist_tokens)


def hyper_lora(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """Build HyperT5-LoRA."""
    h, lora, gists = config.hypermodel, specs.lora(config), 0
    if h.reader == "layerwise":
        gists = h.gist_tokens or math.gcd(*map(lora.rank_of, lora.targets))
        for target in lora.targets:
            if lora.rank_of(target) % gists:
                raise UserError(
                    f"adapter.lora_rank={lora.rank_of(target)} is not a multiple of "
                    f"hypermodel.gist_tokens={gists} at {target}: each token emits as many "
                    "components; set hypermodel.gist_tokens to 0"
                )
    return HyperT5(sizes, ad.AdapterSpec(lora=lora), h.reader, gists)


class HyperT5(nn.Module):
    """Conditioning ids [T, L] -> Adapters of T tasks."""

    config: T5Config
    spec: ad.AdapterSpec
    reader: str = "layerwise"
    gist_tokens: int = 0

    # Parameters that start as the backbone's; see `hypermodels.init_params`.
    sources: ClassVar[dict[str, str]] = {
        "reader": "",
        "cross": "decoder/layers/encoder_decoder_attention",
    }

    @nn.compact
    def __call__(self, ids: Array, tasks: Array, deterministic: bool = True) -> ad.Adapters:
        if self.reader == "layerwise":
            reader = LayerwiseReader(self.config, self.gist_tokens, name="reader")
            tree = self._from_layers(reader(ids, deterministic))
        else:
            tree = self._from_queries(ids, deterministic)
        return ad.Adapters(tree, self.spec)

    def _from_layers(self, features: LayerFeatures) -> dict:
        c, tree = self.config, {}
        if self.spec.prefix:
            pairs = {"enc_self": (features.key, features.value)}
            if "dec_cross" in self.spec.prefix.sites:
                pairs["dec_cross"] = CrossKeysValues(c, name="cross")(features.output)
            for site in self.spec.prefix.sites:
                key, value = pairs[site]
                tree[site] = {"prefix": {"key": key, "value": value}}
                if not self.gist_tokens:
                    mask = jnp.broadcast_to(features.mask, (key.shape[0], *features.mask.shape))
                    tree[site]["prefix"]["mask"] = mask
        if self.spec.lora:
            # The decoder has no states of this text: each of its layers gets the encoder's output
            # and a layer embedding.
            n = c.num_decoder_layers
            init = nn.with_logical_partitioning(nn.initializers.normal(0.1), ("layers", "embed"))
            layer = self.param("decoder_layer", init, (n, c.emb_dim), jnp.float32)
            decoder = features.output + layer[:, None, None].astype(c.dtype)
            by_site = {
                s: features.states if s.startswith("enc") else decoder
                for s in (*ad.ATTENTION_SITES, *ad.MLP_SITES)
            }
            tree |= LoraHeads(self.spec.lora, c, name="heads")(by_site)
        return tree

    def _from_queries(self, ids: Array, deterministic: bool) -> dict:
        c = self.config
        if self.spec.prefix:
            features = QueryReader(c, self.spec.prefix.length, name="reader")(ids, deterministic)
            return PrefixHeads(self.spec.prefix, c, name="heads")(features)
        assert self.spec.lora
        sites = list(dict.fromkeys(t.partition(".")[0] for t in self.spec.lora.targets))
        counts = [ad.num_layers(site, c) for site in sites]
        features = QueryReader(c, sum(counts), name="reader")(ids, deterministic)
        parts = jnp.split(features, [sum(counts[:i]) for i in range(1, len(counts))], 1)
        by_site = {s: p.swapaxes(0, 1)[:, :, None] for s, p in zip(sites, parts, strict=True)}
        return LoraHeads(self.spec.lora, c, name="heads")(by_site)
