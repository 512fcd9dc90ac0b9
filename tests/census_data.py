"""What the oracle has to know of some architectures, and those that it can't judge."""

from __future__ import annotations

# Attention without a softmax in the middle, by model type.
LINEAR_ATTENTION = {"minimax", "xlstm"}
# Queries that positions get from different experts.
ALONE = {"jetmoe"}

# Tensors that the oracle can't judge, and what was decided of them.
#   An indexer's scores pick positions by top-k, through which nothing is differentiated: by head, as queries and keys.
#   What DeepSeek-V4's compressor pools over positions is a latent: by neuron.
#   DBRX's experts stand below one another in one matrix, summed over within each: a column of each expert.
UNOBSERVED = r"\bindexer\b|\bcompressor\.\w+_proj\b|\bexperts\.mlp\.w2\b"

# Architectures whose attention is not between projections alone, so that the oracle finds more.
UNJUDGED = {
    "inkling2": "learned queries attend to the residual stream, with no projection to keys",
    "inkling2_text": "learned queries attend to the residual stream, with no projection to keys",
}
