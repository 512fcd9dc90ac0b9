"""Each door opens on one training step with whatever is installed; what is not says what to install.

Run in each environment of `run.py`, and with the other tests in theirs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adam_mini_plugins import AdamMini

DOORS = {"transformers": ("hf", "callbacks.hf"), "lightning": ("lightning", "callbacks.lightning")}
EXTRAS = {"transformers": "hf", "lightning": "lightning"}
IDS = torch.arange(12).view(2, 6) % 16


def needs(*packages: str) -> pytest.MarkDecorator:
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(absent), reason=f"{', '.join(absent)} is not installed here")


def trains(model: nn.Module, optimizer: torch.optim.Optimizer, step: Any) -> None:
    """Checks that a step makes state and moves all that is trained."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trainable]
    step()
    assert isinstance(optimizer, AdamMini)
    moved = [not torch.equal(p, value) for p, value in zip(trainable, before, strict=True)]
    assert sum(moved) >= len(moved) / 2  # LoRA's A has no gradient as long as B is zero
    assert optimizer.state


def test_plain_torch() -> None:
    model = nn.Sequential(nn.Embedding(16, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 16))
    optimizer = AdamMini.for_model(model, lr=0.01)
    model(IDS).square().sum().backward()
    trains(model, optimizer, optimizer.step)


STEP = """
import torch, adam_mini_plugins
model = torch.nn.Linear(2, 2)
model(torch.ones(2)).sum().backward()
adam_mini_plugins.AdamMini.for_model(model).step()
"""


def test_an_install_has_the_kernel_unless_it_was_told_of_a_wrong_compiler_and_a_step_says_so() -> None:
    wrong = "CC" in os.environ and shutil.which(os.environ["CC"].split()[0]) is None
    assert (importlib.util.find_spec("adam_mini_plugins.kernels._cpu") is None) == wrong
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Where it is built it is used: tests of it are skipped where it isn't, and nothing else would say so.
    said = [line for line in done.stderr.splitlines() if "without its fused kernel" in line]
    assert len(said) == wrong
    assert all("(it was not built: reinstall adam-mini-plugins" in line for line in said)


@pytest.mark.parametrize("package", DOORS)
def test_a_door_opens_or_says_what_to_install(package: str) -> None:
    for module in DOORS[package]:
        code = f"import adam_mini_plugins.{module}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if importlib.util.find_spec(package) is None:
            assert f'pip install "adam-mini-plugins[{EXTRAS[package]}]"' in done.stderr.splitlines()[-1]
        else:
            assert done.returncode == 0, done.stderr


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=1, max_position_embeddings=16, **sizes))


class Ids(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index], "labels": IDS[index]}


SILENT = {"use_cpu": True, "report_to": [], "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}


def unwrapped(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


@needs("transformers", "accelerate")
@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=needs("peft"))], ids=["full", "lora"])
def test_transformers_trainer(adapted: bool, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    import adam_mini_plugins.hf
    from adam_mini_plugins.callbacks.hf import OptimizerMemoryCallback

    model = llama()
    if adapted:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    args = TrainingArguments(str(tmp_path), optim=adam_mini_plugins.hf.NAME, **SILENT)
    trainer = Trainer(model, args, train_dataset=Ids(), callbacks=[OptimizerMemoryCallback()])
    trainer.create_optimizer()
    trains(model, unwrapped(trainer.optimizer), trainer.train)


@needs("trl", "peft")
def test_trl_trainer(tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    import adam_mini_plugins.hf

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[EOS]": 1, "a": 2, "b": 3, "c": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="[EOS]", pad_token="[EOS]", unk_token="[UNK]", model_max_length=16
    )
    model = llama()
    model.config.eos_token_id = model.config.pad_token_id = 1
    args = SFTConfig(str(tmp_path), optim=adam_mini_plugins.hf.NAME, bf16=False, **SILENT)
    data = Dataset.from_dict({"text": ["a b c", "c b a"]})
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    trainer.create_optimizer()
    trains(trainer.model, unwrapped(trainer.optimizer), trainer.train)


@needs("lightning")
def test_lightning_trainer() -> None:
    from lightning.pytorch import LightningModule, Trainer

    from adam_mini_plugins.callbacks.lightning import OptimizerMemoryMonitor
    from adam_mini_plugins.lightning import AdamMiniOptimizer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            self.optimizer: Any = None

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.net(batch[0]).square().sum()

        def configure_optimizers(self) -> Any:
            self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            return self.optimizer

    module = Module()
    before = module.net[2].weight.detach().clone()
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=[AdamMiniOptimizer(), OptimizerMemoryMonitor()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 4)), batch_size=2)
    trainer.fit(module, data)
    assert isinstance(module.optimizer, AdamMini)
    assert not torch.equal(module.net[2].weight, before)


@needs("transformers", "matplotlib", "rich")
def test_command_line(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    for command in ("inspect", "plan"):
        done = subprocess.run(
            [sys.executable, "-m", "adam_mini_plugins", command, str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
