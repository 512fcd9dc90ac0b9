"""The partition on every architecture of the installed transformers, against its own attention.

What was found for which version of transformers is in ``census.json``; ``python tests/census.py``
writes it. A release with an architecture that is partitioned wrongly, that can't be looked at, or that
can be now, makes a test here fail.
"""

from __future__ import annotations

import json

import pytest
from census import KINDS, RESULTS, architectures, probe
from census_data import ALONE, LINEAR_ATTENTION, UNJUDGED
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LM

EXPECTED = json.loads(RESULTS.read_text())
BLIND = EXPECTED["blind"]
# Whose rules are their own: gates in the query, linear attention, state spaces, fused in odd orders,
# stacks of either orientation, one head, 3-D projections, convolutions as projections.
SPECIAL = (
    {"afmoe", "axk2", "bailing_hybrid", "bamba", "codegen", "csm", "dbrx", "deberta", "deepseek_v32",
     "deepseek_v4", "falcon", "funnel", "gemma3", "gemma4", "gpt_bigcode", "gpt_oss", "groupvit", "hubert",
     "internvl", "jamba", "janus", "jetmoe", "kimi_linear", "levit", "lfm2", "lilt", "llama4_text",
     "longcat_flash", "mamba", "mamba2", "minimax", "modernbert", "moshi", "nemotron_h", "olmo2", "olmo_hybrid",
     "parakeet_ctc", "prophetnet", "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "rwkv",
     "squeezebert", "swiftformer", "swin", "t5", "xlnet", "xlstm", "zamba", "zamba2", "zaya"}
)  # fmt: skip


def _sample() -> list[str]:
    """The special ones, and of the others every eighth of each kind."""
    told = [t for t in architectures() if t not in BLIND]
    spread = [t for kind in KINDS for t in [t for t in told if architectures()[t][0] == kind][::8]]
    return sorted({*spread, *SPECIAL, *LINEAR_ATTENTION, *ALONE})


@pytest.mark.parametrize("model_type", _sample())
def test_blocks_are_what_the_architecture_does_with_its_matrices(model_type: str) -> None:
    finding = probe(model_type)
    assert (finding.status, finding.why) == ("right", [])


def test_the_sample_is_spread_over_all_kinds() -> None:
    sample = _sample()
    assert len(sample) >= 100
    assert {architectures()[model_type][0] for model_type in sample} == set(KINDS)


def test_every_architecture_is_accounted_for() -> None:
    assert EXPECTED["wrong"] == {}
    assert set(BLIND) <= set(architectures())
    assert set(UNJUDGED) <= set(BLIND)
    assert all(BLIND.values())
    assert sum(EXPECTED["right"].values()) + len(BLIND) == len(architectures())
    assert sum(EXPECTED["right"].values()) >= 200


def test_few_causal_language_models_are_blind_spots() -> None:
    assert len(set(BLIND) & set(CAUSAL_LM)) < 0.15 * len(CAUSAL_LM)


@pytest.mark.slow
def test_every_architecture() -> None:
    found = {model_type: probe(model_type) for model_type in architectures()}
    by_status: dict[str, set[str]] = {"right": set(), "blind": set(), "wrong": set(), "error": set()}
    for model_type, finding in found.items():
        by_status[finding.status].add(model_type)
    assert {t: found[t].why for t in by_status["wrong"] | by_status["error"]} == {}
    assert {t: found[t].why for t in by_status["blind"] - set(BLIND)} == {}, "new blind spots"
    assert set(BLIND) - by_status["blind"] == set(), "no blind spots any more"
    assert len(by_status["right"]) == sum(EXPECTED["right"].values())
    assert sum(found[t].tensors for t in by_status["right"]) == EXPECTED["query and key tensors"]
