"""A chat model as a pairwise judge. It sees each comparison in both orders; answers are cached."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from hypo_train.judges.cache import Answer, AnswerCache
from hypo_train.judges.endpoint import AskError, ChatEndpoint, Usage
from hypo_train.judges.settings import JudgeSettings
from hypo_train.judges.template import load_template, preferred
from hypo_train.judges.verdicts import Comparison, JudgeError, Verdict

FAILURES_IN_A_ROW = 10  # then the endpoint is probably down, or the account has no credit


class ChatJudge:
    """A judge that asks a chat model about each comparison as A/B and as B/A. Different verdicts are a tie."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.endpoint = ChatEndpoint(settings)
        self.template = load_template(settings.judge_template)
        self.cache = AnswerCache(settings.cache)
        self.usage_from_cache = Usage()  # usage of cached answers, which an earlier run paid for
        self._lock = threading.Lock()

    def conditions(self) -> dict[str, Any]:
        return {
            "judge": self.settings.judge_model_name,
            "judge_url": self.endpoint.url,
            "judge_template": self.template.name,
            "judge_template_sha256": hashlib.sha256(self.template.text.encode()).hexdigest(),
            "judge_temperature": self.settings.judge_temperature,
            "judge_max_tokens": self.settings.judge_max_tokens,
        }

    def estimate(self, comparisons: Sequence[Comparison]) -> str:
        """Return a line with the number of requests that are not in the cache, and an upper bound of their cost."""
        messages = [message for c in comparisons if not _are_equal(c) for message in self._messages(c)]
        messages = [message for message in messages if self.cache.get(self._cache_key(message)) is None]
        line = f"{len(comparisons)} comparisons in both orders: {len(messages)} requests to {self.endpoint.url}"
        prices, max_tokens = self.settings.prices, self.settings.judge_max_tokens
        if prices is None:
            return line
        if max_tokens is None:
            return f"{line}; answers without --judge_max_tokens have no upper estimate of their cost"
        # A token has at least one byte of UTF-8. The chat template adds a few tokens to each message.
        tokens_in = sum(len(message.encode("utf-8", "replace")) + 20 for message in messages)
        bound = (tokens_in * prices[0] + len(messages) * max_tokens * prices[1]) / 1e6
        return f"{line}, at most {bound:.2f} USD without retries (a token a byte; English has about four bytes a token)"

    def cost(self) -> dict[str, Any]:
        """Return tokens and USD of the requests of this run, and of the cached answers that it used."""
        new, cached, prices = self.endpoint.usage, self.usage_from_cache, self.settings.prices
        usage: dict[str, Any] = {"usage": asdict(new), "usage_from_cache": asdict(cached)}
        if prices is not None:
            usage |= {"cost_usd": new.cost(prices), "cost_usd_from_cache": cached.cost(prices)}
        return usage

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return a verdict on each comparison.

        Raises:
            JudgeError: the endpoint refuses every request, or ten comparisons in a row fail.
        """
        verdicts: dict[int, Verdict] = {}
        failures = 0
        bar = tqdm(total=len(comparisons), unit="comparison", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        with bar, ThreadPoolExecutor(self.settings.judge_workers) as pool:
            futures = {pool.submit(self._verdict, c): i for i, c in enumerate(comparisons)}
            try:
                for future in as_completed(futures):
                    verdict = verdicts[futures[future]] = future.result()
                    bar.update()
                    failures = 0 if verdict.outcome else failures + 1
                    if failures == FAILURES_IN_A_ROW:
                        raise JudgeError(
                            f"{failures} comparisons in a row failed, the last with {verdict.details['error']}: the "
                            "answers so far are kept, the same command resumes from there"
                        )
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.endpoint.stop()
                raise
        return [verdicts[i] for i in range(len(comparisons))]

    def _verdict(self, comparison: Comparison) -> Verdict:
        if _are_equal(comparison):
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
        if (cached := self.cache.get(key)) is not None:
            with self._lock:
                self.usage_from_cache.add(cached)
            return cached
        answer = self.endpoint.ask(self.endpoint.request(message), lambda text: preferred(text) is not None)
        self.cache.put(key, answer)
        return answer

    def _cache_key(self, message: str) -> dict[str, Any]:
        """Return the request and the address. At another address, the same name may mean another model."""
        return {"url": self.endpoint.url, **self.endpoint.request(message)}


def _are_equal(comparison: Comparison) -> bool:
    """Return whether both responses are equal. That is a tie without a request."""
    return comparison.completion.strip() == comparison.other.strip()
