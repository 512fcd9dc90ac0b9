"""Figure 12 a, Tables 5, 8 and 9: models of several sizes, trained on the same number of tokens a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .frame import Case, Experiment, Result, Verdict, flag, median
from .llama import last, size_of, train
from .parity import BY_CHANNEL, optimizer
from .partition import PAPER
from .plots import WIDTH, whiskers

LEVEL = 0.005  # of AdamW's loss


@dataclass(frozen=True)
class Scaling(Experiment):
    """AdamW and Adam-mini at one rate, as in the paper's Table 9: whose own sizes have 26.2 tokens a parameter.

    ``--sizes 39M 67M 102M --tokens-per-parameter 26.2 --lr 6e-4 --dataset FOLDER`` are the paper's, for a GPU.
    """

    name = "scaling"
    shows = "Figure 12 a, Tables 5, 8, 9"
    claim = "Adam-mini's final loss is AdamW's, to 0.5%, at every size"

    seeds: int = flag(3, "number of initial weights and orders of the data")
    sizes: tuple[str, ...] = flag(("micro", "mini", "tiny"), "the models: micro, mini, tiny, demo, 39M, 67M, ...")
    tokens_per_parameter: tuple[float, ...] = flag((0.5, 1.5), "lengths of the trainings, the shortest first")
    lr: float = flag(3e-3, "peak learning rate")
    blocks: tuple[str, ...] = flag((PAPER, BY_CHANNEL), "rules for the blocks, as for parity; the first is judged")
    dataset: str = flag("", "texts, as for examples/pretrain.py; by default Python's standard library")

    def cases(self) -> list[Case]:
        """A training a seed, a size, a length and an optimizer."""
        return [
            {"size": size, "dataset": self.dataset, "tokens_per_parameter": ratio, "seed": seed}
            | {"longest": max(self.tokens_per_parameter), "lr": self.lr, "name": name}
            for seed in range(self.seeds)
            for size in self.sizes
            for ratio in self.tokens_per_parameter
            for name in ("AdamW", *self.blocks)
        ]

    def measure(self, case: Case) -> dict[str, Any]:
        """Losses and spikes, and how large the model is."""
        parameters = count(case["size"])
        lasting = {
            key: steps(case["size"], parameters * case[ratio])
            for key, ratio in (("steps", "tokens_per_parameter"), ("text_for_steps", "longest"))
        }
        case = {**case, **lasting}
        found = train(lambda model: [optimizer(case["name"], model, case["lr"])], case)
        return {"parameters": parameters, "steps": case["steps"], **found}

    def draw(self, results: Sequence[Result]) -> Figure:
        """The losses of the longest trainings over the size; beside them the gaps of all to AdamW's."""
        figure, (losses, gaps) = plt.subplots(1, 2, figsize=(WIDTH, 3.8), layout="constrained")
        numbers = [self._parameters(results, size) for size in self.sizes]
        longest = max(self.tokens_per_parameter)
        for number, name in enumerate(("AdamW", *self.blocks)):
            style = {"color": f"C{(0, 5, 3, 4, 2, 1)[number % 6]}", "marker": "osD^vP"[number % 6]}
            found = [list(self._losses(results, name, size, longest).values()) for size in self.sizes]
            apart = [n * 1.04 ** (number - len(self.blocks) / 2) for n in numbers]
            label = name if name == "AdamW" else f"Adam-mini, {name}"
            whiskers(losses, apart, found, label, ls=("-", "--", "-.", ":")[number % 4], **style)
            for ratio in self.tokens_per_parameter if number else ():
                shares = [self.shares(results, name, size, ratio) for size in self.sizes]
                filled = {"mfc": "white"} if ratio != longest else {}
                line = {"ls": "-" if ratio == longest else ":", "label": f"{name}, {ratio:g} tokens a parameter"}
                whiskers(gaps, apart, [[100 * share for share in one] for one in shares], **line, **style, **filled)
        gaps.axhline(0, color="black", lw=0.8, ls=":")
        losses.set(title=f"{longest:g} tokens a parameter", ylabel="final validation loss (nats/token)")
        gaps.set(title="Less AdamW's", ylabel="final loss less AdamW's (% of it)")
        for axis in (losses, gaps):
            axis.set(xscale="log", xlabel="parameters")
            axis.set_xticks(numbers, [f"{n / 1e6:.3g}M" for n in numbers])
            axis.minorticks_off()
            axis.grid(alpha=0.25)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """Of the longest trainings, the first rule's median gap is within 0.5% of AdamW's loss at every size."""
        longest, shortest = max(self.tokens_per_parameter), min(self.tokens_per_parameter)
        held, said = True, []
        for name in self.blocks:
            shown = []
            for size in self.sizes:
                ends = [median(self.shares(results, name, size, ratio)) for ratio in (shortest, longest)]
                held = held and (name != self.blocks[0] or abs(ends[1]) <= LEVEL)
                shown.append(" to ".join(f"{share:+.1%}" for share in ends))
            said.append(f"{name} {', '.join(shown)}")
        numbers = ", ".join(f"{self._parameters(results, size) / 1e6:.2g}M" for size in self.sizes)
        line = (
            f"loss less AdamW's, from {shortest:g} to {longest:g} tokens a parameter, at {numbers}: {'; '.join(said)}"
        )
        return Verdict(held, line)

    def shares(self, results: Sequence[Result], name: str, size: str, ratio: float) -> list[float]:
        """The last losses less AdamW's, of AdamW's, by seed."""
        reference = self._losses(results, "AdamW", size, ratio)
        return [loss / reference[seed] - 1 for seed, loss in self._losses(results, name, size, ratio).items()]

    @staticmethod
    def _losses(results: Sequence[Result], name: str, size: str, ratio: float) -> dict[int, float]:
        chosen = {"name": name, "size": size, "tokens_per_parameter": ratio}
        return {r.case["seed"]: last(r) for r in results if chosen.items() <= r.case.items()}

    @staticmethod
    def _parameters(results: Sequence[Result], size: str) -> int:
        return next(r.found["parameters"] for r in results if r.case["size"] == size)


def count(size: str) -> int:
    """The number of parameters of a size's model, head and embedding apart."""
    one = size_of(size)
    width, hidden = one.d_model, -(-8 * one.d_model // (3 * 256)) * 256
    attention = 2 * width**2 + 2 * width**2 * one.kv_heads // one.heads
    return one.layers * (attention + 3 * width * hidden + 2 * width) + 2 * one.vocab_size * width + width


def steps(size: str, tokens: float) -> int:
    """The optimizer steps that so many tokens take."""
    one = size_of(size)
    return max(1, round(tokens / (one.batch_size * one.seq_len)))
