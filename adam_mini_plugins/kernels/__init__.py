"""Kernels that perform the step of :mod:`adam_mini_plugins.update` in one pass over memory."""
