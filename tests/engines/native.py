"""Engines of torch itself: each argument is a module here, whose figures are reported under its name."""

from __future__ import annotations

import faulthandler
import importlib

import torch.distributed as dist
import workers

faulthandler.dump_traceback_later(290)  # where processes wait for one another, say where
dist.init_process_group("gloo")
workers.report({name: importlib.import_module(name).figures() for name in workers.arguments()})
