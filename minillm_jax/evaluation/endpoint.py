"""An OpenAI-compatible endpoint that is asked every question once.

Replies are kept in a file, so that a run that broke off goes on where it was, a second one asks
nothing, and `offline` replays it without network or key. What may pass is tried again with growing
pauses: a connection that fails, a timeout, status 408, 409, 429 and 5xx, a reply without the text
that was asked for. A question that the server refuses (400, 413, 422: its filter, its length) has
an empty reply, unless it refuses all or many in a row.

The key is read from the environment and kept by the client alone: no message, no file and no
exception of this module has it, nor what the server said, which may quote it.
"""

import hashlib
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from minillm_jax.reporting.writers import read_rows, write_rows
from minillm_jax.types import InputError

CHARACTERS_PER_TOKEN = 4  # of English, by OpenAI's rule of thumb: for the estimate alone
LONGEST_PAUSE = 60.0  # seconds between two attempts
_PASSING = (408, 409, 429)
_OF_THE_QUESTION = (400, 413, 422)
_IN_A_ROW = 10  # refused one after the other: it is not the questions
_CURES = {
    400: "the model may not know --temperature or --max_tokens: try --temperature=-1",
    401: "the key is not valid: correct the environment variable",
    403: "the key may not use this model: choose another",
    404: "no such model or address: correct --judge or --base_url",
}


@dataclass(frozen=True)
class Settings:
    """Whom to ask, and how: `temperature` below 0 is the server's own; 0 per minute: no limit."""

    model: str
    base_url: str = ""  # empty: OpenAI's own
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: int = 512
    per_minute: float = 0.0
    parallel: int = 4
    attempts: int = 6
    timeout: float = 60.0  # seconds without a byte
    offline: bool = False


class Estimate(NamedTuple):
    """What is about to be asked: questions not in the cache, and tokens of those, at most."""

    questions: int
    cached: int
    tokens_in: int
    tokens_out: int

    def cost(self, price_in: float, price_out: float) -> float:
        """At prices per million tokens."""
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6


class _Again(Exception):
    """An attempt that failed in a way that may pass; `pause` in seconds if the server names it."""

    def __init__(self, why: str, pause: float = 0.0):
        super().__init__(why)
        self.pause = pause


class _Refused(Exception):
    """A question that the server does not take; `error` is what to say if it takes none."""

    def __init__(self, error: InputError):
        super().__init__()
        self.error = error


class Endpoint:
    """Asks the questions that the cache has no reply to."""

    def __init__(
        self,
        settings: Settings,
        cache: str | Path,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Read the cache; the client is made when the first question is asked.

        Raises:
            InputError: an address that holds a password or a key.
        """
        parts = urlsplit(settings.base_url)
        if parts.username or parts.password or parts.query:
            raise InputError(
                "--base_url holds a user, a password or a query, which would be written down: give "
                "the address alone and the key in the environment"
            )
        self.settings = settings
        self._cache = _Cache(Path(cache))
        self._pace = _Pace(settings.per_minute, sleep, clock)
        self._sleep = sleep
        self._client: Any = None
        self._failed = threading.Event()  # a question had no reply: ask no more
        self._lock = threading.Lock()
        self._served = False  # a question had one
        self._refused: dict[str, InputError] = {}  # since the last reply

    def estimate(self, questions: Sequence[str]) -> Estimate:
        """How many of the questions would be asked, and what that takes."""
        missing = {q for q in questions if self._key(q) not in self._cache.replies}
        size = sum(math.ceil(len(q) / CHARACTERS_PER_TOKEN) for q in missing)
        cached = len(set(questions)) - len(missing)
        return Estimate(len(missing), cached, size, len(missing) * self.settings.max_tokens)

    def ask(
        self,
        questions: Sequence[str],
        valid: Callable[[str], bool],
        done: Callable[[int], None] = lambda number: None,
    ) -> list[str]:
        """The reply to each question; `done` is told how many have theirs.

        A reply that is not `valid` is asked for again; the last one is taken as it is, and that to
        a question which the server refuses is empty.

        Raises:
            InputError: offline with a question that has no reply; no key; a question that got no
                reply in all attempts; a server that refuses all questions.
        """
        kept = self._cache.replies
        missing = [q for q in dict.fromkeys(questions) if self._key(q) not in kept]
        if missing and self.settings.offline:
            raise InputError(
                f"{len(missing)} of {len(questions)} questions have no reply in "
                f"{self._cache.path}: leave out --offline, or give the cache that has them"
            )
        if missing:
            self._client = self._client or self._connect()
        self._served = any(kept.get(self._key(q)) for q in questions)
        answered = len(questions) - len(missing)
        done(answered)
        with ThreadPoolExecutor(self.settings.parallel) as pool:
            for reply in pool.map(lambda question: self._reply(question, valid), missing):
                answered += reply is not None
                done(answered)
        if self._refused and not self._served:
            raise next(iter(self._refused.values()))
        self._give_up_on_refused()
        return [kept[self._key(q)] for q in questions]

    def _key(self, question: str) -> str:
        s = self.settings
        asked = [s.base_url, s.model, s.temperature, s.max_tokens, question]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _connect(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise InputError("the judge needs openai: pip install openai") from error
        key = os.environ.get(self.settings.key_variable, "")
        if not (key or self.settings.base_url):
            raise InputError(
                f"no key: set the environment variable {self.settings.key_variable}, or give "
                "--base_url of a server that needs none"
            )
        return openai.OpenAI(
            api_key=key or "none",
            base_url=self.settings.base_url or None,
            timeout=self.settings.timeout,
            max_retries=0,  # they are counted and paced here
        )

    def _reply(self, question: str, valid: Callable[[str], bool]) -> str | None:
        if self._failed.is_set():
            return None  # an earlier one has no reply, which is about to be said
        try:
            reply = self._replied(question, valid)
        except _Refused as refusal:
            with self._lock:
                self._refused[question] = refusal.error
                if len(self._refused) >= _IN_A_ROW:
                    self._failed.set()
                    raise refusal.error from None
            return ""
        except BaseException:
            self._failed.set()
            raise
        with self._lock:
            self._served = True
            self._give_up_on_refused()
        return reply

    def _give_up_on_refused(self) -> None:
        """The server takes others, so it is the questions."""
        for question in self._refused:
            self._cache.put(self._key(question), "")
        self._refused = {}

    def _replied(self, question: str, valid: Callable[[str], bool]) -> str:
        why, text = "", None
        for attempt in range(self.settings.attempts):
            self._pace.wait()
            try:
                text = self._attempt(question)
                if valid(text):
                    break
                why = "a reply without what was asked for"
            except _Again as error:
                why = str(error)
                pause = min(LONGEST_PAUSE, 0.5 * 2**attempt) * (0.5 + random.random())
                if attempt + 1 < self.settings.attempts:
                    self._sleep(max(pause, min(error.pause, LONGEST_PAUSE)))
        if text is None:
            raise InputError(
                f"{self._name}: no reply in {self.settings.attempts} attempts, the last: {why}; "
                f"what it has answered is in {self._cache.path}: run the same command again later"
            )
        self._cache.put(self._key(question), text)
        return text

    @property
    def _name(self) -> str:
        return f"{self.settings.model} at {self.settings.base_url or 'OpenAI'}"

    def _attempt(self, question: str) -> str:
        import openai

        s = self.settings
        limit = "max_tokens" if s.base_url else "max_completion_tokens"  # what OpenAI now calls it
        options: dict[str, Any] = {limit: s.max_tokens}
        if s.temperature >= 0:
            options["temperature"] = s.temperature
        try:
            reply = self._client.chat.completions.create(
                model=s.model, messages=[{"role": "user", "content": question}], **options
            )
            text = reply.choices[0].message.content
        except openai.APIStatusError as error:
            code = error.status_code
            # `from None`: the request in the chain has the key.
            if code in _PASSING + (500,) or code > 500:
                if getattr(error, "code", None) == "insufficient_quota":
                    raise InputError(f"{self._name}: no credit is left; add some") from None
                after = error.response.headers.get("retry-after", "")
                pause = float(after) if after.isdigit() else 0.0
                raise _Again(f"status {code}", pause) from None
            cure = _CURES.get(code, "correct the settings")
            refused = InputError(f"{self._name}: status {code}; {cure}")
            raise (_Refused(refused) if code in _OF_THE_QUESTION else refused) from None
        except openai.APITimeoutError:
            raise _Again(f"nothing for {s.timeout:g} s") from None
        except openai.APIConnectionError:
            raise _Again("no connection") from None
        except (openai.OpenAIError, ValueError, AttributeError, IndexError, TypeError):
            raise _Again("a reply that is none of a chat") from None
        if not isinstance(text, str):
            raise _Again("a reply without text")
        return text


class _Pace:
    """Starts are at least so far apart, whichever thread makes them."""

    def __init__(self, per_minute: float, sleep: Callable, clock: Callable):
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._sleep, self._clock = sleep, clock
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        if not self._gap:
            return
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + self._gap
        if start > now:
            self._sleep(start - now)


class _Cache:
    """Replies by the hash of their question; a row is written as soon as it is there."""

    def __init__(self, path: Path):
        self.path = path
        rows = read_rows(path)
        if rows and not path.read_bytes().endswith(b"\n"):
            write_rows(path, rows)  # without the line that a kill has torn
        self.replies: dict[str, str] = {row["key"]: row["reply"] for row in rows}
        self._lock = threading.Lock()

    def put(self, key: str, reply: str) -> None:
        line = json.dumps({"key": key, "reply": reply}) + "\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
            self.replies[key] = reply
