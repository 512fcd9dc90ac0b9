"""Tiny models of many architectures, to try a rule about parameters on all of them at once.

Every model has random weights, two layers, float32, no dropout and is in training mode; its batch
carries labels, so that its output has a loss. The sizes are chosen so that a wrong reading of a
layout cannot be right by coincidence: the numbers of query heads (6), key heads (2), query heads to
a key head (3) and of rows to a head (8, or 10 where `head_dim` is set apart from
`hidden_size / num_attention_heads`) are all different.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

SEED = 0
SEQUENCES, TOKENS, OTHER_TOKENS = 2, 8, 5
LABELS = 3
HEADS, KEY_HEADS, WIDE_HEAD = 6, 2, 10
HIDDEN, FEED_FORWARD, LAYERS = 48, 80, 2

# Keyword arguments that configurations share. The ids keep special tokens within the vocabulary.
WORDS: dict[str, Any] = {
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
DECODER: dict[str, Any] = {**WORDS, **SIZES, "num_key_value_heads": KEY_HEADS}
GEMMA: dict[str, Any] = {
    **DECODER,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
GPT2: dict[str, Any] = {
    **WORDS,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
FALCON: dict[str, Any] = {
    **WORDS,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
BERT: dict[str, Any] = {
    **WORDS,
    **SIZES,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
T5: dict[str, Any] = {
    **WORDS,
    "decoder_start_token_id": WORDS["pad_token_id"],
    "d_model": HIDDEN,
    "d_ff": FEED_FORWARD,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
}
BART: dict[str, Any] = {
    **WORDS,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": FEED_FORWARD,
    "decoder_ffn_dim": FEED_FORWARD,
    "dropout": 0.0,
}
VIT: dict[str, Any] = {
    **SIZES,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": LABELS,
}
DEEPSEEK: dict[str, Any] = {
    **WORDS,
    **SIZES,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 40,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One tiny model.

    `build` makes the model and a batch for it, the same ones at every call. `attentions` is how
    often a forward of the model attends: each layer's self attention and cross attention, so that
    a test can tell whether it has seen all of them.
    """

    name: str
    build: Callable[[], tuple[PreTrainedModel, Batch]]
    attentions: int


def _ids(tokens: int = TOKENS) -> Tensor:
    """Random token ids, without the special ones."""
    return torch.randint(WORDS["eos_token_id"] + 1, WORDS["vocab_size"], (SEQUENCES, tokens))


def _same_labels() -> Batch:
    """A text that is its own label, for causal and masked language models."""
    ids = _ids()
    return {"input_ids": ids, "labels": ids.clone()}


def _text_to_text() -> Batch:
    """A text and another one to be made of it, of a different length."""
    return {"input_ids": _ids(), "labels": _ids(OTHER_TOKENS)}


def _with_encoder_states() -> Batch:
    """A text, and the states of something else for a decoder's cross attention to look at."""
    return {**_same_labels(), "encoder_hidden_states": torch.randn(SEQUENCES, OTHER_TOKENS, HIDDEN)}


def _text_classes() -> Batch:
    """Texts and a class for each."""
    return {"input_ids": _ids(), "labels": torch.randint(LABELS, (SEQUENCES,))}


def _image_classes() -> Batch:
    """Images and a class for each."""
    size = VIT["image_size"]
    return {
        "pixel_values": torch.randn(SEQUENCES, 3, size, size),
        "labels": torch.randint(LABELS, (SEQUENCES,)),
    }


def _case(
    name: str,
    model_class: str,
    config: dict[str, Any],
    make_batch: Callable[[], Batch] = _same_labels,
    attentions: int = LAYERS,
    **more: Any,
) -> Case:
    """The case of one of transformers' model classes, its configuration `config` and `more`."""

    def build() -> tuple[PreTrainedModel, Batch]:
        cls = getattr(transformers, model_class)
        torch.manual_seed(SEED)
        # The copy is for configurations that complete the lists and dicts they are given.
        model = cls(cls.config_class(**deepcopy({**config, **more})))
        return model.float().train(), make_batch()

    return Case(name, build, attentions)


# Where the modelling code reads `head_dim`, one variant has it set apart from hidden_size / heads;
# where its default does not follow from hidden_size, the other variant sets it to just that.
EVEN = HIDDEN // HEADS
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _case("llama", "LlamaForCausalLM", DECODER),
        _case("llama-head_dim", "LlamaForCausalLM", DECODER, head_dim=WIDE_HEAD),
        _case("mistral", "MistralForCausalLM", DECODER),
        _case("mistral-head_dim", "MistralForCausalLM", DECODER, head_dim=WIDE_HEAD),
        _case("qwen2", "Qwen2ForCausalLM", DECODER),
        _case("qwen2-head_dim", "Qwen2ForCausalLM", DECODER, head_dim=WIDE_HEAD),
        _case("qwen3", "Qwen3ForCausalLM", DECODER, head_dim=EVEN),
        _case("qwen3-head_dim", "Qwen3ForCausalLM", DECODER, head_dim=WIDE_HEAD),
        _case("gemma2", "Gemma2ForCausalLM", GEMMA, head_dim=EVEN),
        _case("gemma2-head_dim", "Gemma2ForCausalLM", GEMMA, head_dim=WIDE_HEAD),
        _case("gemma3", "Gemma3ForCausalLM", GEMMA, head_dim=EVEN),
        _case("gemma3-head_dim", "Gemma3ForCausalLM", GEMMA, head_dim=WIDE_HEAD),
        _case("phi3", "Phi3ForCausalLM", DECODER),
        _case("phi3-head_dim", "Phi3ForCausalLM", DECODER, head_dim=WIDE_HEAD),
        _case("mixtral", "MixtralForCausalLM", DECODER, num_local_experts=4),
        _case(
            "mixtral-head_dim",
            "MixtralForCausalLM",
            DECODER,
            num_local_experts=4,
            head_dim=WIDE_HEAD,
        ),
        _case("deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK, q_lora_rank=None),
        _case("deepseek_v3-q_lora", "DeepseekV3ForCausalLM", DEEPSEEK, q_lora_rank=18),
        _case("gpt2", "GPT2LMHeadModel", GPT2),
        _case(
            "gpt2-cross",
            "GPT2LMHeadModel",
            GPT2,
            _with_encoder_states,
            attentions=2 * LAYERS,
            add_cross_attention=True,
        ),
        _case("gpt_bigcode", "GPTBigCodeForCausalLM", GPT2),
        _case("gpt_bigcode-multi_head", "GPTBigCodeForCausalLM", GPT2, multi_query=False),
        _case("gpt_neox", "GPTNeoXForCausalLM", {**WORDS, **SIZES}),
        _case(
            "falcon-new",
            "FalconForCausalLM",
            FALCON,
            new_decoder_architecture=True,
            num_kv_heads=KEY_HEADS,
        ),
        _case("falcon-multi_query", "FalconForCausalLM", FALCON, multi_query=True),
        _case("falcon-old", "FalconForCausalLM", FALCON, multi_query=False),
        _case("bert", "BertForMaskedLM", BERT),
        _case(
            "bert-classes",
            "BertForSequenceClassification",
            BERT,
            _text_classes,
            num_labels=LABELS,
        ),
        _case("t5", "T5ForConditionalGeneration", T5, _text_to_text, attentions=3 * LAYERS, d_kv=EVEN),
        _case(
            "t5-head_dim",
            "T5ForConditionalGeneration",
            T5,
            _text_to_text,
            attentions=3 * LAYERS,
            d_kv=WIDE_HEAD,
        ),
        _case("bart", "BartForConditionalGeneration", BART, _text_to_text, attentions=3 * LAYERS),
        _case("vit", "ViTForImageClassification", VIT, _image_classes),
        _case(
            "vit-head_dim",
            "ViTForImageClassification",
            VIT,
            _image_classes,
            head_dim=WIDE_HEAD,
        ),
    )
}
