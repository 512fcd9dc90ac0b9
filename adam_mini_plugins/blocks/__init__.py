"""What a block is: layouts, the rules that choose them, and the partition of a model."""

from .layout import Grid, Layout
from .partition import Partition, PartitionError, TensorBlocks, partition

__all__ = ["Grid", "Layout", "Partition", "PartitionError", "TensorBlocks", "partition"]
