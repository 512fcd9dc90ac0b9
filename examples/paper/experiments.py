"""All experiments, in the order of the table."""

from __future__ import annotations

from .frame import Experiment
from .preconditioner import Preconditioner
from .quadratic import Quadratic

EXPERIMENTS: tuple[type[Experiment], ...] = (Quadratic, Preconditioner)
