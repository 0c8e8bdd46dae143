"""Knows the configurations of models whose speed is measured with random weights. Knows no torch.

Numbers are those of the published configs: Qwen3-4B-Instruct-2507, Qwen3-8B, Llama-3.1-8B-Instruct. ``tiny`` is
nobody's model: it runs on a CPU in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model's configuration, in the words of transformers."""

    config_class: str  # of transformers
    fields: Mapping[str, Any]

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a layer."""
        return int(self.fields["num_key_value_heads"])


def _shape(config_class: str, rope: Mapping[str, Any], **fields: Any) -> Shape:
    rope_parameters = {"rope_type": "default", **rope}
    return Shape(config_class, {**fields, "rope_parameters": rope_parameters})


SHAPES = {
    "qwen3-4b": _shape(
        "Qwen3Config",
        {"rope_theta": 5e6},
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=262_144,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
    ),
    "qwen3-8b": _shape(
        "Qwen3Config",
        {"rope_theta": 1e6},
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=40_960,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
    ),
    "llama-3.1-8b": _shape(
        "LlamaConfig",
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    ),
    "tiny": _shape(
        "Qwen3Config",
        {"rope_theta": 1e4},
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=1024,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
    ),
}
