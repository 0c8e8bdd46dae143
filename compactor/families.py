"""Knows which models can be compacted and why others cannot, from their config alone. Reads no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactor.errors import ModelError
from compactor.fetch import one_line, quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
PICTURE_FAMILIES = ("gemma3",)  # models of pictures and text; the text part is loaded, and is a supported one
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others change with the length of the text
SLIDING, FULL = "sliding_attention", "full_attention"
REFUSED_FIELDS = {
    "attn_logit_softcapping": "squeezes its attention scores",
    "use_bidirectional_attention": "lets a token attend to later ones",
    "attention_chunk_size": "attends within chunks only",
    "num_kv_shared_layers": "shares keys and values between layers",
    "kv_sharing_modes": "shares keys and values between layers",
}


def read_config(folder: Path, name: str) -> PreTrainedConfig:
    """Read and check the config of a folder; of a model of pictures and text, return that of the text part.

    Raises ModelError when there is none, when it is damaged, or when the model cannot be compacted.
    """
    from transformers import AutoConfig

    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError:
        raise ModelError(f"{name} has no config.json, so it is no model; check the folder.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The config.json of {name} is damaged ({one_line(error)}); fetch it again.") from error
    check_family(model_type, name)
    try:
        with quiet_libraries():
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers checks each field in its own way
        raise ModelError(f"The config.json of {name} is not valid: {one_line(error)}.") from error
    text_config = check_config(config, name)
    if text_config is not config:
        text_config.dtype = text_config.dtype or config.dtype
        if field_of(config, "quantization_config") is not None:
            text_config.quantization_config = config.quantization_config
    return text_config


def check_family(model_type: object, name: str) -> None:
    """Raise ModelError, naming the families that are supported, unless ``model_type`` is one of them."""
    if model_type not in SUPPORTED_FAMILIES + PICTURE_FAMILIES:
        raise ModelError(
            f"{name} is of the family {model_type!r}, whose attention compactor has not been tried with; "
            f"supported are {', '.join(SUPPORTED_FAMILIES + PICTURE_FAMILIES)}."
        )


def check_config(config: PreTrainedConfig, name: str = "The model") -> PreTrainedConfig:
    """Return the config of the text decoder, or raise ModelError with the reason against compacting it."""
    check_family(config.model_type, name)
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    check_family(text.model_type, name)
    for field, what in REFUSED_FIELDS.items():
        if field_of(text, field):
            raise ModelError(
                f"{name} {what} ({field}), which a compacted cache cannot reproduce; choose another model."
            )
    moving = sorted(rope_types(text) - set(STATIC_ROPE_TYPES))
    if moving:
        raise ModelError(
            f"{name} has rope of the type {', '.join(moving)}; only types whose angles never change with the "
            f"length of the text are supported: {', '.join(STATIC_ROPE_TYPES)}."
        )
    unknown = sorted(set(_layer_types(text)) - {SLIDING, FULL})
    if unknown:
        raise ModelError(f"{name} has layers of the type {', '.join(unknown)}, which cannot be compacted.")
    if None not in sliding_windows(text):
        raise ModelError(
            f"Every layer of {name} sees only the last {field_of(text, 'sliding_window')} tokens (sliding "
            "window), so there is nothing to compact; choose a model with full attention."
        )
    return text


def sliding_windows(text_config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Return per layer how many tokens a query can look back, None for all, as transformers caches them."""
    window = field_of(text_config, "sliding_window")
    return tuple(window if layer_type == SLIDING else None for layer_type in _layer_types(text_config))


def _layer_types(text: PreTrainedConfig) -> list[str]:
    given = field_of(text, "layer_types")
    if given is not None and text.model_type != "mistral":  # its layers all follow sliding_window
        return list(given)
    return [SLIDING if field_of(text, "sliding_window") else FULL] * text.num_hidden_layers


def rope_of(text_config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rope parameters as plain JSON: one set, or one per layer type.

    Numbers are floats of six digits, so that a GGUF file's float32 and a config's decimals agree.
    """
    rope = field_of(text_config, "rope_parameters") or {}
    given = json.dumps({key: value for key, value in rope.items() if value is not None}, sort_keys=True)
    plain: dict[str, Any] = json.loads(given, parse_int=six_digits, parse_float=six_digits)
    return plain


def six_digits(number: float | str) -> float:
    """Return a number rounded to six significant digits."""
    return float(f"{float(number):.6g}")


def rope_types(text_config: PreTrainedConfig) -> set[str]:
    """Return the types of rope that the layers use."""
    rope = rope_of(text_config)
    sets = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return {str(one.get("rope_type", "default")) for one in sets}


def num_kv_heads(text_config: PreTrainedConfig) -> int:
    """Return the number of KV heads of a layer."""
    return int(field_of(text_config, "num_key_value_heads") or text_config.num_attention_heads)


def head_dim(text_config: PreTrainedConfig) -> int:
    """Return the size of one key."""
    given = field_of(text_config, "head_dim")
    return int(given or text_config.hidden_size // text_config.num_attention_heads)


def field_of(config: PreTrainedConfig, name: str) -> Any:
    """Return a field of a config, or None where the family has no such field."""
    return getattr(config, name, None)
