"""Tokenize prompts with their completions, so that both together are the tokens of the whole text.

A tokenizer need not treat two texts as it treats their sum: it may put a space before each text, or merge the end of
the prompt and the beginning of the completion into one token. So a completion is tokenized behind its prompt:

- The prompt's ids are those of the prompt alone, whatever follows. All completions of a prompt share them, samples
  continue them, and a model that is deployed gets them.
- If the ids of the whole text begin with them, the completion's ids are the rest.
- Else the prompt ends inside a token of the whole text. The completion's ids are then the first found that decode,
  behind the prompt's, to the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple
from unicodedata import normalize

from hypo_train.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A long prompt is tokenized once. Its completions are tokenized behind its last CONTEXT characters, in which tokens
# depend on nothing that is further away; this is checked for each prompt.
CONTEXT = 100
# Short texts before which a completion is tokenized if it begins inside a token, to get it without a space in front.
_ANCHORS = ("\n", "a", "e", "0", ".", ":", "-", "A", "(", "x")


class Encoded(NamedTuple):
    """The ids of a prompt and of its completions, without special tokens that a tokenizer adds to a text."""

    prompt: list[int]
    completions: list[list[int]]
    num_split: int  # completions that begin inside a token of the whole text
    num_altered: int  # those of them whose ids do not decode to the text


@dataclass
class _Part:
    """A completion behind its prompt."""

    prompt: str
    prompt_ids: list[int]
    completion: str
    ids: list[int] = field(default_factory=list)
    whole_ids: list[int] | None = None  # set if the prompt ends inside a token
    altered: bool = False

    @property
    def whole(self) -> str:
        return self.prompt + self.completion

    def take_rest(self, ids: list[int], start: list[int]) -> bool:
        """Take the ids behind ``start`` and return True, if ``ids`` begin with ``start``."""
        fits = ids[: len(start)] == start
        if fits:
            self.ids = ids[len(start) :]
        return fits


class Encoder:
    """Tokenizes prompts with their completions.

    Raises:
        DataError: the tokenizer writes other tokens if it also adds its special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        text = next(text for text in ("a", "0", ".", *tokenizer.get_vocab(), "") if text == "" or self.ids([text])[0])
        (plain,), (added,) = self.ids([text]), self._call([text], special=True)
        starts = range(len(added) - len(plain) + 1)
        start = next((i for i in starts if added[i : i + len(plain)] == plain), None)
        if start is None:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path!r} splits {text!r} into {plain}, and into others if it adds "
                f"special tokens: {added}"
            )
        self.prefix = added[:start]  # what the tokenizer puts before a text, such as a BOS

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without added special tokens."""
        return self._call(texts, special=False)

    def encode(self, rows: Sequence[tuple[str, Sequence[str]]]) -> list[Encoded]:
        """Return the ids of each (prompt, completions)."""
        prompts = self.ids([prompt for prompt, _ in rows])
        parts = [
            [_Part(prompt, ids, completion) for completion in completions]
            for (prompt, completions), ids in zip(rows, prompts, strict=True)
        ]
        self._fill([part for row in parts for part in row])
        return [
            Encoded(
                ids,
                [part.ids for part in row],
                sum(part.whole_ids is not None for part in row),
                sum(part.altered for part in row),
            )
            for ids, row in zip(prompts, parts, strict=True)
        ]

    def _call(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if not texts:  # tokenizers fail on an empty batch
            return []
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        ids: list[list[int]] = batch["input_ids"]
        return ids

    def _fill(self, parts: list[_Part]) -> None:
        """Set the ids of all parts: first behind the end of their prompts, where that fails behind whole prompts."""
        left = self._behind([part for part in parts if len(part.prompt) > CONTEXT])
        left += [part for part in parts if len(part.prompt) <= CONTEXT]
        inside = []
        for part, ids in zip(left, self.ids([part.whole for part in left]), strict=True):
            if not part.take_rest(ids, part.prompt_ids):
                part.whole_ids = ids
                inside.append(part)
        self._split(inside)

    def _behind(self, parts: list[_Part]) -> list[_Part]:
        """Set the ids of parts by the last CONTEXT characters of their prompts; return those where this is unsafe.

        It is safe if these characters have the same tokens as in the prompt, and as before the completion. The first
        ones may differ, because the cut can go through a word.
        """
        ends = list(dict.fromkeys(part.prompt[-CONTEXT:] for part in parts))
        ids_of = dict(zip(ends, self.ids(ends), strict=True))
        texts = [part.prompt[-CONTEXT:] + part.completion for part in parts]
        left = []
        for part, ids in zip(parts, self.ids(texts), strict=True):
            end = ids_of[part.prompt[-CONTEXT:]]
            same = len(end) // 2 + 1
            is_end = part.prompt_ids[-same:] == end[-same:]
            if not (is_end and part.take_rest(ids, end)):
                left.append(part)
        return left

    def _split(self, parts: list[_Part]) -> None:
        """Set the ids of parts that begin inside a token of the whole text."""
        left = parts
        for anchor in ("", *_ANCHORS) if parts else ():
            start = self.ids([anchor])[0] if anchor else []
            rest = []
            for part, ids in zip(left, self.ids([anchor + part.completion for part in left]), strict=True):
                if not (part.take_rest(ids, start) and self._is_text(part)):
                    rest.append(part)
            left = rest
        for part, ids in zip(left, self.ids([part.completion for part in left]), strict=True):
            part.ids, part.altered = ids, True

    def _is_text(self, part: _Part) -> bool:
        """Return whether prompt and completion decode to their text, or as the tokens of the whole text do."""
        assert part.whole_ids is not None
        found = self._decode(part.prompt_ids + part.ids)
        return found in {normalize("NFC", part.whole), self._decode(part.whole_ids)}

    def _decode(self, ids: list[int]) -> str:
        # A tokenizer that composes accents writes the text of its tokens in the composed form.
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return normalize("NFC", str(text))
