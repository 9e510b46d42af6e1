"""The report on the rows of a split: what was used, dropped or changed, and warnings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from hypo_train.data.columns import Columns
from hypo_train.data.errors import quoted
from hypo_train.data.repeats import Repeats


class Lengths(NamedTuple):
    """The lengths, in tokens, of one part (prompt, chosen, ...) of the used rows."""

    smallest: int
    median: int
    high: int  # 95 % are no longer
    largest: int

    @classmethod
    def of(cls, values: list[int]) -> Lengths:
        ordered = sorted(values)
        return cls(ordered[0], ordered[len(ordered) // 2], ordered[len(ordered) * 95 // 100], ordered[-1])


@dataclass(frozen=True)
class Finding:
    """A statement about a number of rows, prompts or completions."""

    count: int
    total: int
    text: str
    fix: str = ""
    warn_above: float | None = None  # the fraction above which it is a warning; None: it is never a warning
    rows: str = ""  # the numbers of the rows, as text

    def line(self) -> str:
        return f"{self.count} of {self.total} ({self.count / self.total:.1%}) {self.text}{self.rows}"

    @property
    def is_warning(self) -> bool:
        return self.warn_above is not None and self.count > self.warn_above * self.total


@dataclass(frozen=True)
class DataReport:
    """The counts of a split. All counts except ``rows`` and ``dropped`` are of used rows."""

    rows: int
    used: int
    dropped: dict[str, list[int]]  # reason -> indices in the source split
    completions: int = 0  # in all used rows: zero, one or two in each
    truncated_prompts: int = 0
    shortened_prompts: int = 0  # by the rule of the format
    truncated_completions: int = 0
    longest_prompt: int = 0  # tokens, before it was cut
    longest_completion: int = 0
    cut_at_eos: int = 0  # completions that had text after an EOS
    doubled_bos: int = 0  # prompts that had a second BOS
    missing_bos: int = 0  # prompts without the BOS that the tokenizer puts before plain text
    eos_behind_prompt: int = 0  # prompts whose text ends with an EOS
    bos_in_completion: int = 0  # completions whose text begins with a BOS
    begins_with_prompt: int = 0  # completions whose text repeats their prompt's
    inside_token: int = 0  # completions that begin inside a token of the whole text
    not_as_text: int = 0  # those of them whose tokens do not decode to their text
    unknown: int = 0  # rows with characters that the tokenizer does not know
    cut_turns: int = 0  # rows whose dialogues go on after the answers; the turns behind the answers are cut
    earlier_answers: int = 0  # conversations with several answers, of which the last is trained on
    open_prompts: int = 0  # prompts that end with the beginning of the answer
    shortened_generation_prompts: int = 0  # prompts without what the template writes only if no answer follows
    unwritten_messages: int = 0  # prompts with a message that the chat template leaves out
    prompts_in_sentence: int = 0  # prompts that are a common beginning and end in the middle of a sentence
    rendered: int = 0  # rows written by a chat template
    turn_end: str | None = None  # ends an answer in the chat template, and is not the tokenizer's EOS
    unused_template: bool = False  # the tokenizer has a chat template, and the rows are plain text without its tokens
    columns: Columns = field(default_factory=Columns)
    repeats: Repeats = field(default_factory=Repeats)
    also_trained_on: list[int] = field(default_factory=list)  # held-out rows with a training row's prompt
    lengths: dict[str, Lengths] = field(default_factory=dict)  # of prompt, chosen, ...

    def lines(self) -> list[str]:
        """Return the report as text, one line for each finding."""
        lines = [f"{self.used} of {self.rows} rows used"]
        if self.dropped:
            reasons = [f"{len(rows)} with {why}{_name_rows(rows)}" for why, rows in self.dropped.items()]
            lines.append(f"{self.rows - self.used} of {self.rows} rows dropped: {', '.join(reasons)}")
        if self.rendered:
            lines.append(f"chat template applied to {'all' if self.rendered == self.used else self.rendered} rows")
        if self.rendered and self.turn_end is not None:
            lines.append(
                f"completions end with {self.turn_end!r}, as the chat template ends an answer, and not with the EOS: "
                "samples end there too, and a whole final model's generation_config.json names it to servers"
            )
        if self.columns.unread:
            lines.append(f"columns that nothing reads: {quoted(self.columns.unread)}")
        lines += [finding.line() for finding in self._findings() if finding.count]
        for name, at in self.lengths.items():
            sizes = f"smallest {at.smallest}, median {at.median}, 95% {at.high}, largest {at.largest}"
            lines.append(f"{name} tokens: {sizes}")
        return lines

    def warnings(self) -> list[str]:
        """Return what is probably a mistake in the data, with its fix, one line each."""
        lines = [*self.columns.warnings]
        lost = self.rows - self.used
        if lost > 0.05 * self.rows:
            lines.append(f"{lost} of {self.rows} ({lost / self.rows:.1%}) rows dropped: repair or leave out these rows")
        lines += [f"{finding.line()}: {finding.fix}" for finding in self._findings() if finding.is_warning]
        if self.unused_template:
            lines.append(
                "plain text, and the tokenizer has a chat template that is not applied: write prompt and completions "
                "as chat messages, if the model is to answer in a chat"
            )
        return lines

    def _findings(self) -> list[Finding]:
        used, completions = self.used, self.completions
        repeats = self.repeats
        return [
            Finding(
                self.truncated_prompts,
                used,
                "prompts cut to their last max_prompt_length tokens",
                f"raise max_prompt_length (the longest has {self.longest_prompt} tokens)",
                0.05,
            ),
            Finding(self.shortened_prompts, used, "prompts with their text shortened to have max_prompt_length tokens"),
            Finding(
                self.truncated_completions,
                completions,
                "completions cut to max_completion_length tokens",
                f"raise max_completion_length (the longest has {self.longest_completion} tokens)",
                0.05,
            ),
            Finding(
                self.cut_at_eos,
                completions,
                "completions cut at an EOS inside their text",
                "take the EOS token's text out of the data",
                0.01,
            ),
            Finding(
                self.doubled_bos,
                used,
                "prompts had a second BOS, now removed",
                "take the BOS token's text out of the data: the tokenizer writes one",
                0.01,
            ),
            Finding(
                self.missing_bos,
                used,
                "prompts have no BOS, which the tokenizer puts before plain text",
                "let the chat template write the bos_token",
                0.01,
            ),
            Finding(
                self.eos_behind_prompt,
                used,
                "prompts ended with an EOS of their text, now removed",
                "take the EOS token's text out of the prompts: an answer follows",
                0.01,
            ),
            Finding(
                self.bos_in_completion,
                completions,
                "completions begin with a BOS",
                "take the BOS token's text out of the completions, which follow their prompt",
                0.0,
            ),
            Finding(
                self.inside_token,
                completions,
                "completions begin inside a token of their row's text",
                "end the prompts where a token ends: a space belongs to the beginning of the completions; of chats, "
                "take a generation prompt that ends as the template's answers begin (chat_template_kwargs)",
                0.01,
            ),
            Finding(
                self.not_as_text,
                completions,
                "completions have tokens that do not decode to the row's text, because they begin inside a token",
                "put a space between prompt and completion",
                0.0,
            ),
            Finding(
                self.unknown,
                used,
                "rows have characters that the tokenizer does not know",
                "use the tokenizer of the data's language, or take these characters out of the data",
                0.01,
            ),
            Finding(
                self.cut_turns,
                used,
                "rows whose conversations go on after the answers that differ: the first answer is trained on",
                "end both dialogues with the answers to compare, if later turns matter",
                0.0,
            ),
            Finding(self.earlier_answers, used, "conversations have several answers: the last one is trained on"),
            Finding(self.open_prompts, used, "prompts end with the beginning of the answer"),
            Finding(
                self.shortened_generation_prompts,
                used,
                "prompts end before what the chat template adds if no answer follows (such as a thinking block)",
                "use a template that writes it before answers too, if the model is to answer behind it",
                0.0,
            ),
            Finding(
                self.unwritten_messages,
                used,
                "prompts have a message that the chat template does not write",
                "use a template that writes it (many leave out system messages), or take it out of the data",
                0.0,
            ),
            Finding(
                self.prompts_in_sentence,
                used,
                "prompts, the common beginning of 'chosen' and 'rejected', end in the middle of a sentence",
                "write the prompts in a column 'prompt', if the answers begin earlier",
                0.05,
            ),
            Finding(
                self.begins_with_prompt,
                completions,
                "completions begin with the whole text of their prompt",
                "leave it out of them, or leave out the column 'prompt': it would be read twice",
                0.05,
            ),
            Finding(
                len(repeats.rows),
                used,
                "rows are equal to an earlier one",
                "leave the copies out",
                0.01,
                _name_rows(repeats.rows),
            ),
            Finding(
                len(repeats.reversed_pairs),
                used,
                "pairs prefer what an earlier one with the same texts rejects",
                "keep one of the two, or set label_smoothing",
                0.01,
                _name_rows(repeats.reversed_pairs),
            ),
            Finding(len(repeats.prompts), used, "rows have the prompt of an earlier one"),
            Finding(
                len(self.also_trained_on),
                used,
                "held-out rows have the prompt of a training row",
                "hold out rows of other prompts, or evaluations say nothing about unseen ones",
                0.01,
                _name_rows(self.also_trained_on),
            ),
        ]


def _name_rows(rows: list[int]) -> str:
    """Return the numbers of the rows as in `` (row 3)`` or `` (rows 3, 17)``."""
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return f" (row {shown})" if len(rows) == 1 else f" (rows {shown})"
