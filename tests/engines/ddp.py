"""DistributedDataParallel by torch itself: each process has all of the model."""

from __future__ import annotations

from typing import Any

import workers
from torch.nn.parallel import DistributedDataParallel


def figures() -> dict[str, Any]:
    return {
        "llama": workers.compare(lambda: workers.cut_llama(num_hidden_layers=1), DistributedDataParallel),
        "tied": workers.compare(
            lambda: workers.cut_llama(num_hidden_layers=1, tie_word_embeddings=True), DistributedDataParallel
        ),
    }
