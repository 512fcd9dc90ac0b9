"""Trains a Llama sharded by FSDP2, and goes on from its checkpoint on another number of processes.

    torchrun --nproc-per-node 2 examples/sharded.py                 # 100 steps, then a checkpoint
    torchrun --nproc-per-node 3 examples/sharded.py --steps 200     # the same run, from there on three processes
    torchrun --nproc-per-node 2 examples/sharded.py --optim adamw --output-dir runs/adamw   # beside it

On GPUs where there are some (a process each, nccl), on the CPU otherwise (gloo), by the same lines. The data is the
source code of Python's standard library, byte by byte. A checkpoint is written by ``torch.distributed.checkpoint``,
each process its part, and any number of processes reads it. The batch of a step is the same whatever their number, and
so is the result, to rounding. On one process it runs too, without anything sharded: ``python examples/sharded.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
from pathlib import Path
from typing import Any

# Where other work shares the cores, OpenMP threads that spin while they wait make a step ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from adam_mini_plugins import AdamMini
from adam_mini_plugins.memory import measure, report

BYTES = 256  # the vocabulary


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--optim", choices=["adam_mini", "adamw"], default="adam_mini", help="the optimizer")
    add("--steps", type=int, default=100, help="steps in all, those of the checkpoint included")
    add("--batch-size", type=int, default=12, help="sequences a step, over all processes")
    add("--seq-len", type=int, default=128, help="bytes a sequence")
    add("--d-model", type=int, default=192, help="width of the model")
    add("--layers", type=int, default=4, help="layers of the model")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add("--dataset", type=Path, default=Path(sysconfig.get_path("stdlib")), help="a folder of Python files")
    add("--output-dir", type=Path, default=Path("runs/sharded"), help="where the checkpoint is written and read")
    return parser.parse_args()


def read_bytes(folder: Path, enough: int) -> Tensor:
    """Source code as numbers of bytes, the first so many."""
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= enough:
            break
    return torch.frombuffer(text, dtype=torch.uint8)[:enough]


def batch(data: Tensor, step: int, args: argparse.Namespace, device: torch.device) -> Tensor:
    """This process's part of a step's sequences, which depend on the step alone."""
    starts = torch.randint(len(data) - args.seq_len, (args.batch_size,), generator=torch.Generator().manual_seed(step))
    mine = starts[dist.get_rank() :: dist.get_world_size()]
    return torch.stack([data[start : start + args.seq_len] for start in mine.tolist()]).long().to(device)


def build(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A Llama, the same on every process, and then cut over them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=args.d_model,
        intermediate_size=3 * args.d_model,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=args.seq_len,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device)
    if dist.get_world_size() > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes a checkpoint, each process its part of it."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "step": step}, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Reads a checkpoint of any number of processes; the step that it was written at, 0 if there is none."""
    if not folder.exists():
        return 0
    weights, state = get_state_dict(model, optimizer)
    checkpoint: dict[str, Any] = {"model": weights, "optimizer": state, "step": 0}
    dcp.load(checkpoint, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return checkpoint["step"]


def main() -> None:
    """Trains from the checkpoint, or from the start, to the last step."""
    args = parse_arguments()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device.index)
    if "WORLD_SIZE" not in os.environ:  # python, not torchrun
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="29511")
    dist.init_process_group()
    if args.batch_size % dist.get_world_size():
        raise SystemExit(f"--batch-size {args.batch_size} is no multiple of the {dist.get_world_size()} processes")

    model = build(args, device)
    options = {"lr": args.lr, "weight_decay": 0.1}
    if args.optim == "adam_mini":
        optimizer: torch.optim.Optimizer = AdamMini.for_model(model, **options)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    checkpoint = args.output_dir / "checkpoint"
    first = load(checkpoint, model, optimizer)
    if first >= args.steps:
        raise SystemExit(f"{checkpoint} is at step {first} already: --steps {first + 100} goes on from it")
    data = read_bytes(args.dataset, enough=2**20)

    def say(*words: object) -> None:
        if dist.get_rank() == 0:
            print(*words, flush=True)

    say(f"{args.optim} on {dist.get_world_size()} processes, steps {first + 1} to {args.steps}")
    for step in range(first + 1, args.steps + 1):
        ids = batch(data, step, args, device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if step in (first + 1, args.steps) or step % 20 == 0:
            say(f"step {step:>5}   loss {mean.item() / dist.get_world_size():.6f} nats/byte")
    save(checkpoint, args.steps, model, optimizer)

    memory = measure(optimizer)
    figures = report(memory, device)
    figures |= {"loss": mean.item() / dist.get_world_size(), "processes": dist.get_world_size()}
    say(
        f"state of process 0: {memory.state_bytes:,} bytes, AdamW's {memory.adamw_state_bytes:,} "
        f"({memory.state_bytes / memory.adamw_state_bytes:.1%}); of all: {figures['optimizer/state_bytes_all_ranks']:,}"
    )
    if dist.get_rank() == 0:
        (args.output_dir / "sharded.json").write_text(json.dumps(figures, indent=2) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
