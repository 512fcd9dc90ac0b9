"""The ReMax example: the greedy answer's reward is the baseline, and Adam-mini trains it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_hf import arguments, inner

pytest.importorskip("trl", reason="the trl extra is not installed")
import trl_zoo
from datasets import Dataset

from adam_mini_plugins import AdamMini

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from remax import ReMaxConfig, ReMaxTrainer


def trainer(folder: Path, **options: object) -> ReMaxTrainer:
    given = {"max_completion_length": 4, "num_generations": 2, "per_device_train_batch_size": 8, "beta": 0.0}
    args = arguments(folder, ReMaxConfig, **{**given, "max_steps": 1, "logging_steps": 1, **options})
    return ReMaxTrainer(
        trl_zoo.model(),
        trl_zoo.code_points,
        args,
        train_dataset=Dataset.from_list(trl_zoo.PROMPTS),
        processing_class=trl_zoo.tokenizer(),
    )


def test_an_advantage_is_the_reward_less_that_of_the_greedy_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remax = trainer(tmp_path)
    rewards: list[torch.Tensor] = []
    scored: list[dict] = []
    calculate, score = remax._calculate_rewards, remax._generate_and_score_completions
    monkeypatch.setattr(remax, "_calculate_rewards", lambda *a: rewards.append(calculate(*a)) or rewards[-1])
    monkeypatch.setattr(remax, "_generate_and_score_completions", lambda x: scored.append(score(x)) or scored[-1])
    remax.train()
    (reward,), (batch,) = rewards, scored
    assert reward.shape == (8, 1)
    expected = reward[0::2, 0] - reward[1::2, 0]
    torch.testing.assert_close(batch["advantages"].flatten(), expected.to(batch["advantages"].dtype))
    assert expected.abs().max() > 0
    assert len(batch["completion_ids"]) == 4
    assert isinstance(inner(remax), AdamMini)


def test_the_baseline_is_greedy(tmp_path: Path) -> None:
    remax = trainer(tmp_path)
    remax.model.train()
    ids = [remax.processing_class(row["prompt"])["input_ids"] for row in trl_zoo.PROMPTS[:3] for _ in (0, 1)]
    torch.manual_seed(1)
    first = remax._generate_single_turn(ids, None, {})
    torch.manual_seed(2)
    second = remax._generate_single_turn(ids, None, {})
    answers = first[0] if isinstance(first, tuple) else first
    others = second[0] if isinstance(second, tuple) else second
    assert answers[1::2] == others[1::2]
    assert answers[0::2] != others[0::2]


def test_what_would_not_be_remax_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_generations=2, not 4"):
        trainer(tmp_path, num_generations=4)
