"""The README's Python runs as it stands, and what it says of the tests is so."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from test_hf import Batches, inner
from transformers import Trainer, TrainingArguments

import adam_mini_plugins
from adam_mini_plugins import AdamMini

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def surroundings(block: str) -> dict[str, Any]:
    """What a reader has before the block: a model, data, arguments, and for TRL a tokenizer, prompts and a reward."""
    model, batch = zoo.CASES["llama"].build()
    given: dict[str, Any] = {
        "model": model,
        "batch": batch,
        "data": Batches(batch, samples=8),
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "partition": adam_mini_plugins.partition,
        "args": TrainingArguments("out", optim="adam_mini"),
    }
    if "from trl" in block:
        pytest.importorskip("trl", reason="the trl extra is not installed")
        import trl_zoo
        from datasets import Dataset

        prompts = Dataset.from_list(trl_zoo.PROMPTS[:2])
        given |= {"prompts": prompts, "reward": trl_zoo.code_points, "tokenizer": trl_zoo.tokenizer()}
    if "from lightning" in block:
        pytest.importorskip("lightning", reason="the lightning extra is not installed")
    if "from peft" in block:
        pytest.importorskip("peft", reason="the peft extra is not installed")
    return given


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_readme_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = BLOCKS[number]
    used: list[torch.optim.Optimizer] = []
    train = Trainer.train

    def train_and_remember(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        used.append(inner(self))
        return result

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "train", train_and_remember)
    given = surroundings(block)
    exec(compile(block, f"README.md, Python block {number}", "exec"), given)
    used += [given["optimizer"]] if "optimizer" in given else []
    assert all(isinstance(optimizer, AdamMini) for optimizer in used)
    assert bool(used) == (".train()" in block or "optimizer =" in block)
    assert all(optimizer.state for optimizer in used) or "optimizer =" in block


def test_the_first_screen_shows_the_argument() -> None:
    assert 'optim="adam_mini"' in BLOCKS[0]
    assert README.index(BLOCKS[0]) < 500


def test_the_figures_of_the_census_are_those_found() -> None:
    census = json.loads((ROOT / "tests" / "census.json").read_text())
    right = sum(census["right"].values())
    assert f"{right} of the {right + len(census['blind'])} architectures of transformers" in README
    assert f"{census['query and key tensors']:,} query and key tensors" in README


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("sft", "loss"),
        ("reward", "accuracy"),
        ("optimize", "rewards/parse_reward/mean"),
        ("optimize", "rewards/reward/mean"),
    ],
)
def test_the_figures_of_the_alignment_are_those_measured(stage: str, key: str) -> None:
    runs = [run for run in json.loads((ROOT / "docs" / "align.json").read_text())["runs"] if run["stage"] == stage]
    cells = [f"{statistics.median(run['before'][key] for run in runs):.3f}"]
    for optim in ("adam_mini", "adamw_torch"):
        after = [run["after"][key] for run in runs if run["optim"] == optim]
        assert len(after) == 3
        cells.append(f"{statistics.median(after):.3f} ({min(after):.3f}, {max(after):.3f})")
    assert f"| {' | '.join(cells)} |" in README


def test_the_figures_of_loras_blocks_are_those_measured() -> None:
    losses = json.loads((ROOT / "docs" / "lora_blocks.json").read_text())["losses"]
    adamw = losses.pop("AdamW")
    assert f"| {' | '.join(f'{statistics.median(values):.3f}' for values in adamw.values())} |" in README
    for by_rate in losses.values():
        gaps = [[own - other for own, other in zip(values, adamw[rate])] for rate, values in by_rate.items()]
        cells = [f"{statistics.median(gap):+.3f} ({min(gap):+.3f}, {max(gap):+.3f})" for gap in gaps]
        assert f"| {' | '.join(cells)} |" in README


def test_the_figures_of_a_step_are_those_measured() -> None:
    rows = json.loads((ROOT / "docs" / "step.json").read_text())["rows"]
    for name in {row["optimizer"] for row in rows}:
        of = {row["case"]: row for row in rows if row["optimizer"] == name and row["threads"] == 1}
        cases = ("50M float32", "50M bfloat16", "1M float32", "LoRA float32")
        cells = [f"{of[case]['step_ratio']:.2f}" if case in of else "" for case in cases]
        assert f"| {name} | {of['50M float32']['state_ratio']:.3f} | {' | '.join(cells)} |" in README
