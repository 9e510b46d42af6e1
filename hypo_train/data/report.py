"""What became of the rows of a split."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of a split; counts other than ``rows`` and ``dropped`` are of used rows."""

    rows: int
    used: int
    dropped: dict[str, list[int]]  # reason -> indices in the source split
    completions: int  # none, one or two in a row
    truncated_prompts: int
    shortened_prompts: int  # in the way of the format
    truncated_completions: int
    cut_at_eos: int  # completions that had text after an EOS of their own
    doubled_bos: int  # prompts that had a second BOS
    lengths: dict[str, tuple[int, int, int]]  # tokens of prompt, chosen, ...: median, 95 %, largest

    def lines(self) -> list[str]:
        """The report as text, one finding a line."""
        lines = [f"{self.used} of {self.rows} rows used"]
        if self.dropped:
            reasons = [f"{len(rows)} with {why} ({_name_rows(rows)})" for why, rows in self.dropped.items()]
            lines.append(f"{self.rows - self.used} of {self.rows} rows dropped: {', '.join(reasons)}")
        for count, total, finding in (
            (self.truncated_prompts, self.used, "prompts cut to their last max_prompt_length tokens"),
            (self.shortened_prompts, self.used, "prompts with their text shortened to have max_prompt_length tokens"),
            (self.truncated_completions, self.completions, "completions cut to max_completion_length tokens"),
            (self.cut_at_eos, self.completions, "completions cut at an EOS inside their text"),
            (self.doubled_bos, self.used, "prompts had a second BOS, now removed"),
        ):
            if count:
                lines.append(f"{count} of {total} ({count / total:.1%}) {finding}")
        for name, (median, high, largest) in self.lengths.items():
            lines.append(f"{name} tokens: median {median}, 95% {high}, largest {largest}")
        return lines


def _name_rows(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}"
