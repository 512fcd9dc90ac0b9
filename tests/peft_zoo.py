"""Tiny PEFT models that train: one for every tuner of the installed PEFT, and more for LoRA's many forms.

`CASES` holds them, `CANNOT` the tuners that do not run here and why, `CANNOT_LORA` the same for forms of
LoRA; a case whose tuner or option the installed PEFT does not have yet is named in `NOT_IN_THIS_PEFT`.
The base models are those of `zoo`, whose sizes are all different, so that a shape tells which axis is
which: 48 features, 80 in the MLP, 16 rows of keys and of values, 97 tokens; the rank is 4 where it can be.

Some tuners want more of a training loop than forward, backward and step, which no case depends on:
AdaLoRA's `model.base_model.update_and_allocate(step)` after each step (it zeroes entries of `lora_E` in
place, and reads the gradients, so before they are zeroed), AdaMSS' callback when `use_asa` is on. Poly,
PVeRA and MonteCLoRA draw random numbers in each forward of training: seed before it to repeat it. Every
trainable parameter has a gradient, if often one of zeros at first, except in the last block of Shadow,
whose update of the small model's states nothing reads.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import zoo
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

RANK, TASKS, VIRTUAL_TOKENS, EXPERTS = 4, 3, 5, 4

Batch = dict[str, Tensor]
Wrap = Callable[[nn.Module, dict[str, Any]], nn.Module]


@dataclass(frozen=True)
class PeftCase:
    """One tiny model with adapters. `build` makes it and a batch for it, the same ones at every call."""

    name: str
    peft_type: str
    build: Callable[[], tuple[nn.Module, Batch]]


# The linear layers to adapt: a square one, one of the grouped keys and a wide one; and all there are.
SOME = ["q_proj", "k_proj", "down_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
VIRTUAL: dict[str, Any] = {**CAUSAL, "num_virtual_tokens": VIRTUAL_TOKENS}
TO_TEXT: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM"}

# For each example its task, for tuners that learn several; and a text for those that look for tokens in it.
TASK_IDS = {"task_ids": torch.tensor([0, TASKS - 1])}
TEXT = {key: torch.arange(3, 3 + zoo.SEQUENCES * zoo.TOKENS).view(zoo.SEQUENCES, -1) for key in ("input_ids", "labels")}
SEEN = [3, 7, 11, 90]  # all but the last

CANNOT: dict[str, str] = {}
if "ADAMSS" in PeftType.__members__ and importlib.util.find_spec("sklearn") is None:
    CANNOT["ADAMSS"] = "AdamssConfig raises ImportError without scikit-learn, whose KMeans it clusters with"

# Forms of LoRA that do not run here. Other initial values (olora, orthogonal, eva, lora_ga) do, but give
# the parameters of "lora" or "lora-pissa"; only eva may also change ranks, and puts new parameters in for that.
CANNOT_LORA: dict[str, str] = {
    "use_qalora": "only the layer for GPTQ has it, elsewhere it is ignored; needs gptqmodel and a quantized model",
    "init_lora_weights='loftq'": "LoraConfig raises ImportError without scipy",
    "megatron_config": "raises ModuleNotFoundError: no module named megatron",
    "arrow_config": "routes among finished adapters: the loss has no gradient, though its parameters ask for one",
    "quantized layers": "none of bitsandbytes, gptqmodel, awq, aqlm, eetq, hqq, torchao, neural_compressor is there",
    "Transformer Engine layers": "the package is not there, and needs a GPU",
}

NOT_IN_THIS_PEFT: list[str] = []


def _base(name: str) -> tuple[nn.Module, Batch]:
    """A base model of `zoo` and its batch, and the seed set again for the adapters."""
    model, batch = (BASES.get(name) or zoo.CASES[name].build)()
    torch.manual_seed(zoo.SEED)
    return model, batch


def _config(peft_type: str, options: dict[str, Any]) -> peft.PeftConfig:
    """A tuner's configuration; tuners write into what they are given."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)](**deepcopy(options))


def _lacks(peft_type: str, options: dict[str, Any]) -> bool:
    """Whether the installed PEFT does not know a tuner or one of its options."""
    if peft_type not in PeftType.__members__:
        return True
    fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)])}
    return not fields.issuperset(options)


def _case(
    name: str, base: str = "llama", wrap: Wrap | None = None, more: Batch | None = None, **options: Any
) -> PeftCase | None:
    """The case of one tuner's configuration, or None where the installed PEFT lacks the tuner or an option.

    The tuner is what the name says before its first "-". `wrap` makes the model of base and options where
    PEFT's `get_peft_model` alone does not; `more` goes into the batch.
    """
    peft_type = name.partition("-")[0].upper()
    if _lacks(peft_type, options):
        NOT_IN_THIS_PEFT.append(name)
        return None

    def build() -> tuple[nn.Module, Batch]:
        with warnings.catch_warnings():  # of choices that are meant, such as the layout of Conv1D
            warnings.simplefilter("ignore")
            model, batch = _base(base)
            model = wrap(model, options) if wrap else peft.get_peft_model(model, _config(peft_type, options))
        return model.float().train(), {**batch, **deepcopy(more or {})}

    return PeftCase(name, peft_type, build)


def _linear(name: str, base: str = "llama", **options: Any) -> PeftCase | None:
    """The case of a tuner that adapts linear layers of a causal language model."""
    return _case(name, base, **{**CAUSAL, "target_modules": SOME, **options})


def _two_adapters(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """A model with a second, smaller adapter, which is the active one."""
    model = peft.get_peft_model(model, _config("LORA", options))
    model.add_adapter("second", _config("LORA", {**options, "r": 2}))
    model.set_adapter("second")
    return model


def _both_adapters(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """A model whose two adapters are of different kinds and both active."""
    model = peft.get_peft_model(model, _config("LORA", options), adapter_name="first", mixed=True)
    model.add_adapter("second", _config("LOHA", options))
    model.set_adapter(["first", "second"])
    return model


def _of_experts(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """X-LoRA of two LoRA adapters, which it wants as files."""
    model.config.use_cache = False
    lora = {**CAUSAL, "r": RANK, "target_modules": SOME, "init_lora_weights": False}
    with tempfile.TemporaryDirectory() as folder:
        adapters = {str(number): str(Path(folder, str(number))) for number in range(2)}
        for path in adapters.values():
            peft.get_peft_model(deepcopy(model), _config("LORA", lora)).save_pretrained(path)
        return peft.get_peft_model(model, _config("XLORA", {**options, "adapters": adapters}))


class AttentionClassifier(nn.Module):
    """A classifier of sequences of vectors by PyTorch's own attention, whose q, k and v are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(zoo.HIDDEN, zoo.HEADS, batch_first=True)
        self.classifier = nn.Linear(zoo.HIDDEN, zoo.LABELS)

    def forward(self, inputs: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        mixed, _ = self.attention(inputs, inputs, inputs)
        logits = self.classifier(mixed.mean(1))
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def _attention_classifier() -> tuple[nn.Module, Batch]:
    """The classifier above and a batch for it."""
    torch.manual_seed(zoo.SEED)
    inputs = torch.randn(zoo.SEQUENCES, zoo.TOKENS, zoo.HIDDEN)
    return AttentionClassifier(), {"inputs": inputs, "labels": torch.randint(zoo.LABELS, (zoo.SEQUENCES,))}


def _with_biases() -> tuple[nn.Module, Batch]:
    """A model with biases that are not zero, as an untrained model's are."""
    model, batch = zoo.CASES["qwen2"].build()
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(param)
    return model, batch


# Base models for cases below that `zoo` does not have.
BASES: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "attention": _attention_classifier,
    "biases": _with_biases,
    # its stacks of experts have the inputs before the outputs
    "gpt_oss": zoo._case("gpt_oss", "GptOssForCausalLM", zoo.DECODER, num_local_experts=EXPERTS, head_dim=8).build,
}

STACKS: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
PATCHES: dict[str, Any] = {"base": "vit", "target_modules": ["projection"]}  # a convolution
CLASSES: dict[str, Any] = {"base": "bert-classes", "task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
XLORA: dict[str, Any] = {**CAUSAL, "wrap": _of_experts, "hidden_size": zoo.HIDDEN, "xlora_dropout_p": 0.0}
BLOCKS = {"nblocks": 2, "target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj", "k_proj"]}
ADALORA: dict[str, Any] = {"init_r": RANK, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2}

_TABLE: tuple[PeftCase | None, ...] = (
    # LoRA
    _linear("lora", r=RANK, target_modules=ALL),
    _linear("lora-rslora", r=RANK, use_rslora=True),
    _linear("lora-pissa", r=RANK, init_lora_weights="pissa"),
    _linear("lora-mica", r=RANK, init_lora_weights="mica"),
    _linear("lora-dora", r=RANK, use_dora=True),
    _linear("lora-kasa", r=RANK, kasa_config={}),
    _linear("lora-velora", r=RANK, velora_config={"num_groups": 4}),
    _linear("lora-alora", r=RANK, alora_invocation_tokens=[5], more=TEXT),
    _linear("lora-monteclora", r=RANK, monteclora_config={"num_samples": 3, "buffer_size": 2}),
    _linear("lora-bdlora", r=RANK, use_bdlora=BLOCKS),
    _linear("lora-lora_bias", r=RANK, lora_bias=True),
    _linear("lora-modules_to_save", r=RANK, modules_to_save=["lm_head", "norm"]),
    _linear("lora-tokens", r=RANK, trainable_token_indices=SEEN, more=TEXT),
    _linear("lora-layer_replication", r=RANK, layer_replication=[(0, 2), (0, 1)]),
    _linear("lora-embeddings", r=RANK, target_modules=["embed_tokens", "lm_head"]),
    _linear("lora-dora-embeddings", r=RANK, target_modules=["embed_tokens", "lm_head"], use_dora=True),
    _linear("lora-two_adapters", r=RANK, wrap=_two_adapters),
    _case("lora-mixed", r=RANK, target_modules=SOME, wrap=_both_adapters),
    _linear("lora-bias", "biases", r=RANK, bias="lora_only"),
    _linear("lora-gpt2", "gpt2", r=RANK, target_modules=["c_attn", "c_proj"]),
    _linear("lora-dora-gpt2", "gpt2", r=RANK, target_modules=["c_attn"], use_dora=True),
    _linear("lora-gpt_neox", "gpt_neox", r=RANK, target_modules=["query_key_value", "dense"]),
    _case("lora-t5", "t5", r=RANK, target_modules=["q", "v", "wo"], **TO_TEXT),
    _case("lora-bert", r=RANK, **CLASSES),
    _linear("lora-experts", "mixtral", r=RANK, **STACKS),
    _linear("lora-experts-gpt_oss", "gpt_oss", r=RANK, **STACKS),
    _case("lora-conv", r=RANK, **PATCHES),
    _case("lora-dora-conv", r=RANK, use_dora=True, **PATCHES),
    _case("lora-attention", "attention", r=RANK, target_modules=["attention"]),
    # made of LoRA
    _linear("adalora", **ADALORA),
    _linear("adalora-gpt2", "gpt2", **{**ADALORA, "target_modules": ["c_attn"]}),
    _case("xlora", **XLORA, xlora_depth=2, xlora_size=20),
    _case("xlora-trainable", **XLORA, layerwise_scalings=True, use_trainable_adapters=True),
    _linear("poly", r=RANK, n_tasks=TASKS, n_skills=3, n_splits=2, more=TASK_IDS),
    # products and sums of other small matrices
    _linear("hira", r=RANK),
    _linear("hira-embedding", r=RANK, target_modules=["embed_tokens"]),
    _linear("delora", r=RANK),
    _linear("deft", r=RANK),
    _linear("deft-qr", r=RANK, decomposition_method="qr"),
    _linear("gralora", r=RANK, hybrid_r=3, gralora_k=2),
    _linear("glora", "biases", r=RANK, config_D_E="vector"),
    _linear("glora-vectors", "biases", config_A_B="vector", config_C="vector"),
    _linear("lily", r=RANK, num_B=3, stride_A=2),
    _linear("peanut", r=RANK, depth=1),
    _linear("loha", r=RANK),
    _case("loha-conv", r=RANK, use_effective_conv2d=True, **PATCHES),
    _linear("lokr", r=6, decompose_factor=4),
    _linear("lokr-both", r=2, decompose_both=True, decompose_factor=8),
    _case("lokr-conv", r=2, use_effective_conv2d=True, **PATCHES),
    _linear("miss", r=RANK),
    _linear("miss-bat", r=RANK, init_weights="bat"),
    _linear("miss-mini", r=RANK, init_weights="mini", mini_r=8),
    _linear("osf", effective_rank=6),
    _case("adamss", r=RANK, num_subspaces=2, subspace_rank=2, **CLASSES),
    # vectors and scalars on frozen matrices
    _linear("ia3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    _case("ia3-t5", "t5", target_modules=["k", "v", "wo"], feedforward_modules=["wo"], **TO_TEXT),
    _linear("beft", "biases"),
    _linear("ln_tuning", target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    _case("ln_tuning-bert", **{**CLASSES, "target_modules": ["LayerNorm"]}),
    _linear("vera", r=6),
    _linear("pvera", r=6),
    _linear("randlora", r=RANK),
    _linear("tinylora", u=6, weight_tying=0.5),
    _linear("unilora", r=RANK, theta_d_length=60),
    _linear("vblora", r=RANK, num_vectors=10, vector_length=8),
    # rotations and reflections
    _linear("oft", oft_block_size=8),
    _linear("oft-shared", oft_block_size=8, block_share=True, coft=True),
    _linear("boft", boft_block_size=8),
    _linear("hra", r=RANK),
    _linear("road", group_size=8),
    _linear("road-4", group_size=8, variant="road_4"),
    _linear("psoft", r=RANK),
    _linear("psoft-free", r=RANK, psoft_orth=False),
    _linear("frod", progressbar=False),
    # coefficients of a transform, chosen entries
    _linear("fourierft", n_frequency=60),
    _linear("waveft", n_frequency=60),
    _linear("c3a", block_size=8),
    _linear("shira", r=2, random_seed=0),
    _linear("supertuning", sparsity=0.9),
    _linear("supertuning-lora", sparsity=0.9, r=RANK),
    _linear("trainable_tokens", target_modules=["embed_tokens"], token_indices=SEEN, more=TEXT),
    _linear("trainable_tokens-tied", "gpt2", target_modules=["wte"], token_indices=SEEN, more=TEXT),
    # tokens that are not in the text
    _case("prompt_tuning", **VIRTUAL),
    _case("prompt_tuning-t5", "t5", **{**VIRTUAL, **TO_TEXT}),
    _case("multitask_prompt_tuning", **VIRTUAL, num_tasks=TASKS, num_ranks=2, more=TASK_IDS),
    _case("p_tuning", **VIRTUAL, encoder_hidden_size=20),
    _case("p_tuning-lstm", **VIRTUAL, encoder_hidden_size=20, encoder_reparameterization_type="LSTM"),
    _case("prefix_tuning", **VIRTUAL),
    _case("prefix_tuning-projected", **VIRTUAL, prefix_projection=True, encoder_hidden_size=20),
    # a template, an input, a template and an output: the rows of outputs stay as they are
    _case("cpt", **CAUSAL, cpt_token_ids=[5, 6, 7, 8], cpt_tokens_type_mask=[1, 2, 3, 4]),
    _case("cartridge", **VIRTUAL, num_frozen_tokens=1),
    _case("adaption_prompt", **CAUSAL, adapter_len=VIRTUAL_TOKENS, adapter_layers=1),
    # a small model beside the model
    _case("shadow", **CAUSAL, r=RANK, shadow_dropout=0.0, shadow_hidden_size=24),
)
CASES: dict[str, PeftCase] = {case.name: case for case in _TABLE if case and case.peft_type not in CANNOT}
