"""Knows how many operations and bytes the work on a model takes at least. Knows no timing.

A multiplication and an addition are two operations. Only matrix products are counted: norms, rope, activations, softmax
and element by element work are not. All layers see the whole document.

T tokens, N of them the document's; R reference rows in segments of n; L layers, H query heads of dimension d, G of them
to a KV head; C keys of a chunk, K of them picked; c document keys kept in a KV head:

    matrices    2 W per token, W the weights of the layers' matrices; 2 V for each token whose logits are formed
    prefill     2 W T + 4 L H d T (T + 1) / 2
    observed    2 L H d sum over context rows of the document keys before the row's span: scores a second time
    exact       4 L H d (R T + sum over segments n (n + 1) / 2)
    scores      2 L H d R N
    Gram        2 L H R N (d + C)
    greedy      in each chunk 2 C^2 (d + 1) + C K^2 + 4 C K (d + 1): factor, targets, energies
    biases      2 G R sum over KV heads c (d + c), half of it where every other row is looked at
    values      2 G R sum over KV heads c (3 d + c), the same
    outputs     4 G R d sum over KV heads c
    refinement  10 d steps min(G R, rows of a step) sum over KV heads c: scores, outputs and three gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compactor.model import LoadedModel
from compactor.prefill import context_spans
from compactor.solve.fit import EVERY_OTHER


@dataclass(frozen=True)
class ModelCounts:
    """Sizes of a model that decide what its work costs."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_bytes: int  # of one token in all layers
    layer_weights: int  # elements of the layers' matrices
    head_weights: int  # elements of the matrix that makes logits
    step_bytes: int  # of the weights that a token passes: all but an embedding that is only looked up
    all_bytes: int  # of all weights

    @classmethod
    def of(cls, loaded: LoadedModel) -> ModelCounts:
        """Count the weights of a model in memory; tied ones once."""
        model = loaded.model
        matrices = [weight for weight in model.get_decoder().layers.parameters() if weight.ndim == 2]
        weights = list(model.parameters())
        ends: tuple[Any, Any] = model.get_output_embeddings(), model.get_input_embeddings()
        head, embedding = (end.weight for end in ends)
        total = sum(weight.nbytes for weight in weights)
        return cls(
            loaded.num_layers,
            loaded.num_heads,
            loaded.num_kv_heads,
            loaded.head_dim,
            2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * loaded.dtype.itemsize,
            sum(weight.numel() for weight in matrices),
            head.numel(),
            total if head is embedding else total - embedding.nbytes,
            total,
        )

    def matrices(self, num_tokens: int, num_logits: int = 0) -> float:
        """Return the operations of all weights on some tokens, and on those whose logits are formed."""
        return 2.0 * self.layer_weights * num_tokens + 2.0 * self.head_weights * num_logits

    def attention(self, pairs: float, products: int = 2) -> float:
        """Return the operations of attention over so many pairs of a row and a key, in all layers and heads;
        ``products``: scores and outputs are 2, scores alone 1."""
        return 2.0 * products * self.num_layers * self.num_heads * self.head_dim * pairs

    def prefill(self, num_tokens: int) -> float:
        """Return the operations of a causal pass without logits."""
        return self.matrices(num_tokens) + self.attention(causal_pairs(num_tokens))

    def observed(self, prefix_length: int, num_document: int) -> float:
        """Return the operations that scoring keys by the document's own rows adds to a prefill."""
        spans = context_spans(0, prefix_length + num_document, prefix_length)
        return self.attention(sum((last - first) * (past - prefix_length) for first, last, past in spans), products=1)

    def exact(self, segments: Sequence[int], num_seen: int) -> float:
        """Return the operations of exact attention of segments (their lengths) over ``num_seen`` tokens and, causally,
        themselves."""
        return self.attention(sum(segments) * num_seen + sum(map(causal_pairs, segments)))

    def gram(self, num_rows: int, num_document: int, chunk: int) -> float:
        """Return the operations of all chunks' Gram matrices, scores included."""
        return 2.0 * self.num_layers * self.num_heads * num_rows * num_document * (self.head_dim + chunk)

    def greedy(self, num_document: int, chunk: int, num_picks: int) -> float:
        """Return the operations of the greedy search in all chunks, ``num_picks`` keys in each."""
        targets, chunks = self.head_dim + 1, -(-num_document // chunk)
        one = 2 * chunk**2 * targets + chunk * num_picks**2 + 4 * chunk * num_picks * targets
        return float(self.num_layers * self.num_kv_heads * chunks * one)

    def fit(self, num_rows: int, kept: Sequence[int], refine_steps: int, rows_of_step: int) -> dict[str, float]:
        """Return the operations of the parts of the fit; ``kept``: document keys of every KV head of every layer.
        Before a refinement least squares may look at every other row only (`solve.fit.rows_apart`)."""
        rows = num_rows * self.num_heads // self.num_kv_heads
        products, biases, values = self.head_dim * sum(kept), 0.0, 0.0
        for first in range(0, len(kept), self.num_kv_heads):
            layer = kept[first : first + self.num_kv_heads]
            looked_at = rows / 2 if refine_steps and rows >= EVERY_OTHER * max(layer) else rows
            squares = sum(count**2 for count in layer)
            biases += 2.0 * looked_at * (self.head_dim * sum(layer) + squares)
            values += 2.0 * looked_at * (3 * self.head_dim * sum(layer) + squares)
        return {
            "biases": biases,
            "values": values,
            "refinement": 10.0 * refine_steps * min(rows, rows_of_step) * products,
            "outputs": 4.0 * rows * products,
        }


def causal_pairs(num_tokens: int) -> float:
    """Return the pairs of a token and one that is not after it."""
    return num_tokens * (num_tokens + 1) / 2


def precision_of(dtype: torch.dtype) -> str:
    """Return the ceiling that binds products of a type: bfloat16 for any half precision, else float32."""
    return "bfloat16" if dtype in (torch.bfloat16, torch.float16) else "float32"
