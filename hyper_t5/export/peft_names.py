"""File names of PEFT folders, and the names of a T5's modules and tensors in them.

PEFT names a module by its path in Hugging Face's T5, such as
`encoder.block.0.layer.0.SelfAttention.q`, and a tensor by
`base_model.model.{module}.lora_A.weight`.
"""

from __future__ import annotations

from hyper_t5.adapters import SITES, num_layers, targets_of
from hyper_t5.t5 import T5Config
from hyper_t5.weights.param_names import hf_name

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"
PROMPT = "prompt_embeddings"
_SITE_BLOCKS = {
    "enc_self": ("encoder", "attention"),
    "dec_self": ("decoder", "self_attention"),
    "dec_cross": ("decoder", "encoder_decoder_attention"),
    "enc_mlp": ("encoder", "mlp"),
    "dec_mlp": ("decoder", "mlp"),
}


def kernel_path(target: str) -> str:
    """Return the parameter path of the kernels that a LoRA target such as `dec_mlp.wo` updates."""
    site, _, projection = target.partition(".")
    stack, block = _SITE_BLOCKS[site]
    return f"{stack}/layers/{block}/{projection}/kernel"


def hf_module(target: str, layer: int) -> str:
    """Return Hugging Face's name of the module that a LoRA target updates in one layer."""
    name = hf_name(kernel_path(target).replace("/layers/", f"/layers_{layer}/"))
    return name.removesuffix(".weight")


def lora_tensor(module: str, name: str) -> str:
    """Return PEFT's name of a module's tensor, such as `lora_A.weight`."""
    return f"base_model.model.{module}.{name}"


def modules_of(t5_config: T5Config) -> dict[str, tuple[str, int]]:
    """Map every module that LoRA can be applied to onto its (target, layer)."""
    return {
        hf_module(target, layer): (target, layer)
        for target in targets_of(SITES, t5_config)
        for layer in range(num_layers(target, t5_config))
    }
