"""What is asked: lengths, prefixes, conversations, files; the same in every process, new in every level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tpworker.bench.dataset import read_dataset
from tpworker.bench.lengths import Lengths
from tpworker.bench.plan import Plan
from tpworker.errors import ConfigError


def plan(**fields: Any) -> Plan:
    given: dict[str, Any] = {
        "model": "m", "is_chat": False, "seed": 1, "prompt_len": Lengths(10, 10), "output_len": Lengths(5, 9),
    }  # fmt: skip
    return Plan(**{**given, **fields})


def body(made: Plan, level: int = 1, number: int = 0) -> dict[str, Any]:
    return dict(json.loads(made.conversation(level, number).next()[0]))


def test_token_ids_behind_a_shared_prefix() -> None:
    made = plan(token_ids=(100, 200), shared_prefix=6, ignore_eos=True, extra={"top_p": 0.5})
    first, second = body(made), body(made, number=1)
    assert len(first["prompt"]) == 16
    assert all(100 <= token < 200 for token in first["prompt"])
    assert first["prompt"][:6] == second["prompt"][:6] == body(made, level=2)["prompt"][:6]
    assert first["prompt"][6:] != second["prompt"][6:]
    assert first["prompt"] != body(made, level=2)["prompt"]
    assert body(plan(**{**vars(made), "seed": 2}))["prompt"][:6] != first["prompt"][:6]
    assert (first["model"], first["ignore_eos"], first["top_p"], first["stream"]) == ("m", True, 0.5, True)
    assert 5 <= first["max_tokens"] <= 9
    assert "model" not in body(plan(model=""))


def test_the_same_in_another_process() -> None:
    for made in (plan(token_ids=(1, 9)), plan(is_chat=True, turns=2), plan(dataset=({"prompt": "x"},))):
        there = Plan.from_json(json.loads(json.dumps(made.to_json())))
        assert there == made
        assert body(there, 3, 4) == body(made, 3, 4)


def test_text_of_known_lengths() -> None:
    made = plan(tokens_per_word=2.0, overhead=4.0, prompt_len=Lengths(104, 104), shared_prefix=20)
    words = body(made)["prompt"].split()
    assert len(words) == 10 + 50
    assert words[:10] == body(made, number=1)["prompt"].split()[:10]


def test_conversations_grow() -> None:
    conversation = plan(is_chat=True, turns=3, shared_prefix=5, overhead=2.0).conversation(1, 0)
    first = json.loads(conversation.next()[0])["messages"]
    assert [one["role"] for one in first] == ["system", "user"]
    assert [len(one["content"].split()) for one in first] == [5, 8]
    conversation.answered("Hello")
    second = json.loads(conversation.next()[0])["messages"]
    assert second[:2] == first
    assert second[2] == {"role": "assistant", "content": "Hello"}
    assert len(second[3]["content"].split()) == 10


def test_a_file_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"a"\n\n{"prompt": "b", "max_tokens": 3, "other": 1}\n')
    items = read_dataset(str(file), is_chat=False)
    made = plan(dataset=items)
    assert [body(made, number=number)["prompt"] for number in range(3)] == ["a", "b", "a"]
    assert body(made, number=1)["max_tokens"] == 3
    assert "other" not in body(made, number=1)
    assert read_dataset(str(file), is_chat=True)[0] == {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("text", "is_chat", "message"),
    [
        ("", False, "is empty"),
        ('"a"\n{', False, "line 2 is no JSON"),
        ("7", False, "line 1 must be a text, or an object with either"),
        ('{"prompt": "a", "messages": []}', False, "either `prompt` or `messages`"),
        ('{"messages": []}', False, "is a conversation: --endpoint chat"),
        ('{"prompt": [1]}', True, "must be a text"),
        ('{"prompt": "a", "max_tokens": 0}', True, "max_tokens must be a number from 1"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, is_chat: bool, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_dataset(str(file), is_chat)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_dataset(str(tmp_path / "none"), is_chat)


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("7", 7, 7), ("512-2048", 512, 2048), ("1000~10%", 900, 1100), ("1000~0%", 1000, 1000)],
)
def test_lengths(text: str, low: int, high: int) -> None:
    assert Lengths.parse(text, "--x") == Lengths(low, high)


@pytest.mark.parametrize("text", ["", "x", "0", "9-2", "-5", "10~200%", "99999999999", "5 ", "1.5"])
def test_no_lengths(text: str) -> None:
    with pytest.raises(ConfigError, match="must be tokens, as 1024, 512-2048 or 1024~10%, from 1"):
        Lengths.parse(text, "--x")
