"""Whether what an output is to be held to can be compiled: found out before the scheduler hears of it.

    check ─► its text ─► known? ─┬─ yes ──────────────────────────────┬─► good: the text
             (a thread)          └─ no ─► tpworker-grammar compiles it ─┴─► or what is wrong: InvalidRequest
                                          (a thread waits)

Compiling may take any time and memory, so a bounded process does it first (grammar/process.py). The first
request that asks starts it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tpworker.bounded.frames import pack
from tpworker.bounded.pool import Bounds, Cause, Closed, Ended, NotReady, Pool
from tpworker.errors import InvalidRequest, ModelError, RuntimeStopped
from tpworker.grammar import grammar_of
from tpworker.ipc.messages import MAX_TOKENIZER
from tpworker.runtime.workers import Workers
from tpworker.structured_outputs import PARAMETER, StructuredOutputs

if TYPE_CHECKING:
    from tpworker.text.tokenizer import Tokenizer

MAX_PROCESSES = 2
"""So many grammars are compiled at once: one that takes its time holds up nobody."""
MAX_SECONDS = 2.0
"""Of CPU time, for one grammar and some steps with it. Most take some ten milliseconds."""
MAX_START_SECONDS = 60.0
"""Of CPU time, for the vocabulary: one of 150,000 tokens takes a second."""
MAX_MEMORY = 1 << 30
"""Bytes, beyond the 20 MB that the process begins with. A vocabulary of 260,000 tokens takes a third."""
MAX_VERDICTS = 4096
"""So many grammars are known to be good, or what is wrong with them."""
NUM_TEXTS = 2

logger = logging.getLogger(__name__)

_SIMPLER = "simplify it, e.g. fewer alternatives in allOf, or shorter repetitions in patterns"


class Grammars:
    """Checks grammars for one model; belongs to one event loop's thread.

    Args:
        tokenizer: the model's; None: there is none, and no output can be held to anything.
        vocab_size: as the model's config.json has it: ids are below it.
        eos_ids: what ends an output.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._has_end = bool(eos_ids)
        self._verdicts = _Verdicts(MAX_VERDICTS)
        self._finding: dict[str, _Finding] = {}
        self._useless: str | None = None  # why no grammar can be compiled for this model
        self._lock = threading.Lock()
        self._texts = Workers(NUM_TEXTS, "tpworker-grammar-text")
        self._checks = Workers(MAX_PROCESSES, "tpworker-grammar-check")
        self._bounds = Bounds(
            max_processes=MAX_PROCESSES,
            max_seconds=MAX_SECONDS,
            max_start_seconds=MAX_START_SECONDS,
            max_memory=MAX_MEMORY,
        )
        start = partial(_start, tokenizer, vocab_size, sorted(eos_ids))
        self._pool = Pool("tpworker.grammar.process", start, self._bounds)

    async def check(self, outputs: StructuredOutputs) -> str:
        """The grammar's text, since it has been compiled within bounds, now or lately.

        Raises:
            InvalidRequest: with parameter `structured_outputs`: it is wrong, or not supported, and where; it
                goes beyond the bounds; or nothing can be held to a grammar with this model.
            RuntimeStopped: it was closed.
        """
        if self._tokenizer is None:
            raise InvalidRequest(
                "the model's folder has no tokenizer, so its outputs cannot be held to anything: fetch "
                f"tokenizer.json, or leave {PARAMETER} out",
                PARAMETER,
            )
        if not self._has_end:
            raise InvalidRequest(
                "the model names no token that ends an output, which one that is complete needs: name it in "
                f"generation_config.json (eos_token_id), or leave {PARAMETER} out",
                PARAMETER,
            )
        loop = asyncio.get_running_loop()
        make = partial(grammar_of, outputs, special_ids=self._tokenizer.added)
        text, wrong = await loop.run_in_executor(self._texts, self._known, make)
        if wrong is None:
            wrong = await self._found(text)
        if wrong:
            raise InvalidRequest(f"{PARAMETER}.{outputs.kinds[0]}{wrong}", PARAMETER)
        return text

    def abandon(self, error: Callable[[], Exception]) -> None:
        """Whoever waits gets an error now; `error` makes it. No more is taken."""
        self._texts.abandon(error)
        self._checks.abandon(error)

    def close(self) -> None:
        """Ends the processes; whoever waits gets `RuntimeStopped`. May be called more than once."""
        self.abandon(_stopped)
        self._pool.close()

    async def _found(self, text: str) -> str:
        """What is wrong with a grammar. All who wait for the same take up one process, until they leave."""
        finding = self._finding.get(text)
        if finding is None:
            answer = asyncio.get_running_loop().run_in_executor(self._checks, self._find, text)
            finding = self._finding[text] = _Finding(answer)
        finding.num_waiting += 1
        try:
            return await asyncio.shield(finding.answer)
        finally:
            finding.num_waiting -= 1
            if not finding.num_waiting:
                del self._finding[text]
                finding.answer.cancel()

    def _known(self, make: Callable[[], str]) -> tuple[str, str | None]:
        """A grammar's text, and what is wrong with it: "" if nothing is, None if that is not known."""
        text = make()
        return text, self._verdicts.get(text)

    def _find(self, text: str) -> str:
        """What is wrong with a grammar, asked of a process if nobody has asked before; "" if nothing is."""
        wrong = self._verdicts.get(text)  # it may have been found out since we looked
        if wrong is None:
            wrong = self._ask(text)
            self._verdicts.put(text, wrong)
        return wrong

    def _ask(self, text: str) -> str:
        """What a process finds. What says nothing of the grammar is raised.

        Raises:
            InvalidRequest: as `check`.
            RuntimeStopped: it was closed.
        """
        if self._useless is not None:
            raise InvalidRequest(self._useless, PARAMETER)
        try:
            found: str = self._pool.ask(pack(text))
        except Closed:
            raise _stopped() from None
        except (NotReady, ModelError) as error:
            raise self._refused_for_all(str(error)) from None
        except Ended as error:
            if (beyond := self._beyond(error)) is None:
                raise InvalidRequest(
                    f"the process that compiles grammars was ended {error.how}: try again", PARAMETER
                ) from None
            if error.is_start:
                raise self._refused_for_all(f"llguidance {beyond} to read its tokenizer") from None
            return f" {beyond} to compile: {_SIMPLER}"
        return found and f": {found}"

    def _refused_for_all(self, why: str) -> InvalidRequest:
        """Nothing will ever be held to a grammar with this model; said in the log once."""
        with self._lock:
            is_news = self._useless is None
            self._useless = f"this model's outputs cannot be held to anything: {why}: leave {PARAMETER} out"
        if is_news:
            logger.error("%s", self._useless)
        return InvalidRequest(self._useless, PARAMETER)

    def _beyond(self, error: Ended) -> str | None:
        """Which bound was reached; None: none of them."""
        bounds = self._bounds
        seconds = bounds.max_start_seconds if error.is_start else bounds.max_seconds
        memory = f"{bounds.max_memory >> 20} MiB of memory"
        return {
            Cause.TIME: f"takes more than {seconds:g} s of processor time, the limit,",
            Cause.MEMORY: f"takes more than {memory}, the limit,",
            Cause.CRASH: f"takes more than {memory}, or than the stack, the limits,",
        }.get(error.cause)


@dataclass(slots=True)
class _Finding:
    """A grammar that a process is asked about, or will be."""

    answer: asyncio.Future[str]
    num_waiting: int = 0


class _Verdicts:
    """What is wrong with the grammars that were asked for last; of their texts only digests are kept."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._wrong: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str) -> str | None:
        """ "" if nothing is; None if it is not known."""
        with self._lock:
            wrong = self._wrong.get(key := _digest(text))
            if wrong is not None:
                self._wrong.move_to_end(key)
            return wrong

    def put(self, text: str, wrong: str) -> None:
        with self._lock:
            self._wrong[_digest(text)] = wrong
            if len(self._wrong) > self._size:
                self._wrong.popitem(last=False)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _start(tokenizer: Tokenizer | None, vocab_size: int, eos_ids: list[int]) -> dict[str, Any]:
    """What a process starts with. Not kept: it is large, and seldom needed.

    Raises:
        ModelError: it cannot be written, or not sent to the scheduler.
    """
    assert tokenizer is not None
    text = tokenizer.to_json()
    if len(text.encode()) > MAX_TOKENIZER:
        raise ModelError(f"its tokenizer.json is larger than {MAX_TOKENIZER >> 20} MiB, the limit")
    return {"tokenizer": text, "vocab_size": vocab_size, "eos_ids": eos_ids}


def _stopped() -> RuntimeStopped:
    return RuntimeStopped("the runtime was stopped")
