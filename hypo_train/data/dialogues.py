"""Find where the prompt of a row ends and its answers begin and end, in text.

Text can be a dialogue whose turns begin with marks, such as "Human:" and "Assistant:" in HH-RLHF. Then a prompt ends
with the mark of an answer, and an answer ends before the next human turn, which is never trained on.
"""

from __future__ import annotations

import re
from bisect import bisect
from typing import NamedTuple

from hypo_train.data.errors import Unusable

# (mark of a human turn, mark of an answer)
_LINE_MARKS = [
    ("Human:", "Assistant:"),
    ("User:", "Assistant:"),
    ("Human:", "AI:"),
    ("### Human:", "### Assistant:"),
    ("### User:", "### Assistant:"),
    ("### Instruction:", "### Response:"),
    ("### Question:", "### Answer:"),
    ("Question:", "Answer:"),
    ("Q:", "A:"),
]
_TOKEN_MARKS = [  # anywhere in a line
    ("<|im_start|>user", "<|im_start|>assistant"),
    ("<|start_header_id|>user<|end_header_id|>", "<|start_header_id|>assistant<|end_header_id|>"),
    ("<start_of_turn>user", "<start_of_turn>model"),
    ("<|user|>", "<|assistant|>"),
    ("<|prompter|>", "<|assistant|>"),
    ("<human>:", "<bot>:"),
    ("[INST]", "[/INST]"),
    ("USER:", "ASSISTANT:"),
]
_SENTENCE_END = tuple(".!?:;\n\"'”’»)]}>。！？：")  # noqa: RUF001


class _Marks(NamedTuple):
    name: str  # the text of the human turn's mark, which is searched first because that is fast
    human: re.Pattern[str]
    answer: re.Pattern[str]

    def last_human(self, text: str) -> int:
        """Return where the last human turn begins, -1 if there is none."""
        return max((found.start() for found in self.human.finditer(text)), default=-1)

    def last_answer(self, text: str) -> int:
        """Return where the text of the last answer begins, -1 if there is none."""
        return max((found.end() for found in self.answer.finditer(text)), default=-1)


def _marks(human: str, answer: str, before: str) -> _Marks:
    # White space before a mark is part of it, and so are line breaks behind it. A space there belongs to the answer.
    patterns = (rf"{before}{re.escape(mark)}(?:[ \t]*\n+)?" for mark in (human, answer))
    return _Marks(human, *map(re.compile, patterns))


_DIALOGUES = [
    *(_marks(*pair, r"(?:\A|\s*\n)[ \t]*") for pair in _LINE_MARKS),
    *(_marks(*pair, r"\s*") for pair in _TOKEN_MARKS),
]


class Texts(NamedTuple):
    """The text of a prompt and of each of its answers, and notes for the report."""

    prompt: str
    completions: list[str]
    notes: tuple[str, ...] = ()


def split_texts(prompt: str | None, texts: list[str]) -> Texts:
    """Return the prompt and the answers behind it.

    Without a prompt, it is the common beginning of the texts: up to the mark of an answer in a dialogue, else up to
    white space; a space goes to the answers. In a dialogue, turns that all answers have in common belong to the prompt,
    and what follows an answer is cut.
    """
    if not texts:
        return Texts(prompt or "", [])
    whole = [(prompt or "") + text for text in texts]
    if prompt is not None:
        return _split_behind(prompt, texts, whole)
    shared = _common_start(whole)
    marks = _find_marks(shared, whole)
    if marks is None:
        return _split_at_space(shared, whole)
    end = marks.last_answer(shared)
    if end < marks.last_human(shared):
        raise Unusable("dialogues that part in a human turn: no answers to the same prompt")
    return _cut_turns(marks, whole, end)


def _split_behind(prompt: str, texts: list[str], whole: list[str]) -> Texts:
    """Return the prompt, with the turns that the answers share, and the answers."""
    marks = _find_marks(prompt, [prompt])
    if marks is None:
        return Texts(prompt, texts)
    shared = _common_start(whole) if len(whole) > 1 else prompt
    end, human = marks.last_answer(shared), marks.last_human(shared)
    shares_turns = marks.last_human(prompt) < human < end
    return _cut_turns(marks, whole, end if shares_turns else len(prompt))


def _cut_turns(marks: _Marks, whole: list[str], end: int) -> Texts:
    """Return the prompt, which ends at ``end``, and the answers without what follows them."""
    answers = [text[end:] for text in whole]
    kept = [marks.human.split(answer, maxsplit=1)[0] for answer in answers]
    return Texts(whole[0][:end], kept, ("cut_turns",) if kept != answers else ())


def _find_marks(start: str, texts: list[str]) -> _Marks | None:
    """Return the marks of a dialogue: ``start`` has a human turn, and each text has an answer behind it."""

    def is_dialogue(marks: _Marks) -> bool:
        human = marks.human.search(start) if marks.name in start else None
        return human is not None and all(marks.answer.search(text, human.end()) for text in texts)

    return next((marks for marks in _DIALOGUES if is_dialogue(marks)), None)


def _common_start(texts: list[str]) -> str:
    """Return the common beginning of the first and the last text; it is searched by halving."""
    first, last = texts[0], texts[-1]
    sizes = range(min(len(first), len(last)))
    return first[: bisect(sizes, False, key=lambda size: first[: size + 1] != last[: size + 1])]


def _split_at_space(shared: str, whole: list[str]) -> Texts:
    """Return the common beginning, cut so that no word is split between prompt and completion."""
    cut = len(shared)
    while cut > 0 and not shared[cut - 1].isspace():
        cut -= 1
    if shared[:cut].endswith(" "):
        cut -= 1
    if not shared[:cut].strip():
        raise Unusable("no common beginning of 'chosen' and 'rejected', which would be the prompt")
    notes = () if shared[:cut].rstrip(" ").endswith(_SENTENCE_END) else ("prompts_in_sentence",)
    return Texts(shared[:cut], [text[cut:] for text in whole], notes)
