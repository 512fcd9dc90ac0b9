"""The examples, in small: they run to their end, and what they measure is what is predicted, to the byte.

The demo, examples/pretrain.py, is in test_plan.py with the figures that the README gives.
"""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from adam_mini_plugins import partition
from adam_mini_plugins.planning import predict

EXAMPLES = Path(__file__).parents[1] / "examples"
STAGES = ("pretrain", "sft", "reward", "optimize")


def run(script: str, *options: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / script), *options, "--output-dir", "out"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def predicted(build: Callable[[], nn.Module]) -> dict[str, int]:
    """Bytes of state by optimizer, from shapes alone."""
    with torch.device("meta"):
        model = build()
    return {prediction.optimizer: prediction.state for prediction in predict(model, partition(model))}


def write_functions(folder: Path) -> None:
    folder.mkdir()
    for number in range(20):
        source = [
            f'def take_{name}_{number}(self, {name}):\n    """Returns {name}, {number} times."""\n    return {name}\n'
            for name in ("first", "second", "last", "key", "value", "item", "left", "right")
        ]
        (folder / f"module_{number}.py").write_text("\n\n".join(source))


def test_align(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    pytest.importorskip("trl", reason="the trl extra is not installed")
    write_functions(tmp_path / "source")
    small = [option for stage in STAGES for option in (f"--steps-{stage}", "2", f"--batch-{stage}", "2")]

    printed = run(
        "align.py",
        *("--dataset", "source", "--seeds", "0", "--eval-functions", "8", "--completion-tokens", "12", *small),
        folder=tmp_path,
    )

    record = json.loads((tmp_path / "out" / "align.json").read_text())
    assert [(run["stage"], run["optim"]) for run in record["runs"]] == [
        ("pretrain", "adam_mini"),
        *((stage, optim) for stage in STAGES[1:] for optim in ("adam_mini", "adamw_torch")),
    ]
    for run_ in record["runs"]:
        assert run_["before"].keys() == run_["after"].keys()
        assert all(map(math.isfinite, (*run_["before"].values(), *run_["after"].values())))
    for one, other in zip(record["runs"][1::2], record["runs"][2::2]):
        assert one["before"] == other["before"]  # both optimizers start from the same weights
    assert all((tmp_path / "out" / f"{stage}.png").stat().st_size > 10_000 for stage in STAGES)
    assert {"before", "after", "Adam-mini", "AdamW"} <= set(printed.split())

    config = transformers.AutoConfig.from_pretrained(tmp_path / "out" / "reward")
    lora = peft.LoraConfig(target_modules="all-linear", r=record["arguments"]["lora_rank"])
    models: dict[str, Callable[[], nn.Module]] = {
        "pretrain": lambda: transformers.LlamaForCausalLM(config),
        "sft": lambda: peft.get_peft_model(transformers.LlamaForCausalLM(config), lora),
        "reward": lambda: transformers.LlamaForSequenceClassification(config),
        "optimize": lambda: transformers.LlamaForCausalLM(config),
    }
    titles = {"adam_mini": "Adam-mini", "adamw_torch": "AdamW"}
    for run_ in record["runs"]:
        assert run_["state_bytes"] == predicted(models[run_["stage"]])[titles[run_["optim"]]], run_["stage"]


def measured(folder: Path) -> dict[str, int]:
    """Bytes of state by optimizer, as the monitor has logged them."""
    sizes = {}
    for title, name in (("Adam-mini", "adam_mini"), ("AdamW", "adamw")):
        with (folder / "out" / name / "metrics.csv").open() as file:
            logged = [row["optimizer/state_bytes"] for row in csv.DictReader(file)]
        (sizes[title],) = (int(float(size)) for size in logged if size)
    return sizes


def test_lightning_vision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="the lightning extra is not installed")
    run("lightning_vision.py", "--steps", "3", folder=tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    import lightning_vision

    sizes = predicted(lambda: lightning_vision.build_model(SimpleNamespace(width=64, layers=3, heads=4)))
    assert measured(tmp_path) == {title: sizes[title] for title in ("Adam-mini", "AdamW")}
    assert (tmp_path / "out" / "lightning_vision.png").stat().st_size > 10_000


def test_lightning_finetune(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the lightning extra is not installed")
    pytest.importorskip("trl", reason="the trl extra is not installed")
    import trl_zoo

    tokenizer = trl_zoo.tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text("the cat sat on the mat " * 20)

    data = ("--model", "model", "--dataset", "texts", "--seq-len", "16", "--batch-size", "2")
    run("lightning_finetune.py", *data, "--steps", "3", "--eval-sequences", "4", folder=tmp_path)

    expected = predicted(lambda: transformers.LlamaForCausalLM(config))
    assert measured(tmp_path) == {title: expected[title] for title in ("Adam-mini", "AdamW")}
    assert (tmp_path / "out" / "lightning_finetune.png").stat().st_size > 10_000
