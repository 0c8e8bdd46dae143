"""Knows how far a compacted cache is from the full one. Knows no fitting and no prompts.

KL(full || compacted) in nats per token, teacher-forced on the full cache's greedy answers, for every token of them; and
the error of attention itself, layer by layer, on the queries of the full cache.

Of a pass over many answers only the last hidden states are held, a few kilobytes a token. The log-probabilities (a
token of a vocabulary of 152k takes 1.2 MB in float64) are formed from them a block of positions at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from compactor.attach import DocumentLayer
from compactor.types import LayerCache

if TYPE_CHECKING:
    from compactor.attach import AttachedCache
    from compactor.model import LoadedModel

POSITIONS_AT_ONCE = 32  # positions whose log-probabilities are held together: 39 MB each at a vocabulary of 152k


@dataclass(frozen=True)
class Fidelity:
    """Distance of one cache to the full cache on one or more answers."""

    kl: torch.Tensor  # (num_tokens,) float64, nats
    agreement: torch.Tensor  # (num_tokens,) bool: the most likely token is the same

    @property
    def mean_kl(self) -> float:
        """Nats per answer token."""
        return float(self.kl.mean())


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, as token ids. An answer that ended has its stop token, so none is empty."""

    question_ids: tuple[int, ...]  # from the end of the document to the opening of the answer
    answer_ids: tuple[int, ...]

    @property
    def input_ids(self) -> tuple[int, ...]:
        """What the model reads in order to predict every token of the answer."""
        return self.question_ids + self.answer_ids[:-1]


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


# ------------------------------------------------------------------------------------------- many answers at once


@torch.no_grad()
def answer_states(loaded: LoadedModel, cache: Cache, exchanges: Sequence[Exchange]) -> torch.Tensor:
    """Return the last hidden state at each position of all answers, one answer after another.

    ``cache``: a fresh cache over a document (an `AttachedCache`, or one of `ComparedLayer`); its tail is used up. The
    exchanges run as one batch over the shared document, padded on the right, where causality hides the padding.
    Returns (number of answer tokens, hidden_size) in the model's type, on its device.
    """
    longest = max(len(exchange.input_ids) for exchange in exchanges)
    padded = [[*exchange.input_ids, *[0] * (longest - len(exchange.input_ids))] for exchange in exchanges]
    input_ids = torch.tensor(padded, device=loaded.device)  # (num_exchanges, longest)
    hidden = loaded.model.get_decoder()(
        input_ids=input_ids, past_key_values=cache, use_cache=True
    ).last_hidden_state  # (num_exchanges, longest, hidden_size)
    return torch.cat([hidden[i, len(one.question_ids) - 1 : len(one.input_ids)] for i, one in enumerate(exchanges)])


@torch.no_grad()
def compare_states(loaded: LoadedModel, full_states: torch.Tensor, other_states: torch.Tensor) -> Fidelity:
    """Compare the predictions at two sets of hidden states (num_tokens, hidden_size); see `answer_states`."""
    blocks = [
        compare(log_probs_of(loaded, full), log_probs_of(loaded, other))
        for full, other in zip(full_states.split(POSITIONS_AT_ONCE), other_states.split(POSITIONS_AT_ONCE), strict=True)
    ]
    return Fidelity(
        torch.cat([block.kl.cpu().double() for block in blocks]), torch.cat([block.agreement.cpu() for block in blocks])
    )


def log_probs_of(loaded: LoadedModel, states: torch.Tensor) -> torch.Tensor:
    """Apply the model's head: (num_tokens, hidden_size) to log-probabilities (num_tokens, vocabulary).

    The product is in the model's type, as when it answers; the softmax in float64 (float32 where a device has none).
    """
    head = loaded.model.get_output_embeddings()
    assert isinstance(head, torch.nn.Module)
    logits: torch.Tensor = head(states)
    cap: float | None = getattr(loaded.model.config, "final_logit_softcapping", None)  # Gemma
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    return logits.to(exact).log_softmax(-1)


# ------------------------------------------------------------------------------------------- attention


class ComparedLayer(DocumentLayer):
    """A layer of the full cache that also attends over its compacted self and sums how far the outputs are apart.

    The full output is what goes on to the next layer, so both sides see the queries of the full cache. With the weights
    w_ih = g_h^2 (`solve.currency.output_gains`) of the real tokens i of the batch and the query heads h:

        squared_error = sum w_ih ||o'_ih - o_ih||^2,   energy = sum w_ih ||o_ih||^2

    where o is the output of attention over document and own tail together, o' the same with the compacted document.
    """

    def __init__(
        self,
        layer: LayerCache,
        compacted: LayerCache,
        logical_length: int,
        previous: DocumentLayer | None,
        head_gains: torch.Tensor,
        real: torch.Tensor,
    ) -> None:
        """head_gains: (num_heads,) float32; real: (batch, q_len) bool, False for padding."""
        super().__init__(layer, logical_length, previous)
        self.compacted = DocumentLayer(compacted, logical_length)
        self.head_gains = head_gains
        self.real = real
        self.squared_error = 0.0
        self.energy = 0.0

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        scaling: float,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend to the full document; compare; see `DocumentLayer.attend`."""
        out = super().attend(query, key, value, mask=mask, scaling=scaling, position_ids=position_ids)
        if self.document.sliding_window is None:
            other = self.compacted.attend(query, key, value, mask=mask, scaling=scaling, position_ids=position_ids)
            weights = self.head_gains.to(query.device).square().view(1, -1, 1) * self.real.to(query.device).unsqueeze(1)
            self.squared_error += float((weights * (other.float() - out.float()).square().sum(-1)).sum())
            self.energy += float((weights * out.float().square().sum(-1)).sum())
        return out

    @property
    def relative_error(self) -> float:
        """Return sqrt(squared_error / energy), 0 when there is no energy."""
        return (self.squared_error / self.energy) ** 0.5 if self.energy > 0 else 0.0


def compare_layers(
    full: AttachedCache, compacted: AttachedCache, head_gains: torch.Tensor, exchanges: Sequence[Exchange]
) -> list[ComparedLayer]:
    """Return fresh layers of the full cache for `answer_states`, which sum the errors of their compacted selves there.

    head_gains: (num_layers, num_heads) float32. Every token of question and answer is a query. Both caches must place
    the exchanges at the same positions (equal logical lengths), else their queries are not the same.
    """
    longest = max(len(exchange.input_ids) for exchange in exchanges)
    lengths = torch.tensor([len(exchange.input_ids) for exchange in exchanges])
    real = torch.arange(longest) < lengths.unsqueeze(1)  # (num_exchanges, longest)
    layers: list[ComparedLayer] = []
    for i, (layer, other) in enumerate(zip(full.document_layers, compacted.document_layers, strict=True)):
        previous = layers[-1] if layers else None
        layers.append(ComparedLayer(layer.document, other.document, full.logical_length, previous, head_gains[i], real))
    return layers
