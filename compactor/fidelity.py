"""Knows how far a compacted cache is from the full one. Knows no fitting.

KL(full || compacted) in nats per token, teacher-forced on the full cache's greedy answers, for every token of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from compactor.attach import AttachedCache
    from compactor.model import LoadedModel


@dataclass(frozen=True)
class Fidelity:
    """Distance of one cache to the full cache on one answer."""

    kl: torch.Tensor  # (num_tokens,) float64, nats
    agreement: torch.Tensor  # (num_tokens,) bool: the most likely token is the same

    @property
    def mean_kl(self) -> float:
        """Nats per answer token."""
        return float(self.kl.mean())


@torch.no_grad()
def answer_log_probs(
    loaded: LoadedModel, cache: AttachedCache, question_ids: list[int], answer_ids: list[int]
) -> torch.Tensor:
    """Log-probabilities of the token at each position of an answer, (len(answer_ids), vocabulary) float64.

    An empty answer has one position: that of the stop token.
    """
    input_ids = torch.tensor([[*question_ids, *answer_ids[:-1]]], device=loaded.device)
    cache.forget_tail()
    try:
        logits = loaded.model(
            input_ids=input_ids,
            attention_mask=cache.attention_mask(torch.ones_like(input_ids)),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=max(1, len(answer_ids)),  # 0 would mean all
        ).logits
    finally:
        cache.forget_tail()
    log_probs: torch.Tensor = logits[0].cpu().double().log_softmax(-1)
    return log_probs


def compare(full_log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> Fidelity:
    """Compare two sets of log-probabilities (num_tokens, vocabulary)."""
    kl = (full_log_probs.exp() * (full_log_probs - other_log_probs)).sum(-1)
    return Fidelity(kl, full_log_probs.argmax(-1) == other_log_probs.argmax(-1))
