"""`partition(model, probe=batch)` on models that transformers does not know: heads are where the models' code says."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable

import numpy
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import zoo
from torch import Tensor, nn

from adam_mini_plugins import AdamMini, PartitionError, partition
from adam_mini_plugins.blocks.fit import fit_layout

WIDTH, HEADS, KEY_HEADS, DIM, TOKENS = 30, 6, 2, 5, 4  # no two of the counts that a layout has are the same


class Attention(nn.Module):
    """Attention whose queries and keys a case makes; the scores and the rest are the same for all."""

    def __init__(self, rows: int = 3 * WIDTH) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, rows, bias=False)
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (batch, heads, tokens, dim)."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend(*self.heads(x))
        return self.last(heads.transpose(1, 2).flatten(2))


class NanoGPT(Attention):
    """One linear layer; query, key and value one after another."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in self.mix(x).split(WIDTH, dim=2))
        return q, k, v


class ByHand(NanoGPT):
    """No attention function: scores, a mask, a softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / DIM**0.5
        hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


class Flattened(NanoGPT):
    """Batch and heads in one axis, as for ``baddbmm``; a bias of positions added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(TOKENS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [part.reshape(-1, TOKENS, DIM) for part in (q, k, v)]
        bias = self.positions.expand(len(flat[0]), TOKENS, -1)
        scores = torch.baddbmm(bias, flat[0], flat[1].mT)
        return torch.bmm(F.softmax(scores, dim=-1), flat[2]).view(q.shape)


class Ordered(Attention):
    """Rows in an order that an einops pattern could give: head, part and dimension in any order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = {"p": 3, "h": HEADS, "d": DIM}
        rows = self.mix(x).unflatten(-1, [sizes[letter] for letter in self.order])
        q, k, v = torch.einsum(f"bt{self.order}->pbhtd", rows)
        return q, k, v


class Grouped(Attention):
    """Key/value heads that are repeated before attention sees them, scaled by a norm over all heads."""

    def __init__(self) -> None:
        super().__init__((HEADS + 2 * KEY_HEADS) * DIM)
        self.norm = nn.RMSNorm(WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.mix(x).split((WIDTH, KEY_HEADS * DIM, KEY_HEADS * DIM), dim=2)
        q = self.norm(q) * q.pow(2).mean(-1, keepdim=True).rsqrt()
        q, k, v = (part.unflatten(-1, (-1, DIM)).transpose(1, 2) for part in (q, k, v))
        return q, k.repeat_interleave(HEADS // KEY_HEADS, 1), v.repeat_interleave(HEADS // KEY_HEADS, 1)


class Transposed(Attention):
    """A bare weight (in, out) on the right of ``@``."""

    def __init__(self) -> None:
        super().__init__()
        del self.mix
        self.mix = nn.ParameterDict({"weight": nn.Parameter(torch.randn(WIDTH, 3 * WIDTH))})

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x @ self.mix["weight"]).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        return q, k, v


class Einsum(nn.Module):
    """Weights (heads, in, dim) and scores by einsum, tokens before heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(HEADS, WIDTH, DIM)) for _ in range(3))
        self.out = nn.Parameter(torch.randn(HEADS, DIM, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bte,hed->bthd", x, w) for w in (self.q, self.k, self.v))
        probabilities = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(dim=-1)
        return torch.einsum("bhqk,bkhd,hde->bqe", probabilities, v, self.out)


class Functional(nn.Module):
    """torch's functional attention over weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(3 * WIDTH, WIDTH))])
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        none = {"in_proj_bias": None, "bias_k": None, "bias_v": None, "out_proj_bias": None}
        settings = {"add_zero_attn": False, "dropout_p": 0.0, "training": self.training, "need_weights": False}
        weights = {"in_proj_weight": self.weights[0], "out_proj_weight": self.last.weight}
        return F.multi_head_attention_forward(x, x, x, WIDTH, HEADS, **none, **settings, **weights)[0]


def batch() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def blocks_of(rows: Callable[[int], tuple], count: int) -> list[int]:
    """Numbers the blocks of rows by what tells them apart."""
    numbers: dict[tuple, int] = {}
    return [numbers.setdefault(rows(row), len(numbers)) for row in range(count)]


def by_part(row: int, keys: int = HEADS) -> tuple:
    """Query, key and value one after another."""
    if row < WIDTH:
        return "q", row // DIM
    return ("k", (row - WIDTH) // DIM) if row < WIDTH + keys * DIM else ("v", row)


def by_order(order: str) -> Callable[[int], tuple]:
    sizes = {"p": 3, "h": HEADS, "d": DIM}
    digits = list(itertools.product(*(range(sizes[letter]) for letter in order)))

    def block(row: int) -> tuple:
        at = dict(zip(order, digits[row]))
        return ("qkv"[at["p"]], at["h"], at["d"] if at["p"] == 2 else None)

    return block


ORDERS = ["".join(order) for order in itertools.permutations("phd")]
FUSED: dict[str, tuple[Callable[[], nn.Module], str, Callable[[int], tuple], int]] = {
    "nanogpt": (NanoGPT, "mix.weight", by_part, 0),
    "by hand": (ByHand, "mix.weight", by_part, 0),
    "flattened": (Flattened, "mix.weight", by_part, 0),
    "grouped": (Grouped, "mix.weight", lambda row: by_part(row, KEY_HEADS), 0),
    "transposed": (Transposed, "mix.weight", by_part, 1),
    "functional": (Functional, "weights.0", by_part, 0),
    "torch": (lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), "in_proj_weight", by_part, 0),
    **{order: (lambda order=order: Ordered(order), "mix.weight", by_order(order), 0) for order in ORDERS},
}


def run(model: nn.Module) -> Callable[[], object]:
    is_torch = isinstance(model, nn.MultiheadAttention)
    return lambda: model(batch(), batch(), batch()) if is_torch else model(batch())


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_weight_is_cut_as_the_code_of_the_model_does(name: str) -> None:
    build, weight, block, axis = FUSED[name]
    model = build()

    blocks = partition(model, probe=run(model))

    assert blocks[weight].role == "fused"
    index = blocks.block_index(weight)
    assert index.shape[1 - axis] == 1
    rows = index.flatten().tolist()
    expected = blocks_of(block, len(rows))
    assert blocks_of(lambda row: (rows[row],), len(rows)) == expected


def test_weights_of_three_axes_have_a_block_a_head() -> None:
    model = Einsum()

    blocks = partition(model, probe=batch(), rules=[("v", "tensor"), ("out", "tensor")])

    for name in ("q", "k"):
        assert blocks.block_index(name).flatten().tolist() == list(range(HEADS))
        assert blocks.block_index(name).shape == (HEADS, 1, 1)
    assert [blocks[name].role for name in ("q", "k")] == ["query", "key"]


@pytest.mark.parametrize("name", ["nanogpt", "by hand", "flattened"])
def test_the_value_can_be_one_block(name: str) -> None:
    model = FUSED[name][0]()

    assert partition(model, probe=batch(), value="whole").num_blocks("mix.weight") == 2 * HEADS + 1
    assert partition(model, probe=batch()).num_blocks("mix.weight") == 2 * HEADS + WIDTH


@pytest.mark.parametrize("name", ["llama-head_dim", "falcon-new", "t5-head_dim", "gpt2-cross", "vit"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_the_probe_sees_is_what_structure_says(name: str, attention: str) -> None:
    """The two ways share nothing but the form of their answer."""
    model, inputs = zoo.CASES[name].build()
    model.set_attn_implementation(attention)

    seen, told = partition(model, probe=inputs), partition(model)

    assert {n: str(seen[n].layout) for n in seen} == {n: str(told[n].layout) for n in told}
    looked_up = {n for n in seen if "seen in attention" in seen[n].why}
    assert looked_up == {n for n in told if told[n].role in ("query", "key", "fused")}


@pytest.mark.parametrize(
    "probe",
    [
        lambda model: batch(),
        lambda model: (batch(),),
        lambda model: {"x": batch()},
        lambda model: lambda: model(batch()),
    ],
    ids=["tensor", "arguments", "keywords", "callable"],
)
def test_a_probe_may_be(probe: Callable) -> None:
    model = NanoGPT()
    assert partition(model, probe=probe(model)).num_blocks("mix.weight") == 2 * HEADS + WIDTH


def test_frozen_weights_are_seen_and_stay_frozen() -> None:
    model = NanoGPT().requires_grad_(False)
    model.last.weight.requires_grad_(True)

    assert partition(model, probe=batch()).num_blocks("mix.weight") == 2 * HEADS + WIDTH
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["last.weight"]


def test_bfloat16() -> None:
    assert partition(NanoGPT().bfloat16(), probe=batch().bfloat16()).num_blocks("mix.weight") == 2 * HEADS + WIDTH


def test_the_optimizer_takes_a_probe() -> None:
    optimizer = AdamMini.for_model(NanoGPT(), probe=batch())
    assert optimizer.partition.num_blocks("mix.weight") == 2 * HEADS + WIDTH


class Restless(NanoGPT):
    """Everything that a forward pass can leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(TOKENS)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))
        self.generator = torch.Generator().manual_seed(3)
        self.count, self.seen, self.cache = 0, [1], {"a": 1}

    def forward(self, x: Tensor) -> Tensor:
        self.train()
        x = self.dropout(self.norm(x)) + torch.randn(x.shape, generator=self.generator)
        self.calls += random.random() + numpy.random.random()
        self.count += 1
        self.seen.append(self.count)
        self.cache["b"] = x
        self.new = x
        return super().forward(x)


def test_the_model_comes_back_as_it_went_in() -> None:
    model = Restless().eval()
    model.mix.weight.grad = torch.ones_like(model.mix.weight)
    gradient, seen = model.mix.weight.grad, model.seen
    before = copy.deepcopy(model.state_dict())
    states = (torch.get_rng_state(), model.generator.get_state(), random.getstate(), numpy.random.get_state()[1].copy())

    partition(model, probe=batch())

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert (model.count, model.seen, model.cache) == (0, [1], {"a": 1})
    assert model.seen is seen
    assert not hasattr(model, "new")
    assert model.mix.weight.grad is gradient
    assert gradient.eq(1).all()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(model.generator.get_state(), states[1])
    assert random.getstate() == states[2]
    assert (numpy.random.get_state()[1] == states[3]).all()


def test_a_rejected_batch_leaves_the_model_as_it_was() -> None:
    model = Restless()
    with pytest.raises(PartitionError, match=r"Restless could not be run on the probe: RuntimeError: .*7"):
        partition(model, probe=torch.randn(2, TOKENS, 7))
    assert model.training
    assert model.count == 0


def test_a_model_without_weights_can_not_be_probed() -> None:
    with torch.device("meta"):
        model = NanoGPT()
    with pytest.raises(PartitionError, match=r"mix\.weight of NanoGPT is on the meta device"):
        partition(model, probe=batch())


def test_a_model_without_attention_has_nothing_to_see() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softmax(-1))
    with pytest.raises(PartitionError, match="the probe has seen no attention in Sequential"):
        partition(model, probe=batch())


def test_weights_that_are_not_finite_are_an_error() -> None:
    model = NanoGPT()
    model.mix.weight.data.fill_(float("nan"))
    with pytest.raises(PartitionError, match="not finite"):
        partition(model, probe=batch() * float("inf"))


def test_rows_without_a_pattern_are_an_error_that_names_the_way_out() -> None:
    class Shuffled(NanoGPT):
        def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            order = torch.randperm(3 * WIDTH, generator=torch.Generator().manual_seed(0))
            q, k, v = self.mix(x)[..., order].unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
            return q, k, v

    with pytest.raises(PartitionError, match=r"mix\.weight .*no regular pattern.*rules="):
        partition(Shuffled(), probe=batch())


def test_without_a_probe_the_error_names_it() -> None:
    with pytest.raises(PartitionError, match=r"SelfAttention is called attention.*probe="):
        partition(_unknown_attention())
    assert partition(_unknown_attention(), probe=batch()).num_blocks("mixing.weight") == 2 * HEADS + WIDTH


def _unknown_attention() -> nn.Module:
    class SelfAttention(NanoGPT):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = self.mix
            del self.mix

        def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = self.mixing(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
            return q, k, v

    return SelfAttention()


def test_a_partition_of_another_model_is_refused() -> None:
    blocks = partition(NanoGPT(), probe=batch())
    with pytest.raises(ValueError, match=r"weight"):
        AdamMini(Grouped().named_parameters(), partition=blocks)


@pytest.mark.parametrize(
    "text", ["0: (64) 8", "0: 8 | (4) + 8 | (4) + 8 | 4", "0: 2 (2) 2 (3)", "1: 6 (5) + 2 (5) + 10"]
)
def test_a_closed_form_is_found_again(text: str) -> None:
    from adam_mini_plugins import Layout

    layout = Layout.parse(text)
    index = layout.block_index(torch.Size([1] * layout.axes[0] + [layout.rows])).flatten().tolist()
    starts = list(itertools.accumulate((grid.num_blocks for grid in layout.grids), initial=0))
    kinds = [str(sum(block >= start for start in starts)) for block in index]

    assert str(fit_layout(kinds, index, layout.axes[0])) == text


# Public libraries whose models are not transformers' own.


def _litgpt() -> tuple[nn.Module, str, int, int]:
    litgpt = pytest.importorskip("litgpt", reason="pip install litgpt")
    config = litgpt.Config(
        n_layer=1,
        n_embd=WIDTH,
        n_head=HEADS,
        n_query_groups=KEY_HEADS,
        vocab_size=50,
        block_size=16,
        padded_vocab_size=50,
    )
    return litgpt.GPT(config), "transformer.h.0.attn.qkv.weight", HEADS, KEY_HEADS


@pytest.mark.slow
def test_litgpt() -> None:
    model, name, heads, keys = _litgpt()
    blocks = partition(model, probe=torch.arange(8).view(2, 4))
    dim = model.config.head_size
    rows = blocks.block_index(name).flatten().tolist()

    def block(row: int) -> tuple:
        head = row // dim
        if head < heads:
            return "q", head
        return ("k", head) if head < heads + keys else ("v", row)

    assert blocks_of(lambda row: (rows[row],), len(rows)) == blocks_of(block, len(rows))


@pytest.mark.slow
def test_x_transformers() -> None:
    library = pytest.importorskip("x_transformers", reason="pip install x-transformers")
    layers = library.Decoder(
        dim=WIDTH, depth=1, heads=HEADS, attn_dim_head=DIM, attn_kv_heads=KEY_HEADS, rotary_pos_emb=False
    )
    model = library.TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers)

    blocks = partition(model, probe=torch.arange(8).view(2, 4))

    by_role = {blocks[name].role: (name, str(blocks[name].layout)) for name in blocks}
    assert by_role["query"][1] == f"0: {HEADS} ({DIM})"
    assert by_role["key"][1] == f"0: {KEY_HEADS} ({DIM})"


def test_a_softmax_without_an_axis_is_passed_over() -> None:
    class Old(NanoGPT):
        def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with pytest.warns(UserWarning, match="Implicit dimension"):
                F.softmax(x)
            return super().heads(x)

    assert partition(Old(), probe=batch()).num_blocks("mix.weight") == 2 * HEADS + WIDTH
