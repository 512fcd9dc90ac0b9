"""What `adam-mini inspect` shows, against the partition that the optimizer uses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import zoo
from matplotlib.image import imread
from test_plan import failure
from torch import nn

from adam_mini_plugins import Layout, partition
from adam_mini_plugins.cli import main
from adam_mini_plugins.cli.picture import Tile, draw, layer_of
from adam_mini_plugins.cli.sources import build

# One file for all: a function for each tiny model.
FACTORIES = "import zoo\n" + "\n".join(
    f"{name.replace('-', '_')} = lambda: zoo.CASES[{name!r}].build()[0]" for name in zoo.CASES
)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "models.py").write_text(FACTORIES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return str(tmp_path / "models.py")


def inspect_json(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    main(["inspect", *options, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "deepseek_v3-q_lora", "t5"])
@pytest.mark.parametrize("value", ["neuron", "whole"])
def test_json_is_the_partition(name: str, value: str, models: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = inspect_json(capsys, f"{models}:{name.replace('-', '_')}", "--value", value)
    model = zoo.CASES[name].build()[0]
    blocks = partition(model, value=value)
    assert (record["scheme"], record["blocks"], record["left_out"]) == ("hessian", blocks.num_blocks(), {})
    assert record["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert [tensor["name"] for tensor in record["tensors"]] == [n for n, _ in model.named_parameters()]
    for tensor in record["tensors"]:
        entry = blocks[tensor["name"]]
        assert (tensor["role"], tensor["blocks"], tensor["why"]) == (entry.role, entry.num_blocks, entry.why)
        assert tuple(tensor["shape"]) == entry.shape
        assert Layout.parse(tensor["layout"]) == entry.layout


def test_rules_scheme_and_adapters(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"{models}:llama"
    record = inspect_json(capsys, source, "--rule", "*.q_proj.weight=3 heads", "--rule", "*.k_proj.weight=tensor")
    found = {t["name"]: (t["role"], t["blocks"]) for t in record["tensors"]}
    assert found["model.layers.1.self_attn.q_proj.weight"] == ("custom", 3)
    assert found["model.layers.1.self_attn.k_proj.weight"] == ("custom", 1)
    assert inspect_json(capsys, source, "--scheme", "tensor")["blocks"] == len(record["tensors"])
    adapted = inspect_json(capsys, source, "--lora", "4")
    (lora,) = (t for t in adapted["tensors"] if "layers.0.self_attn.q_proj.lora_B" in t["name"])
    assert (lora["role"], lora["blocks"], lora["shape"]) == ("adapter", 6, [48, 4])


def test_the_largest_models_fit_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "llama-3-70b"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 20
    assert lines[0] == "llama-3-70b: LlamaForCausalLM, 70,553,706,496 parameters"
    (query,) = (line.split(maxsplit=4) for line in lines if "q_proj" in line)
    assert query[:4] == ["model.layers.0-79.self_attn.q_proj.weight", "8192x8192", "query", "64"]
    assert query[4].strip() == "64 heads of 128 rows: LlamaConfig.num_attention_heads"
    main(["inspect", "deepseek-v3"])
    assert len(capsys.readouterr().out.splitlines()) < 30


def test_frozen_tensors_that_no_rule_fits_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import torch\nfrom torch import nn\nclass Net(nn.MultiheadAttention):\n"
        "    def __init__(self):\n        super().__init__(8, 2)\n"
        "        self.odd = nn.Parameter(torch.zeros(2, 3, 4, 5), requires_grad=False)\n"
    )
    (tmp_path / "net.py").write_text(code)
    source = f"{tmp_path}/net.py:Net"
    main(["inspect", source])
    assert "left out while frozen: odd: none of the rules fits" in capsys.readouterr().out
    assert list(inspect_json(capsys, source)["left_out"]) == ["odd"]


def test_the_layer_drawn_is_the_first_of_the_commonest_kind() -> None:
    def drawn(preset: str, wanted: str | None = None) -> tuple[str, list[str]]:
        layer, tensors = layer_of(partition(build(preset)), wanted)
        return layer, [tensor.name.removeprefix(f"{layer}.") for tensor in tensors]

    layer, names = drawn("llama-2-7b")
    assert layer == "model.layers.0"
    assert names[:2] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert names[2:4] == ["self_attn.q_proj.weight", "self_attn.k_proj.weight"]
    assert len(names) == 9 + 2
    assert drawn("llama-2-7b", "model.layers.31")[0] == "model.layers.31"
    assert drawn("deepseek-v3")[0] == "model.layers.3"  # the first three have no experts
    assert drawn("t5-small")[0] == "decoder.block.1"  # the first of a stack has the positions' table
    alone = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    layer, tensors = layer_of(partition(alone))
    assert (layer, [t.name for t in tensors]) == ("", ["0.weight", "0.bias", "1.weight", "1.bias"])


@pytest.mark.parametrize("name", zoo.CASES)
def test_a_colour_is_a_block(name: str) -> None:
    with torch.device("meta"):
        model = zoo.CASES[name].build()[0]
    for entry in partition(model).values():
        tile = Tile(entry, "", 1.0)
        colours, index = tile.colours(), tile.index
        rows, columns = tile.shape
        assert index.shape[0] in (1, rows)
        assert index.shape[1] in (1, columns)
        assert colours.min() >= 0
        assert colours.max() <= 1
        pairs = torch.cat([index.flatten()[:, None], (colours.flatten(0, 1) * 1e9).round().long()], dim=1).unique(dim=0)
        assert len(pairs) == len(index.unique())  # one colour a block
        for axis in (0, 1):
            changes = index.diff(dim=axis) != 0
            assert torch.equal((colours.diff(dim=axis).abs() > 1e-6).any(-1), changes)
        if len(entry.shape) == 2:  # the whole tensor is drawn
            assert torch.equal(index.expand(entry.shape), entry.block_index.expand(entry.shape))
            assert not tile.stacked


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "vit"])
def test_the_picture_is_written(name: str, models: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "blocks.png"
    main(["inspect", f"{models}:{name}", "--plot", str(file), "--layer", _layer(name, "1")])
    assert f"models.py:{name}: " in capsys.readouterr().out
    pixels = imread(file)[..., :3]
    assert pixels.shape[1] > 2000
    coloured = (pixels.max(-1) - pixels.min(-1)) > 0.1
    assert 0.02 < coloured.mean() < 0.6


def _layer(name: str, number: str) -> str:
    names = zoo.CASES[name.replace("_", "-")].build()[0].named_parameters()
    return next(n.partition(f".{number}.")[0] + f".{number}" for n, _ in names if f".{number}." in n)


def test_the_bands_of_a_query_are_its_heads() -> None:
    with torch.device("meta"):
        model = zoo.CASES["llama"].build()[0]
    _, tensors = layer_of(partition(model))
    (axes,) = draw("a title", tensors, "model.layers.0").axes
    texts = [text.get_text() for text in axes.texts]
    for text in ("a title", "48 x 48, 6 blocks", "6 heads of 8 rows", "97 x 48, 97 blocks"):
        assert text in texts
    names = [text.get_text() for text in axes.texts if text.get_fontsize() == 8.5]
    drawn = dict(zip(names, (image.get_array() for image in axes.images), strict=True))
    # The embedding on the left, the output on the right, the layer between them.
    assert (names[0], names[-1]) == ("model.embed_tokens", "lm_head")
    bands = {name: int((array[1:] != array[:-1]).any(-1).sum()) + 1 for name, array in drawn.items()}
    assert bands["self_attn.q_proj"] == 6
    assert bands["self_attn.k_proj"] == 2
    assert bands["self_attn.v_proj"] == 16
    assert bands["input_layernorm"] == 1


def test_mistakes(models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the nearest presets are llama-3-8b" in failure(capsys, "inspect", "llama-3-8")
    command = ["inspect", f"{models}:llama", "--plot", "x.png", "--layer", "model.layer.1"]
    assert "no layer 'model.layer.1'; the nearest is model.layers.1" in failure(capsys, *command)
    message = failure(capsys, "inspect", f"{models}:llama", "--rule", "*.q_proj.weight=5 heads")
    assert "does not divide model.layers.0.self_attn.q_proj.weight of shape (48, 48)" in message
    assert "--rule 'PATTERN=BLOCKS'" in message
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert 'pip install "adam-mini-plugins[cli]"' in failure(capsys, "inspect", f"{models}:llama")
