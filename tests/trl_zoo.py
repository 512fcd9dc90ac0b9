"""Tiny runs of TRL's stable trainers: a model, a tokenizer, and a few rows of data in each trainer's format.

`CASES` holds a case for each trainer, `LEFT_OUT` those that are not tried and why; a case whose trainer the
installed TRL does not export is named in `NOT_IN_THIS_TRL`. The model is a Qwen3 of `zoo`'s sizes, in a
folder, from which the trainers that compare with a reference load it once more. A token is a character.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
import zoo
from datasets import Dataset
from peft import LoraConfig
from test_hf import arguments
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer

STEPS = 3
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>"]  # the first three as numbered in zoo.WORDS
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

Row = dict[str, Any]


@dataclass(frozen=True)
class TrlCase:
    """One trainer: its rows of data, and what its configuration, itself and its LoRA want besides the usual."""

    name: str
    rows: list[Row]
    config: dict[str, Any] = field(default_factory=dict)
    trainer: Callable[[], dict[str, Any]] = dict
    lora: dict[str, Any] = field(default_factory=dict)


def said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def code_points(completions: list[str], **_: Any) -> list[float]:
    """A reward that random completions hardly ever have the same of, so that there is an advantage to learn from."""
    return [sum(map(ord, completion)) / 100 for completion in completions]


QUESTIONS = ["one and one?", "who is it", "red or blue?", "the sea", "count to 3", "what for?", "a, b, c", "why"]
PROMPTS = [{"prompt": question} for question in QUESTIONS]
CHATS = [{"messages": said("user", q) + said("assistant", q[::-1])} for q in QUESTIONS]
PREFERENCES = [
    {"prompt": said("user", q), "chosen": said("assistant", q[::-1]), "rejected": said("assistant", "no " + q[2:])}
    for q in QUESTIONS
]
JUDGED = [{"prompt": q, "completion": " " + q[::-1], "label": i % 3 == 0} for i, q in enumerate(QUESTIONS)]
GENERATION = {"max_completion_length": 4, "num_generations": 2, "per_device_train_batch_size": 4, "beta": 0.1}

ALL = (
    TrlCase("SFT", CHATS, lora={"modules_to_save": ["embed_tokens"]}),
    TrlCase("Reward", PREFERENCES, lora={"task_type": "SEQ_CLS", "modules_to_save": ["score"]}),
    TrlCase("DPO", PREFERENCES),
    TrlCase("KTO", JUDGED),
    TrlCase("GRPO", PROMPTS, GENERATION, lambda: {"reward_funcs": code_points}),
    TrlCase("RLOO", PROMPTS, GENERATION, lambda: {"reward_funcs": [code_points]}),
    TrlCase("Distillation", PROMPTS, {"max_completion_length": 4}, lambda: {"teacher_model": model(seed=1)}),
)
LEFT_OUT: dict[str, str] = {}


def exported() -> set[str]:
    """The trainers that the installed TRL has at its top, as what comes before "Trainer" in their names."""
    return {name.removesuffix("Trainer") for name in trl.__all__ if name.endswith("Trainer")}


CASES = {case.name: case for case in ALL if case.name in exported()}
NOT_IN_THIS_TRL = [case.name for case in ALL if case.name not in CASES]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of characters, with as many tokens as the models of `zoo`."""
    size = zoo.WORDS["vocab_size"] - len(SPECIAL)
    words = SPECIAL + list(" " + string.printable[: size - 1])
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[3]))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        unk_token=SPECIAL[3],
        additional_special_tokens=SPECIAL[4:],
        chat_template=CHAT_TEMPLATE,
    )


def model(seed: int = zoo.SEED) -> transformers.Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**zoo.DECODER, head_dim=zoo.WIDE_HEAD))


def save(folder: Path) -> Path:
    """Puts the model and its tokenizer into a folder."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def lora(name: str, **options: Any) -> LoraConfig:
    common = {"r": 4, "target_modules": ["q_proj", "k_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**deepcopy({**common, **CASES[name].lora, **options}))  # PEFT writes into its lists


def trainer(
    name: str,
    model_folder: Path,
    output: Path,
    peft_config: LoraConfig | None = None,
    student: nn.Module | None = None,
    **options: Any,
) -> Any:
    """A trainer with `optim="adam_mini"` that is ready to train, without weight decay: what moves has learnt.

    It trains `student`, or the model in the folder.
    """
    case = CASES[name]
    config = getattr(trl, f"{name}Config")
    common = {"max_steps": STEPS, "logging_steps": 1, "weight_decay": 0.0}
    cls: type[Trainer] = getattr(trl, f"{name}Trainer")
    return cls(
        model=student or str(model_folder),
        args=arguments(output, config, **{**common, **case.config, **options}),
        train_dataset=Dataset.from_list(case.rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(model_folder),
        peft_config=peft_config,
        **case.trainer(),
    )
