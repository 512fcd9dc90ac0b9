"""`adam-mini inspect --verify` and `--hessian`, which ask a tiny instance of the architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread
from test_plan import failure
from transformers import FalconConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen3Config

from adam_mini_plugins import Layout, partition
from adam_mini_plugins.cli import curvature, main, tiny, verify

# Configs of full size whose peculiarities a tiny instance has to keep.
CONFIGS = {
    "grouped": (LlamaConfig(num_key_value_heads=8), {"q_proj": 6, "k_proj": 2}),
    "not grouped": (LlamaConfig(), {"q_proj": 6, "k_proj": 6}),
    "head_dim": (Qwen3Config(head_dim=160), {"q_proj": 6, "k_proj": 6}),
    "fused": (GPT2Config(n_layer=48), {"c_attn": 6 + 6 + 48}),
    "one key head": (FalconConfig(multi_query=True, new_decoder_architecture=False), {"query_key_value": 6 + 1 + 8}),
    "by head": (FalconConfig(multi_query=False), {"query_key_value": 6 + 6 + 48}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_query_and_key_is_verified(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, blocks = CONFIGS[name]
    config.save_pretrained(tmp_path)
    main(["inspect", str(tmp_path), "--verify", "--json"])

    record = json.loads(capsys.readouterr().out)

    assert record["model"]["parameters"] < 300_000
    assert {(v["name"].split(".")[-2], v["verdict"]) for v in record["verdicts"]} == {
        (part, "right") for part in blocks
    }
    counts = {v["name"].split(".")[-2]: Layout.parse(v["blocks"]).num_blocks for v in record["verdicts"]}
    assert counts == blocks


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [("neuron", "wrong"), ("tensor", "wrong"), ("3 heads", "wrong"), ("6 heads", "right")],
)
def test_wrong_blocks_are_found(rule: str, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "partition", lambda model: partition(model, rules=[("*.q_proj.weight", rule)]))
    model, batch = tiny.build(LlamaForCausalLM, LlamaConfig(num_key_value_heads=8))

    verdicts = verify.verify(model, batch)

    assert {v.verdict for v in verdicts if "q_proj" in v.name} == {verdict}
    assert {v.verdict for v in verdicts if "k_proj" in v.name} == {"right"}
    assert verify.all_right(verdicts) == (verdict == "right")


def test_wrong_blocks_are_a_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verify, "partition", lambda model: partition(model, rules=[("*.q_proj.weight", "neuron")]))
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", "llama-3-8b", "--verify"])
    assert exit_.value.code == 1
    printed = capsys.readouterr().out
    assert "model.layers.0-1.self_attn.q_proj.weight" in printed
    assert "query and key tensors: 2 right, 2 wrong" in printed


def test_a_model_of_ones_own_is_pointed_to_the_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("import torch\nmake = lambda: torch.nn.Linear(3, 3)\n")
    for option in ("--verify", "--hessian"):
        assert "partition(model, probe=batch)" in failure(capsys, "inspect", f"{tmp_path}/mine.py:make", option)


def test_the_hessian_of_a_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build(LlamaForCausalLM, LlamaConfig(num_key_value_heads=8, hidden_size=4096))
    report = curvature.measure(model, batch)

    by_part = {one.name.split(".")[-2]: one for one in report}
    assert list(by_part) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert {part for part, one in by_part.items() if one.densest == "head"} == {"q_proj", "k_proj"}
    assert all(one.densest == one.chosen for one in report)
    rows = curvature.record(report)
    assert [row["rows"] for row in rows] == [48, 16, 16, 48, 80, 80, 48]
    curvature.draw("a title", report).savefig(tmp_path / "hessian.png")
    assert imread(tmp_path / "hessian.png")[..., :3].std() > 0.1
    table = curvature.table(report)[0]
    assert table.row_count == len(report)
