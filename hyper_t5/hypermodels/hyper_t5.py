"""HyperT5: a T5 of the backbone's size reads the task and emits prefixes or LoRA.

HyperTuning (Phang et al. 2022), with the choice of two readers:

- ``decoder_queries``, the paper's: a bidirectional T5 decoder over learned queries; one MLP a
  tensor turns its output into adapters.
- ``layerwise``, ours: the encoder's own keys and values of the text (or of gist tokens behind it)
  are the encoder prefixes, its output seen through the decoder's cross-attention the decoder's.
  Started from the backbone it is, before any training, that backbone reading the text; LoRA heads
  start from the states of that same reading.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.errors import UserError
from hyper_t5.hypermodels import specs
from hyper_t5.hypermodels.heads import LoraHeads, PrefixHeads
from hyper_t5.hypermodels.readers import (
    CrossKeysValues,
    LayerFeatures,
    LayerwiseReader,
    QueryReader,
)
from hyper_t5.t5 import T5Config

Array = jax.Array


def hyper_prefix(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """HyperT5-Prefix."""
    h, length = config.hypermodel, 0
    if h.reader == "layerwise":
        if "dec_self" in config.adapter.prefix_sites:
            raise UserError(
                "adapter.prefix_sites: hypermodel.reader=layerwise has no keys and values for "
                "dec_self; leave it out, or set hypermodel.reader to decoder_queries"
            )
        length = h.gist_tokens or config.data.hyper_length
    spec = ad.AdapterSpec(prefix=specs.prefix(config, length))
    return HyperT5(sizes, spec, h.reader, h.gist_tokens)


def hyper_lora(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """HyperT5-LoRA."""
    h, lora, gists = config.hypermodel, specs.lora(config), 0
    if h.reader == "layerwise":
        gists = h.gist_tokens or math.gcd(*map(lora.rank_of, lora.targets))
        for target in lora.targets:
            if lora.rank_of(target) % gists:
                raise UserError(
                    f"adapter.lora_rank={lora.rank_of(target)} is no multiple of "
                    f"hypermodel.gist_tokens={gists} at {target}: each of them emits as many "
                    "components; set the latter to 0"
                )
    return HyperT5(sizes, ad.AdapterSpec(lora=lora), h.reader, gists)


class HyperT5(nn.Module):
    """Conditioning ids [T, L] -> Adapters of T tasks."""

    config: T5Config
    spec: ad.AdapterSpec
    reader: str = "layerwise"
    gist_tokens: int = 0

    # Which parameters start as the backbone's (see hypermodels.init_params).
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

    def _from_layers(self, seen: LayerFeatures) -> dict:
        c, tree = self.config, {}
        if self.spec.prefix:
            pairs = {"enc_self": (seen.key, seen.value)}
            if "dec_cross" in self.spec.prefix.sites:
                pairs["dec_cross"] = CrossKeysValues(c, name="cross")(seen.output)
            for site in self.spec.prefix.sites:
                key, value = pairs[site]
                tree[site] = {"prefix": {"key": key, "value": value}}
                if not self.gist_tokens:
                    mask = jnp.broadcast_to(seen.mask, (key.shape[0], *seen.mask.shape))
                    tree[site]["prefix"]["mask"] = mask
        if self.spec.lora:
            # The decoder has no states of this text: each of its layers gets the last ones and an
            # embedding of its own.
            n = c.num_decoder_layers
            init = nn.with_logical_partitioning(nn.initializers.normal(0.1), ("layers", "embed"))
            layer = self.param("decoder_layer", init, (n, c.emb_dim), jnp.float32)
            decoder = seen.output + layer[:, None, None].astype(c.dtype)
            features = {
                s: seen.states if s.startswith("enc") else decoder
                for s in (*ad.ATTENTION_SITES, *ad.MLP_SITES)
            }
            tree |= LoraHeads(self.spec.lora, c, name="heads")(features)
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
