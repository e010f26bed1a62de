"""A row of any format -> prompt, chosen and rejected as text -> token ids. Knows nothing of rows, batches or models.

Formats: standard (strings) and conversational (lists of messages), with the prompt or with chosen and rejected that
share it. Conversational rows go through the chat template; standard rows never do.
"""

import dataclasses
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from orpo_jax.config import DataConfig
from orpo_jax.packing import Pair

Messages = list[dict[str, Any]]
Prompted = tuple[Any, Any, Any]  # prompt, chosen, rejected: three strings or three lists of messages


class Texts(NamedTuple):
    """A pair as text: two whole sequences and the character up to which both are prompt."""

    chosen: str
    rejected: str
    boundary: int
    templated: bool
    identical: bool
    empty: bool


# Rows to prompt, chosen, rejected


def _kind(value: Any, column: str, where: str) -> str:
    if isinstance(value, str):
        return "text"
    ok = isinstance(value, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
    if not ok:
        raise ValueError(f"{where}: {column} must be a string or a list of messages with role and content, "
                         f"got {_shorten(value)}")
    return "messages"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def split_prompt(row: Mapping[str, Any], where: str) -> Prompted:
    """Returns prompt, chosen and rejected of a row; ValueError names the row and the column that breaks a rule."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: must be an object with chosen and rejected, got {_shorten(row)}")
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise ValueError(f"{where}: needs the column {column}, got " + (
                "null" if column in row else ", ".join(map(str, row)) or "no columns"))
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    kinds = _kind(chosen, "chosen", where), _kind(rejected, "rejected", where)
    if kinds[0] != kinds[1]:
        raise ValueError(f"{where}: chosen and rejected must be of one kind, got {kinds[0]} and {kinds[1]}")
    kind, prompt_kind = kinds[0], None if prompt is None else _kind(prompt, "prompt", where)
    if prompt_kind is None:
        return split_shared_text(chosen, rejected) if kind == "text" else _split_shared_messages(chosen, rejected)
    if prompt_kind == kind == "text":
        return prompt, chosen, rejected
    if kind == "text":
        raise ValueError(f"{where}: prompt is a list of messages, so chosen and rejected must be too, got text")
    if isinstance(prompt, list):
        count = len(prompt)
        if count and chosen[:count] == prompt == rejected[:count]:  # the responses repeat the prompt
            return prompt, chosen[count:], rejected[count:]
        return prompt, chosen, rejected
    # A string prompt that the messages repeat, as in HuggingFaceH4/ultrafeedback_binarized.
    shared = _split_shared_messages(chosen, rejected)
    if not shared[0]:
        raise ValueError(f"{where}: prompt is text, and chosen and rejected share no first message to take its place; "
                         "give prompt as a list of messages")
    return shared


def _split_shared_messages(chosen: Messages, rejected: Messages) -> Prompted:
    limit = min(len(chosen), len(rejected))
    count = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    if chosen == rejected:
        count = max(count - 1, 0)  # the last message is the response
    return chosen[:count], chosen[count:], rejected[count:]


def split_shared_text(chosen: str, rejected: str) -> Prompted:
    """Returns the prompt that two strings share, cut back to a word boundary, and what follows it in each."""
    if chosen == rejected:
        return "", chosen, rejected  # nothing tells where the prompt ends
    limit = min(len(chosen), len(rejected))
    end = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    while end and any(_in_word(text, end) for text in (chosen, rejected)):
        end -= 1
    if end and chosen[end - 1] == " ":  # the space belongs to the word that follows it, as in TRL
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def _in_word(text: str, i: int) -> bool:
    return i < len(text) and _joins(text[i - 1]) and _joins(text[i])


def _joins(char: str) -> bool:
    """Whether a character is part of a longer word. Chinese, Japanese and other wide characters are their own words."""
    letter = char.isalnum() or char in "'’_" or unicodedata.category(char).startswith("M")
    return letter and unicodedata.east_asian_width(char) not in "WF"


# Prompt, chosen, rejected to text


def _blank(response: str | Messages) -> bool:
    return not (response if isinstance(response, str) else "".join(m["content"] for m in response)).strip()


def render(prompted: Prompted, template: Callable[..., str] | None, where: str) -> Texts:
    """Returns the pair as text. template: `tokenizer.apply_chat_template`; None where the tokenizer has no template."""
    prompt, chosen, rejected = prompted
    flags = {"identical": chosen == rejected, "empty": _blank(chosen) or _blank(rejected)}
    if isinstance(prompt, str):
        return Texts(prompt + chosen, prompt + rejected, len(prompt), False, **flags)
    if template is None:
        raise ValueError(f"{where}: messages need a chat template, and the tokenizer has none; set data.chat_template")
    try:
        goes_on = bool(prompt) and prompt[-1]["role"] == "assistant"
        before = template(prompt, tokenize=False, add_generation_prompt=not goes_on,
                          continue_final_message=goes_on) if prompt else ""
        whole = [template(prompt + response, tokenize=False) if prompt + response else "" for response in
                 (chosen, rejected)]
    except Exception as error:  # templates are programs: they raise what they like
        raise ValueError(f"{where}: the chat template can't render the messages: {error}") from error
    # A template may write the prompt otherwise once a response follows (reasoning models): only what all share counts.
    boundary = min(_shared_prefix(before, text) for text in whole)
    return Texts(whole[0], whole[1], boundary, True, **flags)


def _shared_prefix(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    return next(i for i in range(len(a)) if i >= len(b) or a[i] != b[i])


# Text to ids


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Texts to ids under one tokenizer and one set of rules. `stop_ids`: ids that end a turn, eos first."""

    tokenizer: Any
    stop_ids: tuple[int, ...]
    config: DataConfig
    # What an encoder-decoder's responses follow; None: a decoder's follow the prompt.
    decoder_start: int | None = None

    @property
    def template(self) -> Callable[..., str] | None:
        return self.tokenizer.apply_chat_template if self.tokenizer.chat_template else None

    def __call__(self, batch: Sequence[Texts]) -> tuple[list[Pair], np.ndarray]:
        """Returns the pairs, cut to `max_length`, and how many ids each lost."""
        if self.decoder_start is not None:
            return self._apart(batch, self.decoder_start)
        encoded = self.tokenizer([text for texts in batch for text in (texts.chosen, texts.rejected)],
                                 add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs, lost = [], []
        for i, texts in enumerate(batch):
            sides = [self._side(encoded["input_ids"][j], encoded["offset_mapping"][j], texts)
                     for j in (2 * i, 2 * i + 1)]
            (chosen, chosen_prompt), (rejected, rejected_prompt) = sides
            pair = make_pair(np.array(chosen, np.int32), np.array(rejected, np.int32), chosen_prompt, rejected_prompt)
            cut = truncate(pair, self.config, self.tokenizer.bos_token_id)
            pairs.append(cut)
            lost.append(sum(map(len, pair[:2])) - sum(map(len, cut[:2])))
        return pairs, np.array(lost)

    def _apart(self, batch: Sequence[Texts], decoder_start: int) -> tuple[list[Pair], np.ndarray]:
        """Returns the same for an encoder-decoder, whose prompts and responses are tokenised by themselves, as in TRL.

        Each ends in EOS once, and goes on doing so where it is cut.
        """
        config, pairs, lost = self.config, [], []
        longest = config.max_completion_length or min(MAX_COMPLETION_LENGTH, config.max_length)
        for prompt, *responses in zip(
                encode_closed(self.tokenizer, [t.chosen[:t.boundary] for t in batch]),
                encode_closed(self.tokenizer, [t.chosen[t.boundary:] for t in batch]),
                encode_closed(self.tokenizer, [t.rejected[t.boundary:] for t in batch]), strict=True):
            source = _cut_closed(prompt, config.max_prompt_length or config.max_length, config.truncation_mode)
            chosen, rejected = (_cut_closed(ids, longest, "keep_start") for ids in responses)
            lost.append(sum(map(len, (prompt, *responses))) - sum(map(len, (source, chosen, rejected))))
            after_start = lambda ids: np.array([decoder_start, *ids], np.int32)
            pairs.append(Pair(after_start(chosen), after_start(rejected), 1, 1, 1, np.array(source, np.int32)))
        return pairs, np.array(lost)

    def _side(self, ids: list[int], offsets: Sequence[tuple[int, int]], texts: Texts) -> tuple[list[int], int]:
        """Returns one whole sequence and its number of prompt ids.

        The prompt is the run of ids that end at or before the boundary; an id that spans it is scored.
        """
        prompt = next((i for i, (_, end) in enumerate(offsets) if end > texts.boundary), len(ids))
        ids = self._end(list(ids), prompt, texts.templated)
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return ids, prompt
        return (ids, max(prompt, 1)) if ids[0] == bos else ([bos, *ids], prompt + 1)

    def _end(self, ids: list[int], prompt: int, templated: bool) -> list[int]:
        """Appends EOS unless the response ends in it; a template's may end in any stop token and white space."""
        last = len(ids) - 1
        if templated:
            while last >= prompt and not self.tokenizer.decode([ids[last]]).strip():
                last -= 1
        ends = last >= prompt and ids[last] in (self.stop_ids if templated else self.stop_ids[:1])
        return ids if ends else [*ids, self.stop_ids[0]]


# TRL's default for encoder-decoders.
MAX_COMPLETION_LENGTH = 128


def encode_closed(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text with the special tokens that the tokenizer gives it, and EOS once at the end."""
    eos, result = tokenizer.eos_token_id, []
    for ids in tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]:
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        result.append([*ids, eos])
    return result


def _cut_closed(ids: list[int], length: int, truncation_mode: str) -> list[int]:
    """Returns at most `length` ids, of which the last one, EOS, stays the last."""
    if len(ids) <= length:
        return ids
    return ids[len(ids) - length:] if truncation_mode == "keep_end" else [*ids[:length - 1], ids[-1]]


def truncate(pair: Pair, config: DataConfig, bos: int | None) -> Pair:
    """Returns the pair with no sequence over `max_length`: the prompt is cut first, then the responses' tails.

    Both prompts lose the same ids, so that what they share they go on sharing; BOS stays, and at least one response id.
    """
    responses = [ids[prompt:][:config.max_completion_length]
                 for ids, prompt in ((pair.chosen_ids, pair.chosen_prompt), (pair.rejected_ids, pair.rejected_prompt))]
    prompts = [pair.chosen_ids[:pair.chosen_prompt], pair.rejected_ids[:pair.rejected_prompt]]
    excess = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)) - config.max_length
    if excess > 0:
        room = min(map(len, prompts)) - min(config.max_prompt_length or 1, *map(len, prompts))
        keep_bos = int(bos is not None and len(prompts[0]) > 0 and prompts[0][0] == bos)
        for i, prompt in enumerate(prompts):
            # Where one prompt is much the longer, it loses what would leave no room for a response.
            cut = max(min(excess, room), len(prompt) - config.max_length + 1)
            prompts[i] = (np.delete(prompt, slice(keep_bos, keep_bos + cut)) if config.truncation_mode == "keep_end"
                          else prompt[:len(prompt) - cut])
    kept = [np.concatenate([p, r[:max(config.max_length - len(p), 1)]])
            for p, r in zip(prompts, responses, strict=True)]
    return make_pair(kept[0], kept[1], len(prompts[0]), len(prompts[1]))


def make_pair(chosen_ids: np.ndarray, rejected_ids: np.ndarray, chosen_prompt: int, rejected_prompt: int) -> Pair:
    """Returns the pair; what its two sequences share is their common start within the prompt."""
    limit = min(chosen_prompt, rejected_prompt)
    differ = np.flatnonzero(chosen_ids[:limit] != rejected_ids[:limit])
    return Pair(chosen_ids, rejected_ids, chosen_prompt, rejected_prompt, int(differ[0]) if differ.size else limit)
