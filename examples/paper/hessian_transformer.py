"""Figure 7 and Table 4: the exact Hessians of a small Transformer's tensors, and Adam's rates in their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adam_mini_plugins import partition
from adam_mini_plugins.hessian import measure_hessian

from .frame import Case, Experiment, Result, Verdict, flag, median, spread
from .plots import WIDTH, heat
from .spectra import adam_preconditioner, condition

LAYER = "model.layers.0."
CLEAR = 3.0  # the contrast from which on a picture shows blocks
PARTS = {  # and the level that the paper finds dense
    "self_attn.q_proj": "head",
    "self_attn.k_proj": "head",
    "self_attn.v_proj": "neuron",
    "self_attn.o_proj": "neuron",
    "mlp.gate_proj": "neuron",
    "mlp.up_proj": "neuron",
    "mlp.down_proj": "neuron",
}


@dataclass(frozen=True)
class HessianTransformer(Experiment):
    """A Llama of one layer, of the sizes of the paper's appendix E.2, at its initial weights, in float64.

    The paper has a GPT-2. Its layer norm takes the mean off what each linear map gets, so that the map's Hessian is
    singular by construction; Llama's doesn't.
    """

    name = "hessian-transformer"
    shows = "Figure 7, Table 4"
    claim = "query and key are dense by head, the rest by neuron, and Adam's rates don't lower a dense block's kappa"

    seeds: int = flag(3, "number of initial weights and batches")
    width: int = flag(16, "width of the model")
    heads: int = flag(4, "attention heads")
    neurons: int = flag(32, "neurons of the MLP")
    vocabulary: int = flag(300, "tokens of the vocabulary")
    sequences: int = flag(8, "sequences of the batch that the loss is taken on")
    tokens: int = flag(32, "tokens a sequence")
    steps: int = flag(0, "steps of AdamW, at a rate of 3e-3, before the Hessian is taken (the paper: none)")

    def cases(self) -> list[Case]:
        """A model a seed."""
        names = ("width", "heads", "neurons", "vocabulary", "sequences", "tokens", "steps")
        return [{**{name: getattr(self, name) for name in names}, "seed": seed} for seed in range(self.seeds)]

    def measure(self, case: Case) -> dict[str, Any]:
        """Of each tensor the coupling of its rows, and of its first dense block the kappas."""
        model, batch = _model_and_batch(case)
        names = [f"{LAYER}{part}.weight" for part in PARTS]
        parameters = dict(model.named_parameters())
        found = {}

        def loss() -> Tensor:
            return model(batch, labels=batch).loss

        for part, one in zip(PARTS, measure_hessian(model, loss, partition(model), names)):
            weight = parameters[one.name]
            with sdpa_kernel(SDPBackend.MATH):
                gradient, hessian = first_rows(loss(), weight, _rows(case, part))
            found[part] = {
                "mass": one.mass.tolist(),
                "kappa": condition(hessian).item(),
                "adam": condition(hessian, adam_preconditioner(gradient)).item(),
            }
        return found

    def draw(self, results: Sequence[Result]) -> Figure:
        """The first seed's Hessian of each tensor by pair of rows, and the condition numbers of all seeds."""
        figure, axes = plt.subplots(2, 4, figsize=(WIDTH, 4.6), layout="constrained")
        for axis, part in zip(axes.flat, PARTS):
            mass = torch.tensor(results[0].found[part]["mass"])
            image = heat(axis, (mass / mass.max()).clamp(min=1e-3).log10(), vmin=-3, vmax=0)
            axis.set(title=part.split(".")[1], xlabel="output row")
        figure.colorbar(image, ax=axes[:, -1], label="log10 of |d2 loss| by pair of rows, largest = 0")
        axis = axes[1, 3]
        for place, part in enumerate(PARTS):
            for key, colour, marker in (("kappa", "C0", "o"), ("adam", "C5", "s")):
                values = [result.found[part][key] for result in results]
                label = None if place else {"kappa": "kappa(H)", "adam": "kappa(D H)"}[key]
                axis.plot(values, [place] * len(values), marker, color=colour, ms=4, alpha=0.7, label=label)
        axis.set(xscale="log", title="first dense block", yticks=range(len(PARTS)))
        axis.set_yticklabels([part.split(".")[1].removesuffix("_proj") for part in PARTS], fontsize=7)
        axis.invert_yaxis()
        axis.legend(frameon=False, fontsize=7, loc="lower right")
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """Clear blocks in every tensor, and kappa(D H) above kappa(H), both at the median over seeds.

        Of the value the paper itself says that its blocks are less clear: for it, any contrast will do.
        """
        contrasts = {part: median(_contrast(result, part) for result in results) for part in PARTS}
        clear = [contrast > (1 if part.endswith("v_proj") else CLEAR) for part, contrast in contrasts.items()]
        ratios = {
            part.split(".")[1]: [result.found[part]["adam"] / result.found[part]["kappa"] for result in results]
            for part in PARTS
        }
        worse = [median(values) > 1 for values in ratios.values()]
        said = ", ".join(f"{part.split('.')[1]} {contrast:.2g}" for part, contrast in contrasts.items())
        every = spread(ratio for values in ratios.values() for ratio in values)
        return Verdict(
            all(clear) and all(worse),
            f"blocks are clear in {sum(clear)} of {len(clear)} tensors: second derivatives inside over outside {said}; "
            f"Adam's rates raise kappa in {sum(worse)} of {len(worse)}: kappa(D H) / kappa(H) {every}",
        )


def _contrast(result: Result, part: str) -> float:
    """The mean absolute second derivative inside the blocks that the paper finds dense, over that outside."""
    mass = torch.tensor(result.found[part]["mass"])
    group = torch.arange(len(mass)) // _rows(result.case, part)
    inside = group[:, None] == group
    return (mass[inside].mean() / mass[~inside].mean()).item()


def _rows(case: Case, part: str) -> int:
    """Rows of a dense block."""
    return case["width"] // case["heads"] if PARTS[part] == "head" else 1


def _model_and_batch(case: Case) -> tuple[nn.Module, Tensor]:
    """A Llama in float64 and one batch of Python's source."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from .llama import small_text

    torch.manual_seed(case["seed"])
    config = LlamaConfig(
        vocab_size=case["vocabulary"],
        hidden_size=case["width"],
        intermediate_size=case["neurons"],
        num_hidden_layers=1,
        num_attention_heads=case["heads"],
        num_key_value_heads=case["heads"],
        bos_token_id=None,
        eos_token_id=None,
    )
    tokens = small_text(case["vocabulary"], (1 + case["steps"]) * case["sequences"] * case["tokens"], case["seed"])
    batches = tokens.view(1 + case["steps"], case["sequences"], case["tokens"])
    model = LlamaForCausalLM(config).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches[1:]:
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, batches[0]


def first_rows(loss: Tensor, weight: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Gradient and exact Hessian of the first rows of a weight: (n,) and (n, n), where n is their elements."""
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    size = rows * weight.shape[1]
    picked = torch.eye(weight.numel(), dtype=weight.dtype)[:size].view(size, *weight.shape)
    (second,) = torch.autograd.grad(gradient, weight, picked, is_grads_batched=True)
    return gradient[:rows].detach().flatten(), second[:, :rows].reshape(size, size)
