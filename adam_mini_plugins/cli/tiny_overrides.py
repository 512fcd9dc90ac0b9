"""What tiny instances of some architectures need beside the names of their config's fields."""

from __future__ import annotations

from typing import Any

# Fields that don't shrink by their names alone, by model type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 16},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 96, "mamba_d_state": 16},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 48, "attention_window_size": 8},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    "dots1": {"n_shared_experts": 1},
    "mamba2": {"num_heads": 6, "head_dim": 16, "state_size": 16, "n_groups": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 12, "ssm_state_size": 16, "n_groups": 2, "n_group": 1},
    "zamba": {
        "num_hidden_layers": 5,
        "layer_types": ...,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
    },
    "mimo_v2_flash": {"num_key_value_heads": 3},
    "jetmoe": {"num_experts_per_tok": 4},
    "swin": {"depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "donut-swin": {"depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "blt": {"encoder_hash_byte_group_vocab": 60},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 48, "ffn_hidden_size": 80, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "pix2struct_text_model": {"d_kv": 8},
    "esm": {"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 32},
    "mobilebert": {"intra_bottleneck_size": 48, "true_hidden_size": 48},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [24, 24]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4, "chunk_size": 8},
    "qwen4_exp_text": {
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
}
