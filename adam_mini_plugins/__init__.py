"""Adam-mini for the trainers that people use: half of AdamW's optimizer state by one argument.

Importing this package needs and imports torch alone. ``import adam_mini_plugins.hf`` makes
``optim="adam_mini"`` known to transformers.
"""

from .blocks import Layout, Partition, PartitionError, partition
from .optimizer import AdamMini

__version__ = "0.1.0"

__all__ = ["AdamMini", "Layout", "Partition", "PartitionError", "partition", "register"]


def register() -> None:
    """Makes ``optim="adam_mini"`` known to transformers; ``import adam_mini_plugins.hf`` does the same."""
    from .hf import register as register_with_transformers

    register_with_transformers()
