"""Tiny models with random weights of every architecture that transformers can build as a causal language model."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST_PARAMETERS = 3_000_000

_SIZES = {
    **dict.fromkeys(("vocab_size",), 512),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "inner_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 1),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_head_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "sliding_window"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("layer_types", "mlp_layer_types"), None),
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config(architecture: str, randomness: float = 0.0) -> PretrainedConfig:
    """The default config of an architecture with small sizes.

    Args:
        randomness: of every dropout, layer drop and jitter that the config knows.

    Raises:
        Exception: the architecture does not take the sizes, or it is made of several models.
    """
    cls = CONFIG_MAPPING[architecture]
    default = cls()
    if default.get_text_config() is not default:
        raise ValueError("made of several models")
    renamed = default.attribute_map
    there = set(vars(default)) | set(renamed)
    sizes = {name: size for name, size in _SIZES.items() if name in there and renamed.get(name) not in _SIZES}
    if "qk_rope_head_dim" in there:  # heads of two parts, whose sizes are given
        sizes.pop("head_dim", None)
        sizes.pop("qk_head_dim", None)
    random = {name: randomness for name, value in vars(default).items() if isinstance(value, float) and ("drop" in name or "jitter" in name)}
    return cls(**sizes, **random)


def tiny_language_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of a tiny config, in evaluation mode.

    Raises:
        ValueError: it is not tiny after all.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
