"""Grammars are found to be good, or refused by name, before a request is told to anybody."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import eventually, is_gone
from tests.grammar.tokenizers import END, END_ID, THINK, TOOL, VOCAB_SIZE, added_tokens, bytes_alone
from tpworker.errors import InvalidRequest, RuntimeStopped
from tpworker.grammar import grammar_of
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Sampling, Submit, Vocabulary
from tpworker.runtime import grammars as grammars_module
from tpworker.runtime.grammars import Grammars
from tpworker.runtime.intake import Intake
from tpworker.sampling_params import SamplingParams
from tpworker.structured_outputs import StructuredOutputs, Thinking
from tpworker.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("nothing_left")

ROOT = Path(__file__).parents[2]
TOKENIZER = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=bytes_alone(), eos_token=END))
EXPLOSIVE = StructuredOutputs(
    json={"allOf": [{"type": "string", "pattern": f".*a{{{i}}}b.*"} for i in range(1, 40)]}
)
GOOD = StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}})
OTHER = StructuredOutputs(choice=["yes", "no"])
WRONG = StructuredOutputs(json={"not": {}})
Make = Callable[..., Grammars]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Grammars] = []

    def maker(tokenizer: Tokenizer | None = TOKENIZER, eos_ids: Any = frozenset({END_ID})) -> Grammars:
        made.append(Grammars(tokenizer, VOCAB_SIZE, eos_ids))
        return made[-1]

    yield maker
    for one in made:
        one.close()


def json_of(outputs: StructuredOutputs) -> dict[str, Any]:
    assert isinstance(outputs.json, str)
    schema: dict[str, Any] = json.loads(outputs.json)
    return schema


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


def processes() -> list[psutil.Process]:
    """Those that live."""
    children = psutil.Process().children()
    return [child for child in children if not is_gone(child.pid) and child.name() == "tpworker-grammar"]


def kill_the_one() -> None:
    (process,) = processes()
    process.kill()
    eventually(lambda: not processes())


async def eventually_one_works() -> None:
    """A process has begun to compile: its start takes a fraction of that."""
    await asyncio.to_thread(eventually, lambda: any(one.cpu_times().user > 1.0 for one in processes()))


async def refused(grammars: Grammars, outputs: StructuredOutputs) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await grammars.check(outputs)
    assert caught.value.parameter == "structured_outputs"
    return str(caught.value)


# ------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize(
    "outputs",
    [
        GOOD,
        OTHER,
        StructuredOutputs(json_object=True),
        StructuredOutputs(regex="[a-z]{3}"),
        StructuredOutputs(grammar='start: "a" start | "b"'),
        StructuredOutputs(json_object=True, behind=Thinking(start=THINK, end=TOOL)),
    ],
)
def test_what_is_good_is_a_text_for_the_scheduler(make: Make, outputs: StructuredOutputs) -> None:
    async def main() -> None:
        assert await make().check(outputs) == grammar_of(outputs, special_ids=TOKENIZER.added)

    run(main)


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (WRONG, ("structured_outputs.json: ", "not supported: not")),
        (StructuredOutputs(grammar="start: a b"), ("structured_outputs.grammar: ", 'unknown name: "a"')),
        (StructuredOutputs(regex="(?=a)b"), ("structured_outputs.regex: ", "look-ahead")),
        (
            StructuredOutputs(grammar="start: /[^\\s\\S]/"),
            ("structured_outputs.grammar: no output can match it",),
        ),
    ],
)
def test_what_is_wrong_is_said_once_and_again(
    make: Make, outputs: StructuredOutputs, words: tuple[str, ...]
) -> None:
    async def main() -> None:
        grammars = make()
        said = [await refused(grammars, outputs) for _ in range(2)]
        assert said[0] == said[1]
        assert all(word in said[0] for word in words)

    run(main)


def test_nothing_is_started_for_who_never_asks(make: Make) -> None:
    make()
    assert not processes()


def test_what_has_been_found_is_known(make: Make) -> None:
    async def main() -> None:
        grammars = make()
        await grammars.check(GOOD)
        await refused(grammars, WRONG)
        kill_the_one()
        for _ in range(3):
            await grammars.check(StructuredOutputs(json=json_of(GOOD)))
            await refused(grammars, WRONG)
        assert not processes()

    run(main)


def test_those_that_were_asked_for_last_are_known(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars_module, "MAX_VERDICTS", 2)

    async def main() -> None:
        grammars = make()
        for outputs in (GOOD, OTHER, GOOD, StructuredOutputs(regex="c")):
            await grammars.check(outputs)
        kill_the_one()
        await grammars.check(GOOD)
        assert not processes()
        await grammars.check(OTHER)
        assert len(processes()) == 1

    run(main)


def test_many_who_come_with_the_same_ask_for_it_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    grammars = make()
    ask = grammars._pool.ask
    monkeypatch.setattr(grammars._pool, "ask", lambda frame: (asked.append(frame), ask(frame))[1])

    async def main() -> None:
        assert len(set(await asyncio.gather(*(grammars.check(GOOD) for _ in range(64))))) == 1
        assert len(asked) == 1
        assert not grammars._finding

    run(main)


# ------------------------------------------------------------------------------- its bounds


@pytest.fixture
def for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is explosive is at work until somebody ends it."""
    monkeypatch.setattr(grammars_module, "MAX_SECONDS", 600.0)


@pytest.mark.usefixtures("for_ever")
def test_while_one_takes_its_time_others_are_answered(make: Make) -> None:
    async def main() -> None:
        grammars = make()
        explosive = asyncio.ensure_future(grammars.check(EXPLOSIVE))
        await eventually_one_works()
        for outputs in (GOOD, OTHER):
            await grammars.check(outputs)
        await refused(grammars, WRONG)
        assert not explosive.done()
        grammars.close()
        await asyncio.wait([explosive])
        assert isinstance(explosive.exception(), RuntimeStopped)

    run(main)


def test_what_is_explosive_is_refused(make: Make) -> None:
    async def main() -> None:
        grammars = make()
        await grammars.check(GOOD)
        said = await refused(grammars, EXPLOSIVE)
        assert "structured_outputs.json takes more than 2 s of processor time, the limit" in said
        assert "fewer alternatives in allOf" in said
        assert not processes()
        assert await refused(grammars, EXPLOSIVE) == said
        assert not processes()  # nobody was asked
        await grammars.check(OTHER)

    run(main)


def test_more_explosive_ones_than_there_are_processes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars_module, "MAX_SECONDS", 0.3)

    async def main() -> None:
        grammars = make()
        several = [
            StructuredOutputs(json={**json_of(EXPLOSIVE), "title": str(number)}) for number in range(4)
        ]
        said = await asyncio.gather(*(refused(grammars, one) for one in several), grammars.check(GOOD))
        assert all("more than 0.3 s of processor time" in one for one in said[:4])
        assert len(processes()) <= grammars_module.MAX_PROCESSES

    run(main)


@pytest.mark.usefixtures("for_ever")
def test_who_gives_up_waiting_takes_nothing_from_others(make: Make) -> None:
    async def main() -> None:
        grammars = make()
        waiting = [asyncio.ensure_future(grammars.check(EXPLOSIVE)) for _ in range(3)]
        await eventually_one_works()
        for one in waiting:
            one.cancel()
        for gone in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(gone, asyncio.CancelledError)
        assert await grammars.check(GOOD)
        assert not grammars._finding

    run(main)


@pytest.mark.usefixtures("for_ever")
def test_who_gives_up_does_not_take_the_answer_from_who_waits_for_the_same(make: Make) -> None:
    async def main() -> None:
        grammars = make()
        first, second = (asyncio.ensure_future(grammars.check(EXPLOSIVE)) for _ in range(2))
        await eventually_one_works()
        first.cancel()
        await asyncio.wait([first])
        grammars.abandon(lambda: RuntimeStopped("a rank died"))
        await asyncio.wait([second])
        assert first.cancelled()
        assert isinstance(second.exception(), RuntimeStopped)

    run(main)


def test_what_nobody_waits_for_is_not_begun(make: Make) -> None:
    async def main() -> None:
        grammars = make()
        grammars._checks.submit(gate.wait, 60)
        grammars._checks.submit(gate.wait, 60)
        waiting = [asyncio.ensure_future(grammars.check(GOOD)) for _ in range(2)]
        while not grammars._finding:
            await asyncio.sleep(0.01)
        for one in waiting:
            one.cancel()
        await asyncio.wait(waiting)
        gate.set()
        assert await grammars.check(OTHER)
        assert grammars._verdicts.get(grammar_of(GOOD)) is None

    gate = threading.Event()
    run(main)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_was_killed_is_no_fault_of_who_comes_next(make: Make, number: int) -> None:
    async def main() -> None:
        grammars = make()
        await grammars.check(GOOD)
        os.kill(processes()[0].pid, number)
        await grammars.check(OTHER)
        assert await grammars.check(StructuredOutputs(regex="a|b"))

    run(main)


@pytest.mark.usefixtures("for_ever")
def test_one_that_is_killed_over_a_grammar_says_nothing_of_it(make: Make) -> None:
    async def main() -> None:
        grammars = make()
        await grammars.check(GOOD)
        for _ in range(2):  # nothing is remembered of it
            asking = asyncio.ensure_future(refused(grammars, EXPLOSIVE))
            await eventually_one_works()
            while not asking.done():  # a used one is no proof: it is asked of a new one
                for process in processes():
                    process.kill()
                await asyncio.sleep(0.01)
            assert "was ended by SIGKILL: try again" in await asking

    run(main)


# ------------------------------------------------------------------------------- no grammars at all


def test_without_a_tokenizer(make: Make) -> None:
    run(lambda: _said(make(None), "has no tokenizer"))


def test_without_an_end(make: Make) -> None:
    run(lambda: _said(make(eos_ids=()), "no token that ends an output"))


async def _said(grammars: Grammars, words: str) -> None:
    assert words in await refused(grammars, GOOD)
    assert not processes()


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("decoder", None, "llguidance cannot read the model's tokenizer"),
        (
            "pre_tokenizer",
            pre_tokenizers.PreTokenizer.custom(object()),
            "cannot be written as a tokenizer.json",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_told_of_once(
    make: Make, caplog: pytest.LogCaptureFixture, part: str, value: Any, words: str
) -> None:
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=bytes_alone()))
    setattr(tokenizer._backend, part, value)
    grammars = make(tokenizer)

    async def main() -> None:
        at_once = await asyncio.gather(refused(grammars, GOOD), refused(grammars, OTHER))
        for said in (*at_once, await refused(grammars, GOOD)):
            assert said.startswith("this model's outputs cannot be held to anything: ")
            assert words in said
        assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [said]
        assert not processes()

    run(main)


def test_a_vocabulary_beyond_the_bounds(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(grammars_module, "MAX_MEMORY", 1 << 20)
    grammars = make()

    async def main() -> None:
        for outputs in (GOOD, OTHER):
            said = await refused(grammars, outputs)
            assert "llguidance takes more than 1 MiB of memory" in said
        assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [said]

    run(main)


# ------------------------------------------------------------------------------- its end


@pytest.mark.usefixtures("for_ever")
def test_closed_who_waits_is_told_at_once_and_nothing_is_left(make: Make) -> None:
    async def main() -> None:
        grammars = make()
        waiting = [asyncio.ensure_future(grammars.check(EXPLOSIVE)) for _ in range(3)]
        await eventually_one_works()
        for _ in range(2):
            grammars.close()
        assert not processes()
        for failed in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(failed, RuntimeStopped)
        with pytest.raises(RuntimeStopped):
            await grammars.check(GOOD)

    run(main)


@pytest.mark.usefixtures("for_ever")
def test_abandoned_who_waits_is_given_that_error(make: Make) -> None:
    async def main() -> None:
        grammars = make()
        waiting = asyncio.ensure_future(grammars.check(EXPLOSIVE))
        await eventually_one_works()
        grammars.abandon(lambda: RuntimeStopped("a rank died"))
        with pytest.raises(RuntimeStopped, match="a rank died"):
            await waiting
        with pytest.raises(RuntimeStopped, match="a rank died"):
            await grammars.check(GOOD)

    run(main)


def test_who_drops_it_leaves_no_process() -> None:
    async def main() -> None:
        grammars = Grammars(TOKENIZER, VOCAB_SIZE, {END_ID})
        await grammars.check(GOOD)
        assert processes()
        grammars.abandon(lambda: RuntimeStopped(""))  # its threads, which wait for work

    run(main)
    gc.collect()
    assert not processes()


def test_it_ends_with_its_parent_while_it_compiles() -> None:
    program = (
        "import asyncio\nfrom tests.runtime.test_grammars import *\n"
        "grammars_module.MAX_SECONDS = 600.0\n"
        "grammars = Grammars(TOKENIZER, VOCAB_SIZE, {END_ID})\n"
        "asyncio.run(grammars.check(GOOD))\n"
        "print(processes()[0].pid, flush=True)\n"
        "asyncio.run(grammars.check(EXPLOSIVE))\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        eventually(lambda: is_gone(pid) or psutil.Process(pid).cpu_times().user > 1.0)
        assert not is_gone(pid)
        parent.kill()
    eventually(lambda: is_gone(pid))


# ------------------------------------------------------------------------------- the tokenizer


def test_added_tokens_are_those_of_its_json() -> None:
    assert TOKENIZER.added == added_tokens(TOKENIZER.to_json())
    assert {END, THINK, TOOL} <= set(TOKENIZER.added)
    assert TOOL not in TOKENIZER.special


def test_a_tokenizer_that_is_too_large_to_be_sent_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars_module, "MAX_TOKENIZER", len(TOKENIZER.to_json().encode()) - 1)

    async def main() -> None:
        told = await refused(make(), GOOD)
        assert "its tokenizer.json is larger than 0 MiB, the limit" in told

    run(main)


def test_the_scheduler_is_told_the_vocabulary_once_and_before_any_grammar() -> None:
    """Several ask for it at the same time, and who was the first may leave; each scheduler is told anew."""
    spec = SimpleNamespace(vocab_size=VOCAB_SIZE, eos_ids=frozenset({END_ID}))
    served: Any = SimpleNamespace(
        tokenizer=TOKENIZER, model=SimpleNamespace(spec=spec), needed_tokenizer=lambda: TOKENIZER
    )
    sent: list[Any] = []
    params = SamplingParams(structured_outputs=OTHER)
    sampling = Sampling(0.0, 1.0, 0, 0, 5, 0, b"")

    async def main() -> None:
        intake = Intake(10, 0, "fcfs", 1)
        dispatch = intake.dispatch
        intake.serve(served)
        try:
            assert await intake._grammar(SamplingParams(), served) is None
            assert dispatch.vocabulary is None
            asked = [asyncio.ensure_future(intake._grammar(params, served)) for _ in range(6)]
            while not intake._reading.locked():
                await asyncio.sleep(0)
            asked[0].cancel()
            grammars = await asyncio.gather(*asked, return_exceptions=True)
            assert grammars[1:] == [grammar_of(OTHER)] * 5
            for name in "ab":
                request = intake.requests.open(name)
                grammar = grammar_of(OTHER)
                request.submit = Submit(0, request.number, pack_int32([1]), 0, sampling, grammar=grammar)
                dispatch.submit(request)
            assert sent == []
            for number in (3, 4):
                generation: Any = SimpleNamespace(number=number, send=sent.append)
                dispatch.resume(generation)
                told = Vocabulary(number, TOKENIZER.to_json(), pack_int32([END_ID]))
                assert sent[0] == told
                assert [(m.generation, m.request) for m in sent[1:]] == [(number, 0), (number, 1)]
                sent.clear()
                intake.requests.interrupt()
        finally:
            intake.abandon_prompts(lambda: RuntimeStopped("the test has ended"))
            intake.close_processes()

    run(main)
