"""Backbone weights: read and write T5X, Hugging Face and native checkpoints.

In memory a backbone is a `T5Config` and a nested dict of arrays under T5X's names, with the layers
of each stack stacked on axis 0 (`encoder/layers/attention/query/kernel [N, D, H*K]`). On disk:

- native: `config.json` and `model.safetensors`, whose names are the paths joined by `/`;
- t5x: a msgpack file `checkpoint` with inline arrays or zarr folders, one tree per layer
  (`encoder/layers_0/attention/query/kernel [D, H*K]`) or scanned;
- hf: a Hugging Face T5, `config.json` and `model.safetensors` (or shards with an index).

A reader lists the stored tensors as a `TensorSource`, maps names and shapes to T5X's, and checks
them against the config before it reads any values. A writer takes one array after another. Neither
holds the whole model in memory.
"""

from hyper_t5.weights.compatible import SHAPE_FIELDS, backbone_meta, check_compatible
from hyper_t5.weights.convert import convert, save, save_hf, save_native
from hyper_t5.weights.load import detect, load_backbone, load_sharded, open_source, read_config
from hyper_t5.weights.param_names import digest
from hyper_t5.weights.source import STORAGE_DTYPES, TensorSource, VocabIdentity

__all__ = [
    "SHAPE_FIELDS",
    "STORAGE_DTYPES",
    "TensorSource",
    "VocabIdentity",
    "backbone_meta",
    "check_compatible",
    "convert",
    "detect",
    "digest",
    "load_backbone",
    "load_sharded",
    "open_source",
    "read_config",
    "save",
    "save_hf",
    "save_native",
]
