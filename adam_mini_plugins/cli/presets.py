"""Models by name: the sizes that their makers published, for transformers' own classes.

Only what decides the shapes of parameters is given; the rest is the config class's default.
"""

from __future__ import annotations

from typing import Any

Preset = tuple[str, dict[str, Any]]


def _decoder(
    architecture: str, hidden: int, feed_forward: int, layers: int, heads: int, key_heads: int, words: int, **more: Any
) -> Preset:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": words,
    }
    return architecture, {**sizes, **more}


def _llama(*sizes: int, **more: Any) -> Preset:
    return _decoder("LlamaForCausalLM", *sizes, **more)


def _qwen2(*sizes: int, **more: Any) -> Preset:
    return _decoder("Qwen2ForCausalLM", *sizes, **more)


def _qwen3(*sizes: int, **more: Any) -> Preset:
    return _decoder("Qwen3ForCausalLM", *sizes, head_dim=128, **more)


def _gemma2(*sizes: int, head_dim: int) -> Preset:
    return _decoder("Gemma2ForCausalLM", *sizes, head_dim=head_dim)


def _gemma3(*sizes: int) -> Preset:
    return _decoder("Gemma3ForCausalLM", *sizes, head_dim=256)


def _phi3(*sizes: int) -> Preset:
    return _decoder("Phi3ForCausalLM", *sizes)


def _gpt2(hidden: int, layers: int, heads: int) -> Preset:
    return "GPT2LMHeadModel", {"n_embd": hidden, "n_layer": layers, "n_head": heads}


def _t5(hidden: int, feed_forward: int, layers: int, heads: int, head_dim: int) -> Preset:
    sizes = {"d_model": hidden, "d_ff": feed_forward, "num_layers": layers, "num_heads": heads, "d_kv": head_dim}
    return "T5ForConditionalGeneration", sizes


def _encoder(architecture: str, hidden: int, layers: int, heads: int, **more: Any) -> Preset:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return architecture, {**sizes, "intermediate_size": 4 * hidden, **more}


TIED = {"tie_word_embeddings": True}

# Decoders: hidden size, feed-forward size, layers, heads, key/value heads, vocabulary.
PRESETS: dict[str, Preset] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, **TIED),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, 128256),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, **TIED),
    "mistral-7b": _decoder("MistralForCausalLM", 4096, 14336, 32, 32, 8, 32000),
    "mixtral-8x7b": _decoder("MixtralForCausalLM", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, **TIED),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, **TIED),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, 151936, **TIED),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, 152064),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 152064),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, 152064),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, 151936, **TIED),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, 151936, **TIED),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, 151936, **TIED),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, 151936),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8, 151936),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8, 151936),
    "qwen3-30b-a3b": _decoder(
        "Qwen3MoeForCausalLM", 2048, 6144, 48, 32, 4, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128
    ),
    "gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4, 256000, head_dim=256),
    "gemma-2-9b": _gemma2(3584, 14336, 42, 16, 8, 256000, head_dim=256),
    "gemma-2-27b": _gemma2(4608, 36864, 46, 32, 16, 256000, head_dim=128),
    "gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, 262144),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, 262144),
    "phi-3-mini": _phi3(3072, 8192, 32, 32, 32, 32064),
    "phi-3-medium": _phi3(5120, 17920, 40, 40, 10, 32064),
    "phi-4": _phi3(5120, 17920, 40, 40, 10, 100352),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {}),  # the config class's defaults
    "bert-base": _encoder("BertForMaskedLM", 768, 12, 12),
    "bert-large": _encoder("BertForMaskedLM", 1024, 24, 16),
    "t5-small": _t5(512, 2048, 6, 8, 64),
    "t5-base": _t5(768, 3072, 12, 12, 64),
    "t5-large": _t5(1024, 4096, 24, 16, 64),
    "t5-3b": _t5(1024, 16384, 24, 32, 128),
    "t5-11b": _t5(1024, 65536, 24, 128, 128),
    "vit-base": _encoder("ViTForImageClassification", 768, 12, 12, num_labels=1000),
    "vit-large": _encoder("ViTForImageClassification", 1024, 24, 16, num_labels=1000),
}
