"""Which blocks LoRA's matrices should have: final losses over seeds and learning rates, beside AdamW.

    python examples/benchmarks/lora_blocks.py

A small Llama is pre-trained on the standard library's code; LoRA (rank 8, on all linear layers) then fine-tunes
it on the text of the same library's docstrings, with AdamW and with Adam-mini under different partitions of
LoRA's A (rank, in) and B (out, rank). Everything else is the same. Takes about half an hour on two cores.

Printed: the held-out loss of each partition less AdamW's at the same seed and learning rate, in nats per token,
and the number of blocks for each parameter that is trained.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim import Optimizer
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).parents[1]))
import pretrain

from adam_mini_plugins import AdamMini

# Rules on the names of LoRA's matrices; what they don't match follows the contract (B: heads of query and key).
PARTITIONS: dict[str, list[tuple[str, str]]] = {
    "A by row, B by the layer's rule": [],
    "A by row, B by row": [("*.lora_B.*", "neuron")],
    "A by row, B as a whole": [("*.lora_B.*", "tensor")],
    "A as a whole, B by the layer's rule": [("*.lora_A.*", "tensor")],
    "A and B each as a whole": [("*.lora_A.*", "tensor"), ("*.lora_B.*", "tensor")],
}
ADAMW = "AdamW"


def docstrings(documents: list[str]) -> list[str]:
    """The docstrings of some modules, their classes and functions."""
    found = []
    for text in documents:
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a file for another version of Python
            continue
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        found += [doc for doc in map(ast.get_docstring, nodes) if doc]
    return found


def sequences_of(tokenizer: Tokenizer, texts: list[str], seq_len: int) -> Tensor:
    """Texts, one after another and each ended by its token, cut into sequences."""
    end = tokenizer.token_to_id(pretrain.END_OF_TEXT)
    tokens = torch.tensor([i for encoding in tokenizer.encode_batch(texts) for i in (*encoding.ids, end)])
    return tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)


def loss_on(model: torch.nn.Module, data: Tensor) -> float:
    """Mean cross-entropy in nats per token."""
    model.eval()
    with torch.no_grad():
        total = sum(model(**pretrain.collate(list(part))).loss.item() * len(part) for part in data.split(16))
    model.train()
    return total / len(data)


def train(model: torch.nn.Module, optimizer: Optimizer, data: Tensor, steps: int, batch: int, seed: int) -> None:
    """A plain loop with a cosine schedule; the order of the batches depends on the seed alone."""
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    indices = itertools.cycle(order.tolist())
    for _ in range(steps):
        sequences = [data[i] for i in itertools.islice(indices, batch)]
        model(**pretrain.collate(sequences)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def finetune(
    base: LlamaForCausalLM, name: str, lr: float, seed: int, data: Tensor, held_out: Tensor, args: argparse.Namespace
) -> tuple[float, float]:
    """The held-out loss after fine-tuning, and the number of blocks for each trained parameter."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=args.rank, lora_alpha=16, target_modules="all-linear"))
    options = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.0}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    blocks_each = 1.0
    if name == ADAMW:
        optimizer = torch.optim.AdamW(trainable.values(), fused=True, **options)
    else:
        optimizer = AdamMini.for_model(model, rules=PARTITIONS[name], **options)
        blocks = sum(optimizer.partition.num_blocks(n) for n in trainable)
        blocks_each = blocks / sum(p.numel() for p in trainable.values())
    train(model, optimizer, data, args.steps, args.batch_size, seed)
    return loss_on(model, held_out), blocks_each


def main() -> None:
    """Pre-trains, fine-tunes with every partition, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pretrain-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console(width=120)

    sys.argv[1:] = ["--steps", str(args.pretrain_steps), "--vocab-size", "2048", "--output-dir", "runs/lora_blocks"]
    setting = pretrain.parse_arguments()
    setting.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer, code, _ = pretrain.load_data(setting)
    documents = list(itertools.islice(pretrain.read_documents(setting), 400))
    texts = docstrings(documents)
    cut = len(texts) * 9 // 10
    data, held_out = (sequences_of(tokenizer, part, setting.seq_len) for part in (texts[:cut], texts[cut:]))
    held_out = held_out[:96]
    base = pretrain.build_model(setting, tokenizer)
    optimizer = torch.optim.AdamW(base.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    train(base, optimizer, code, args.pretrain_steps, args.batch_size, seed=0)
    console.print(f"before fine-tuning: {loss_on(base, held_out):.4f} nats/token on {len(held_out)} held-out sequences")

    results: dict[str, dict[float, list[float]]] = {name: {} for name in (ADAMW, *PARTITIONS)}
    blocks_each: dict[str, float] = {}
    for lr, name in itertools.product(args.lrs, results):
        runs = [finetune(base, name, lr, seed, data, held_out, args) for seed in range(args.seeds)]
        results[name][lr] = [loss for loss, _ in runs]
        blocks_each[name] = runs[0][1]
        console.print(f"lr {lr:g}  {name:38} {' '.join(f'{loss:.4f}' for loss in results[name][lr])}", highlight=False)

    table = Table("blocks", "blocks a parameter", *(f"lr {lr:g}" for lr in args.lrs))
    for name, by_lr in results.items():
        cells = []
        for lr, losses in by_lr.items():
            if name == ADAMW:
                cells.append(f"{statistics.median(losses):.4f}")
            else:
                gaps = [own - other for own, other in zip(losses, results[ADAMW][lr])]
                cells.append(f"{statistics.median(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f})")
        table.add_row(name, f"{blocks_each[name]:.4f}", *cells)
    console.print(table)
    console.print(
        "AdamW: median loss in nats/token; others: median difference from AdamW at the same seed (least to most)."
    )
    if args.json:
        record = {
            "environment": pretrain.environment(),
            "arguments": vars(args),
            "losses": results,
            "blocks": blocks_each,
        }
        args.json.write_text(json.dumps(record, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
