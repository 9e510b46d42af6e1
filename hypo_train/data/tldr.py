"""The format of Reddit's TL;DR: posts with a summary, and human choices between two summaries of a post.

It reads the original fields of OpenAI's summarize-from-feedback and of its copies on the Hub:

    a post with a summary    subreddit, title, post, summary
    a comparison             info {subreddit, title, post, ...}, summaries [{text, ...}, {text, ...}], choice 0 or 1

Other columns, such as prompts that were already cut and tokenized, are ignored: this module writes the prompt and cuts
the post for the tokenizer of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hypo_train.data.errors import DataError, Unusable, quoted, refuse_blank
from hypo_train.data.formats import Encode, RowText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POST = {"subreddit", "title", "post"}
COMPARISON = {"info", "summaries", "choice"}
# A cut of b bytes saves at most b + SLACK tokens. Each token has at least one byte, but the last word that remains is
# tokenized anew and may then need a few tokens less. The largest difference in a million cuts, of words and pairs of
# words of a vocabulary of 49,152 tokens, was 3.
SLACK = 6


class Tldr:
    """Reads posts and comparisons; a prompt ends with "TL;DR:" and a completion begins with a space."""

    guards_columns = False
    targets = frozenset(POST | COMPARISON | {"summary"})

    def pair_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        if not columns >= COMPARISON:
            raise DataError(
                "TL;DR preferences need the columns 'info', 'summaries' and 'choice' (or use dataset_format: "
                f"preferences); the columns are {quoted(columns)}"
            )
        return ("chosen", "rejected")

    def example_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        if columns >= POST | {"summary"}:
            return ("summary",)
        if columns >= COMPARISON:
            return ("chosen",)
        raise DataError(
            "SFT on TL;DR needs the columns 'subreddit', 'title', 'post' and 'summary', or those of comparisons "
            f"('info', 'summaries' and 'choice'); the columns are {quoted(columns)}"
        )

    def prompt_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        if columns >= COMPARISON:
            return ("chosen", "rejected")  # so that rows and prompts are those of the pairs
        if columns >= POST:
            return ()
        raise DataError(
            "TL;DR prompts need the columns 'subreddit', 'title' and 'post', or those of comparisons ('info', "
            f"'summaries' and 'choice'); the columns are {quoted(columns)}"
        )

    def columns_read(self, parts: Sequence[str], columns: Sequence[str]) -> list[str]:
        return [name for name in columns if name in self.targets]

    def row_text(
        self, row: int, example: Mapping[str, Any], parts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> RowText:
        post = _post(example.get("info", example))
        texts = _judged(example) if "choice" in example else {"summary": example.get("summary")}
        completions = [_completion(texts[part], part) for part in parts]
        return RowText(row, post.prompt(), completions, rendered=False, shorten=post.shorten)


@dataclass(frozen=True)
class Post:
    """One Reddit post."""

    subreddit: str
    title: str
    text: str

    def prompt(self) -> str:
        return f"SUBREDDIT: r/{self.subreddit}\n\nTITLE: {self.title}\n\nPOST: {self.text}\n\nTL;DR:"

    def shorten(self, encode: Encode, limit: int) -> tuple[int, ...]:
        """Return the ids of the prompt with at most ``limit`` tokens.

        While the prompt is too long, its text loses its last line or, if it has only one line, its last character. Not
        every step is tokenized: a prompt with n tokens too many must lose at least n - ``SLACK`` bytes first.

        Raises:
            Unusable: the prompt is too long even without the text of its post.
        """
        post = self
        while (excess := len(ids := encode(post.prompt())) - limit) > 0:
            if not post.text:
                raise Unusable("a prompt of more than max_prompt_length tokens without its post")
            post = replace(post, text=_cut(post.text, excess - SLACK))
        return ids


def _cut(text: str, num_bytes: int) -> str:
    """Return ``text`` after at least one cut, and after enough cuts to lose ``num_bytes`` bytes."""
    lost = 0
    while text and (lost == 0 or lost < num_bytes):
        line_break = text.rfind("\n")
        end = len(text) - 1 if line_break < 0 else line_break
        lost += len(text[end:].encode())
        text = text[:end]
    return text


def _post(fields: Any) -> Post:
    fields = fields if isinstance(fields, Mapping) else {}
    if fields.get("post") is None and fields.get("article") is not None:
        raise Unusable("a news article (CNN/DM) where the post should be")
    for name in sorted(POST):
        if not isinstance(fields.get(name), str):
            raise Unusable(f"no text as {name!r}")
    refuse_blank(fields["post"], "post")
    return Post(fields["subreddit"], fields["title"], fields["post"])


def _judged(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return the two summaries as "chosen" and "rejected"."""
    summaries, choice = example["summaries"], example["choice"]
    if not isinstance(summaries, list) or [isinstance(summary, Mapping) for summary in summaries] != [True, True]:
        raise Unusable("'summaries' that are not two with a text")
    if choice not in (0, 1):
        raise Unusable("a 'choice' that is neither 0 nor 1")
    chosen = int(choice)
    return {"chosen": summaries[chosen].get("text"), "rejected": summaries[1 - chosen].get("text")}


def _completion(text: Any, part: str) -> str:
    """Return the summary with a space in front, which comparisons have and reference summaries do not have."""
    if not isinstance(text, str):
        raise Unusable(f"no text as {part!r}")
    refuse_blank(text, part)
    return text if text.startswith(" ") else f" {text}"
