"""Requests whose output is held to a grammar: which tokens each may choose next, written while ranks compute.

    Submit ──► compiled, by a thread ──► queue, plans … ──► step N + 1 is launched, and its end waits
                                                                           ▲
    result N ──► tokens consumed ──► masks of step N + 1 ──► shared memory ┘       (ipc/masks.py)

A guide belongs to its request and outlives its slots: a preemption leaves it as it is, since the tokens in
flight are consumed when they come. After a restart it consumes what had been delivered.

Masks of a step are written as soon as every token before it is known, and step N - 2 is answered (so that
nobody reads its masks any more). A token is known when it is committed; or before, when the grammar leaves no
other: then the mask behind it is written without waiting for it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING

from tpworker.errors import one_line
from tpworker.grammar import Compiler, GrammarError
from tpworker.ipc.arrays import unpack_int32
from tpworker.ipc.limits import usable_cores
from tpworker.ipc.masks import TURNS, MaskBoard
from tpworker.ipc.messages import MAX_STEP, Vocabulary
from tpworker.scheduler.guide import Guide
from tpworker.scheduler.inflight import InFlight
from tpworker.scheduler.requests import Request, State

if TYPE_CHECKING:
    from tpworker.grammar.bits import Masks

logger = logging.getLogger(__name__)

MOST_THREADS = 8
"""That fill masks, where these take long."""
_LONGEST = 500  # characters of an error


class Guides:
    """Compiles grammars, and writes the masks of steps. All but the compiling belongs to one thread.

    Args:
        board: where the ranks look for masks.
    """

    def __init__(self, board: MaskBoard) -> None:
        self._board = board
        self._masks: Masks | None = None  # once there is a grammar
        self._vocabulary: Vocabulary | None = None
        self._due: deque[InFlight] = deque()
        self._num_answered = 0
        self._asked: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._compiled: queue.SimpleQueue[tuple[Request, Guide | str]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.num_compiling = 0
        """Requests whose grammars are being compiled."""
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """A descriptor that is readable when `compiled` has something; it counts what is there."""
        weakref.finalize(self, os.close, self.bell)

    # --------------------------------------------------------------------------------- compiling

    def use(self, vocabulary: Vocabulary) -> None:
        """What grammars are compiled for, from now on."""
        self._vocabulary = vocabulary

    def compile(self, request: Request) -> None:
        """Has a request's grammar compiled: later it is one of `compiled`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._compile_all, name="grammars", daemon=True)
            self._thread.start()
        self.num_compiling += 1
        self._asked.put(request)

    def compiled(self) -> list[tuple[Request, str]]:
        """Requests that have a guide by now; or have none, because of the error that is told with them."""
        done = []
        if self.num_compiling:
            try:
                count = os.eventfd_read(self.bell)
            except BlockingIOError:
                return []
            # No more than it has rung for: it would ring for the others later, and nobody would look.
            for _ in range(count):
                request, guide = self._compiled.get()
                if isinstance(guide, str):
                    done.append((request, guide))
                else:
                    request.guide = guide
                    done.append((request, ""))
            self.num_compiling -= count
        return done

    def _compile_all(self) -> None:
        compiler: Compiler | None = None
        while (request := self._asked.get()) is not None:
            guide: Guide | str = "it was aborted"
            try:
                if request.state is not State.FINISHED:
                    compiler = compiler or self._compiler()
                    guide = self._guide(request, compiler)
            except GrammarError as why:
                guide = str(why)
            except BaseException as why:  # a panic of llguidance's is no Exception
                logger.exception("a grammar could not be compiled")
                guide = one_line(f"{type(why).__name__}: {why}", _LONGEST)
            self._compiled.put((request, guide))
            os.eventfd_write(self.bell, 1)

    def _compiler(self) -> Compiler:
        """And what else takes its time at first."""
        from tpworker.grammar.bits import Masks

        board, vocabulary = self._board, self._vocabulary
        assert vocabulary is not None, "a grammar came before its vocabulary"
        num_threads = max(1, min(MOST_THREADS, usable_cores() // 2))
        self._masks = Masks(board.memory, board.num_words, num_threads)
        eos_ids = unpack_int32(vocabulary.eos_ids).tolist()
        compiler = Compiler(vocabulary.tokenizer, 32 * board.num_words, eos_ids, num_threads)
        self._vocabulary = None  # some megabytes, read once
        return compiler

    @staticmethod
    def _guide(request: Request, compiler: Compiler) -> Guide:
        assert request.grammar is not None
        guide = Guide(compiler.matcher(request.grammar), sorted(request.stop_ids), request.min_tokens)
        for token in request.tokens[request.num_prompt :]:  # delivered before a restart
            if not guide.commit(token):
                raise GrammarError(guide.error or "its output had ended already")
        return guide

    # ------------------------------------------------------------------------------------- masks

    def expect(self, plan: InFlight) -> None:
        """A plan with guided tokens is streamed; they wait for masks. Writes those that can be written."""
        self._due.append(plan)
        self._write()

    def answered(self, step: int) -> None:
        """A step's tokens are committed. Writes the masks that can be written now."""
        self._num_answered = step + 1
        self._write()

    def has_written(self, step: int) -> bool:
        """Whether a step has its masks, if it needs any."""
        return self._board.num_written > step

    def _write(self) -> None:
        while self._due and self._due[0].step < self._num_answered + TURNS and self._all_known(self._due[0]):
            self._write_masks(self._due.popleft())

    @staticmethod
    def _all_known(plan: InFlight) -> bool:
        return all(
            request.guide.knows(index)
            for _, request, index in plan.guided
            if request.guide is not None and request.state is not State.FINISHED
        )

    def _write_masks(self, plan: InFlight) -> None:
        masks, first = self._masks, plan.step % TURNS * self._board.num_slots
        assert masks is not None, "a guide without a grammar"
        guides: list[tuple[Guide, int]] = []
        for slot, request, _ in plan.guided:
            guide = request.guide
            if guide is None or request.state is State.FINISHED or guide.has_ended or guide.error:
                masks.allow_all(first + slot)  # nobody wants the token, but there has to be one
            else:
                guides.append((guide, first + slot))
        slow = masks.fill([(guide.matcher, row) for guide, row in guides])
        for guide, row in guides:
            guide.settle(masks, row, row in slow)
        self._board.publish(plan.step)

    def let_go(self) -> None:
        """No more masks will come, and no step waits for any: nobody wants its tokens."""
        self._due.clear()
        self._asked.put(None)
        self._board.publish(MAX_STEP)
