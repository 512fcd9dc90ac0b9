"""Table 2: tokens a second of whole training steps and, where there is a GPU, at the largest batch that fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.optim import AdamW

from adam_mini_plugins import AdamMini

from .frame import Case, Experiment, Result, Verdict, flag, median, spread
from .plots import WIDTH

ADAMW, OURS = "AdamW", "Adam-mini"
WARM = 3  # steps before the clock is read: the first ones make the state
GIGABYTE = 10**9


@dataclass(frozen=True)
class Throughput(Experiment):
    """A Llama on random tokens, torch's fused AdamW and Adam-mini by turns. The paper trains Llama 2-7B on two GPUs.

    A GPU's figures are its largest batches too (``--size 1B``, and ``--gigabytes`` for a smaller GPU than there is).
    A CPU has no batch that just fits: there, only the same batch is measured.
    """

    name = "throughput"
    shows = "Table 2"
    claim = "the memory that Adam-mini saves holds a larger batch, with more tokens a second"
    parallel = False

    size: str = flag("demo", "the model, one of examples/pretrain.py's (demo, 39M, ..., 1B)")
    batch: int = flag(8, "sequences a step where both have the same")
    rounds: int = flag(40, "steps that are measured")
    gigabytes: float = flag(0.0, "of the GPU's memory that may be used; 0: all")

    def cases(self) -> list[Case]:
        """One."""
        return [{"size": self.size, "batch": self.batch, "rounds": self.rounds, "gigabytes": self.gigabytes}]

    def measure(self, case: Case) -> dict[str, Any]:
        """Tokens a second of each round; of a GPU the largest batches, tokens a second there, and peak bytes."""
        return _on_gpu(case) if torch.cuda.is_available() else _on_cpu(case)

    def draw(self, results: Sequence[Result]) -> Figure:
        """Bars: medians, with the range of the middle half of the rounds."""
        (result,) = results
        figure, axes = plt.subplots(figsize=(WIDTH, 2.2), layout="constrained")
        bars = [(where, name, one) for where, both in result.found.items() for name, one in both.items()]
        for place, (_, name, one) in enumerate(bars):
            rates = sorted(one["tokens_per_second"])
            middle = median(rates)
            low, high = rates[len(rates) // 4], rates[3 * len(rates) // 4]
            colour = "C0" if name == ADAMW else "C5"
            axes.barh(place, middle, color=colour, xerr=[[middle - low], [high - middle]], capsize=4)
            axes.annotate(f"  {middle:,.0f}", (high, place), va="center")
        axes.set_yticks(range(len(bars)), [f"{name}\nbatch {one['batch']} ({where})" for where, name, one in bars])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(title=f"Whole training steps, {self.size}", xlabel="tokens a second")
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """A larger batch than AdamW's, and there a higher rate."""
        (result,) = results
        same, largest = result.found["same batch"], result.found.get("largest batch")
        rates = {name: spread(one["tokens_per_second"], ",.0f") for name, one in same.items()}
        said = f"at a batch of {self.batch} {rates[OURS]} tokens/s, AdamW {rates[ADAMW]}: {_said(same)} at the median"
        if largest is None:
            return Verdict(None, f"the largest batch wants a GPU, and none is here; {said}")
        sizes = {name: one["batch"] for name, one in largest.items()}
        held = sizes[OURS] > sizes[ADAMW] and _gain(largest) > 0
        peaks = {name: one["peak_bytes"] / GIGABYTE for name, one in largest.items()}
        said = (
            f"largest batch {sizes[OURS]} at {peaks[OURS]:.1f} GB, AdamW {sizes[ADAMW]} at {peaks[ADAMW]:.1f} GB: "
            f"{_said(largest)} tokens/s there; {said}"
        )
        return Verdict(held, said)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest batch that fits, 0 where none does; whatever is smaller than one that fits must fit too."""
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _gain(both: dict[str, Any]) -> float:
    ours, adamw = (median(both[name]["tokens_per_second"]) for name in (OURS, ADAMW))
    return ours / adamw - 1 if adamw else float("inf")


def _said(both: dict[str, Any]) -> str:
    return f"{_gain(both):+.1%}" if both[ADAMW]["batch"] else "no room for AdamW,"


class _Training:
    """A model with its optimizer; the same weights and tokens for both optimizers."""

    def __init__(self, name: str, size: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        from examples.pretrain import SIZES

        if size not in SIZES:
            raise SystemExit(f"--size {size}: choose from {', '.join(SIZES)}")
        self.size, self.device = SIZES[size], "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        with torch.device(self.device):
            config = LlamaConfig(
                vocab_size=self.size.vocab_size,
                hidden_size=self.size.d_model,
                intermediate_size=-(-8 * self.size.d_model // (3 * 256)) * 256,
                num_hidden_layers=self.size.layers,
                num_attention_heads=self.size.heads,
                num_key_value_heads=self.size.kv_heads,
                use_cache=False,
            )
            self.model = LlamaForCausalLM(config)
        fused = AdamW(self.model.parameters(), fused=True) if name == ADAMW else None
        self.optimizer = fused or AdamMini.for_model(self.model)

    def step(self, batch: int) -> None:
        """A whole step; bfloat16 autocast on a GPU."""
        tokens = torch.randint(self.size.vocab_size, (batch, self.size.seq_len), device=self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.model(tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rate(self, batch: int) -> float:
        """Tokens a second of one step."""
        if self.device == "cuda":
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            self.step(batch)
            ended.record()
            ended.synchronize()
            seconds = began.elapsed_time(ended) / 1e3
        else:
            start = time.perf_counter()
            self.step(batch)
            seconds = time.perf_counter() - start
        return batch * self.size.seq_len / seconds

    def fits(self, batch: int) -> bool:
        """Whether the GPU has room for such a step, twice over: the second has all of the state from the start."""
        found = True
        try:
            self.step(batch)
            self.step(batch)
        except torch.cuda.OutOfMemoryError:
            found = False
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()
        return found


def _on_cpu(case: Case) -> dict[str, Any]:
    trainings = {name: _Training(name, case["size"]) for name in (ADAMW, OURS)}
    rates: dict[str, list[float]] = {name: [] for name in trainings}
    for number in range(WARM + case["rounds"]):
        for name in sorted(trainings, reverse=number % 2 == 1):  # neither always follows the other
            rates[name].append(trainings[name].rate(case["batch"]))
    both = {name: {"batch": case["batch"], "tokens_per_second": found[WARM:]} for name, found in rates.items()}
    return {"same batch": both}


def _on_gpu(case: Case) -> dict[str, Any]:
    """One optimizer after the other, as each has the whole memory."""
    if case["gigabytes"]:
        share = case["gigabytes"] * GIGABYTE / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    found: dict[str, Any] = {"same batch": {}, "largest batch": {}}
    for name in (ADAMW, OURS):
        training = _Training(name, case["size"])
        most = largest(training.fits)
        for where, batch in (("same batch", case["batch"]), ("largest batch", most)):
            if not 0 < batch <= most:
                found[where][name] = {"batch": 0, "tokens_per_second": [0.0], "peak_bytes": 0}
                continue
            torch.cuda.reset_peak_memory_stats()
            rates = [training.rate(batch) for _ in range(WARM + case["rounds"])][WARM:]
            peak = torch.cuda.max_memory_allocated()
            found[where][name] = {"batch": batch, "tokens_per_second": rates, "peak_bytes": peak}
        del training
        torch.cuda.empty_cache()
    return found
