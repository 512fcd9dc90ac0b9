"""The door into transformers: after ``import adam_mini_plugins.hf``, ``optim="adam_mini"`` is an optimizer.

It works wherever transformers' ``TrainingArguments`` do: ``Trainer``, ``Seq2SeqTrainer`` and what is
built on them. Betas, epsilon and weight decay are those of the arguments, and the same parameters are
decayed as with ``adamw_torch``. ``optim_args="value=whole,state_dtype=bfloat16"`` passes options on;
with ``from_adamw=true`` among them, a checkpoint of AdamW's is resumed from as well.
"""

from __future__ import annotations

import logging
from typing import Any

from .backward import AdamMiniInBackward
from .blocks import partition
from .convert import take_over_adamw
from .optimizer import AdamMini
from .parameters import trainable_parameters

SUPPORTED = ">=5.2"

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f'adam_mini_plugins.hf needs transformers{SUPPORTED}: pip install "adam-mini-plugins[hf]"'
    ) from error

logger = logging.getLogger(__name__)

NAME = "adam_mini"
_OF_PARTITION = ("scheme", "value")
_SWITCHES = ("in_backward", "from_adamw")
OPTIONS = (*_OF_PARTITION, "state_dtype", "fused", "stochastic_rounding", "seed", *_SWITCHES)
_TRUTHS: dict[str, bool | None] = {"true": True, "false": False}
_CHOICES = {**dict.fromkeys(("stochastic_rounding", *_SWITCHES), _TRUTHS), "fused": {**_TRUTHS, "none": None}}


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


class _FromAdamWInBackward(_FromAdamW, AdamMiniInBackward):
    """The same, with steps in the backward pass."""


# By the switches, in their order.
_CLASSES: dict[tuple[bool, bool], type[AdamMini]] = {
    (False, False): AdamMini,
    (True, False): AdamMiniInBackward,
    (False, True): _FromAdamW,
    (True, True): _FromAdamWInBackward,
}


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
    options = {name: _read(name, given) for name, given in context.optim_args.items()}
    in_backward, from_adamw = (options.pop(switch, False) for switch in _SWITCHES)
    if in_backward:
        _check_in_backward(context.args)
    trainable_parameters(context.model)  # raises if there are none, where others would train nothing
    blocks = partition(context.model, **{name: options.pop(name) for name in _OF_PARTITION if name in options})
    logger.info("%r", blocks)
    return _CLASSES[in_backward, from_adamw], {
        **context.optimizer_kwargs,
        **context.adam_kwargs,
        "partition": blocks,
        **options,
    }


def _read(name: str, given: str) -> Any:
    """The value of an option of AdamMini's or of its partition, which transformers hands on as text.

    Raises:
        ValueError: It is not what the option takes.
    """
    values = _CHOICES.get(name)
    text = str(given).strip().lower()
    if values is not None:
        if text not in values:
            raise ValueError(f"optim_args has {name}={given}, and {name} is one of {', '.join(values)}")
        return values[text]
    if name == "seed":
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"optim_args has seed={given}, and seed is a whole number") from None
    return given


def _check_in_backward(args: Any) -> None:
    """Raises where the Trainer would want gradients after the backward pass has used them."""
    wrong = (
        (
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}",
            args.gradient_accumulation_steps > 1,
            "gradients add up over several backward passes: set gradient_accumulation_steps=1",
        ),
        (
            f"max_grad_norm={args.max_grad_norm}",
            args.max_grad_norm is not None and args.max_grad_norm > 0,
            "gradients are clipped by the norm of all, which are never there at once: set max_grad_norm=0",
        ),
        ("fp16=True", args.fp16, "gradients are scaled back after the backward pass: set bf16=True"),
        (
            f"world_size={args.world_size}",
            args.world_size > 1,
            "processes share their gradients after the backward pass: train in one process",
        ),
        ("deepspeed", args.deepspeed_plugin is not None, "DeepSpeed takes the gradients itself: train without it"),
    )
    for setting, is_wrong, why in wrong:
        if is_wrong:
            raise ValueError(
                f"optim_args has in_backward=true, which does not go with {setting}: {why}, or leave in_backward out"
            )


register()
