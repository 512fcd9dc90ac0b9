"""The examples, in small: they run to their end, and what they measure is what is predicted, to the byte.

The demo, examples/pretrain.py, is in test_plan.py with the figures that the README gives.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a benchmark in its quick form and returns the figures that it has written."""
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")

    def run_benchmark(name: str, *options: str) -> dict[str, Any]:
        importlib.import_module(name).main(["--quick", "--output-dir", str(tmp_path), *options])
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run_benchmark


def test_the_benchmark_of_a_step(benchmark: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    rows = benchmark("step", "--threads", "1", "--cases", "50M bfloat16", "LoRA float32")["rows"]
    of = {(row["case"], row["optimizer"]): row for row in rows}
    for case, dtype in (("50M bfloat16", 2), ("LoRA float32", 4)):
        baseline, ours = of[case, "AdamW, fused"], of[case, "AdamMini"]
        assert baseline["step_ratio"] == baseline["state_ratio"] == 1.0
        # Both hold two moments, or one and some, in the parameters' dtype, and a count.
        assert baseline["state_bytes"] == 2 * dtype * baseline["parameters"] + 4 * baseline["tensors"]
        assert 0.5 < ours["state_ratio"] < 0.52  # a number of four bytes for each row of 64 of two
        # A copy of all second moments, or of no more than a row.
        assert of[case, "AdamW, foreach"]["extra_fraction"] >= 1.0 > 0.01 > ours["extra_fraction"]
        assert all(row["step_ms"] > 0 and row["rounds"] >= 3 for row in of.values())
    assert of["LoRA float32", "AdamMini"]["tensors"] == 300
    assert of["LoRA float32", "AdamMini"]["parameters"] == 300 * 8 * 512
    assert (tmp_path / "step.png").stat().st_size > 10_000
    assert f"| AdamMini | {of['50M bfloat16', 'AdamMini']['step_ratio']:.2f} |" in (tmp_path / "step.md").read_text()


def test_the_benchmark_of_training(benchmark: Callable[..., dict[str, Any]]) -> None:
    figures = benchmark("training")
    peaks = {row["optimizer"]: row["peak_bytes_per_parameter"] for row in figures["rows"]}
    # In the backward pass, one gradient at a time: the peak is lower by nearly all of them.
    assert 2.0 < peaks["adam_mini"] - peaks["adam_mini, in_backward=true"] <= 4.0
    assert all(row["tokens_per_second"] > 0 and row["time_ratio"] > 0 for row in figures["rows"])


def test_the_benchmark_of_the_start(benchmark: Callable[..., dict[str, Any]]) -> None:
    figures = benchmark("startup")
    assert figures["parameters"] == 2 * 32_000 * 4096 + 4 * 4096**2 + 3 * 4096 * 11_008 + 3 * 4096
    assert all(figures[key] > 0 for key in ("import_seconds", "build_seconds", "build_adamw_seconds"))
