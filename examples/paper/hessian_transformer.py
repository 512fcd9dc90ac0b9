"""Figure 7 and Table 4: the exact Hessians of a small Transformer's tensors, and Adam's rates in their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adam_mini_plugins import partition
from adam_mini_plugins.hessian import measure_hessian

from .frame import Case, Experiment, Result, Verdict, flag, median, spread
from .plots import WIDTH, heat
from .spectra import adam_preconditioner

LAYER = "transformer.h.0."
CLEAR = 3.0  # the contrast from which on a picture shows blocks
SPARSE = 16  # one sequence is taken of so many that follow one another: a file alone is all one pattern
GN = "gauss_newton"
PARTS = {  # in the order in which they are measured, and the level that the paper finds dense
    "query": "head",
    "key": "head",
    "value": "neuron",
    "attn.proj": "neuron",
    "mlp.fc_1": "neuron",
    "mlp.proj": "neuron",
}
WEIGHTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # the first holds query, key and value


@dataclass(frozen=True)
class HessianTransformer(Experiment):
    """The paper's model: a GPT-2 of one layer, of the sizes of its appendix E.2, at its initial weights, in float64.

    The Hessian is a sum of two. The Gauss-Newton part is that of the loss against the model's own predictions: of
    nearly uniform ones, the rows of the output layer weigh alike, and neurons before it are coupled by no more than the
    rows' chance correlation, which falls as the vocabulary grows (the paper's is 50257). The rest comes from what the
    predictions lack of the targets: before any training that is much, mostly how common each token is, and it curves
    the last layer norm across all neurons. It has no blocks, and veils those of attn.proj and mlp.proj: what they
    show, 2 to 4 by the batch, is near what counts as clear. The Gauss-Newton part is measured beside the whole.

    What a layer norm puts out has mean zero, so that the loss doesn't depend on the mean of a row of the weights that
    follow. The condition numbers are those of the directions on which it does.
    """

    name = "hessian-transformer"
    shows = "Figure 7, Table 4"
    claim = "query and key are dense by head, the rest by neuron, and Adam's rates don't lower a dense block's kappa"

    seeds: int = flag(3, "number of initial weights and batches")
    width: int = flag(16, "width of the model")
    heads: int = flag(4, "attention heads")
    neurons: int = flag(32, "neurons of the MLP")
    vocabulary: int = flag(300, "tokens of the vocabulary")
    sequences: int = flag(16, "sequences of the batch that the loss is taken on")
    tokens: int = flag(32, "tokens a sequence")
    steps: int = flag(0, "steps of AdamW, at a rate of 3e-3, before the Hessian is taken (the paper: none)")

    def cases(self) -> list[Case]:
        """A model a seed."""
        names = ("width", "heads", "neurons", "vocabulary", "sequences", "tokens", "steps")
        return [{**{name: getattr(self, name) for name in names}, "seed": seed} for seed in range(self.seeds)]

    def measure(self, case: Case) -> dict[str, Any]:
        """Of each part the coupling of its neurons, in all and in Gauss-Newton, and of its first block the kappas."""
        model, batch = _model_and_batch(case)
        names = [f"{LAYER}{name}.weight" for name in WEIGHTS]
        parameters, blocks = dict(model.named_parameters()), partition(model)
        found, first = {}, dict.fromkeys(names, 0)

        def loss() -> Tensor:
            return model(batch, labels=batch).loss

        def against_itself() -> Tensor:
            logits = model(batch).logits[:, :-1].flatten(0, 1)
            return nn.functional.cross_entropy(logits, logits.detach().softmax(-1))

        measured = (measure_hessian(model, one, blocks, names) for one in (loss, against_itself))
        for part, whole, gauss_newton in zip(PARTS, *measured):
            name, weight = whole.name, parameters[whole.name]
            index = blocks.block_index(name).expand(weight.shape).flatten()
            with sdpa_kernel(SDPBackend.MATH):
                gradient, hessian = of_elements(loss(), weight, (index == first[name]).nonzero().flatten())
            first[name] += whole.layout.num_blocks  # the next slice's first
            found[part] = {
                "mass": whole.mass.tolist(),
                GN: gauss_newton.mass.tolist(),
                "kappa": condition(hessian),
                "adam": condition(hessian, adam_preconditioner(gradient)),
            }
        return found

    def draw(self, results: Sequence[Result]) -> Figure:
        """The first seed's Hessian of each part by pair of neurons; contrasts and condition numbers of all seeds."""
        figure, axes = plt.subplots(2, 4, figsize=(WIDTH, 4.4), layout="constrained")
        for axis, part in zip(axes[:, :3].flat, PARTS):
            mass = torch.tensor(results[0].found[part]["mass"])
            image = heat(axis, (mass / mass.max()).clamp(min=1e-3).log10(), vmin=-3, vmax=0)
            axis.set(title=part, xlabel=f"{len(mass)} output neurons")
        bar = figure.colorbar(image, ax=axes[:, :3], location="bottom", shrink=0.6, aspect=40)
        bar.set_label("log10 of |second derivatives| by pair of neurons, largest = 0")
        contrast, kappas = axes[:, 3]
        series = (
            (contrast, "Hessian", "C0", "o", [[_contrast(r, part) for r in results] for part in PARTS]),
            (contrast, "Gauss-Newton", "C5", "x", [[_contrast(r, part, GN) for r in results] for part in PARTS]),
            (kappas, "H", "C0", "o", [[r.found[part]["kappa"] for r in results] for part in PARTS]),
            (kappas, "D H", "C5", "x", [[r.found[part]["adam"] for r in results] for part in PARTS]),
        )
        for axis, label, colour, marker, values in series:
            for place, of_part in enumerate(values):
                style = {"color": colour, "ms": 4, "label": None if place else label}
                axis.plot(of_part, [place] * len(of_part), marker, **style)
        contrast.axvline(CLEAR, color="black", lw=0.8, ls=":")
        contrast.text(CLEAR * 0.9, 0.5, "clear\nfrom", fontsize=7, ha="right", va="center")
        for axis, title in ((contrast, "inside / outside"), (kappas, "kappa of a block")):
            axis.set(xscale="log", title=title, yticks=range(len(PARTS)))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_yticklabels(PARTS, fontsize=8)
            axis.yaxis.tick_right()
            axis.spines["left"].set_visible(False)
            axis.spines["right"].set_visible(True)
            axis.invert_yaxis()
        contrast.set_xlim(1, 100)
        for axis in (contrast, kappas):
            handles = {"frameon": False, "fontsize": 8, "ncols": 2, "handletextpad": 0.1, "columnspacing": 0.8}
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), **handles)
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """Clear blocks in every part, and kappa(D H) above kappa(H), both at the median over seeds.

        Of the value the paper itself says that its blocks are less clear: for it, any contrast will do.
        """
        contrasts = {part: median(_contrast(result, part) for result in results) for part in PARTS}
        clear = [contrast > (1 if part == "value" else CLEAR) for part, contrast in contrasts.items()]
        ratios = {part: [r.found[part]["adam"] / r.found[part]["kappa"] for r in results] for part in PARTS}
        worse = [median(values) > 1 for values in ratios.values()]
        said = ", ".join(f"{part} {contrast:.2g}" for part, contrast in contrasts.items())
        parts = [f"{median(_contrast(r, part, GN) for r in results):.2g}" for part in ("attn.proj", "mlp.proj")]
        every = spread(ratio for values in ratios.values() for ratio in values)
        return Verdict(
            all(clear) and all(worse),
            f"second derivatives inside over outside: {said} (Gauss-Newton, the two proj: {' and '.join(parts)}); "
            f"kappa(D H) / kappa(H) {every}, above 1 in {sum(worse)} of {len(worse)}",
        )


def _contrast(result: Result, part: str, of: str = "mass") -> float:
    """The mean absolute second derivative inside the blocks that the paper finds dense, over that outside."""
    mass = torch.tensor(result.found[part][of])
    group = torch.arange(len(mass)) // (result.case["width"] // result.case["heads"] if PARTS[part] == "head" else 1)
    inside = group[:, None] == group
    return (mass[inside].mean() / mass[~inside].mean()).item()


def _model_and_batch(case: Case) -> tuple[nn.Module, Tensor]:
    """A GPT-2 in float64 and one batch of Python's source, sequences from all over it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from .llama import small_text

    torch.manual_seed(case["seed"])
    config = GPT2Config(
        vocab_size=case["vocabulary"],
        n_positions=case["tokens"],
        n_embd=case["width"],
        n_inner=case["neurons"],
        n_layer=1,
        n_head=case["heads"],
        bos_token_id=None,
        eos_token_id=None,
    )
    number = (1 + case["steps"]) * case["sequences"]
    tokens = small_text(case["vocabulary"], SPARSE * number * case["tokens"], case["seed"]).view(-1, case["tokens"])
    picked = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(case["seed"]))[:number]
    batches = tokens[picked].view(1 + case["steps"], case["sequences"], case["tokens"])
    model = GPT2LMHeadModel(config).double().eval()  # without dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches[1:]:
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, batches[0]


def of_elements(loss: Tensor, weight: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and exact Hessian of some elements of a weight, by their places in it: (n,) and (n, n)."""
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    picked = torch.eye(weight.numel(), dtype=weight.dtype)[elements].view(-1, *weight.shape)
    (second,) = torch.autograd.grad(gradient, weight, picked, is_grads_batched=True)
    return gradient.detach().flatten()[elements], second.flatten(1)[:, elements]


def condition(hessian: Tensor, rates: Tensor | None = None) -> float:
    """The largest over the smallest singular value that isn't zero, of ``diag(rates) @ hessian`` or the Hessian.

    Rates leave the rank as it is, so that the Hessian's own, of which the zeros are the clearer, tells it.
    """
    values = torch.linalg.svdvals(hessian if rates is None else rates[:, None] * hessian)
    return (values[0] / values[torch.linalg.matrix_rank(hessian) - 1]).item()
