"""Python imports this at start-up in every process of ``adam-mini run``: it stands first on the path.

It waits until transformers' training arguments have been imported, then registers the optimizer. It
imports nothing of the package before that: most processes of a launcher never need it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys


class _RegisterAfter(importlib.abc.MetaPathFinder):
    """Finds one module, once, as the other finders would, and registers when it has been executed."""

    awaited = "transformers.training_args"

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            sys.modules[fullname] = module
            import adam_mini_plugins.hf  # noqa: F401

        spec.loader.exec_module = execute_and_register
        return spec


def _run_the_next_sitecustomize():
    here = os.path.dirname(os.path.abspath(__file__))
    others = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _RegisterAfter())
_run_the_next_sitecustomize()
