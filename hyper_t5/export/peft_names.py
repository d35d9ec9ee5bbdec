"""What both directions share of PEFT's files: their names, and those of a T5's modules in them.

PEFT calls a module by its path in Hugging Face's T5, such as
`encoder.block.0.layer.0.SelfAttention.q`, and a tensor of an adapter by
`base_model.model.{module}.lora_A.weight`.
"""

from __future__ import annotations

from hyper_t5.adapters import ATTENTION_SITES, MLP_SITES, num_layers, targets_of
from hyper_t5.names import hf_name
from hyper_t5.t5 import T5Config

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"
PROMPT = "prompt_embeddings"
EVERYWHERE = (*ATTENTION_SITES, *MLP_SITES)
_SITE_BLOCKS = {
    "enc_self": ("encoder", "attention"),
    "dec_self": ("decoder", "self_attention"),
    "dec_cross": ("decoder", "encoder_decoder_attention"),
    "enc_mlp": ("encoder", "mlp"),
    "dec_mlp": ("decoder", "mlp"),
}


def kernel_path(target: str) -> str:
    """Where a backbone's tree has the kernels that a LoRA target such as `dec_mlp.wo` changes."""
    site, _, projection = target.partition(".")
    stack, block = _SITE_BLOCKS[site]
    return f"{stack}/layers/{block}/{projection}/kernel"


def hf_module(target: str, layer: int) -> str:
    """Hugging Face's name of the module that a LoRA target changes in one layer."""
    name = hf_name(kernel_path(target).replace("/layers/", f"/layers_{layer}/"))
    return name.removesuffix(".weight")


def modules_of(sizes: T5Config) -> dict[str, tuple[str, int]]:
    """Every module of a T5 that LoRA can be on -> (target, layer)."""
    return {
        hf_module(target, layer): (target, layer)
        for target in targets_of(EVERYWHERE, sizes)
        for layer in range(num_layers(target, sizes))
    }
