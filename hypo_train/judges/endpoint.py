"""A client for a chat model behind an OpenAI-compatible address, with retries.

The ``openai`` client is not used. It takes half a second of CPU to import, waits in one thread where all threads should
wait, ignores a Retry-After above two minutes, follows redirects, sends facts about the machine in its headers, and
requires a key even if the endpoint does not.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypo_train.judges.cache import Answer
from hypo_train.judges.settings import JudgeSettings
from hypo_train.judges.verdicts import JudgeError

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second attempt; doubles up to the longest wait
LONGEST_RETRY_AFTER = 600.0  # seconds; if the endpoint asks for a longer wait, the comparison fails
_NEVER = {401, 403, 404}  # all other comparisons would fail too
_LATER = {408, 409, 425, 429}  # retried, as is every status of 500 or more


class AskError(Exception):
    """A message got no answer; the text of the error is the reason."""


@dataclass
class Usage:
    """Token counts of answers. ``uncounted`` is the number of answers without a count."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    answers: int = 0
    uncounted: int = 0

    def add(self, answer: Answer) -> None:
        """Count one answer."""
        self.answers += 1
        if answer.prompt_tokens is None or answer.completion_tokens is None:
            self.uncounted += 1
        else:
            self.prompt_tokens += answer.prompt_tokens
            self.completion_tokens += answer.completion_tokens

    def cost(self, prices: tuple[float, float]) -> float:
        """Return the cost in USD. ``prices`` are USD per million prompt tokens and per million completion tokens."""
        return (self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]) / 1e6


class ChatEndpoint:
    """The client for the address and model in the settings. Thread-safe.

    The API key is sent as a bearer token to this address only, and is stored nowhere.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.url = str(settings.judge_url).rstrip("/")
        self.usage = Usage()  # of all answers, also those without a verdict
        self._api_key = settings.api_key()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._not_before = 0.0  # every thread waits until this time.monotonic()
        self._opener = urllib.request.build_opener(_NoRedirect)  # a redirect would send the key to another address

    def request(self, message: str) -> dict[str, Any]:
        """Return the body of the request for ``message``."""
        limits = {"temperature": self.settings.judge_temperature, "max_tokens": self.settings.judge_max_tokens}
        messages = [{"role": "user", "content": message}]
        body = {"model": self.settings.judge_model_name, "messages": messages, **limits}
        return {name: value for name, value in body.items() if value is not None}

    def ask(self, request: dict[str, Any], accept: Callable[[str], bool]) -> Answer:
        """Send ``request`` until the text of an answer passes ``accept``; return that answer.

        Raises:
            AskError: all attempts failed, or the endpoint refuses this request.
            JudgeError: the endpoint would refuse every request.
        """
        reason, wait, attempts = "", 0.0, self.settings.judge_retries + 1
        for attempt in range(attempts):
            if attempt:
                wait = max(wait, min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.75, 1.25))
            self._wait(wait)
            try:
                answer = self._post(request)
            except _TryLater as error:
                reason, wait = str(error), error.retry_after
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + wait)
                continue
            with self._lock:
                self.usage.add(answer)
            if accept(answer.text):
                return answer
            reason, wait = f"an answer without a verdict: {answer.text[:80]!r}", 0.0
        raise AskError(f"{reason} ({attempts} attempts)")

    def stop(self) -> None:
        """Make all waiting threads stop."""
        self._stopped.set()

    def _wait(self, seconds: float) -> None:
        until = max(time.monotonic() + seconds, self._not_before)
        if self._stopped.wait(max(0.0, until - time.monotonic())):
            raise AskError("judging was stopped")

    def _post(self, request: dict[str, Any]) -> Answer:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        address, timeout = f"{self.url}/chat/completions", self.settings.judge_timeout
        body = json.dumps(request).encode()
        try:
            with self._opener.open(urllib.request.Request(address, body, headers), timeout=timeout) as response:
                return _answer(response.read())
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except urllib.error.URLError as error:
            raise _TryLater(f"{self.url}: {error.reason}") from None
        except TimeoutError:
            raise _TryLater(f"no answer within {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _TryLater(f"the connection broke: {type(error).__name__}") from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """Return the exception for an HTTP status: to retry, to fail the comparison, or to stop the judging."""
        with error:
            text = " ".join(error.read(2000).decode("utf-8", "replace").split())
        text = text if self._api_key is None else text.replace(self._api_key, "***")
        reason = f"HTTP {error.code}" + (f": {text[:300]}" if text else "")
        if error.code in _NEVER:
            model = self.settings.judge_model_name
            return JudgeError(f"judge_url={self.url!r} refuses the model {model!r}: {reason}")
        if 300 <= error.code < 400:
            target = error.headers.get("Location")
            return JudgeError(f"judge_url={self.url!r} answers with a redirect to {target!r}: use the address itself")
        if error.code not in _LATER and error.code < 500:
            return AskError(reason)
        retry_after = _seconds(error.headers.get("Retry-After"))
        if retry_after > LONGEST_RETRY_AFTER:
            return AskError(f"{reason} (it asks to wait {retry_after:.0f} s)")
        return _TryLater(reason, retry_after)


class _TryLater(Exception):
    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after  # seconds; 0 if the endpoint gives no time


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _answer(body: bytes) -> Answer:
    """Return the answer in a response's body. Raises _TryLater if it holds no chat completion."""
    try:
        data = json.loads(body)
        text = data["choices"][0]["message"]["content"]
        usage = data.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _TryLater(f"an answer that is no chat completion: {body[:80]!r}") from None
    return Answer(text if isinstance(text, str) else "", *(n if isinstance(n, int) else None for n in counts))


def _seconds(retry_after: str | None) -> float:
    """Return the seconds to wait from a Retry-After header, which is a number or a date; 0 if it is neither."""
    try:
        return max(0.0, float(retry_after or ""))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after or "").timestamp() - time.time())
    except ValueError:
        return 0.0
