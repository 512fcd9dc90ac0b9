"""What tiny instances of some architectures need, and those of which there is none."""

from __future__ import annotations

from typing import Any

# Fields that don't shrink by their names alone, by model type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 16},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 96, "mamba_d_state": 16},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_state": 16, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 48, "attention_window_size": 8},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    "dots1": {"n_shared_experts": 1},
    "mamba2": {"num_heads": 6, "head_dim": 16, "state_size": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 12, "ssm_state_size": 16, "n_groups": 2, "n_group": 1},
    "mimo_v2_flash": {"v_head_dim": 12},
    "gemma4_assistant": {},
    "zamba": {"num_hidden_layers": 3, "layer_types": None, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [24, 24]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4, "chunk_size": 8},
    "qwen4_exp_text": {"num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"]},
}

# Attention without a softmax in the middle, by model type.
LINEAR_ATTENTION = {"minimax", "xlstm"}
# Queries that positions get from different experts.
ALONE = {"jetmoe"}

# Queries and keys through which nothing is differentiated: an indexer's scores pick positions by top-k.
UNOBSERVED = r"\bindexer\b"
