"""The door into transformers: after ``import adam_mini_plugins.hf``, ``optim="adam_mini"`` is an optimizer.

It works wherever transformers' ``TrainingArguments`` do: ``Trainer``, ``Seq2SeqTrainer`` and what is
built on them. Betas, epsilon and weight decay are those of the arguments, and the same parameters are
decayed as with ``adamw_torch``. ``optim_args="value=whole,state_dtype=bfloat16"`` passes options on;
with ``from_adamw=true`` among them, a checkpoint of AdamW's is resumed from as well.
"""

from __future__ import annotations

import logging
from typing import Any

from .blocks import partition
from .convert import take_over_adamw
from .optimizer import AdamMini, trainable_parameters

SUPPORTED = ">=5.2"

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f'adam_mini_plugins.hf needs transformers{SUPPORTED}: pip install "adam-mini-plugins[hf]"'
    ) from error

logger = logging.getLogger(__name__)

NAME = "adam_mini"
OPTIONS = ("scheme", "value", "state_dtype", "from_adamw")


def register() -> None:
    """Makes ``optim="adam_mini"`` known to transformers. Doing it again changes nothing.

    Raises:
        RuntimeError: This transformers keeps its optimizers elsewhere; the message gives the
            versions that are known to work.
    """
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
        from transformers.training_args import OptimizerNames
    except ImportError as error:
        raise RuntimeError(
            f"cannot add an optimizer to transformers {transformers.__version__}, which has no table of optimizers "
            f'where it is expected; transformers{SUPPORTED} works: pip install "transformers{SUPPORTED}"'
        ) from error
    if NAME not in OptimizerNames._value2member_map_:
        _add_member(OptimizerNames, NAME.upper(), NAME)
    _OPTIMIZER_HANDLERS[OptimizerNames(NAME)] = _adam_mini


def _add_member(names: Any, key: str, value: str) -> None:
    """Adds a member to an enumeration of strings, which Python has no public way to do."""
    member = str.__new__(names, value)
    member._name_, member._value_, member.__objclass__ = key, value, names
    member._sort_order_ = len(names._member_names_)
    # Saved TrainingArguments hold the member: reading them must register it, in whatever process.
    member.__reduce_ex__ = lambda protocol: (_registered_member, ())
    setattr(names, key, member)
    names._member_names_.append(key)
    names._member_map_[key] = member
    names._value2member_map_[value] = member


def _registered_member() -> Any:
    from transformers.training_args import OptimizerNames

    register()
    return OptimizerNames(NAME)


class _FromAdamW(AdamMini):
    """An AdamMini that loads AdamW's state as well as its own."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(take_over_adamw(self, state_dict))


def _adam_mini(context: Any) -> tuple[type[AdamMini], dict[str, Any]]:
    """Transformers' handler for this optimizer: its class and the keyword arguments to build it with."""
    if context.model is None:
        raise ValueError('optim="adam_mini" needs the model to find its blocks, and the Trainer passed none')
    unknown = sorted(set(context.optim_args) - set(OPTIONS))
    if unknown:
        raise ValueError(
            f'optim_args has {", ".join(map(repr, unknown))}, which optim="adam_mini" does not know; '
            f'it knows {", ".join(OPTIONS)}, as in optim_args="value=whole,state_dtype=bfloat16"'
        )
    options = dict(context.optim_args)
    state_dtype = options.pop("state_dtype", None)
    from_adamw = options.pop("from_adamw", "false").lower()
    if from_adamw not in ("true", "false"):
        raise ValueError(f"from_adamw must be true or false, got {from_adamw!r} in optim_args")
    trainable_parameters(context.model)  # raises if there are none, where others would train nothing
    blocks = partition(context.model, **options)
    logger.info("%r", blocks)
    return _FromAdamW if from_adamw == "true" else AdamMini, {
        **context.optimizer_kwargs,
        **context.adam_kwargs,
        "partition": blocks,
        "state_dtype": state_dtype,
    }


register()
