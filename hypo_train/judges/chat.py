"""A chat model as a pairwise judge: asked in both orders, many comparisons at once, nothing asked twice."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm

from hypo_train.judges.cache import Answer, AnswerCache
from hypo_train.judges.endpoint import AskError, ChatEndpoint, Usage
from hypo_train.judges.protocol import Comparison, JudgeError, Verdict
from hypo_train.judges.template import Template, preferred

FAILURES_IN_A_ROW = 10  # after so many the endpoint is down, or an account empty


class ChatJudge:
    """Each comparison is asked twice, as A/B and as B/A: a verdict that changes with the order is a tie."""

    def __init__(self, endpoint: ChatEndpoint, template: Template, cache: AnswerCache, *, workers: int) -> None:
        self.endpoint = endpoint
        self.template = template
        self.cache = cache
        self.workers = workers
        self.from_cache = Usage()  # of answers that an earlier run paid for
        self._lock = threading.Lock()

    def conditions(self) -> dict[str, Any]:
        return {
            "judge": self.endpoint.model,
            "judge_url": self.endpoint.url,
            "judge_template": self.template.name,
            "judge_template_sha256": hashlib.sha256(self.template.text.encode()).hexdigest(),
            "judge_temperature": self.endpoint.temperature,
            "judge_max_tokens": self.endpoint.max_tokens,
        }

    def unanswered(self, comparisons: Sequence[Comparison]) -> list[str]:
        """The messages still to be sent: not those in the cache."""
        messages = [message for c in comparisons if not _same(c) for message in self._messages(c)]
        return [message for message in messages if self.cache.get(self._cache_key(message)) is None]

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Raises JudgeError where the endpoint refuses us, or ten comparisons fail one after another."""
        verdicts: dict[int, Verdict] = {}
        failures = 0
        bar = tqdm(total=len(comparisons), unit="comparison", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        with bar, ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(self._verdict, c): i for i, c in enumerate(comparisons)}
            try:
                for future in as_completed(futures):
                    verdict = verdicts[futures[future]] = future.result()
                    bar.update()
                    failures = 0 if verdict.outcome else failures + 1
                    if failures == FAILURES_IN_A_ROW:
                        raise JudgeError(
                            f"{failures} comparisons in a row failed, the last with {verdict.details['error']}: what "
                            "was answered is kept, the same command goes on from there"
                        )
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.endpoint.stop()
                raise
        return [verdicts[i] for i in range(len(comparisons))]

    def _verdict(self, comparison: Comparison) -> Verdict:
        if _same(comparison):
            return Verdict("tie")
        try:
            answers = [self._ask(message).text for message in self._messages(comparison)]
        except AskError as error:
            return Verdict(None, details={"error": str(error)})
        details = dict(zip(("answer", "answer_swapped"), answers, strict=True))
        wins = [preferred(answers[0]) == "A", preferred(answers[1]) == "B"]
        if wins[0] != wins[1]:
            return Verdict("tie", consistent=False, details=details)
        return Verdict("win" if wins[0] else "loss", details=details)

    def _messages(self, comparison: Comparison) -> tuple[str, str]:
        prompt, completion, other = comparison.prompt, comparison.completion, comparison.other
        return self.template.message(prompt, completion, other), self.template.message(prompt, other, completion)

    def _ask(self, message: str) -> Answer:
        key = self._cache_key(message)
        if (known := self.cache.get(key)) is not None:
            with self._lock:
                self.from_cache.add(known)
            return known
        answer = self.endpoint.ask(self.endpoint.request(message), lambda text: preferred(text) is not None)
        self.cache.put(key, answer)
        return answer

    def _cache_key(self, message: str) -> dict[str, Any]:
        """All that an answer depends on: template and texts make the message; a name elsewhere is another model's."""
        return {"url": self.endpoint.url, **self.endpoint.request(message)}


def _same(comparison: Comparison) -> bool:
    """Two equal responses tie, whoever judges."""
    return comparison.completion.strip() == comparison.other.strip()
