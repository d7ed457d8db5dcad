"""Grammars compiled in their own process: what is wrong with them, and no more than their share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.grammar.tokenizers import END_ID, VOCAB_SIZE, bytes_alone
from tpworker.bounded.frames import pack
from tpworker.bounded.pool import Bounds, Cause, Ended, NotReady, Pool
from tpworker.grammar import Compiler
from tpworker.grammar.process import NAME, what_is_wrong

pytestmark = pytest.mark.usefixtures("nothing_left")

ROOT = Path(__file__).parents[2]
START = {"tokenizer": bytes_alone().to_str(), "vocab_size": VOCAB_SIZE, "eos_ids": [END_ID]}
Make = Callable[..., Pool]


def schema(value: Any) -> str:
    return f"start: %json {json.dumps(value)}"


#: Each pattern is small, and all of them together are more than anybody can wait for.
EXPLOSIVE = {"allOf": [{"type": "string", "pattern": f".*a{{{i}}}b.*"} for i in range(1, 40)]}


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Pool] = []

    def maker(start: Any = START, **bounds: Any) -> Pool:
        given = {"max_processes": 1, "max_seconds": 2.0, "max_start_seconds": 60.0, "max_memory": 1 << 30}
        made.append(Pool("tpworker.grammar.process", lambda: start, Bounds(**{**given, **bounds})))
        return made[-1]

    yield maker
    for one in made:
        one.close()


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == NAME]


GOOD = [
    schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
    "start: /[a-z]{3}/",
    'start: "yes" | "no"',
    'start: ""',
    '{"grammars": [{"lark_grammar": "start: @x"}, {"name": "x", "lark_grammar": "start: \\"é\\""}]}',
]


def test_what_is_good_and_what_is_wrong_is_answered_by_one_process(make: Make) -> None:
    pool = make()
    for grammar in GOOD:
        assert pool.ask(pack(grammar)) == ""
    (process,) = processes()
    for grammar, words in (
        (schema({"not": {}}), "not supported: not"),
        ("start: a b", 'unknown name: "a"'),
        ("start: /(?=a)b/", "look-ahead"),
        ("", "Empty grammar"),
        ("{", "EOF"),
        ("start: /[^\\s\\S]/", "no output can match it"),
        (schema({"$ref": "#"}), "no output can match it"),
        ("(" * 50_000, "expecting rule"),
        ("start: " + "(" * 50_000, "nested"),
        ("[" * 50_000, ""),
        (schema(None).replace("null", "[" * 5_000), "recursion"),
        ("start: <[999999]>", "999999"),
        ('start: "\ud800"', "ValueError"),
    ):
        answer = pool.ask(pack(grammar))
        assert words in answer, (grammar[:50], answer)
        assert answer
        assert "\n" not in answer
        assert "<state>" not in answer
        assert len(answer) < 800
    assert processes() == [process]


def test_what_is_explosive_is_ended(make: Make) -> None:
    pool = make()
    assert pool.ask(pack(GOOD[0])) == ""
    with pytest.raises(Ended) as caught:
        pool.ask(pack(schema(EXPLOSIVE)))
    assert caught.value.cause is Cause.TIME
    assert not processes()
    assert pool.ask(pack(GOOD[0])) == ""


def test_what_takes_too_much_memory_is_ended(make: Make) -> None:
    pool = make(max_memory=400 << 20, max_seconds=60.0)
    assert pool.ask(pack(GOOD[0])) == ""
    with pytest.raises(Ended) as caught:
        pool.ask(pack(schema(EXPLOSIVE)))
    assert caught.value.cause in (Cause.CRASH, Cause.MEMORY)
    assert pool.ask(pack(GOOD[0])) == ""


@pytest.mark.parametrize(
    "tokenizer", ["{}", "no JSON", '{"model": {"type": "WordLevel", "vocab": {"a": 0}}}']
)
def test_a_tokenizer_that_cannot_be_read(make: Make, tokenizer: str) -> None:
    with pytest.raises(NotReady, match="llguidance"):
        make({**START, "tokenizer": tokenizer}).ask(pack(GOOD[0]))
    assert not processes()


class PanicException(BaseException):
    """What a panic of a library written in Rust is in Python."""


class Panicking:
    def try_out(self, grammar: str) -> Any:
        raise PanicException("index out of bounds:\n  the len is 3")


class Exhausted:
    def try_out(self, grammar: str) -> Any:
        raise MemoryError


def test_a_panic_is_an_answer() -> None:
    answer = what_is_wrong(Panicking(), "start: a")  # type: ignore[arg-type]
    assert answer == "llguidance fails on it: PanicException: index out of bounds: the len is 3"


def test_no_memory_is_none() -> None:
    with pytest.raises(MemoryError):
        what_is_wrong(Exhausted(), "start: a")  # type: ignore[arg-type]


def test_it_is_what_the_compiler_says() -> None:
    compiler = Compiler(START["tokenizer"], VOCAB_SIZE, [END_ID])  # type: ignore[arg-type]
    assert what_is_wrong(compiler, GOOD[0]) == ""
    assert "not supported: not" in what_is_wrong(compiler, schema({"not": {}}))


def test_it_is_small_and_writes_nothing_to_the_log_that_clients_have_caused(make: Make) -> None:
    pool = make()
    pool.ask(pack(GOOD[0]))
    (process,) = processes()
    assert process.memory_info().rss < 60 << 20
    assert os.readlink(f"/proc/{process.pid}/fd/2") == os.devnull


def test_it_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, tpworker.grammar.process\n"
        "unwanted = {'torch', 'transformers', 'tokenizers', 'zmq', 'asyncio', 'jinja2'}\n"
        "print(sorted(unwanted & set(sys.modules)), 'llguidance' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[] True", done.stderr
