"""Config files as model families write them, cut to what counts."""

from typing import Any

from pagedkv.hf_config import model_from_config
from pagedkv.model_spec import ModelSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "attention_dropout": 0.0,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
MIXTURE: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "image_token_index": 9,
    "text_config": {
        **{key: LLAMA[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")},
        "head_dim": 64,
        "num_hidden_layers": 8,
        "max_position_embeddings": 4096,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_value_head_dim": 32,
        "mamba_ssm_dtype": "float32",
        "moe_intermediate_size": 128,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 128,
        "dtype": "bfloat16",
    },
}
LATENT: dict[str, Any] = {
    "model_type": "deepseek_v32",
    **{key: LLAMA[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")},
    "max_position_embeddings": 4096,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "index_head_dim": 128,
    "index_n_heads": 4,
    "index_topk": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
WINDOWED: dict[str, Any] = {
    **LLAMA,
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 128,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
}


def parse(config: dict[str, Any]) -> ModelSpec:
    return model_from_config(config, name="m", title="M", source="a test")
