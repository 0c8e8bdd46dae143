"""Knows chance: what any choice must beat. Knows no queries."""

from __future__ import annotations

import torch

from compactor.methods import Compacted
from compactor.methods.keeping import keep_uniformly
from compactor.study import Study

SUMMARY = "random keys, equally many in every head, nothing fitted"


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep random document keys; a larger cache of the same seed holds the keys of a smaller one."""
    orders = study.once("random orders", lambda: random_orders(study))
    return keep_uniformly(study, num_kept, lambda layer, head, count: orders[layer][head, :count])


def random_orders(study: Study) -> dict[int, torch.Tensor]:
    """Return a random order of the document's keys for every head of every compacted layer, (num_kv_heads, T) int64."""
    generator = torch.Generator().manual_seed(study.job.settings.seed)
    num_document, num_kv_heads = len(study.job.document_ids), study.job.loaded.num_kv_heads
    return {
        i: torch.stack([torch.randperm(num_document, generator=generator) for _ in range(num_kv_heads)])
        for i in study.full.full_layers
    }
