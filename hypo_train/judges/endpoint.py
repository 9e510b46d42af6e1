"""A chat model behind an OpenAI-compatible address: a message there, an answer back, asked again where that helps."""

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
from hypo_train.judges.protocol import JudgeError

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second attempt; it doubles up to the longest
LONGEST_RETRY_AFTER = 600.0  # what an endpoint may ask to wait; beyond it, waiting is no use
_NEVER = {401, 403, 404}  # no comparison will fare better
_LATER = {408, 409, 425, 429}  # and all from 500 on


class AskError(Exception):
    """One message that was not answered; the message is the reason."""


@dataclass
class Usage:
    """Tokens of answers; an endpoint that counts none leaves them ``uncounted``."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    answers: int = 0
    uncounted: int = 0

    def add(self, answer: Answer) -> None:
        self.answers += 1
        if answer.prompt_tokens is None or answer.completion_tokens is None:
            self.uncounted += 1
        else:
            self.prompt_tokens += answer.prompt_tokens
            self.completion_tokens += answer.completion_tokens

    def cost(self, prices: tuple[float, float]) -> float:
        """At USD per million tokens in and out."""
        return (self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]) / 1e6


class ChatEndpoint:
    """An address and a model's name there, asked by several threads.

    Args:
        url: up to and without ``/chat/completions``.
        temperature, max_tokens: sent along; None leaves them out, for models that refuse them.
        api_key: sent as a bearer token to ``url`` alone and kept nowhere; None sends none.
        timeout: seconds that an answer may take.
        retries: attempts after the first.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        temperature: float | None,
        max_tokens: int | None,
        api_key: str | None,
        timeout: float,
        retries: int,
    ) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.usage = Usage()  # of every answer that came in, used or not
        self._api_key = api_key
        self._timeout = timeout
        self._retries = retries
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._not_before = 0.0  # time.monotonic() that the endpoint asked all of us to wait for
        self._opener = urllib.request.build_opener(_NoRedirect)  # which would take the key to another address

    def request(self, message: str) -> dict[str, Any]:
        """The body that asks ``message``."""
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": message}]}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        return body

    def ask(self, request: dict[str, Any], accept: Callable[[str], bool]) -> Answer:
        """The first answer that is acceptable.

        Raises:
            AskError: there was none in all attempts, or the endpoint refuses this one request.
            JudgeError: it refuses us altogether.
        """
        reason, wait = "", 0.0
        for attempt in range(self._retries + 1):
            if attempt:
                wait = max(wait, min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.75, 1.25))
            self._wait(wait)
            try:
                answer = self._post(request)
            except _TryLater as error:
                reason, wait = str(error), error.retry_after
                self._hold_all(error.retry_after)
                continue
            with self._lock:
                self.usage.add(answer)
            if accept(answer.text):
                return answer
            reason, wait = f"an answer without a verdict: {answer.text[:80]!r}", 0.0
        raise AskError(f"{reason} ({self._retries + 1} attempts)")

    def stop(self) -> None:
        """Let every thread that waits give up."""
        self._stopped.set()

    def _wait(self, seconds: float) -> None:
        until = max(time.monotonic() + seconds, self._not_before)
        if self._stopped.wait(max(0.0, until - time.monotonic())):
            raise AskError("judging was stopped")

    def _hold_all(self, seconds: float) -> None:
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)

    def _post(self, request: dict[str, Any]) -> Answer:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        sent = urllib.request.Request(
            f"{self.url}/chat/completions", data=json.dumps(request).encode(), headers=headers, method="POST"
        )
        try:
            with self._opener.open(sent, timeout=self._timeout) as response:
                return _answer(response.read())
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except urllib.error.URLError as error:
            raise _TryLater(f"{self.url}: {error.reason}") from None
        except TimeoutError:
            raise _TryLater(f"no answer within {self._timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _TryLater(f"the connection broke: {type(error).__name__}") from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status means for the comparison, or for all of them."""
        with error:
            said = self._without_key(" ".join(error.read(2000).decode("utf-8", "replace").split()))[:300]
        reason = f"HTTP {error.code}" + (f": {said}" if said else "")
        if error.code in _NEVER:
            return JudgeError(f"judge_url={self.url!r} refuses the model {self.model!r}: {reason}")
        if 300 <= error.code < 400:
            target = error.headers.get("Location")
            return JudgeError(f"judge_url={self.url!r} answers with a redirect to {target!r}: use the address itself")
        if error.code not in _LATER and error.code < 500:
            return AskError(reason)
        retry_after = _seconds(error.headers.get("Retry-After"))
        if retry_after > LONGEST_RETRY_AFTER:
            return AskError(f"{reason} (it asks to wait {retry_after:.0f} s)")
        return _TryLater(reason, retry_after)

    def _without_key(self, text: str) -> str:
        return text if self._api_key is None else text.replace(self._api_key, "***")


class _TryLater(Exception):
    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after  # seconds, 0 = the endpoint names none


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _answer(body: bytes) -> Answer:
    """Raises _TryLater for what is no chat completion."""
    try:
        data = json.loads(body)
        text = data["choices"][0]["message"]["content"]
        usage = data.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _TryLater(f"an answer that is no chat completion: {body[:80]!r}") from None
    return Answer(text if isinstance(text, str) else "", *(n if isinstance(n, int) else None for n in counts))


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header: a number, or a date."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
