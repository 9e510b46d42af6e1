"""Find where the prompt of a row ends and its answers begin and end, in text.

Text can be a dialogue whose turns begin with marks, such as "Human:" and "Assistant:" in HH-RLHF. Then a prompt ends
with the mark of an answer, and an answer ends before the next human turn, which is never trained on.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from hypo_train.data.boundaries import num_shared
from hypo_train.data.errors import Unusable

# (mark of a human turn, mark of an answer)
_LINE_MARKS = [
    ("Human:", "Assistant:"),
    ("User:", "Assistant:"),
    ("USER:", "ASSISTANT:"),
    ("### Human:", "### Assistant:"),
    ("### User:", "### Assistant:"),
    ("### Instruction:", "### Response:"),
    ("Question:", "Answer:"),
    ("Q:", "A:"),
]
_TOKEN_MARKS = [
    ("<|im_start|>user", "<|im_start|>assistant"),
    ("<|start_header_id|>user<|end_header_id|>", "<|start_header_id|>assistant<|end_header_id|>"),
    ("<start_of_turn>user", "<start_of_turn>model"),
    ("<|user|>", "<|assistant|>"),
    ("[INST]", "[/INST]"),
]
_SENTENCE_END = tuple(".!?:;\n\"'”’»)]}>。！？：")  # noqa: RUF001


class _Marks(NamedTuple):
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
    return _Marks(*map(re.compile, patterns))


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
    shared = whole[0][: num_shared(whole[0], whole[-1])] if prompt is None or len(whole) > 1 else prompt
    marks = _find_marks(shared, whole) if prompt is None else _find_marks(prompt, [prompt])
    if marks is None:
        return _split_at_space(shared, whole) if prompt is None else Texts(prompt, texts)
    end, human = marks.last_answer(shared), marks.last_human(shared)
    if prompt is None and end < human:
        raise Unusable("dialogues that part in a human turn: no answers to the same prompt")
    if prompt is not None and not marks.last_human(prompt) < human < end:  # no later turn is shared
        end = len(prompt)
    answers = [text[end:] for text in whole]
    kept = [marks.human.split(answer, maxsplit=1)[0] for answer in answers]
    return Texts(whole[0][:end], kept, ("cut_turns",) if kept != answers else ())


def _find_marks(start: str, texts: list[str]) -> _Marks | None:
    """Return the marks of a dialogue: ``start`` has a human turn, and each text has an answer behind it."""

    def is_dialogue(marks: _Marks) -> bool:
        human = marks.human.search(start)
        return human is not None and all(marks.answer.search(text, human.end()) for text in texts)

    return next((marks for marks in _DIALOGUES if is_dialogue(marks)), None)


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
