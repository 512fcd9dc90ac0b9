"""All experiments, in the order of the table."""

from __future__ import annotations

from .frame import Experiment
from .graph import Graph
from .hessian_mlp import HessianMLP
from .hessian_transformer import HessianTransformer
from .leave_one_out import LeaveOneOut
from .memory import Memory
from .parity import Parity
from .partition import PartitionAblation
from .preconditioner import Preconditioner
from .pretrain import Pretrain
from .quadratic import Quadratic
from .reduction import Reduction
from .scaling import Scaling
from .throughput import Throughput
from .trajectory import Trajectory
from .value import Value
from .vision import Vision

EXPERIMENTS: tuple[type[Experiment], ...] = (
    Quadratic,
    Preconditioner,
    HessianMLP,
    HessianTransformer,
    LeaveOneOut,
    PartitionAblation,
    Reduction,
    Value,
    Trajectory,
    Pretrain,
    Scaling,
    Parity,
    Vision,
    Graph,
    Memory,
    Throughput,
)
