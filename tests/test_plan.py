"""What is predicted, against what the optimizers themselves hold after a step, and against published figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import zoo
from peft import LoraConfig, get_peft_model
from test_hf import arguments, trainer_for
from torch import Tensor, nn

from adam_mini_plugins import AdamMini, partition
from adam_mini_plugins.callbacks.hf import OptimizerMemoryCallback
from adam_mini_plugins.cli import main
from adam_mini_plugins.cli.presets import PRESETS
from adam_mini_plugins.cli.sources import build
from adam_mini_plugins.memory import measure, storage_bytes
from adam_mini_plugins.planning import Prediction, predict

MODELS = ("llama", "gpt2", "mixtral", "bert", "t5", "vit")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def on_meta(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        return zoo.CASES[name].build()[0].to(dtype)


def predicted(model: nn.Module, **options: object) -> dict[str, Prediction]:
    return {p.optimizer: p for p in predict(model, partition(model), **options)}


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon as its documentation has it: hidden matrices; AdamW for embeddings, the output and all else."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    heads = [model.get_output_embeddings()] if model.get_output_embeddings() else [getattr(model, "classifier", None)]
    apart = {id(p) for p in [*tables, *(head.weight for head in heads if head is not None)]}
    apart |= {id(p) for n, p in model.named_parameters() if n.endswith(("_token", "position_embeddings"))}
    hidden = [p for p in model.parameters() if p.ndim == 2 and id(p) not in apart]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    return [torch.optim.Muon(hidden), torch.optim.AdamW(rest)]


def bitsandbytes(name: str) -> Callable[[nn.Module], list[torch.optim.Optimizer]]:
    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        module = pytest.importorskip("bitsandbytes", reason="without bitsandbytes there is nothing to compare with")
        return [getattr(module.optim, name)(model.parameters())]

    return make


OPTIMIZERS: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    "Adam-mini": lambda model: [AdamMini.for_model(model)],
    "AdamW": lambda model: [torch.optim.AdamW(model.parameters())],
    "8-bit AdamW": bitsandbytes("AdamW8bit"),
    # As transformers' trainer makes it.
    "Adafactor": lambda model: [
        transformers.Adafactor(model.parameters(), lr=1e-3, scale_parameter=False, relative_step=False)
    ],
    "Lion": bitsandbytes("Lion"),
    "Muon": muon,
}


def stepped(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> int:
    """The bytes that optimizers hold after a step."""
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    state = 0
    for optimizer in optimizers:
        optimizer.step()
        state += measure(optimizer).state_bytes
    return state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_state_is_predicted_to_the_byte(name: str, dtype: str, optimizer: str) -> None:
    model = zoo.CASES[name].build()[0].to(DTYPES[dtype])
    measured = stepped(OPTIMIZERS[optimizer](model), model)
    plan = predicted(on_meta(name, DTYPES[dtype]))
    assert list(plan) == list(OPTIMIZERS)
    assert plan[optimizer].state == measured
    assert plan[optimizer].weights == storage_bytes(model.parameters())
    assert plan[optimizer].gradients == storage_bytes(p.grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_frozen_and_tied_parameters(dtype: torch.dtype) -> None:
    def make() -> nn.Module:
        cls, config = transformers.LlamaForCausalLM, transformers.LlamaConfig(**zoo.DECODER, tie_word_embeddings=True)
        model = get_peft_model(cls(config).to(dtype), LoraConfig(r=4, target_modules="all-linear"))
        model.get_input_embeddings().weight.requires_grad_()  # which is the head's as well
        return model

    model = make()
    with torch.device("meta"):
        twin = make()
    for state_dtype in (None, "bfloat16"):
        measured = stepped([AdamMini.for_model(model, state_dtype=state_dtype)], model)
        assert predicted(twin, state_dtype=state_dtype)["Adam-mini"].state == measured
    plan = predicted(twin)["AdamW"]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert plan.state == stepped([torch.optim.AdamW(trainable)], model)
    assert plan.gradients == sum(p.nbytes for p in trainable)
    assert plan.weights == storage_bytes(model.parameters())
    assert plan.total == plan.weights + plan.gradients + plan.state


@pytest.mark.parametrize("optim", ["adam_mini", "adamw_torch"])
def test_it_is_what_the_callback_measures_in_a_trainer(tmp_path: Path, optim: str) -> None:
    memory = OptimizerMemoryCallback()
    trainer_for("llama", arguments(tmp_path, optim=optim), callbacks=[memory]).train()
    plan = predicted(on_meta("llama"))
    assert memory.memory.state_bytes == plan["Adam-mini" if optim == "adam_mini" else "AdamW"].state
    assert memory.memory.adamw_state_bytes == plan["AdamW"].state


def test_it_is_what_the_demo_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root / "examples")
    import pretrain

    record = json.loads((root / "docs" / "pretrain.json").read_text())
    words = record["arguments"]["vocab_size"]
    tokenizer = SimpleNamespace(get_vocab_size=lambda: words, token_to_id=lambda token: 0)
    with torch.device("meta"):
        model = pretrain.build_model(SimpleNamespace(**record["arguments"]), tokenizer)
    plan = predicted(model)
    measured = {run["optim"]: run["state_bytes"] for run in record["runs"]}
    assert measured == {"adam_mini": plan["Adam-mini"].state, "adamw_torch": plan["AdamW"].state}


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_a_shard_is_what_fsdp_gives_to_the_first_process(shards: int) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = zoo.CASES["llama"].build()[0]
    plan = predicted(on_meta("llama"), shards=shards)
    blocks = partition(model)
    rows = {name: blocks.block_index(name).shape for name in blocks}
    init_process_group("fake", store=FakeStore(), rank=0, world_size=shards)
    try:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (shards,)))
        local = {name: p.to_local().detach().clone() for name, p in model.named_parameters()}
    finally:
        destroy_process_group()
    parts: list[Tensor] = list(local.values())
    for part in parts:
        part.requires_grad_().grad = torch.ones_like(part)
    adamw = torch.optim.AdamW(parts)
    adamw.step()
    assert plan["AdamW"].state == measure(adamw).state_bytes
    assert plan["AdamW"].weights == plan["AdamW"].gradients == sum(part.nbytes for part in parts)
    # Adam-mini's second moment has a number a row, and every first axis of a Llama's tensors is rows or one vector.
    assert all(len(shape) == 1 or shape[1:].numel() == 1 for shape in rows.values())
    assert plan["Adam-mini"].state == sum(part.nbytes + 4 * len(part) + 4 for part in parts)


def test_where_rows_are_another_axis_each_process_holds_all_of_them() -> None:
    plan = predicted(transformers.pytorch_utils.Conv1D(nf=6, nx=10), shards=4)  # weight (10, 6), a column an output
    weight, bias = 4 * 3 * 6, 4 * 2
    assert plan["Adam-mini"].weights == weight + bias
    # The default scheme for what has no attention is one block a tensor, kept as a number a row of the first axis.
    assert plan["Adam-mini"].state == weight + 4 * 3 + 4 + bias + 4 * 2 + 4
    model = transformers.pytorch_utils.Conv1D(nf=6, nx=10)
    (hessian, *_) = predict(model, partition(model, scheme="hessian"), shards=4)
    assert hessian.state == weight + 4 * 6 + 4 + bias + 4 * 2 + 4


# As their makers count them: model cards, the sizes of published checkpoints (of deepseek-v3 less the 58 x 256
# biases that balance its experts, which are buffers here).
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "deepseek-v3": 671_026_419_200 - 58 * 256,
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "vit-base": 86_567_656,
    "vit-large": 304_326_632,
}


def test_presets_have_as_many_parameters_as_was_published() -> None:
    assert {name: sum(p.numel() for p in build(name).parameters()) for name in PRESETS} == PUBLISHED


def plan_json(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    main(["plan", *options, "--json"])
    return json.loads(capsys.readouterr().out)


# The paper's Table 1, in GB of 10^9 bytes; its "Llama 2 1B" is the size of TinyLlama, 1.1 thousand million.
TABLE_1 = {"gpt2-xl": 12.48, "tinyllama-1.1b": 8.80, "llama-2-7b": 53.92, "llama-2-13b": 104.16}


@pytest.mark.parametrize("preset", TABLE_1)
def test_the_papers_table_1(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = plan_json(capsys, preset, "--dtype", "fp32")
    assert (record["unit"], record["dtype"], record["shards"]) == ("bytes", "fp32", 1)
    state = {p["optimizer"]: p["state"] for p in record["optimizers"]}
    assert state["AdamW"] / 1e9 == pytest.approx(TABLE_1[preset], rel=0.01)
    assert 0.5 < state["Adam-mini"] / state["AdamW"] <= 0.5010


def test_options_reach_the_prediction(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**zoo.DECODER, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    model = on_meta("llama")
    for dtype in ("fp32", "bf16-mixed"):
        record = plan_json(capsys, str(tmp_path), "--dtype", dtype, "--shards", "3")
        assert record["optimizers"] == [p.as_dict() for p in predict(model, partition(model), shards=3)]
    model = on_meta("llama", torch.bfloat16)
    record = plan_json(capsys, str(file), "--dtype", "bf16", "--state-dtype", "float32")
    assert record["optimizers"] == [p.as_dict() for p in predict(model, partition(model), state_dtype="float32")]
    adapted = get_peft_model(zoo.CASES["llama"].build()[0].bfloat16(), LoraConfig(r=4, target_modules="all-linear"))
    record = plan_json(capsys, str(file), "--dtype", "bf16", "--lora", "4")
    assert record["lora_rank"] == 4
    assert record["model"]["class"] == "LlamaForCausalLM"
    assert record["model"]["trainable"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert record["optimizers"] == [p.as_dict() for p in predict(adapted, partition(adapted))]


def test_the_table_has_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "llama-2-7b"])
    out = capsys.readouterr().out
    model = build("llama-2-7b")
    plan, adamw, *_ = predict(model, partition(model))
    shown = [f"{number / 1e9:.2f}" for number in (plan.weights, plan.gradients, plan.state, plan.total)]
    shown.append(f"{plan.state / adamw.state:.2%}")
    (line,) = (line for line in out.splitlines() if "Adam-mini" in line)
    assert line.split() == ["Adam-mini", *shown, "adam_mini_plugins.AdamMini"]
    assert "llama-2-7b: LlamaForCausalLM, 6,738,415,616 parameters" in out
    assert "GB = 10^9 bytes" in out


def test_the_chart_draws_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from adam_mini_plugins.cli.plan import chart

    main(["plan", "gpt2", "--json", "--plot", str(tmp_path / "plan.png")])
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(capsys.readouterr().out)
    predictions = predict(build("gpt2"), partition(build("gpt2")))
    (axes,) = chart(record["model"], "fp32", predictions).axes
    drawn = [[bar.get_width() * 1e9 for bar in bars] for bars in axes.containers]
    for bars, part in zip(drawn, ("weights", "gradients", "state"), strict=True):
        assert bars == pytest.approx([p[part] for p in record["optimizers"]])
    assert [label.get_text() for label in axes.get_yticklabels()] == list(OPTIMIZERS)


def failure(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command that fails writes to stderr; it writes nothing else."""
    with pytest.raises(SystemExit) as exit_status:
        main(command)
    assert exit_status.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert "Traceback" not in written.err
    return written.err


FACTORIES = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

def raises():
    raise KeyError("no such dataset")

def exits():
    raise SystemExit("usage: train.py")

def values():
    return nn.Linear(int(torch.ones(()).item()), 2)

number = lambda: 3
empty = nn.Identity
lazy = lambda: nn.LazyLinear(3)
frozen = lambda: nn.Linear(2, 2).requires_grad_(False)
headless = Attention
model = nn.Linear(3, 5, bias=False)
"""

MISTAKES = {
    "lama-3-70b": "no preset and no path 'lama-3-70b'; the nearest presets are llama-3-70b,",
    "zzz": "no preset and no path 'zzz'. A model is a preset,",
    "nothing/config.json": "no preset and no path 'nothing/config.json'",
    "folder": "the folder 'folder' has no config.json",
    "models.py": "'models.py' is not a config.json; for a model that it makes: models.py:FUNCTION",
    "models.py:raises": "models.py:raises(): KeyError: 'no such dataset'\n  at {models}:11, in raises",
    "models.py:exits": "models.py:exits(): SystemExit: usage: train.py\n  at {models}:14, in exits",
    "models.py:values": "models.py:17, in values",
    "models.py:number": "models.py:number returned a int; what is needed is a torch.nn.Module",
    "models.py:torch": "models.py:torch is a module; what is needed is a torch.nn.Module",
    "models.py:numbers": "models.py has no 'numbers'; it has 'number'",
    "models.py:empty": "Identity has no parameters",
    "models.py:lazy": "LazyLinear has lazy layers, whose shapes a first batch decides",
    "models.py:frozen": "Linear has no parameter to train: all 2 are frozen",
    "models.py:headless": "no blocks for q_proj.weight of shape (8, 8), a 'weight' of Linear: no number of heads was",
    "broken.py:model": "importing broken.py: ZeroDivisionError: division by zero\n  at {broken}:1, in <module>",
    "missing.py:model": "no file 'missing.py'",
    "no_such_package.models:make": "importing no_such_package.models: ModuleNotFoundError: No module named",
    "broken.json": "broken.json",
    "headless.json": "num_attention_heads",
    "typeless.json": "Should have a `model_type` key",
    "classless.json": "has no class NoSuchLM; if it is code of your own, give a function that returns the model",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = {**zoo.DECODER, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    files = {
        "models.py": FACTORIES,
        "broken.py": "1 / 0",
        "broken.json": "{",
        "headless.json": json.dumps({**config, "num_attention_heads": None}),
        "typeless.json": json.dumps(zoo.DECODER),
        "classless.json": json.dumps({**config, "architectures": ["NoSuchLM"]}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize("source", MISTAKES)
def test_a_mistake_is_named_and_the_exit_status_is_2(
    source: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = failure(capsys, "plan", source)
    assert message.startswith("adam-mini plan: ")
    expected = MISTAKES[source].format(models=folder / "models.py", broken=folder / "broken.py")
    assert expected in message


def test_options_out_of_range(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--shards: must be 1 or more, got 0" in failure(capsys, "plan", "gpt2", "--shards", "0")
    assert "--rule: must be PATTERN=BLOCKS" in failure(capsys, "plan", "gpt2", "--rule", "16 heads")
    assert "matches no parameter" in failure(capsys, "plan", "models.py:model", "--rule", "x=neuron")
    assert "state_dtype must be a floating-point dtype" in failure(capsys, "plan", "gpt2", "--state-dtype", "int8")
    assert "can't be written to 'no/plan.png'" in failure(capsys, "plan", "gpt2", "--plot", "no/plan.png")
    assert "can't be written to 'plan.zzz'" in failure(capsys, "plan", "gpt2", "--plot", "plan.zzz")
    assert "LoRA: NoMatchingPeftModuleError: No modules were targeted" in failure(
        capsys, "plan", "models.py:model", "--lora", "4"
    )
    with pytest.raises(ValueError, match="shards must be 1 or more, got 0"):
        predicted(on_meta("llama"), shards=0)


def test_models_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "package").mkdir()
    (folder / "package" / "inner.py").write_text(FACTORIES)
    (folder / "json.py").write_text(FACTORIES)
    for source in ("json.py:model", "models:model", "package.inner:model", str(folder / "models.py") + ":model"):
        record = plan_json(capsys, source)
        assert record["model"] == {"source": source, "class": "Linear", "parameters": 15, "trainable": 15}
    assert sys.modules["json"] is json
    assert torch.empty(()).device.type == "cpu"  # nothing is left of the meta device


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        (None, "LlamaForCausalLM"),
    ],
)
def test_the_class_is_the_configs_or_the_commonest_with_a_head(
    architectures: list[str] | None, expected: str, folder: Path
) -> None:
    (folder / "config.json").write_text(
        json.dumps({**zoo.DECODER, "model_type": "llama", "architectures": architectures})
    )
    model = build(".")
    assert type(model).__name__ == expected
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("transformers", ["plan", "gpt2"], "cli"),
        ("rich.console", ["plan", "gpt2"], "cli"),
        ("matplotlib.figure", ["plan", "gpt2", "--plot", "plan.png"], "cli"),
        ("peft", ["plan", "gpt2", "--lora", "4"], "peft"),
    ],
)
def test_a_missing_package_is_named(
    module: str, command: list[str], extra: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert f'pip install "adam-mini-plugins[{extra}]"' in failure(capsys, *command)


def test_a_model_of_ones_own_needs_torch_alone_and_help_says_much(folder: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('transformers', 'rich', 'matplotlib', 'peft')))\n"
        "from adam_mini_plugins.cli import main\n"
        "try: main(['plan', '--help'])\n"
        "except SystemExit: print('---')\n"
        "main(['plan', 'models.py:model', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    help_text, _, record = done.stdout.partition("---\n")
    assert "llama-3-70b" in help_text, done.stderr
    assert json.loads(record)["model"]["parameters"] == 15
