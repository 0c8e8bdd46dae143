"""Knows synthetic layers whose attention looks as that of real heads does. Knows no solver.

A layer is a document of topics and some KV heads that read it. Every logit s q_i.k_j is a sum of six parts, each of its
own subspace of the head (orthonormal, drawn per head); what depends on the head is drawn per head:

- **topic**: the document is a run of segments, each about one of a few topics that come again later. Keys and queries
  carry the topic of their place, and some variation, in a subspace of an eighth of the head's dimensions.
- **recency**: sines and cosines of the place at geometric frequencies, as of rope; a row prefers keys near its place.
- **sink**: key 0, with a large share of nearly every row (10% to 70% in the median row, by head), and a small value.
- **heavy keys**: one key in 256, of which many rows see a little, in shares that fall as 1 / rank.
- **retrieval**: keys with a code of their own. A row that carries the code gives that key most of its attention; a key
  is looked up by one or two rows of the fit, on average, and other rows do not see it.
- **content**: independent noise in what is left of the head, of full rank.

Topic, recency and content are multiplied by the head's sharpness, so that some heads are diffuse and some narrow. Sink,
heavy keys and codes are calibrated on a sample of rows, so that the shares above hold whatever the sharpness.

Rows go through the document as a repeat pass does; three in ten jump to a random place. A value is a mean, a low-rank
part that follows the topic, and noise, larger for keys that are retrieved.

Held-out rows are drawn anew by the same process: other places, other noise, codes of the same keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from compactor.prefill import dense_layer
from compactor.types import LayerCache

TOKENS_PER_TOPIC = 512  # the number of topics follows the document's length
SEGMENT_TOKENS = 96  # a segment's average length, beyond the least
LEAST_SEGMENT = 16
TOPIC_FRACTION, PLACE_FRACTION = 8, 16  # head dimensions per topic dimension, and per frequency
TOPIC_SPREAD = 0.4  # length of a token's deviation from its topic, a unit vector
SHARPNESS = (1.5, 6.0)  # logit between two tokens of one topic; log-uniform over heads
RECENCY = (0.0, 1.5)  # of the sharpness: logit of a row's own place
CONTENT = 0.25  # of the sharpness: standard deviation of the content's logit
SINK_SHARE = (0.1, 0.7)
HEAVY_SHARE = (0.05, 0.25)
TOKENS_PER_HEAVY_KEY = 256
EAGERNESS = 0.1  # deviation between rows of how much they see sink and heavy keys, relative
RETRIEVING = (0.002, 0.02)  # of the rows; log-uniform over heads
ROWS_PER_RETRIEVED_KEY = 1.5
RETRIEVED_ODDS = 4.0  # of a retrieved key against all others together
JUMPING = 0.3  # of the rows
ELSEWHERE = 0.2  # of the rows: they look for another topic than that of their place
TOPIC_VALUE, NOISE_VALUE, RETRIEVED_VALUE, SINK_VALUE = 0.8, 0.4, 1.5, 0.1  # lengths; the mean has length 1
CALIBRATION_ROWS = 256


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer."""

    heads: int
    keys: int
    rows: int
    held_out_rows: int
    head_dim: int


@dataclass(frozen=True)
class SyntheticLayer:
    """Keys and values of a layer, and the rows that look at them."""

    full: LayerCache  # every head keeps every key; there is no prefix
    queries: torch.Tensor  # (heads, rows, head_dim), the layer's type
    held_out: torch.Tensor  # (heads, held_out_rows, head_dim), seen by no fit
    scaling: float


@dataclass(frozen=True)
class Document:
    """Topics along a document."""

    topics: torch.Tensor  # (num_topics, topic_dim), unit vectors in random directions
    topic_of: torch.Tensor  # (keys,) int64


@dataclass(frozen=True)
class _Head:
    """What a head looks for; in its basis, logits are plain products of queries and keys."""

    basis: torch.Tensor  # (head_dim, head_dim) orthonormal: topic | place | common | content
    sharpness: float
    frequencies: torch.Tensor  # (num_frequencies,)
    recency: float  # logit at a row's own place
    codes: torch.Tensor  # (num_retrieved, content_dim) unit vectors
    retrieving: float  # of the rows
    code_logit: float = 0.0  # of a code with itself


def make_layers(
    shape: LayerShape, count: int, *, seed: int, device: torch.device, dtype: torch.dtype
) -> list[SyntheticLayer]:
    """Return some layers of one document; drawn on the CPU in float32, so that every device gets the same numbers."""
    document = make_document(shape, seed)
    return [_make_layer(shape, document, _generator(seed, layer), device, dtype) for layer in range(count)]


def _generator(seed: int, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed + 1) << 20) + layer)


def make_document(shape: LayerShape, seed: int) -> Document:
    """Return topics and where they are, in segments of `LEAST_SEGMENT` tokens and an exponential number more."""
    generator = torch.Generator().manual_seed(seed)
    num_topics = max(3, shape.keys // TOKENS_PER_TOPIC)
    topics = _unit(torch.randn(num_topics, _topic_dim(shape), generator=generator))
    topic_of = torch.empty(shape.keys, dtype=torch.int64)
    start, topic = 0, 0
    while start < shape.keys:
        stop = start + LEAST_SEGMENT + int(torch.empty(1).exponential_(1 / SEGMENT_TOKENS, generator=generator))
        topic_of[start:stop] = topic
        start = stop
        topic = (topic + 1 + int(torch.randint(num_topics - 1, (1,), generator=generator))) % num_topics
    return Document(topics, topic_of)


def _make_layer(
    shape: LayerShape, document: Document, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> SyntheticLayer:
    heads = [_make_head(shape, document, generator) for _ in range(shape.heads)]
    keys, values, queries, held_out = (torch.stack(parts).to(device, dtype) for parts in zip(*heads, strict=True))
    full = dense_layer(keys, values, first_position=0)
    return SyntheticLayer(full, queries, held_out, shape.head_dim**-0.5)


def _make_head(
    shape: LayerShape, document: Document, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return keys, values, queries and held-out queries of a head, each (count, head_dim)."""
    topic_dim, num_frequencies = _topic_dim(shape), max(2, shape.head_dim // PLACE_FRACTION)
    common = topic_dim + 2 * num_frequencies  # index of the dimension in which sink and heavy keys stand out
    content_dim = shape.head_dim - common - 1
    sharpness = _between(*SHARPNESS, generator, logarithmic=True)
    retrieving = _between(*RETRIEVING, generator, logarithmic=True)
    num_heavy = max(2, shape.keys // TOKENS_PER_HEAVY_KEY)
    num_retrieved = min(shape.keys // 4, max(1, round(retrieving * shape.rows / ROWS_PER_RETRIEVED_KEY)))
    head = _Head(
        basis=torch.linalg.qr(torch.randn(shape.head_dim, shape.head_dim, generator=generator)).Q,
        sharpness=sharpness,
        frequencies=2 * math.pi / torch.logspace(math.log10(16.0), math.log10(2.0 * shape.keys), num_frequencies),
        recency=sharpness * _between(*RECENCY, generator),
        codes=_unit(torch.randn(num_retrieved, content_dim, generator=generator)),
        retrieving=retrieving,
    )
    topic = _vary(document.topics[document.topic_of], generator)
    place = _place_part(head, torch.arange(shape.keys))
    content = _content(shape.keys, content_dim, sharpness, generator)
    keys = _join(sharpness, topic, place, torch.zeros(shape.keys, 1), content)
    keys[0] = 0.0  # the sink looks like nothing else
    special = 1 + torch.randperm(shape.keys - 1, generator=generator)
    heavy, retrieved = special[:num_heavy], special[num_heavy : num_heavy + num_retrieved]

    # Shares are calibrated against what a sample of rows sees of the other keys.
    sample = _draw_rows(head, document, min(CALIBRATION_ROWS, shape.rows), generator)
    sink_share, heavy_share = _between(*SINK_SHARE, generator), _between(*HEAVY_SHARE, generator)
    ordinary = float((sample @ keys[1:].T).logsumexp(-1).median())
    whole = ordinary - math.log(1.0 - sink_share - heavy_share)
    weights = 1.0 / torch.arange(1, num_heavy + 1)
    keys[heavy, common] = whole + (heavy_share * weights / weights.sum()).log() - (sample @ keys[heavy].T).mean(0)
    keys[0, common] = whole + math.log(sink_share)
    head = replace(head, code_logit=whole + math.log(RETRIEVED_ODDS))
    keys[retrieved, common + 1 :] += math.sqrt(head.code_logit) * head.codes
    values = _make_values(shape, topic, retrieved, generator)
    queries, held_out = (_draw_rows(head, document, n, generator) for n in (shape.rows, shape.held_out_rows))
    mix = head.basis.T * shape.head_dim**0.25  # keys and queries alike, so that s q.k is the product of the parts
    return keys @ mix, values, queries @ mix, held_out @ mix


def _make_values(
    shape: LayerShape, topic: torch.Tensor, retrieved: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    directions = torch.linalg.qr(torch.randn(shape.head_dim, topic.shape[1] + 1, generator=generator)).Q
    noise = torch.randn(shape.keys, shape.head_dim, generator=generator) / shape.head_dim**0.5
    lengths = torch.full((shape.keys, 1), NOISE_VALUE)
    lengths[retrieved] = RETRIEVED_VALUE
    values = directions[:, 0] + TOPIC_VALUE * topic @ directions[:, 1:].T + lengths * noise
    values[0] = SINK_VALUE * directions[:, 0]
    result: torch.Tensor = values * shape.head_dim**0.5  # entries of about 1
    return result


def _draw_rows(head: _Head, document: Document, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return queries (count, head_dim) in the head's basis."""
    num_keys, num_topics = len(document.topic_of), len(document.topics)
    places = ((torch.arange(count) + torch.rand(count, generator=generator)) * num_keys / count).long()
    jumping = torch.rand(count, generator=generator) < JUMPING
    places = torch.where(jumping, torch.randint(num_keys, (count,), generator=generator), places)
    places = places.clamp_max(num_keys - 1)
    elsewhere = torch.rand(count, generator=generator) < ELSEWHERE
    topics = torch.where(elsewhere, torch.randint(num_topics, (count,), generator=generator), document.topic_of[places])
    content = _content(count, head.codes.shape[1], head.sharpness, generator)
    wanted = torch.randint(len(head.codes), (count,), generator=generator)
    retrieving = torch.rand(count, 1, generator=generator) < head.retrieving
    content = content + retrieving * math.sqrt(head.code_logit) * head.codes[wanted]
    eagerness = 1.0 + EAGERNESS * torch.randn(count, 1, generator=generator)
    topic = _vary(document.topics[topics], generator)
    return _join(head.sharpness, topic, _place_part(head, places), eagerness, content)


def _join(
    sharpness: float, topic: torch.Tensor, place: torch.Tensor, common: torch.Tensor, content: torch.Tensor
) -> torch.Tensor:
    return torch.cat([math.sqrt(sharpness) * topic, place, common, content], dim=1)


def _place_part(head: _Head, places: torch.Tensor) -> torch.Tensor:
    """Return sines and cosines of places, such that two equal places have the product ``recency``."""
    angles = places.unsqueeze(-1) * head.frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1) * math.sqrt(head.recency / len(head.frequencies))


def _content(count: int, dim: int, sharpness: float, generator: torch.Generator) -> torch.Tensor:
    """Return noise whose products have the standard deviation `CONTENT` times the sharpness."""
    return math.sqrt(CONTENT * sharpness / dim**0.5) * torch.randn(count, dim, generator=generator)


def _vary(topics: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    result: torch.Tensor = (
        topics + TOPIC_SPREAD * torch.randn(topics.shape, generator=generator) / topics.shape[1] ** 0.5
    )
    return result


def _unit(rows: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = rows / rows.norm(dim=-1, keepdim=True)
    return result


def _between(low: float, high: float, generator: torch.Generator, *, logarithmic: bool = False) -> float:
    share = float(torch.rand(1, generator=generator))
    return low * (high / low) ** share if logarithmic else low + (high - low) * share


def _topic_dim(shape: LayerShape) -> int:
    return max(2, shape.head_dim // TOPIC_FRACTION)
