"""Reddit's TL;DR: posts with a summary, and people's choices between two summaries of a post.

The rows are those of OpenAI's summarize-from-feedback and of its copies on the Hub, read from their original fields:

    a post with a summary    subreddit, title, post, summary
    a comparison             info {subreddit, title, post, ...}, summaries [{text, ...}, {text, ...}], choice 0 or 1

Other columns, such as prompts that somebody has cut and tokenised before, are left alone: the prompt is written here,
and a post is cut here, for the tokenizer of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hypo_train.data.formats import DataError, Encode, RowText, Unusable, quoted, refuse_blank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POST = {"subreddit", "title", "post"}
COMPARISON = {"info", "summaries", "choice"}
# How many tokens a cut of b bytes may save beyond b. A token has a byte at least, so that this would be none, were it
# not for the last word that is left: it is tokenised anew, and may have taken a few tokens more than its letters need.
# The most in a million cuts, of words and pairs of words of a vocabulary of 49,152 tokens, was 3.
SLACK = 6


class Tldr:
    """The format: its prompts end with "TL;DR:", its completions begin with a space."""

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
            return ("chosen", "rejected")  # the same rows and prompts as of the pairs
        if columns >= POST:
            return ()
        raise DataError(
            "TL;DR prompts need the columns 'subreddit', 'title' and 'post', or those of comparisons ('info', "
            f"'summaries' and 'choice'); the columns are {quoted(columns)}"
        )

    def row_text(
        self, row: int, example: Mapping[str, Any], parts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> RowText:
        post = _post(example.get("info", example))
        texts = _judged(example) if "choice" in example else {"summary": example.get("summary")}
        completions = [_completion(texts[part], part) for part in parts]
        return RowText(row, post.prompt(), completions, rendered=False, shorten=post.shorten)


@dataclass(frozen=True)
class Post:
    subreddit: str
    title: str
    text: str

    def prompt(self) -> str:
        return f"SUBREDDIT: r/{self.subreddit}\n\nTITLE: {self.title}\n\nPOST: {self.text}\n\nTL;DR:"

    def shorten(self, encode: Encode, limit: int) -> tuple[int, ...]:
        """The ids of the prompt, cut by one rule: while it has more than ``limit`` tokens, its text loses its last
        line, or, where it is but one line, its last character.

        Not every cut on the way is tokenised: a prompt with n tokens too many has to lose n - ``SLACK`` bytes at
        least, and is not looked at before. Raises ``Unusable`` where the rest of the prompt is too long already.
        """
        post = self
        while (excess := len(ids := encode(post.prompt())) - limit) > 0:
            if not post.text:
                raise Unusable("a prompt of more than max_prompt_length tokens without its post")
            post = replace(post, text=_cut(post.text, excess - SLACK))
        return ids


def _cut(text: str, num_bytes: int) -> str:
    """``text`` after one cut, and as many more as it takes to lose ``num_bytes`` bytes."""
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
    """The two summaries, by what the choice made of them."""
    summaries, choice = example["summaries"], example["choice"]
    if not isinstance(summaries, list) or [isinstance(summary, Mapping) for summary in summaries] != [True, True]:
        raise Unusable("'summaries' that are not two with a text")
    if choice not in (0, 1):
        raise Unusable("a 'choice' that is neither 0 nor 1")
    chosen = int(choice)
    return {"chosen": summaries[chosen].get("text"), "rejected": summaries[1 - chosen].get("text")}


def _completion(text: Any, part: str) -> str:
    """A summary as it follows its prompt: after a space, which comparisons have and references lack."""
    if not isinstance(text, str):
        raise Unusable(f"no text as {part!r}")
    refuse_blank(text, part)
    return text if text.startswith(" ") else f" {text}"
