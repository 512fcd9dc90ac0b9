"""Every architecture of the installed transformers, tiny, against its own attention.

    python tests/census.py                 # all of them; writes what was found to tests/census.json
    python tests/census.py llama qwen3     # these, and what is wrong with them

builds a tiny instance of each model type, runs it, and compares :func:`partition` with what
``tests/oracle.py`` sees.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from census_data import ALONE, LINEAR_ATTENTION, UNJUDGED, UNOBSERVED
from oracle import Observed, observe
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from adam_mini_plugins import Partition, PartitionError, partition
from adam_mini_plugins.cli.tiny import CannotRunError, build, feed

RESULTS = Path(__file__).with_name("census.json")
# What an architecture is mostly trained as comes first.
KINDS = {
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    "causal-lm": ("CAUSAL_LM",),
    "multimodal": ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "VISUAL_QUESTION_ANSWERING"),
    "masked-lm": ("MASKED_LM",),
    "image": (
        "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION",
        "INSTANCE_SEGMENTATION", "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION",
        "ZERO_SHOT_OBJECT_DETECTION", "MASKED_IMAGE_MODELING",
    ),
    "audio": ("CTC", "RNNT", "TDT", "AUDIO_CLASSIFICATION", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM"),
    "other": ("SEQUENCE_CLASSIFICATION", "TIME_SERIES_PREDICTION", "PRETRAINING", "MASK_GENERATION"),
    "base": ("",),
}  # fmt: skip


def architectures() -> dict[str, tuple[str, str]]:
    """For each model type with a model class: its kind, and the name of the class to probe."""
    found: dict[str, tuple[str, str]] = {}
    for kind, mappings in KINDS.items():
        for mapping in mappings:
            names = getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES" if mapping else "MODEL_MAPPING_NAMES")
            for model_type, classes in names.items():
                found.setdefault(model_type, (kind, classes if isinstance(classes, str) else classes[0]))
    return found


@dataclass
class Finding:
    """What is to be said of one architecture.

    `status` is "right"; "wrong" or "error" where the partition is or raises; "blind" where the oracle
    can't tell. `tensors` counts those found to make queries or keys.
    """

    status: str
    why: list[str] = field(default_factory=list)
    tensors: int = 0


def probe(model_type: str) -> Finding:
    """Compares the partition of a tiny model with what the oracle sees of it."""
    _, name = architectures()[model_type]
    try:
        model, batch = build(getattr(transformers, name))
    except (CannotRunError, AttributeError) as error:
        return Finding("blind", [f"can't be built: {error}"])
    try:
        blocks = partition(model)
    except PartitionError as error:
        return Finding("error", [str(error)])
    if isinstance(batch, CannotRunError):
        return Finding("blind", [f"can't be run: {batch}"])
    if model_type in UNJUDGED:
        return Finding("blind", [UNJUDGED[model_type]])
    seen = look(model, model_type)
    wrong, unseen = judge(model, blocks, seen)
    if wrong:
        return Finding("wrong", wrong, len(seen.heads))
    if unseen:
        return Finding("blind", [f"not reached: {unseen[0]} and {len(unseen) - 1} others"], len(seen.heads))
    return Finding("right", [], len(seen.heads))


def look(model: PreTrainedModel, model_type: str) -> Observed:
    """What is seen of a model, and of the models inside it that its own forward didn't reach."""
    alone = model_type in ALONE
    batch = feed(model, tokens=64 if alone else 0)
    how = {"linear": model_type in LINEAR_ATTENTION, "alone": alone}
    seen = observe(model, lambda: model(**batch), **how)
    for prefix, inner in model.named_modules():
        reached = any(name.startswith(f"{prefix}.") for name in seen.contracted)
        if reached or inner is model or not isinstance(inner, PreTrainedModel):
            continue
        try:
            batch = feed(inner)
        except CannotRunError:
            continue  # its queries and keys stay unseen
        more = observe(inner, lambda: inner(**batch), **how)  # noqa: B023
        seen.contracted |= {f"{prefix}.{name}": axes for name, axes in more.contracted.items()}
        seen.convolved |= {f"{prefix}.{name}" for name in more.convolved}
        seen.heads |= {f"{prefix}.{name}": heads for name, heads in more.heads.items()}
        seen.attentions += more.attentions
    return seen


def judge(model: nn.Module, blocks: Partition, seen: Observed) -> tuple[list[str], list[str]]:
    """What is wrong with a model's blocks by what was seen of it, and the queries and keys that weren't seen."""
    parameters = dict(model.named_parameters())
    wrong = [f"{name} is in no block" for name in parameters if name not in blocks]
    if blocks.scheme == "tensor":
        return [*wrong, *(["it attends"] if seen.attentions else [])], []
    for name, axes in seen.contracted.items():
        if re.search(UNOBSERVED, name):
            continue
        if name not in blocks or (name in seen.convolved and name not in seen.heads):
            continue
        shape = parameters[name].shape
        index = blocks.block_index(name).expand(shape).movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)
        if not (index == index[0]).all():
            wrong.append(f"{name} {tuple(shape)}: blocks along {axes}, which are summed over")
            continue
        rows = index[0].flatten()
        expected = torch.arange(len(rows))
        sets = seen.heads.get(name, [])
        if not sets and blocks[name].role in ("query", "key", "fused"):
            continue  # among the unseen below
        if len(sets) == 1 and len(sets[0]) < len(rows):
            sets = []  # the part of latent attention's down-projection that all heads share
        for head in sets:
            expected[list(head)] = min(head)
        pairs = torch.stack([rows, expected]).unique(dim=1)
        if not (len(pairs[0].unique()) == pairs.shape[1] == len(pairs[1].unique())):
            sizes, entry = sorted({len(s) for s in sets}), blocks[name]
            wrong.append(f"{name} {tuple(shape)}: {entry.role} {entry.layout}, but {len(sets)} heads of {sizes} rows")
    unseen = [
        entry.name for entry in blocks.values()
        if entry.role in ("query", "key", "fused") and entry.name not in seen.heads
        and not re.search(UNOBSERVED, entry.name)
    ]  # fmt: skip
    return wrong, unseen


def main(chosen: list[str]) -> None:
    """Goes through the chosen architectures, or through all and writes what was found."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = {}
    for model_type in chosen or architectures():
        found[model_type] = finding = probe(model_type)
        print(model_type, finding.status, *finding.why[:5], sep=" | ", flush=True)  # noqa: T201
    if not chosen:
        RESULTS.write_text(json.dumps(summary(found), indent=1) + "\n")


def summary(found: dict[str, Finding]) -> dict[str, object]:
    """What ``tests/census.json`` has: how many are right, of which kinds, and why others can't be told."""
    kinds = architectures()
    right = [model_type for model_type, finding in found.items() if finding.status == "right"]
    return {
        "transformers": transformers.__version__,
        "right": dict(Counter(kinds[model_type][0] for model_type in right)),
        "query and key tensors": sum(found[model_type].tensors for model_type in right),
        "blind": {t: finding.why[0] for t, finding in found.items() if finding.status == "blind"},
        "wrong": {t: finding.why[0] for t, finding in found.items() if finding.status in ("wrong", "error")},
    }


if __name__ == "__main__":
    main(sys.argv[1:])
