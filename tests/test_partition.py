"""The blocks of models, against the models' own attention and against the contract's table."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
import torch
import zoo
from census import judge
from oracle import observe
from torch import nn

from adam_mini_plugins import Layout, Partition, PartitionError, partition

MODELS = {name: case.build for name, case in zoo.CASES.items()}


@pytest.mark.parametrize("name", zoo.CASES)
def test_blocks_are_what_the_models_own_attention_and_products_say(name: str) -> None:
    case = zoo.CASES[name]
    model, batch = case.build()
    seen = observe(model, lambda: model(**batch))
    assert seen.attentions == case.attentions
    assert judge(model, partition(model), seen) == ([], [])


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (
            ("*.1.*.q_proj.weight", "neuron"),
            "layers.1.self_attn.q_proj.weight (48, 48): custom 0: 48, but 6 heads",
        ),
        (("*.0.*.k_proj.weight", "4 heads"), "layers.0.self_attn.k_proj.weight (16, 48): custom 0: 4 (4), but 2 heads"),
        (("*.0.*.v_proj.weight", "2 heads"), "layers.0.self_attn.v_proj.weight (16, 48): custom 0: 2 (8), but 0 heads"),
        (("*.0.*.up_proj.weight", Layout.each_row(48, (1,))), "up_proj.weight (80, 48): blocks along (1,), which are"),
    ],
)
def test_the_judge_finds_blocks_that_are_wrong(rule: tuple, complaint: str) -> None:
    model, batch = MODELS["llama"]()
    seen = observe(model, lambda: model(**batch))
    (wrong,), _ = judge(model, partition(model, rules=[rule]), seen)
    assert complaint in wrong


@pytest.mark.parametrize("value", ["neuron", "whole"])
@pytest.mark.parametrize("scheme", ["hessian", "tensor"])
@pytest.mark.parametrize("name", zoo.CASES)
def test_every_element_lies_in_exactly_one_block(name: str, scheme: str, value: str) -> None:
    model, _ = MODELS[name]()
    blocks = partition(model, scheme=scheme, value=value)
    for parameter_name, parameter in model.named_parameters():
        index = blocks.block_index(parameter_name)
        counts = index.expand(parameter.shape).flatten().bincount()
        assert len(counts) == blocks.num_blocks(parameter_name)
        assert (counts > 0).all()
        assert counts.sum() == parameter.numel()
        if scheme == "tensor" and parameter.dim():
            assert blocks.num_blocks(parameter_name) == 1
    assert blocks.num_blocks() == sum(blocks.num_blocks(n) for n, _ in model.named_parameters())


def roles(name: str, **options: str) -> dict[str, tuple[str, int]]:
    """Role and number of blocks of each parameter of the first layer, and of all outside layers."""
    model, _ = MODELS[name]()
    blocks = partition(model, **options)
    return {n: (blocks[n].role, blocks.num_blocks(n)) for n in blocks}


def test_llama_as_the_contract_says() -> None:
    found = roles("llama")
    layer = "model.layers.1."
    assert found["model.embed_tokens.weight"] == ("embedding", 97)
    assert found["lm_head.weight"] == ("output", 97)
    assert found[layer + "self_attn.q_proj.weight"] == ("query", 6)
    assert found[layer + "self_attn.k_proj.weight"] == ("key", 2)
    assert found[layer + "self_attn.v_proj.weight"] == ("value", 16)
    assert found[layer + "self_attn.o_proj.weight"] == ("linear", 48)
    assert found[layer + "mlp.gate_proj.weight"] == ("linear", 80)
    assert found[layer + "mlp.down_proj.weight"] == ("linear", 48)
    assert found[layer + "input_layernorm.weight"] == ("vector", 1)


def test_other_roles_as_the_contract_says() -> None:
    gpt2 = roles("gpt2")
    assert gpt2["transformer.wpe.weight"][0] == "embedding"
    assert gpt2["transformer.h.0.attn.c_attn.weight"] == ("fused", 6 + 6 + 48)
    assert gpt2["transformer.h.0.attn.c_attn.bias"] == ("bias", 3 * 48)
    assert gpt2["transformer.h.0.mlp.c_fc.weight"] == ("linear", 4 * 48)
    assert gpt2["transformer.h.0.ln_1.bias"] == ("bias", 48)
    mixtral = roles("mixtral")
    assert mixtral["model.layers.0.mlp.experts.gate_up_proj"] == ("expert", 4 * 2 * 80)
    assert mixtral["model.layers.0.mlp.experts.down_proj"] == ("expert", 4 * 48)
    assert mixtral["model.layers.0.mlp.gate.weight"] == ("linear", 4)
    deepseek = roles("deepseek_v3-q_lora")
    attention = "model.layers.0.self_attn."
    assert deepseek[attention + "q_a_proj.weight"] == ("linear", 18)
    assert deepseek[attention + "q_b_proj.weight"] == ("query", 6)
    assert deepseek[attention + "kv_a_proj_with_mqa.weight"] == ("linear", 20)
    assert deepseek[attention + "kv_b_proj.weight"] == ("fused", 6 + 6 * 12)
    vit = roles("vit")
    assert vit["vit.embeddings.cls_token"] == ("vector", 1)
    assert vit["vit.embeddings.position_embeddings"] == ("embedding", 17)
    assert vit["vit.embeddings.patch_embeddings.projection.weight"] == ("conv", 1)
    assert vit["classifier.weight"] == ("output", 3)
    t5 = roles("t5")
    assert t5["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == ("embedding", 32)
    assert roles("bert-classes")["classifier.weight"] == ("output", 3)


def test_value_as_a_whole_is_one_block_also_inside_a_fused_tensor() -> None:
    assert roles("llama", value="whole")["model.layers.0.self_attn.v_proj.weight"] == ("value", 1)
    assert roles("gpt2", value="whole")["transformer.h.0.attn.c_attn.weight"] == ("fused", 6 + 6 + 1)
    neox = roles("gpt_neox", value="whole")["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert neox == ("fused", 6 + 6 + 1)
    deepseek = roles("deepseek_v3", value="whole")["model.layers.0.self_attn.kv_b_proj.weight"]
    assert deepseek == ("fused", 6 + 1)


def test_the_value_rows_between_interleaved_heads_are_one_block_a_row() -> None:
    model, _ = MODELS["gpt_neox"]()
    index = partition(model).block_index("gpt_neox.layers.0.attention.query_key_value.weight").flatten()
    rows = index.view(6, 3, 8)  # heads; query, key and value; rows of a head
    assert (rows[:, :2] == rows[:, :2, :1]).all()
    assert len(rows[:, 2].unique()) == 6 * 8
    assert len(rows.unique()) == 6 + 6 + 6 * 8


class Attention(nn.Module):
    """Attention that no library knows, with heads that can be read from it."""

    def __init__(self, width: int = 24, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


def test_a_model_of_ones_own_is_read_from_its_modules() -> None:
    blocks = partition(nn.Sequential(nn.Embedding(7, 24), Attention(), nn.Linear(24, 7)))
    assert blocks.scheme == "hessian"
    assert blocks["1.qkv.weight"].role == "fused"
    assert blocks.num_blocks("1.qkv.weight") == 4 + 4 + 24
    assert blocks.num_blocks("1.proj.weight") == 24


@pytest.mark.parametrize("kdim", [None, 10])
def test_torch_multihead_attention(kdim: int | None) -> None:
    attention = nn.MultiheadAttention(24, 4, kdim=kdim, vdim=kdim)
    blocks = partition(attention)
    if kdim is None:
        assert blocks.num_blocks("in_proj_weight") == 4 + 4 + 24
    else:
        assert (blocks["q_proj_weight"].role, blocks.num_blocks("q_proj_weight")) == ("query", 4)
        assert (blocks["k_proj_weight"].role, blocks.num_blocks("k_proj_weight")) == ("key", 4)
        assert (blocks["v_proj_weight"].role, blocks.num_blocks("v_proj_weight")) == ("value", 24)
    assert (blocks["in_proj_bias"].role, blocks.num_blocks("in_proj_bias")) == ("bias", 72)
    assert blocks.num_blocks("out_proj.weight") == 24


def test_auto_takes_one_block_a_tensor_for_a_model_without_attention() -> None:
    blocks = partition(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)))
    assert blocks.scheme == "tensor"
    assert blocks.num_blocks() == len(blocks) == 4


def test_tied_parameters_count_once_and_answer_to_each_name() -> None:
    model, _ = MODELS["gpt2"]()
    blocks = partition(model)
    assert "lm_head.weight" not in list(blocks)
    assert blocks["lm_head.weight"] is blocks["transformer.wte.weight"]
    assert blocks.name_of(model.lm_head.weight) == "transformer.wte.weight"
    assert partition(model, rules=[("lm_head.*", "tensor")]).num_blocks("transformer.wte.weight") == 1


def test_rules_come_first_and_in_order() -> None:
    model, _ = MODELS["llama"]()
    rules = [
        ("*.layers.0.*.q_proj.weight", "neuron"),
        ("*.q_proj.weight", "tensor"),
        ("*.k_proj.weight", Layout.groups(4, 4)),
        ("*.v_proj.weight", "8 heads"),
        ("*.norm.weight", "element"),
    ]
    blocks = partition(model, rules=rules)
    assert blocks.num_blocks("model.layers.0.self_attn.q_proj.weight") == 48
    assert blocks.num_blocks("model.layers.1.self_attn.q_proj.weight") == 1
    assert blocks.num_blocks("model.layers.1.self_attn.k_proj.weight") == 4
    assert blocks.num_blocks("model.layers.1.self_attn.v_proj.weight") == 8
    assert blocks.num_blocks("model.norm.weight") == 48
    assert blocks["model.norm.weight"].role == "custom"
    assert blocks.num_blocks("model.layers.1.mlp.up_proj.weight") == 80


def test_a_rule_by_neuron_finds_the_output_axis_of_conv1d() -> None:
    model, _ = MODELS["gpt2"]()
    blocks = partition(model, rules=[("*.c_fc.weight", "neuron")])
    assert blocks["transformer.h.0.mlp.c_fc.weight"].layout == Layout.each_row(192, (1,))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [("*.q_prj.weight", "neuron")],
            r"rule '\*\.q_prj\.weight' matches no parameter.*nearest is '.*q_proj.weight'",
        ),
        ([("*.q_proj.weight", "5 heads")], r"'5 heads', which does not divide .*q_proj.weight of shape \(48, 48\)"),
        ([("*.q_proj.weight", "rows")], r"gives 'rows'; it may give 'neuron', 'tensor', 'element'"),
        ([("*.q_proj.weight", Layout.each_row(7))], r"does not divide .* of shape \(48, 48\)"),
    ],
)
def test_rules_that_do_not_fit_are_errors(rules: list, message: str) -> None:
    model, _ = MODELS["llama"]()
    with pytest.raises(PartitionError, match=message):
        partition(model, rules=rules)


@pytest.mark.parametrize(("option", "given"), [("scheme", "heads"), ("value", "rows")])
def test_unknown_options_name_the_choices(option: str, given: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got '{given}'"):
        partition(nn.Linear(2, 2), **{option: given})


def test_heads_that_do_not_divide_the_rows_are_an_error_that_says_how_to_go_on() -> None:
    with pytest.raises(PartitionError) as error:
        partition(Attention(num_heads=5))
    assert "no blocks for qkv.weight of shape (72, 24), a 'weight' of Linear" in str(error.value)
    assert "72 rows are not 15 heads (Attention.num_heads: 5)" in str(error.value)
    assert "rules=[('qkv.weight', ...)]" in str(error.value)


def test_a_declared_head_dim_that_contradicts_the_shape_is_an_error() -> None:
    model, _ = MODELS["llama"]()
    model.model.layers[1].self_attn.head_dim = 9
    with pytest.raises(PartitionError, match=r"layers\.1\.self_attn\.q_proj.*48 rows are not 6 heads of 9 rows"):
        partition(model)


def test_attention_without_a_number_of_heads_is_an_error() -> None:
    attention = Attention()
    del attention.num_heads
    with pytest.raises(PartitionError, match="no number of heads was found: neither Attention nor a config has"):
        partition(attention)


def test_attention_that_is_not_understood_is_an_error_and_a_rule_mends_it() -> None:
    class StrangeAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha, self.beta = nn.Linear(8, 8), nn.Linear(8, 8)

    with pytest.raises(PartitionError, match=r"alpha\.weight.*StrangeAttention is called attention, but no query"):
        partition(StrangeAttention())
    blocks = partition(StrangeAttention(), rules=[("*.weight", "2 heads")])
    assert blocks.num_blocks("beta.weight") == 2


def test_an_unknown_matrix_beside_query_and_key_is_an_error() -> None:
    attention = Attention()
    attention.mystery = nn.Linear(24, 24)
    with pytest.raises(PartitionError, match="Attention holds a matrix 'mystery' whose part in attention is not known"):
        partition(attention)


def test_a_tensor_that_no_rule_fits_is_an_error_unless_it_is_frozen() -> None:
    model = Attention()
    model.odd = nn.Parameter(torch.zeros(2, 3, 4, 5))
    with pytest.raises(PartitionError, match=r"no blocks for odd of shape \(2, 3, 4, 5\).*none of the rules fits"):
        partition(model)
    model.odd.requires_grad_(False)
    blocks = partition(model)
    assert "odd" not in blocks
    assert "none of the rules fits" in blocks.left_out["odd"]


def test_an_expert_stack_whose_output_axis_cannot_be_told_is_an_error() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 2
            self.up = nn.Parameter(torch.zeros(2, 4, 6))

    model = nn.Sequential(Attention(), Experts())
    with pytest.raises(PartitionError, match="no is_transposed to say which of the last two axes"):
        partition(model)
    model[1].is_transposed = True
    assert partition(model)["1.up"].layout == Layout.each_row(12, (0, 2))
    model[1].is_transposed = False
    assert partition(model)["1.up"].layout == Layout.each_row(8, (0, 1))


def test_the_orientation_of_experts_follows_from_how_they_fit_together() -> None:
    class Experts(nn.Module):
        def __init__(self, *shapes: tuple[int, ...]) -> None:
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.zeros(3, *shape)) for shape in shapes)

    def layouts(*shapes: tuple[int, ...]) -> list[Layout]:
        blocks = partition(nn.Sequential(Attention(), Experts(*shapes)))
        return [blocks["1.up"].layout, blocks["1.down"].layout]

    assert layouts((20, 24), (24, 10)) == [Layout.each_row(60, (0, 1)), Layout.each_row(72, (0, 1))]
    assert layouts((24, 20), (10, 24)) == [Layout.each_row(60, (0, 2)), Layout.each_row(72, (0, 2))]
    with pytest.raises(PartitionError, match=r"its shapes don't tell: \(3, 24, 24\), \(3, 24, 24\)"):
        layouts((24, 24), (24, 24))


class Gated(nn.Module):
    """Queries with a gate beside them in each head, keys that say how many heads they have."""

    num_heads, num_key_value_heads, head_dim = 4, 2, 6

    def __init__(self, **more: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(24, 2 * 24), nn.Linear(24, 12)
        for name, module in more.items():
            self.add_module(name, module)


def test_a_gate_beside_the_query_is_cut_by_neuron() -> None:
    index = partition(Gated()).block_index("q_proj.weight").view(4, 2, 6)
    assert (index[:, 0] == index[:, 0, :1]).all()
    assert len(index[:, 1].unique()) == 24
    assert len(index.unique()) == 4 + 24


def test_what_an_attention_holds_beside_its_projections() -> None:
    blocks = partition(
        Gated(
            g_proj=nn.Linear(24, 24), mystery=nn.Linear(24, 4), layout_key=nn.Linear(24, 12), conv=nn.Conv1d(12, 12, 3)
        )
    )
    assert (blocks["g_proj.weight"].role, blocks.num_blocks("g_proj.weight")) == ("linear", 24)
    assert blocks.num_blocks("mystery.weight") == 4  # a row a head: nothing smaller could be one
    assert blocks.num_blocks("layout_key.weight") == 2
    assert (blocks["conv.weight"].role, blocks.num_blocks("conv.weight")) == ("conv", 1)
    with pytest.raises(PartitionError, match="holds a matrix 'strange_proj' whose part in attention is not known"):
        partition(Gated(strange_proj=nn.Linear(24, 5)))


def test_a_projection_that_is_wrapped_is_one() -> None:
    class Wrapped(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.inner = nn.Linear(24, rows)

    class Layer(nn.Module):
        num_heads = 4

        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = Wrapped(24), Wrapped(24)

    blocks = partition(Layer())
    assert blocks.scheme == "hessian"
    assert blocks.num_blocks("q_proj.inner.weight") == blocks.num_blocks("k_proj.inner.weight") == 4


def test_rates_of_a_recurrence_and_bare_tables() -> None:
    model = nn.Sequential(Attention())
    model.A_log, model.D = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6))
    model.pos_embed = nn.Parameter(torch.zeros(1, 3, 5, 24))
    model.text_projection = nn.Parameter(torch.zeros(24, 10))
    blocks = partition(model)
    assert blocks["A_log"].layout == Layout.each_row(6, (0,))
    assert blocks.num_blocks("D") == 1
    assert blocks["pos_embed"].layout == Layout.each_row(15, (0, 1, 2))
    assert blocks["text_projection"].layout == Layout.each_row(10, (1,))


def test_a_weight_that_is_normalised_has_its_blocks() -> None:
    model = nn.Sequential(Attention(), nn.utils.parametrizations.weight_norm(nn.Linear(24, 5)))
    blocks = partition(model)
    assert blocks.num_blocks("1.parametrizations.weight.original0") == 1
    assert blocks["1.parametrizations.weight.original1"].layout == Layout.each_row(5)


def test_an_unknown_name_gives_the_nearest() -> None:
    blocks = partition(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(KeyError, match=r"no parameter '0\.wight' in this partition; the nearest is '0\.weight'"):
        blocks.block_index("0.wight")


def test_the_table_has_a_line_for_each_kind_of_tensor() -> None:
    model, _ = MODELS["llama"]()
    lines = str(partition(model)).splitlines()
    assert lines[0] == "hessian partition: 21 tensors, 44,880 elements, 759 blocks"
    assert lines[1].split() == ["name", "shape", "role", "blocks", "why"]
    (query,) = (line for line in lines if "q_proj" in line)
    assert query.startswith("model.layers.0-1.self_attn.q_proj.weight")
    assert query.split()[1:4] == ["48x48", "query", "6"]
    assert query.endswith("6 heads of 8 rows: LlamaConfig.num_attention_heads")
    assert len(lines) == 2 + 12


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_holds_the_same_blocks(duplicate) -> None:
    model, _ = MODELS["gpt_neox"]()
    blocks = partition(model)
    other: Partition = duplicate(blocks)
    assert str(other) == str(blocks)
    assert [other[name] for name in other] == [blocks[name] for name in blocks]


@pytest.mark.parametrize(
    ("name", "config", "heads"),
    [
        (
            "Llama",
            {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
             "num_key_value_heads": 8, "vocab_size": 128256},
            {"layers.79.self_attn.q_proj": 64, "layers.79.self_attn.k_proj": 8},
        ),
        ("DeepseekV3", {}, {"layers.60.self_attn.q_b_proj": 128, "layers.60.mlp.experts.down_proj": 256 * 7168}),
    ],
)  # fmt: skip
def test_a_large_model_on_the_meta_device_costs_by_its_tensors_alone(name: str, config: dict, heads: dict) -> None:
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config))
    assert sum(p.numel() for p in model.parameters()) > 70e9
    start = time.process_time()
    blocks = partition(model)
    assert time.process_time() - start < 2  # 0.2 in earnest; this only guards against work on elements
    for projection, count in heads.items():
        tensor = f"model.{projection}" if "experts" in projection else f"model.{projection}.weight"
        assert blocks.num_blocks(tensor) == count
    assert len(pickle.dumps(blocks)) < 1000 * len(blocks)


@pytest.mark.parametrize(("name", "head"), [("llama", "lm_head.weight"), ("bert-classes", "classifier.weight")])
def test_a_wrapped_model_has_its_blocks_and_roles(name: str, head: str) -> None:
    model, _ = zoo.CASES[name].build()

    wrapped = partition(nn.ModuleDict({"model": model}))

    expected = {f"model.{e.name}": (e.role, e.layout) for e in partition(model).values()}
    assert {n: (wrapped[n].role, wrapped[n].layout) for n in wrapped} == expected
    assert wrapped[f"model.{head}"].role == "output"


def test_it_is_said_where_no_attention_is_known(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="adam_mini_plugins"):
        assert partition(nn.Sequential(nn.Linear(4, 4))).scheme == "tensor"
    assert [record.getMessage() for record in caplog.records] == [
        "no attention is known in Sequential: one block a tensor, by scheme='auto'"
    ]
