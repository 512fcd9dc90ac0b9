"""ReMax, the algorithm with which the Adam-mini paper optimises rewards (section 3.2), as a trainer of TRL.

REINFORCE with the reward of the greedy answer to the same prompt as the baseline (Li et al. 2023, "ReMax: A Simple,
Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models", arXiv:2310.10505):

    loss = -E[ (r(x, y) - r(x, y_greedy)) log pi(y | x) ],    y ~ pi(. | x),    y_greedy = argmax, token by token

The baseline depends on the prompt alone, so the gradient stays unbiased; there is no value model, and hence none to
train or to keep optimizer state for.

How it extends TRL: an RLOOTrainer that draws two answers a prompt already takes the reward of the second for the
baseline of the first. Here the second is decoded greedily and left out of the loss. Everything else is TRL's: several
rewards, PEFT, the KL penalty ``beta``, which is deducted from the rewards (of the greedy answer too).

    trainer = ReMaxTrainer(model, reward, ReMaxConfig("out", optim="adam_mini"), train_dataset=prompts)

TRL counts both answers in ``per_device_train_batch_size``: 32 are 16 prompts, and 16 answers in the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from trl import RLOOConfig, RLOOTrainer

SAMPLED, GREEDY = slice(0, None, 2), slice(1, None, 2)  # the rows of a batch: TRL puts a prompt's answers side by side
PER_ANSWER = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "old_logps", "advantages")


class ReMaxConfig(RLOOConfig):
    """RLOO's arguments; those that would make it something else than ReMax are refused by the trainer."""


class ReMaxTrainer(RLOOTrainer):
    """Policy gradient with the greedy answer's reward as the baseline.

    Evaluation samples its answers, ``num_generations_eval`` a prompt, and has no greedy ones. Training logs
    ``reward_sampled`` and ``reward_greedy``; RLOO's own ``reward`` is the mean of both.
    """

    _tag_names = ["trl", "remax"]
    _name = "ReMax"
    _paper = {
        "title": "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning LLMs",
        "id": "2310.10505",
    }

    def __init__(self, model: Any, reward_funcs: Any, args: RLOOConfig, *rest: Any, **others: Any) -> None:
        if args.num_generations != 2:
            raise ValueError(f"ReMax takes two answers, one greedy: num_generations=2, not {args.num_generations}")
        if args.normalize_advantages:
            raise ValueError("normalize_advantages=True would subtract a mean that ReMax's advantages do not have")
        if args.use_vllm:
            raise ValueError("use_vllm=True samples a prompt's answers together, so that none of them can be greedy")
        if args.per_device_train_batch_size * args.steps_per_generation % 2:
            raise ValueError("per_device_train_batch_size counts sampled and greedy answers, so it has to be even")
        super().__init__(model, reward_funcs, args, *rest, **others)

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict) -> list:
        if not self.model.training:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        if images is not None or multimodal_fields:
            raise NotImplementedError("this ReMax is for prompts of text alone")
        answers: list[list[int]] = [[] for _ in prompt_ids]
        answers[SAMPLED] = super()._generate_single_turn(prompt_ids[SAMPLED], None, {})
        with self._greedy():
            answers[GREEDY] = super()._generate_single_turn(prompt_ids[GREEDY], None, {})
        return answers

    @contextmanager
    def _greedy(self) -> Iterator[None]:
        before = self.generation_config, self.generation_kwargs
        decoding = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
        self.generation_config = copy.deepcopy(self.generation_config)
        self.generation_config.update(**decoding)
        self.generation_kwargs = {**self.generation_kwargs, **decoding}
        try:
            yield
        finally:
            self.generation_config, self.generation_kwargs = before

    def _calculate_rewards(self, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args)  # of all processes, a column for each function
        if self.model.training:
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
            self._metrics["train"]["reward_sampled"].append(total[SAMPLED].mean().item())
            self._metrics["train"]["reward_greedy"].append(total[GREEDY].mean().item())
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        scored = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return scored
        # Leaving one out of a pair leaves the other: a sampled answer's advantage is ReMax's by now.
        return {name: value[SAMPLED] if name in PER_ANSWER else value for name, value in scored.items()}
