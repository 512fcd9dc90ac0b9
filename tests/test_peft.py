"""Every tuner that PEFT ships trains, with the blocks that the contract gives its tensors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import zoo
from test_hf import Batches, arguments, inner
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

peft = pytest.importorskip("peft", reason="the peft extra is not installed")
import peft_zoo  # noqa: E402  after the check that PEFT is there

from adam_mini_plugins import AdamMini, PartitionError, partition  # noqa: E402


def test_every_tuner_of_the_installed_peft_is_tried_or_has_a_reason() -> None:
    tried = {case.peft_type for case in peft_zoo.CASES.values()}
    assert tried | set(peft_zoo.CANNOT) == {kind.value for kind in peft.PeftType}
    assert not tried & set(peft_zoo.CANNOT)
    assert len(peft_zoo.CANNOT) <= 1
    assert not peft_zoo.NOT_IN_THIS_PEFT


@pytest.mark.parametrize("name", peft_zoo.CASES)
def test_a_tuner_trains_and_its_blocks_tile_its_tensors(name: str) -> None:
    model, batch = peft_zoo.CASES[name].build()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamMini.for_model(model, lr=1e-2)
    before = copy.deepcopy(trainable)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch).loss
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
    moved = [n for n, p in trainable.items() if p.grad is not None and p.grad.any()]
    assert moved
    for n, p in trainable.items():
        assert p.isfinite().all(), n
        assert n not in moved or not torch.equal(p, before[n]), n
        counts = optimizer.partition.block_index(n).expand(p.shape).flatten().bincount()
        assert (counts > 0).all()
        assert (len(counts), counts.sum()) == (optimizer.partition.num_blocks(n), p.numel())
    assert set(optimizer.state) <= set(trainable.values())


def lora_b(name: str, layer: str) -> torch.Tensor:
    """The block of each row of LoRA's B of a layer, counted from 0 in the order of the rows."""
    model, _ = peft_zoo.CASES[name].build()
    blocks = partition(model)
    (found,) = (n for n in blocks if layer in n and "lora_B" in n and blocks[n].shape[-1] > 0)
    index = blocks.block_index(found)
    assert index.shape[1:] == (1,)
    return index.flatten()


def blocks_of_base(case: str, parameter: str) -> torch.Tensor:
    model, _ = zoo.CASES[case].build()
    return partition(model).block_index(parameter).flatten()


@pytest.mark.parametrize(
    ("name", "case", "layer"),
    [
        ("lora", "llama", "layers.0.self_attn.q_proj"),
        ("lora", "llama", "layers.1.self_attn.k_proj"),
        ("lora", "llama", "layers.1.self_attn.v_proj"),
        ("lora", "llama", "layers.1.mlp.down_proj"),
        ("lora-gpt2", "gpt2", "h.0.attn.c_attn"),
        ("lora-gpt_neox", "gpt_neox", "layers.0.attention.query_key_value"),
    ],
)
def test_loras_b_has_the_blocks_of_the_layer_it_adapts(name: str, case: str, layer: str) -> None:
    model, _ = zoo.CASES[case].build()
    (weight,) = (n for n, _ in model.named_parameters() if n.endswith(f"{layer}.weight"))
    assert torch.equal(lora_b(name, layer), blocks_of_base(case, weight))


def test_loras_a_has_one_block_a_row() -> None:
    model, _ = peft_zoo.CASES["lora"].build()
    blocks = partition(model)
    found = [blocks[n] for n in blocks if "lora_A" in n]
    assert found
    for entry in found:
        assert (entry.role, entry.num_blocks) == ("adapter", entry.shape[0])


def test_lora_on_embeddings_has_a_block_a_token() -> None:
    model, _ = peft_zoo.CASES["lora-embeddings"].build()
    blocks = partition(model)
    (a,) = (blocks[n] for n in blocks if "lora_embedding_A" in n)
    assert (a.shape[1], a.num_blocks, a.layout.axes) == (97, 97, (1,))
    (b,) = (blocks[n] for n in blocks if "lora_embedding_B" in n)
    assert (b.num_blocks, b.layout.axes) == (48, (0,))


def test_lora_on_expert_stacks_never_takes_a_mean_over_experts() -> None:
    case = next(name for name in peft_zoo.CASES if "expert" in name)
    model, _ = peft_zoo.CASES[case].build()
    blocks = partition(model)
    name = next(n for n in blocks if "lora_B" in n)
    index = blocks.block_index(name)
    experts = 4
    # Column i * experts + e belongs to expert e, as PEFT's get_delta_weight has it.
    by_expert = index.view(index.shape[0], -1, experts)
    assert (by_expert == by_expert[:, :1]).all()
    assert blocks.num_blocks(name) == index.shape[0] * experts


def test_a_copy_of_a_module_to_save_has_the_blocks_of_the_module() -> None:
    model, _ = zoo.CASES["llama"].build()
    config = peft.LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["q_proj"])
    blocks = partition(peft.get_peft_model(model, config))
    (copied,) = (blocks[n] for n in blocks if "layers.0.self_attn.q_proj.modules_to_save" in n)
    assert (copied.role, copied.num_blocks) == ("query", 6)


def test_loraplus_ratios_are_groups_with_their_own_learning_rates() -> None:
    from peft.optimizers import create_loraplus_optimizer

    model, batch = peft_zoo.CASES["lora"].build()
    optimizer = create_loraplus_optimizer(
        model, AdamMini, lr=1e-3, loraplus_lr_ratio=16, partition=partition(model), weight_decay=0.1
    )
    assert sorted({group["lr"] for group in optimizer.param_groups if group["params"]}) == [1e-3, 1.6e-2]
    model(**batch).loss.backward()
    optimizer.step()
    assert optimizer.state


def test_an_adapter_added_later_needs_a_new_partition() -> None:
    model, batch = peft_zoo.CASES["lora"].build()
    optimizer = AdamMini.for_model(model)
    model.add_adapter("later", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("later")
    added = [(n, p) for n, p in model.named_parameters() if "later" in n]
    with pytest.raises(ValueError, match=r"the partition does not know '.*later.*before this parameter was added"):
        optimizer.add_param_group({"params": added})
    optimizer.partition = partition(model)
    optimizer.add_param_group({"params": added})
    model(**batch).loss.backward()
    optimizer.step()
    assert all(p in optimizer.state for _, p in added)


def test_a_lora_run_in_a_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    def trainer(folder: str, **options) -> Trainer:
        model, batch = peft_zoo.CASES["lora"].build()
        return Trainer(model, arguments(tmp_path / folder, **options), train_dataset=Batches(batch))

    whole = trainer("whole", save_strategy="steps", save_steps=3)
    whole.train()
    assert isinstance(inner(whole), AdamMini)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    ends = dict(whole.model.named_parameters())
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, ends[name]), name
    frozen = {p for p in whole.model.parameters() if not p.requires_grad}
    assert not frozen & set(inner(whole).state)


def test_an_adapter_whose_layer_cannot_be_found_is_an_error() -> None:
    model, _ = peft_zoo.CASES["lora"].build()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    del layer._modules["base_layer"]
    with pytest.raises(PartitionError, match=r"down_proj\.lora_B.*the layer that Linear adapts can't be found"):
        partition(model)


def test_an_empty_adapter_is_an_error() -> None:
    model, _ = peft_zoo.CASES["lora"].build()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.lora_A["default"] = nn.Linear(80, 0, bias=False)
    with pytest.raises(PartitionError, match="the adapter is empty, as of rank 0, so that nothing of lora_A"):
        partition(model)


def test_all_parameters_frozen_is_an_error(tmp_path: Path) -> None:
    model, batch = peft_zoo.CASES["lora"].build()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM has no parameter to train: all .* are frozen"):
        Trainer(model, arguments(tmp_path), train_dataset=Batches(batch)).train()
    with pytest.raises(ValueError, match=r"all .* are frozen"):
        AdamMini.for_model(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_lora_on_quantised_weights_trains_with_the_blocks_of_the_layers(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plain, batch = zoo.CASES["llama-head_dim"].build()
    plain.save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, device_map="cpu"), config
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = arguments(tmp_path / "out", max_steps=3, learning_rate=1e-2)
    trainer = Trainer(model, args, train_dataset=Batches(batch))

    trainer.train()

    blocks, expected = inner(trainer).partition, partition(peft.get_peft_model(plain, config))
    adapters = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n: str(blocks[n].layout) for n in adapters} == {
        n: str(expected[n].layout) for n in expected if ".lora_" in n
    }
    packed = {n for n, p in model.named_parameters() if not p.is_floating_point()}
    assert len(packed) == 2 * 7
    assert set(blocks.left_out) == packed
    assert str(blocks).count("left out while frozen") == 7
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(adapters)
