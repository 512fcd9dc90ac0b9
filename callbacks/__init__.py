"""Reports of what an optimizer's state takes, as callbacks: ``hf`` for transformers, ``lightning`` for Lightning."""
