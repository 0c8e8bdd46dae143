"""Knows how two models are told apart: by fingerprints of config, weights, tokenizer and chat template."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from compactor.errors import MismatchError, ModelError
from compactor.families import field_of, head_dim, num_kv_heads, rope_of, six_digits, sliding_windows
from compactor.types import ModelIdentity

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SAMPLE_LENGTH = 32  # values at the start, in the middle and at the end of every weight
PLURALS = ("the weights", "the rope parameters")
SMALLEST_SAMPLED = 2.0**-14  # below it float16 is inexact; smaller values count as zero


def identify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    revision: str | None = None,
) -> ModelIdentity:
    """Return the identity of a model in memory; without a tokenizer its hashes are "" and compare as equal.

    A sample of every weight is hashed, not every value. Loading in float32 or bfloat16, or on another
    device, gives the same identity; so does float16, except for a checkpoint in float32.
    """
    identity = identify_config(model.config.get_text_config(decoder=True), tokenizer, name, revision)
    return replace(identity, weights_fingerprint=weights_fingerprint(model))


def identify_config(
    text_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    revision: str | None = None,
) -> ModelIdentity:
    """Return the identity before weights are read: their fingerprint is "", which compares as equal."""
    return ModelIdentity(
        name=name,
        revision=revision,
        family=text_config.model_type,
        config_fingerprint=config_fingerprint(text_config),
        weights_fingerprint="",
        tokenizer_hash=tokenizer_hash(tokenizer) if tokenizer is not None else "",
        chat_template_hash=chat_template_hash(tokenizer) if tokenizer is not None else "",
        num_layers=text_config.num_hidden_layers,
        num_heads=text_config.num_attention_heads,
        num_kv_heads=num_kv_heads(text_config),
        head_dim=head_dim(text_config),
        rope=rope_of(text_config),
    )


def check_identity(saved: ModelIdentity, loaded: ModelIdentity) -> None:
    """Raise MismatchError, naming both models and what differs, unless they are the same; names may differ.

    An empty hash on either side was not computed and is not compared.
    """
    differing = list(_differences(saved, loaded))
    if not differing:
        return
    what = " and ".join(filter(None, [", ".join(differing[:-1]), differing[-1]]))
    verb = "differ" if len(differing) > 1 or what in PLURALS else "differs"
    raise MismatchError(
        f"The cache was made with {_describe(saved)}, but the model here is {_describe(loaded)}: {what} "
        f"{verb}; use the model it was made with, or compact again."
    )


def _differences(saved: ModelIdentity, loaded: ModelIdentity) -> Iterator[str]:
    shape = ("family", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    same_shape = all(getattr(saved, field) == getattr(loaded, field) for field in shape)
    same_rope = saved.rope == loaded.rope
    if not same_shape or (same_rope and saved.config_fingerprint != loaded.config_fingerprint):
        yield "the config"
    if not same_rope:
        yield "the rope parameters"
    hashes = {
        "the weights": (saved.weights_fingerprint, loaded.weights_fingerprint),
        "the tokenizer": (saved.tokenizer_hash, loaded.tokenizer_hash),
        "the chat template": (saved.chat_template_hash, loaded.chat_template_hash),
    }
    yield from (what for what, (ours, theirs) in hashes.items() if ours and theirs and ours != theirs)


def _describe(identity: ModelIdentity) -> str:
    revision = f", revision {identity.revision[:12]}" if identity.revision else ""
    return f"{identity.name} ({identity.family}, {identity.num_layers} layers{revision})"


def config_fingerprint(text_config: PreTrainedConfig) -> str:
    """Return the SHA-256 of the settings that shape attention."""
    settings = {
        "family": text_config.model_type,
        "hidden_size": text_config.hidden_size,
        "intermediate_size": text_config.intermediate_size,
        "num_layers": text_config.num_hidden_layers,
        "num_heads": text_config.num_attention_heads,
        "num_kv_heads": num_kv_heads(text_config),
        "head_dim": head_dim(text_config),
        "rope": rope_of(text_config),
        "sliding_windows": sliding_windows(text_config),
        "query_pre_attn_scalar": field_of(text_config, "query_pre_attn_scalar"),
        "rms_norm_eps": six_digits(text_config.rms_norm_eps),
        "vocab_size": text_config.vocab_size,
        "tie_word_embeddings": bool(text_config.tie_word_embeddings),
    }
    return _sha256([json.dumps(settings, sort_keys=True)])


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return the SHA-256 over every weight's name, shape and a fixed sample of its values.

    Floats are rounded to bfloat16; integer storage of quantised weights is hashed as it is. Samples go to the
    host once per device and type.
    """
    weights = sorted(_weights(model), key=lambda named: named[0])
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for name, weight in weights:
        if weight.is_meta:
            raise ModelError(f"The weight {name} is not in memory (offloaded); load the model without offloading.")
        groups.setdefault((weight.device, weight.dtype), []).append(_sample(weight))
    samples = {key: iter(_to_host(group)) for key, group in groups.items()}
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(next(samples[weight.device, weight.dtype]))
    return digest.hexdigest()


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter once, tied ones under their first name, and every buffer that is saved."""
    for name, weight in model.named_parameters():
        yield name.replace("_orig_mod.", ""), weight.detach()  # the prefix of torch.compile
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".replace("_orig_mod.", ""), buffer.detach()


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Return (up to 3 * SAMPLE_LENGTH,) values: the first, the middle and the last ones."""
    import torch

    flat = weight.reshape(-1)
    if flat.numel() <= 3 * SAMPLE_LENGTH:
        return flat
    middle = flat.numel() // 2
    return torch.cat([flat[:SAMPLE_LENGTH], flat[middle : middle + SAMPLE_LENGTH], flat[-SAMPLE_LENGTH:]])


def _to_host(samples: list[torch.Tensor]) -> list[bytes]:
    """Return each sample's bytes, moved in one piece; floats are rounded to bfloat16, tiny ones to zero."""
    import torch

    values = torch.cat(samples)
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
        values = torch.where(values.abs() < SMALLEST_SAMPLED, torch.zeros_like(values), values)
    size = values.element_size()
    data = values.cpu().view(torch.uint8).numpy().tobytes()
    ends = itertools.accumulate(sample.numel() * size for sample in samples)
    return [data[end - sample.numel() * size : end] for sample, end in zip(samples, ends, strict=True)]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of vocabulary, merges and added tokens; what changes with use does not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _sha256(f"{index} {token}" for token, index in sorted(tokenizer.get_vocab().items()))
    saved = json.loads(backend.to_str())
    vocabulary, merges = saved["model"].get("vocab", {}), saved["model"].get("merges") or []
    if isinstance(vocabulary, dict):
        lines = [f"{index} {token}" for token, index in sorted(vocabulary.items(), key=lambda item: item[1])]
    else:  # unigram: tokens with their scores
        lines = [f"{index} {token} {score}" for index, (token, score) in enumerate(vocabulary)]
    lines += ["merges", *(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)]
    lines += ["added", *(f"{one['id']} {one['content']} {one['special']}" for one in saved["added_tokens"])]
    return _sha256(lines)


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the chat template's text, the default one of several; of "" without any."""
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):
        template = template.get("default", "")
    return hashlib.sha256(template.encode()).hexdigest()


def _sha256(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
