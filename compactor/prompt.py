"""Knows the tokenizer and its chat template, not the model.

The template is rendered once around sentinels and cut there. Its own pieces are tokenized with control
tokens; the user's text (document, question, system message) alone and without them, so a document cannot end
its own turn. Tokenizing apart differs from tokenizing together at the seams; the ids made apart are the
reference.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from compactor.errors import DocumentError, ModelError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

    Encode = Callable[[str], list[int]]

QUESTION_SEPARATOR = "\n\n"
PLAIN_SUFFIX = "\n"  # ends the question where there is no chat template
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SYSTEM, _DOCUMENT = "Sentinel0fSystem7Text", "Sentinel0fDocument7Text"


@dataclass(frozen=True)
class Prompt:
    """The token ids around a document: ``prefix_ids | document | question_ids(question) | answer``."""

    prefix_ids: tuple[int, ...]  # BOS, system message, opening of the user turn
    suffix_ids: tuple[int, ...]  # end of the user turn, opening of the assistant turn
    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)

    def question_ids(self, question: str) -> list[int]:
        """Return the ids that follow the document: a blank line, the question, the end of the turn."""
        return encode_plain(self.tokenizer, QUESTION_SEPARATOR + question) + list(self.suffix_ids)


def build_prompt(tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, thinking: bool = False) -> Prompt:
    """Cut the chat template around a document.

    Without a template: BOS where the tokenizer adds one, then the system message and a blank line. Raises
    SettingsError when the template takes no system message, ModelError when it cannot be cut.
    """
    if not tokenizer.chat_template:
        prefix_ids = _bos_ids(tokenizer)
        if system is not None:
            prefix_ids += encode_plain(tokenizer, system + QUESTION_SEPARATOR)
        return Prompt(tuple(prefix_ids), tuple(encode_plain(tokenizer, PLAIN_SUFFIX)), tokenizer)
    before, between, after = _cut_template(tokenizer, with_system=system is not None, thinking=thinking)
    prefix_ids = _encode_template(tokenizer, before)
    if system is not None:
        prefix_ids += encode_plain(tokenizer, system) + _encode_template(tokenizer, between)
    return Prompt(tuple(prefix_ids), tuple(_encode_template(tokenizer, after)), tokenizer)


def _cut_template(tokenizer: PreTrainedTokenizerBase, *, with_system: bool, thinking: bool) -> tuple[str, str, str]:
    """Return the template's text before the system message, between it and the document, after the document.

    Without a system message the second piece is empty and the first reaches to the document.
    """
    from jinja2 import TemplateError

    try:
        text = _render(tokenizer, with_system=with_system, thinking=thinking)
    except (TemplateError, TypeError, ValueError, KeyError) as failure:
        if with_system and _renders_without_system(tokenizer, thinking=thinking):
            raise _no_system(str(failure)) from failure
        raise ModelError(f"The model's chat template fails ({failure}); use another model.") from failure
    if text.count(_DOCUMENT) != 1:
        raise ModelError("The model's chat template does not show a user message once; use another model.")
    before, after = text.split(_DOCUMENT)
    if not with_system:
        return before, "", after
    if _SYSTEM not in text:
        raise _no_system("it drops it")
    if before.count(_SYSTEM) != 1 or _SYSTEM in after:
        raise _no_system("it does not put it once before the user's message")
    before, between = before.split(_SYSTEM)
    return before, between, after


def _render(tokenizer: PreTrainedTokenizerBase, *, with_system: bool, thinking: bool) -> str:
    messages = [{"role": "user", "content": _DOCUMENT}]
    if with_system:
        messages.insert(0, {"role": "system", "content": _SYSTEM})
    return str(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=thinking)
    )


def _renders_without_system(tokenizer: PreTrainedTokenizerBase, *, thinking: bool) -> bool:
    from jinja2 import TemplateError

    try:
        return _DOCUMENT in _render(tokenizer, with_system=False, thinking=thinking)
    except (TemplateError, TypeError, ValueError, KeyError):
        return False


def _no_system(reason: str) -> SettingsError:
    return SettingsError(
        f"The model's chat template takes no system message ({reason}); leave --system out and put the text "
        "into the document."
    )


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [BOS] when the tokenizer itself puts one in front of a text, else nothing."""
    ids = list(tokenizer("", add_special_tokens=True)["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _encode_template(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a piece of the template: control tokens count; BOS is there only if the template writes it."""
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])


# --- text of the user --------------------------------------------------------------------------------------

_BACKEND_ENCODERS: WeakKeyDictionary[Any, tuple[dict[int, AddedToken], Encode]] = WeakKeyDictionary()


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize text of the user: no BOS, and a control token written in it is spelled out, never obeyed.

    Raises DocumentError in the one case where a tokenizer cannot spell a control token.
    """
    if not text:
        return []
    controls = control_tokens(tokenizer)
    encode = _plain_encoder(tokenizer, controls)
    ids = encode(text)
    forbidden = set(controls.values()) - {tokenizer.unk_token_id}  # unknown text is no control token
    if forbidden.isdisjoint(ids):
        return ids
    # The vocabulary itself has the control token as a word: cut each one after its first character.
    ids = [token_id for piece in _cut_controls(text, controls) for token_id in encode(piece)]
    if not forbidden.isdisjoint(ids):
        names = ", ".join(repr(name) for name, token_id in controls.items() if token_id in set(ids))
        raise DocumentError(f"The tokenizer cannot spell {names} as plain text; remove it from the text.")
    return ids


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens that must never come out of plain text, by their text.

    These are the special tokens and every added token with a character that is no letter, digit or white
    space (``<tool_call>`` and ``<think>`` of Qwen are added but not "special"). Other added tokens, such as
    runs of line ends or new words, are vocabulary, and so are single bytes (``<0x0A>``).
    """
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if not _BYTE.fullmatch(token.content) and (token.special or not _is_word(token.content))
    }


def _is_word(content: str) -> bool:
    return all(char.isalnum() or char.isspace() or char == "▁" for char in content)


def _cut_controls(text: str, controls: dict[str, int]) -> list[str]:
    """Cut text so that no piece contains a control token."""
    pattern = re.compile("|".join(re.escape(name) for name in sorted(controls, key=len, reverse=True)))
    pieces, rest = [], text
    while (match := pattern.search(rest)) and len(match[0]) > 1:
        pieces.append(rest[: match.start() + 1])
        rest = rest[match.start() + 1 :]
    return [piece for piece in [*pieces, rest] if piece]


def _plain_encoder(tokenizer: PreTrainedTokenizerBase, controls: dict[str, int]) -> Encode:
    """Return the function that tokenizes plain text; that of a fast tokenizer is made once and kept."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return partial(_encode_in_python, tokenizer)
    vocabulary = {
        token_id: token for token_id, token in tokenizer.added_tokens_decoder.items() if token.content not in controls
    }
    known_vocabulary, encode = _BACKEND_ENCODERS.get(tokenizer, (None, None))
    if encode is None or known_vocabulary != vocabulary:
        encode = _backend_encoder(backend, vocabulary)
        _BACKEND_ENCODERS[tokenizer] = (vocabulary, encode)
    return encode


def _encode_in_python(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _backend_encoder(backend: Any, vocabulary: dict[int, AddedToken]) -> Encode:
    """Rebuild a fast tokenizer without control tokens and without a leading space.

    Its model is shared, not copied; ``vocabulary`` are the added tokens that stay, by their ids.
    ``split_special_tokens`` is not enough: it leaves added tokens that are not "special" in force.
    """
    from tokenizers import Tokenizer, models

    shell = Tokenizer(models.BPE())
    if backend.normalizer is not None:
        shell.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        shell.pre_tokenizer = backend.pre_tokenizer
    plain = Tokenizer.from_str(json.dumps(_without_leading_space(json.loads(shell.to_str()))))
    plain.model = backend.model
    plain.add_tokens(list(vocabulary.values()))
    true_ids = {plain.token_to_id(token.content): token_id for token_id, token in vocabulary.items()}

    def encode(text: str) -> list[int]:
        ids = plain.encode(text, add_special_tokens=False).ids
        return [true_ids.get(token_id, token_id) for token_id in ids] if true_ids else list(ids)

    return encode


def _without_leading_space(spec: Any) -> Any:
    """Return the tokenizer's JSON without the parts that put a space in front of a text."""
    if isinstance(spec, list):
        return [_without_leading_space(item) for item in spec if not _is_prepend(item)]
    if not isinstance(spec, dict):
        return spec
    spec = {key: None if _is_prepend(value) else _without_leading_space(value) for key, value in spec.items()}
    if "prepend_scheme" in spec:
        spec["prepend_scheme"] = "never"
    if "add_prefix_space" in spec:
        spec["add_prefix_space"] = False
    return spec


def _is_prepend(spec: Any) -> bool:
    return isinstance(spec, dict) and spec.get("type") == "Prepend"


# --- counts of tokens --------------------------------------------------------------------------------------


def chunk_borders(num_tokens: int, chunk: int) -> list[tuple[int, int]]:
    """Cut ``num_tokens`` into ceil(num_tokens / chunk) pieces whose lengths differ by at most one."""
    num_chunks = -(-num_tokens // chunk)
    cuts = [piece * num_tokens // num_chunks for piece in range(num_chunks + 1)] if num_chunks else []
    return list(pairwise(cuts))


def check_window(prefix_tokens: int, document_tokens: int, *, window: int, reserve: int, name: str) -> None:
    """Raise DocumentError when the document has no tokens or leaves less than ``reserve`` tokens free."""
    if document_tokens < 1:
        raise DocumentError(f"{name} has no tokens for this model; give a document with at least one word.")
    room = window - prefix_tokens - reserve
    if document_tokens <= room:
        return
    remedy = f"shorten it to {room:,} tokens, take a model with a larger window, or lower --reserve"
    if room < 1:
        remedy = "lower --reserve or take a model with a larger window"
    raise DocumentError(
        f"{name} has {document_tokens:,} tokens, too many for the model's window of {window:,} with "
        f"{prefix_tokens:,} for the chat template and {reserve:,} reserved for question and answer; {remedy}."
    )
