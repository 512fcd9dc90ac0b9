"""The published package's ``Adam_mini``, for scripts that use it: its arguments, its blocks, its checkpoints.

Change the import and nothing else::

    from adam_mini_plugins.compat import Adam_mini  # was: from adam_mini import Adam_mini

The published package is given names, shapes and three numbers, and guesses the blocks from them. Here
the same guess is made unless there is a model to read them from: ``Adam_mini(..., model=model)`` takes
the model's own blocks and warns of each tensor where the guess is another one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from . import sharding
from .blocks import Layout, Partition, PartitionError
from .blocks import partition as make_partition
from .blocks.partition import TensorBlocks
from .blocks.table import fold
from .convert import block_means
from .optimizer import AdamMini

logger = logging.getLogger(__name__)

# What the published package looks for in a name, by the attribute that a script may add to.
_WORDS: dict[str, frozenset[str]] = {
    "embd_names": frozenset({"embed", "embd", "wte"}),
    "output_names": frozenset({"lm_head", "output", "final_layer"}),
    "wqk_names": frozenset({"k_proj", "q_proj", "wq", "wk", "query", "key"}),
    "wv_names": frozenset({"v_proj", "wv", "value"}),
    "attn_proj_names": frozenset({"o_proj", "wo", "attn.proj"}),
    "mlp_names": frozenset({"feed_forward", "linear", "mlp"}),
    "adam_block_names": frozenset({"bias"}),
}
_BY_ROW = ("embd_names", "output_names", "wv_names", "mlp_names", "attn_proj_names")
_QUERY, _KEY = ("q_proj", "wq", "query"), ("k_proj", "wk", "key")
_GUESSED = "published"  # the scheme of a partition by names
_UNDECAYED = ("norm", "ln", "bias")


class Adam_mini(AdamMini):  # noqa: N801 (the published name)
    """:class:`AdamMini` with the arguments of the published package's ``Adam_mini`` (version 1.1.1).

    As there, each parameter is a group of its own, called ``name`` in lower case, and what has
    ``norm``, ``ln`` or ``bias`` in its name is not decayed. Without ``model`` the blocks are what that
    package would make of names and numbers, ``embd_names``, ``wqk_names`` and the other sets of words
    included, which a script may add to before the first step. State dicts of that package load. Its
    arithmetic in float32 is the same to rounding; in bfloat16 it holds second moments in bfloat16 and
    this class in float32.

    Args:
        named_parameters: Pairs of a name and a parameter; frozen ones are left out.
        lr: Learning rate.
        betas: Decay of the momentum and of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        model_sharding: Without effect, as there.
        dim: Width of the model, by which heads are found: ``dim * dim / n_heads`` elements each.
        n_heads: Number of query heads.
        n_kv_heads: Number of key heads, as many as query heads by default.
        verbose: Whether to log the blocks.
        model: The model, to take the blocks from it. Recommended, for a guess can be wrong.

    Warns:
        UserWarning: The guess is not the model's truth, or without a model contradicts ``n_heads`` or
            ``n_kv_heads``; it names each such tensor.

    Raises:
        ValueError: A hyper-parameter out of range, ``n_heads`` not a multiple of ``n_kv_heads``.
        PartitionError: Without a model, a tensor that the guess fails on.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        model_sharding: bool | None = None,
        dim: int = 2048,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        verbose: bool = True,
        model: nn.Module | None = None,
    ) -> None:
        if n_kv_heads is not None and n_heads % n_kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads, got {n_heads} and {n_kv_heads}")
        if model_sharding is not None:
            warnings.warn("model_sharding has no effect: leave it out", FutureWarning, stacklevel=2)
        self.dim, self.n_heads, self.n_kv_heads = dim, n_heads, n_kv_heads or n_heads
        for attribute, words in _WORDS.items():
            setattr(self, attribute, set(words))
        members = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        blocks = self._guessed(members) if model is None else make_partition(model)
        groups = [
            {
                "params": [(name, parameter)],
                "name": name.lower(),
                "weight_decay": 0.0 if _has(name.lower(), _UNDECAYED) else weight_decay,
            }
            for name, parameter in members
        ]
        super().__init__(groups, lr, betas, eps, weight_decay, partition=blocks)
        self.register_step_pre_hook(Adam_mini._with_words_added)
        if model is not None:
            _warn(self._differences(members), "AdamMini takes the model's blocks, and the published package others")
        if verbose:
            logger.info("%s", self.partition)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, or of the published package for the same parameters.

        Raises:
            ValueError: It doesn't fit. The optimizer is as it was.
        """
        self._with_words_added()
        published = all("beta1" in group for group in state_dict["param_groups"])
        super().load_state_dict(self._converted(state_dict) if published else state_dict)

    # --- what the published package makes of a name and a shape ------------------------------------

    def _guess(self, name: str, shape: torch.Size) -> tuple[str, Layout]:
        """Role and blocks by the name.

        Raises:
            PartitionError: There are none: that package's own step would fail, or cut rows apart.
        """
        name = name.lower()
        if _has(name, self.adam_block_names):  # type: ignore[attr-defined]
            return "bias", Layout.elements(tuple(shape))
        if _has(name, self.wqk_names):  # type: ignore[attr-defined]
            heads, rest = divmod(shape.numel(), self.dim * self.dim // self.n_heads)
            if rest or not heads or shape[0] % heads:
                raise PartitionError(
                    f"{name} of shape {tuple(shape)} is no whole number of heads of dim * dim / n_heads = "
                    f"{self.dim * self.dim // self.n_heads} elements: pass the model's dim and n_heads, or model=model"
                )
            return "query" if _has(name, _QUERY) else "key", Layout.groups(heads, shape[0] // heads)
        if any(_has(name, getattr(self, words)) for words in _BY_ROW):
            if len(shape) != 2:
                raise PartitionError(
                    f"{name} has shape {tuple(shape)}, and its name says a matrix with a block a row: pass model=model"
                )
            return "linear", Layout.each_row(shape[0])
        return "vector", Layout.whole(shape[0]) if shape else Layout.elements(())

    def _guessed(self, members: list[tuple[str, nn.Parameter]]) -> Partition:
        """The partition by names alone, with a warning where it contradicts the numbers that were given."""
        entries, doubts = {}, []
        for name, parameter in members:
            role, layout = self._guess(name, parameter.shape)
            entries[name] = TensorBlocks(name, parameter.shape, role, layout, "guessed from its name")
            heads = {"query": self.n_heads, "key": self.n_kv_heads}.get(role, layout.num_blocks)
            if heads != layout.num_blocks and not (_has(name.lower(), _QUERY) and _has(name.lower(), _KEY)):
                doubts.append((name, f"{layout.num_blocks} heads by dim={self.dim}, where {heads} were said"))
        _warn(doubts, "the blocks guessed contradict n_heads or n_kv_heads; model=model takes the model's")
        return Partition(_GUESSED, entries, {parameter: [name] for name, parameter in members}, {})

    def _with_words_added(self, *_: Any) -> None:
        """Until there is a state: the blocks by the words that a script has added to the sets."""
        guessed = self.partition.scheme == _GUESSED and not self.state
        if guessed and any(getattr(self, attribute) != words for attribute, words in _WORDS.items()):
            pairs = ((group["param_names"][0], group["params"][0]) for group in self.param_groups)
            self.repartition(self._guessed(list(pairs)))

    def _differences(self, members: list[tuple[str, nn.Parameter]]) -> list[tuple[str, str]]:
        """The tensors whose blocks are not what the published package takes them to be, and how."""
        found = []
        for group, (name, parameter) in zip(self.param_groups, members):
            truth = Layout.parse(group["blocks"][0])
            try:
                _, guess = self._guess(name, parameter.shape)
            except PartitionError:
                found.append((name, f"blocks {truth}, where that one fails"))
                continue
            if not _same(truth, guess, parameter.shape):
                found.append((name, f"blocks {truth}, not {guess}"))
        return found

    # --- its checkpoints ---------------------------------------------------------------------------

    def _converted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict of the published package's as one of this class."""
        saved_groups = state_dict["param_groups"]
        names = [[group["name"] for group in groups] for groups in (saved_groups, self.param_groups)]
        if names[0] != names[1]:
            theirs, ours = next(pair for pair in zip_longest(*names) if pair[0] != pair[1])
            raise ValueError(
                f"the state to load has {len(names[0])} parameters, this optimizer {len(names[1])}, and {theirs!r} "
                f"stands where here is {ours!r}: pass the parameters that it was saved with, in their order"
            )
        groups, states = [], {}
        for group, saved in zip(self.param_groups, saved_groups):
            kept = {key: value for key, value in saved.items() if key not in ("beta1", "beta2")}
            groups.append({**group, **kept, "betas": (saved["beta1"], saved["beta2"])})
            (key,), (parameter,), (blocks,) = saved["params"], group["params"], group["blocks"]
            if state_dict["state"].get(key):
                states[key] = _state(state_dict["state"][key], parameter, saved["name"], Layout.parse(blocks))
        return {**state_dict, "state": states, "param_groups": groups}


def _state(state: dict[str, Any], parameter: Tensor, name: str, layout: Layout) -> dict[str, Any]:
    """The published package's state of one parameter as AdamMini's."""
    momentum = sharding.whole(state["m"])
    # One value for each of as many elements that follow one another: a head's, a row's, an element's, or all.
    values = sharding.whole(state["v"] if "v" in state else state["vmean"]).reshape(-1, 1)
    if momentum.numel() != parameter.numel() or parameter.numel() % len(values):
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, but the state to load has {momentum.numel()} elements of "
            f"momentum and {len(values)} second moments: was it saved on several processes, a part on each?"
        )
    spread = values.expand(-1, parameter.numel() // len(values)).reshape(parameter.shape)
    return {
        "step": torch.tensor(float(state["step"])),
        "exp_avg": momentum.reshape(parameter.shape),
        "exp_avg_sq": block_means(spread, parameter, layout),
    }


def _has(name: str, words: Collection[str]) -> bool:
    return any(word in name for word in words)


def _same(one: Layout, other: Layout, shape: torch.Size) -> bool:
    """Whether two layouts cut a tensor into the same blocks."""
    if one.num_blocks != other.num_blocks:
        return False
    if one.num_blocks in (1, shape.numel()):
        return True
    return one.axes == other.axes and torch.equal(one.block_index(shape), other.block_index(shape))


def _warn(tensors: list[tuple[str, str]], what: str) -> None:
    if tensors:
        lines = "".join(f"\n    {name}: {how}" for name, how in fold(tensors))
        warnings.warn(f"{what}:{lines}", UserWarning, stacklevel=3)
