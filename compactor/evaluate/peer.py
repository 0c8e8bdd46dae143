"""Knows how a press of kvpress, where that is installed, compresses a document, and how its cache is asked.

Only its public protocol is used: ``with press(model): model(context_ids, past_key_values=cache)`` leaves a compressed
cache, and the positions of new tokens go on after the whole context. Nothing is saved to a file, and prefix and
document are compressed together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from compactor import attention
from compactor.errors import SettingsError
from compactor.evaluate.asking import Respondent, room_for, synchronize
from compactor.fidelity import Exchange
from compactor.reference_queries import stop_token_ids

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from compactor.job import Job
    from compactor.model import LoadedModel

PREFIX = "kvpress:"  # of the method's name in the results
PLAIN_ATTENTION = "sdpa"  # kvpress wraps transformers' own functions; ours it does not know


@dataclass(frozen=True)
class Compressed:
    """A document compressed by a press."""

    respondent: Respondent
    tensor_bytes: int  # of keys and values that are neither removed nor hidden, in the storage type of our files
    elapsed_s: float  # of the prefill with the press


def find_press(name: str) -> Any:
    """Return a class of kvpress; raises SettingsError when it is not installed or has no such press."""
    try:
        kvpress = import_module("kvpress")
    except ImportError as failure:
        raise SettingsError(
            f"--peer needs kvpress ({failure}); install it in this environment: pip install kvpress."
        ) from failure
    found = getattr(kvpress, name, None)
    if not isinstance(found, type):
        known = ", ".join(sorted(known for known in dir(kvpress) if known.endswith("Press")))
        raise SettingsError(f"kvpress has no press called {name!r}; choose from {known}.")
    return found


def make_press(name: str, keep_ratio: float) -> Any:
    """Return a press that removes all but ``keep_ratio`` of the keys. ``Outer(Inner)`` wraps one press in another.

    Raises SettingsError when the press cannot be made from a ratio alone.
    """
    outer, _, inner = name.removesuffix(")").partition("(")
    press = find_press(outer)
    try:
        return press(press=make_press(inner, keep_ratio)) if inner else press(compression_ratio=1.0 - keep_ratio)
    except TypeError as failure:
        raise SettingsError(
            f"The press {name} cannot be made from a ratio alone ({failure}); choose one that takes "
            "compression_ratio, or wrap one: Outer(Inner)."
        ) from failure


@contextmanager
def compressed(loaded: LoadedModel, job: Job, name: str, keep_ratio: float) -> Iterator[Compressed]:
    """Prefill the document with a press; inside, the model attends through transformers' own sdpa.

    Raises SettingsError for a model with sliding layers, whose caches are cut in another way.
    """
    from transformers import DynamicCache

    press = make_press(name, keep_ratio)
    model = loaded.model
    if any(window is not None for window in loaded.sliding_windows):
        raise SettingsError(f"{loaded.name} has layers with a sliding window; --peer needs a model without them.")
    context_ids = torch.tensor([[*job.prompt.prefix_ids, *job.document_ids]], device=loaded.device)
    length = context_ids.shape[1]
    model.set_attn_implementation(PLAIN_ATTENTION)
    try:
        cache = DynamicCache(config=model.config)
        synchronize(loaded.device)
        started = time.perf_counter()
        with torch.no_grad(), press(model):
            model.get_decoder()(
                input_ids=context_ids,
                past_key_values=cache,
                use_cache=True,
                cache_position=torch.arange(length, device=loaded.device),  # by which a press tells the prefill
            )
        synchronize(loaded.device)
        elapsed_s = time.perf_counter() - started
        layers: list[Any] = cache.layers
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = [(layer.keys, layer.values) for layer in layers]
        numbers = sum(keys.numel() + values.numel() for keys, values in pairs)
        numbers -= 2 * loaded.head_dim * sum(len(module.masked_key_indices[0]) for module in masking(model))
        yield Compressed(PeerRespondent(loaded, pairs, length), numbers * job.storage_dtype.itemsize, elapsed_s)
    finally:
        for module in masking(model):
            module.masked_key_indices = None  # it would mask keys of the next cache
        attention.register(model)


def masking(model: PreTrainedModel) -> list[Any]:
    """Return the attention modules in which a press hides keys instead of removing them: head by head, as indices."""
    return [module for module in model.modules() if getattr(module, "masked_key_indices", None) is not None]


class PeerRespondent:
    """Asks a compressed cache of dense keys, one question after another."""

    def __init__(
        self, loaded: LoadedModel, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], logical_length: int
    ) -> None:
        """pairs: keys and values of each layer, (1, num_kv_heads, num_kept, head_dim)."""
        self.loaded, self.pairs, self.logical_length = loaded, pairs, logical_length

    @torch.no_grad()
    def generate(self, questions: Sequence[list[int]], max_new_tokens: int, *, stop: bool = True) -> list[list[int]]:
        """See `asking.Respondent.generate`. Raises DocumentError where the window has no room for an answer."""
        limit = room_for(self.loaded, self.logical_length, questions, max_new_tokens)
        return [self._answer(question, limit, stop_token_ids(self.loaded) if stop else set()) for question in questions]

    def _answer(self, question: list[int], limit: int, stops: set[int]) -> list[int]:
        cache, answer, new_ids = self._fresh_cache(), list[int](), question
        position = self.logical_length
        while len(answer) < limit:
            logits = self.loaded.model(**self._inputs(new_ids, position, cache), logits_to_keep=1).logits
            token = int(logits[0, -1].argmax())
            if token in stops:
                break
            answer.append(token)
            position += len(new_ids)
            new_ids = [token]
        return answer

    @torch.no_grad()
    def states(self, exchanges: Sequence[Exchange]) -> torch.Tensor:
        """See `asking.Respondent.states`."""
        parts = []
        for one in exchanges:
            inputs = self._inputs(list(one.input_ids), self.logical_length, self._fresh_cache())
            hidden = self.loaded.model.get_decoder()(**inputs).last_hidden_state[0]
            parts.append(hidden[len(one.question_ids) - 1 : len(one.input_ids)])
        return torch.cat(parts)

    def _inputs(self, token_ids: list[int], position: int, cache: Cache) -> dict[str, Any]:
        device = self.loaded.device
        positions = torch.arange(position, position + len(token_ids), device=device)
        return {
            "input_ids": torch.tensor([token_ids], device=device),
            "position_ids": positions.unsqueeze(0),
            "past_key_values": cache,
            "use_cache": True,
            "cache_position": positions,
        }

    def _fresh_cache(self) -> Cache:
        """Return a cache with the document alone: what is appended to it is not seen by the next question."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.pairs):
            cache.update(keys, values, index)
        return cache
