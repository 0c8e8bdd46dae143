"""Knows how sequences after one document grow token by token. Knows no prompts and no solver.

The prompts are one forward call; every later step has the same shapes, since each layer's tail lies in a buffer of its
own. On an NVIDIA GPU a step is captured once as a CUDA graph and replayed: launching a few thousand kernels from Python
takes longer than running them. Tokens come back while the next steps already run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from compactor import attention
from compactor.attach import AttachedCache
from compactor.reference_queries import left_pad, pad_token_id, stop_token_ids
from compactor.shared_layers import SharedLayer

if TYPE_CHECKING:
    from compactor.model import LoadedModel

# Maps logits (rows, vocabulary) float32 and the step's number, (1,) int64, to the next tokens, (rows,) int64, without
# waiting for the device: the step may be captured.
Pick = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

AHEAD = 2  # steps that run before a token is looked at, on a GPU
WARM_STEPS = 2  # static steps before one is captured
WORTH_CAPTURING = 8  # steps that are left at least

MakeLayers = Callable[[torch.Tensor, int], list[SharedLayer]]  # of padding, (rows,) int64, and of the longest tail


def document_layers(cache: AttachedCache) -> MakeLayers:
    """Return what makes layers in which every row sees the whole document of an attached cache."""

    def make(padding: torch.Tensor, capacity: int) -> list[SharedLayer]:
        return [
            SharedLayer(layer.document, cache.logical_length, padding.to(layer.document.keys.device), capacity)
            for layer in cache.document_layers
        ]

    return make


def answer(
    loaded: LoadedModel,
    make_layers: MakeLayers,
    logical_length: int,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    pick: Pick,
    stops: set[int] | frozenset[int] = frozenset(),
    on_step: Callable[[int], None] = lambda _steps: None,
    keep_stop: bool = False,
) -> list[list[int]]:
    """Continue all prompts as one batch; each answer ends before its first token of ``stops`` (after it with
    ``keep_stop``), or at the limit."""
    answers: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    if not prompts or max_new_tokens < 1:
        return answers
    for tokens in stream(loaded, make_layers, logical_length, prompts, max_new_tokens, pick):
        for row, token in enumerate(tokens):
            is_stop = token in stops
            if not ended[row] and (keep_stop or not is_stop):
                answers[row].append(token)
            ended[row] = ended[row] or is_stop
        on_step(1)
        if all(ended):
            break
    return answers


@torch.no_grad()
def stream(
    loaded: LoadedModel,
    make_layers: MakeLayers,
    logical_length: int,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    pick: Pick,
) -> Iterator[list[int]]:
    """Yield the tokens of every step, one per prompt, up to ``max_new_tokens`` times.

    What comes after a stop token is the caller's to leave. Prompts are token ids that follow the document; the caller
    checks that all fits the window.
    """
    batch = _Batch(loaded, make_layers, logical_length, prompts, max_new_tokens, pick)
    ahead = AHEAD if loaded.device.type == "cuda" else 0
    waiting: deque[_Fetched] = deque()
    for step in range(max_new_tokens):
        batch.advance(max_new_tokens - step)
        waiting.append(_Fetched(batch.token))
        if len(waiting) > ahead:
            yield waiting.popleft().tokens()
    while waiting:
        yield waiting.popleft().tokens()


class _Fetched:
    """Tokens on their way to the host."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.event = None
        if tokens.is_cuda:
            self.host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self.host.copy_(tokens, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(tokens.device))
        else:
            self.host = tokens.clone()

    def tokens(self) -> list[int]:
        """Return the tokens; waits for them."""
        if self.event is not None:
            self.event.synchronize()
        rows: list[int] = self.host[:, 0].tolist()
        return rows


class _Batch:
    """The sequences of a batch; `advance` adds one token to each."""

    def __init__(
        self,
        loaded: LoadedModel,
        make_layers: MakeLayers,
        logical_length: int,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        pick: Pick,
    ) -> None:
        self.loaded, self.pick, device = loaded, pick, loaded.device
        input_ids, mask = left_pad(list(prompts), pad_id=pad_token_id(loaded))
        padding = (mask == 0).sum(1).to(device)
        self.prompt_length = input_ids.shape[1]
        self.input_ids = input_ids.to(device)
        self.layers = make_layers(padding, self.prompt_length + max_new_tokens)
        self.cache = Cache(layers=list(self.layers))
        self.no_mask = torch.ones(
            1, 1, 1, 1, dtype=torch.bool, device=device
        )  # the layers mask; 4-d ones are passed on
        first = torch.arange(self.prompt_length, device=device) - padding.unsqueeze(-1)
        self.positions = first.clamp_min(0) + logical_length
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.token = torch.zeros(len(prompts), 1, dtype=torch.int64, device=device)
        self.steps_taken = 0
        self.tail_end: torch.Tensor | None = None  # (1,): where the next token goes, once shapes are fixed
        self.captures = can_capture(loaded) and max_new_tokens > WARM_STEPS + WORTH_CAPTURING
        self.graph: torch.cuda.CUDAGraph | None = None

    def advance(self, steps_left: int) -> None:
        """Take one step: the prompts first, then a token of each sequence."""
        if self.steps_taken == 0:
            self._forward(self.input_ids)
            self.positions = self.positions[:, -1:] + 1
            if self.captures:
                self.tail_end = torch.tensor([self.prompt_length], device=self.loaded.device)
                for layer in self.layers:
                    layer.fix_shapes(self.tail_end)
        elif self.graph is not None:
            self.graph.replay()
        elif (
            self.captures
            and self.steps_taken > WARM_STEPS
            and steps_left > WORTH_CAPTURING
            and (graph := self._capture())
        ):
            self.graph = graph
            graph.replay()
        else:
            self._step()
        self.steps_taken += 1

    def _forward(self, input_ids: torch.Tensor) -> None:
        logits = self.loaded.model(
            input_ids=input_ids,
            position_ids=self.positions,
            attention_mask=self.no_mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        attention.require_consumed(any(layer.pending for layer in self.layers), "a batch of answers")
        self.token.copy_(self.pick(logits.float(), self.step).unsqueeze(-1))
        self.step += 1

    def _step(self) -> None:
        self._forward(self.token)
        self.positions += 1
        if self.tail_end is not None:
            self.tail_end += 1

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """Capture a step; where the model waits for the device in the middle of it, go on without."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError:
            torch.cuda.synchronize(self.loaded.device)
            self.captures = False
            for layer in self.layers:
                layer.pending = False
            return None
        return graph


def can_capture(loaded: LoadedModel) -> bool:
    """Whether a step of the model can be captured as one CUDA graph: an NVIDIA GPU that holds all of it."""
    spread = len(set(getattr(loaded.model, "hf_device_map", {"": 0}).values())) > 1
    return loaded.device.type == "cuda" and torch.version.hip is None and not spread


def answer_after(
    loaded: LoadedModel,
    cache: AttachedCache,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    pick: Pick,
    *,
    stop: bool = True,
    keep_stop: bool = False,
) -> list[list[int]]:
    """Continue all prompts after an attached cache as one batch, each up to the model's own stop tokens, or with
    ``stop`` False to the limit."""
    stops = stop_token_ids(loaded) if stop else set()
    make = document_layers(cache)
    return answer(loaded, make, cache.logical_length, prompts, max_new_tokens, pick, stops, keep_stop=keep_stop)


def greedy(logits: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Pick the most likely token."""
    return logits.argmax(-1)
