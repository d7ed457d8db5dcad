"""Logprobs as the endpoints write them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime, byte_tokenizer, fake_logprob
from tests.server.test_features import body_of
from tests.server.test_generation import USER, events_of
from tests.server.test_refusals import CHAT, COMPLETIONS, error_of
from tpworker.outputs import TokenLogprobs
from tpworker.server.logprobs import LEAST_LOGPROB, LogprobWriter, Offsets
from tpworker.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(real_model: Path) -> Tokenizer:
    return Tokenizer.load(real_model)


def told(token: int, logprob: float, *top: tuple[int, float]) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, top)


def test_chat(tokenizer: Tokenizer) -> None:
    paris, dog = tokenizer.encode(" Paris")[0], tokenizer.encode(" dog")[0]
    found = LogprobWriter(tokenizer).chat([told(paris, -0.5, (paris, -0.5), (dog, -2.25))])
    entry = {"token": " Paris", "logprob": -0.5, "bytes": list(b" Paris")}
    other = {"token": " dog", "logprob": -2.25, "bytes": list(b" dog")}
    assert found == {"content": [{**entry, "top_logprobs": [entry, other]}], "refusal": None}


def test_completions_with_offsets_of_characters(tokenizer: Tokenizer) -> None:
    text = "Ünö Paris"
    ids = tokenizer.encode(text)
    items = [(ids[0], None), *((token, told(token, -1.0, (5, -0.5))) for token in ids[1:])]
    offsets = Offsets(7)
    found = LogprobWriter(tokenizer).completion(items, offsets, True)
    assert found["token_logprobs"] == [None, *[-1.0] * (len(ids) - 1)]
    assert found["top_logprobs"][0] is None
    name = LogprobWriter(tokenizer).token(5)[0]
    assert found["top_logprobs"][-1] == {name: -0.5, " Paris": -1.0}
    assert found["text_offset"][0] == 7
    assert offsets.pass_by(b"") == 7 + len(text)
    assert found["text_offset"][-1] == 7 + len("Ünö")
    without = LogprobWriter(tokenizer).completion(items, Offsets(), False)
    assert without["top_logprobs"] is None


def test_tokens_that_are_no_whole_characters_and_special_ones(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🫨")
    writer = LogprobWriter(tokenizer)
    assert len(ids) > 1
    names, parts = zip(*(writer.token(token) for token in ids), strict=True)
    assert b"".join(parts) == "🫨".encode()
    assert any(name.startswith("bytes:\\x") for name in names)
    offsets = Offsets()
    found = writer.completion([(token, None) for token in ids], offsets, False)
    assert found["text_offset"] == [0] * len(ids)
    assert offsets.pass_by(b"") == 1
    assert tokenizer.eos_id is not None
    assert writer.token(tokenizer.eos_id)[0] == "<|im_end|>"


@pytest.mark.parametrize("as_ids", [False, True])
def test_offsets_are_of_the_text_however_tokens_are_named(tokenizer: Tokenizer, as_ids: bool) -> None:
    items = [(token, None) for token in tokenizer.encode("Hello, Paris")]
    found = LogprobWriter(tokenizer, as_ids).completion(items, Offsets(), False)
    assert found["text_offset"] == [0, 5, 6]


@pytest.mark.parametrize("shows_special", [False, True])
def test_offsets_count_special_tokens_where_they_are_text(tokenizer: Tokenizer, shows_special: bool) -> None:
    start, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    (comma,) = tokenizer.encode(",")
    writer = LogprobWriter(tokenizer, shows_special=shows_special)

    def begins(ids: Sequence[int], **echo: Any) -> list[int]:
        offsets: list[int] = writer.completion([(i, None) for i in ids], Offsets(), False, **echo)[
            "text_offset"
        ]
        return offsets

    assert begins([start, comma, end, comma]) == ([0, 12, 13, 23] if shows_special else [0, 0, 1, 1])
    # Of a prompt it is seen in its text: here the tokenizer has added one, and one was given.
    echo = "<|im_start|>,"
    assert begins([start, start, comma, comma], echo=echo, num_echoed=3) == [0, 12, 12, 13]
    # And here token ids were given, whose text does not tell them.
    assert begins([start, comma, start, comma], echo=",", num_echoed=3) == [0, 0, 1, 1]


@pytest.mark.parametrize(("text", "begins"), [("Hi Hi", [0, 2]), (" Hi Hi", [0, 3]), ("  x", [0, 1])])
def test_the_space_that_a_tokenizer_puts_before_a_prompt_is_not_in_its_text(
    text: str, begins: list[int]
) -> None:
    vocab = {"\u2581": 0, "H": 1, "i": 2, "\u2581H": 3, "\u2581Hi": 4, "x": 5, "\u2581x": 6}
    merges = [("\u2581", "H"), ("\u2581H", "i"), ("\u2581", "x")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    items = [(token, None) for token in tokenizer.encode(text)]
    found = LogprobWriter(tokenizer).completion(items, Offsets(), False, text, len(items))
    assert found["text_offset"] == begins


def test_ids_where_there_is_no_tokenizer_or_they_are_asked_for(tokenizer: Tokenizer) -> None:
    for writer in (LogprobWriter(None), LogprobWriter(tokenizer, as_ids=True)):
        assert writer.token(17) == ("token_id:17", b"token_id:17")


@pytest.mark.parametrize("logprob", [-math.inf, math.nan, -1e30])
def test_what_json_has_no_number_for(logprob: float) -> None:
    found = LogprobWriter(None).completion([(1, told(1, logprob, (2, logprob)))], Offsets(), True)
    assert json.loads(json.dumps(found, allow_nan=False))["token_logprobs"] == [LEAST_LOGPROB]
    assert found["top_logprobs"] == [{"token_id:2": LEAST_LOGPROB, "token_id:1": LEAST_LOGPROB}]


# ----------------------------------------------------------------------- over HTTP


Start = Callable[..., LiveServer]
TOKENS = byte_tokenizer()


def own(text: str) -> list[float]:
    """What the fake tells of each token of a text; a token is a byte."""
    return [fake_logprob(token) for token in TOKENS.encode(text)]


def joined(chunks: Sequence[Any], index: int = 0) -> dict[str, list[Any]]:
    """`logprobs` of one choice of a streamed completion, put together."""
    whole: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index and choice["logprobs"] is not None:
                for name, values in whole.items():
                    values += choice["logprobs"][name] or []
    return whole


def text_of(chunks: Sequence[Any], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_of_a_completion(server: LiveServer, num_top: int) -> None:
    done = server.openai.completions.create(model=MODEL, prompt="ab", logprobs=num_top, max_tokens=100)
    (choice,) = done.choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list("You said 'ab'.")
    assert choice.logprobs.token_logprobs == own(choice.text)
    assert choice.logprobs.text_offset == list(range(len(choice.text)))
    if not num_top:
        assert choice.logprobs.top_logprobs is None
        return
    assert choice.logprobs.top_logprobs is not None
    likeliest = {TOKENS.decode([token]): fake_logprob(token) for token in range(num_top)}
    assert choice.logprobs.top_logprobs[0] == likeliest | {"Y": fake_logprob(TOKENS.encode("Y")[0])}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shown", [False, True])
def test_offsets_lead_to_the_tokens_in_the_text(start: Start, shown: bool, stream: bool) -> None:
    """Whatever is special, in the prompt as it was given and in the output as it is shown."""
    server = start(FakeRuntime(reply=lambda prompt: "one<end>two"))
    body = body_of(
        COMPLETIONS, prompt="a<end>b", echo=True, logprobs=0, max_tokens=7, skip_special_tokens=not shown
    )
    if stream:
        chunks = events_of(server.post(COMPLETIONS, json={**body, "stream": True}).text)
        text, told = text_of(chunks), joined(chunks)
    else:
        (choice,) = server.post(COMPLETIONS, json=body).json()["choices"]
        text, told = choice["text"], choice["logprobs"]
    assert text == ("a<end>bone<end>two" if shown else "a<end>bonetwo")
    tokens = ["a", "<end>", "b", *"one", "<end>", *"two"]
    lengths = [1, 5, 1, 1, 1, 1, 5 * shown, 1, 1, 1]
    assert told["tokens"] == tokens
    assert told["text_offset"] == [sum(lengths[:place]) for place in range(len(tokens))]


@pytest.mark.parametrize("num_top", [None, 0, 5, 20])
def test_of_a_chat(server: LiveServer, num_top: int | None) -> None:
    asked: dict[str, Any] = {"logprobs": True} | ({} if num_top is None else {"top_logprobs": num_top})
    api = server.openai.chat.completions
    done = api.create(model=MODEL, messages=[USER], **asked)  # type: ignore[list-item]
    (choice,) = done.choices
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert "".join(one.token for one in content) == choice.message.content
    assert [one.bytes for one in content] == [list(one.token.encode()) for one in content]
    assert [one.logprob for one in content] == own(choice.message.content or "")
    assert {len(one.top_logprobs) for one in content} == {num_top or 0}
    if num_top:
        assert content[0].top_logprobs[1].token == '"'
        assert content[0].top_logprobs[1].logprob == fake_logprob(1)
    chunks = list(api.create(model=MODEL, messages=[USER], stream=True, **asked))  # type: ignore[list-item]
    streamed = [
        one
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
        for one in chunk.choices[0].logprobs.content or []
    ]
    assert [one.model_dump() for one in streamed] == [one.model_dump() for one in content]


@pytest.mark.parametrize(
    ("path", "change", "param", "words"),
    [
        (COMPLETIONS, {"logprobs": 21}, "logprobs", "logprobs=21: must be an integer from 0 to 20"),
        (COMPLETIONS, {"logprobs": -1}, "logprobs", "from 0 to 20"),
        (COMPLETIONS, {"logprobs": True}, "logprobs", "True"),
        (COMPLETIONS, {"logprobs": 21, "echo": True}, "logprobs", "from 0 to 20"),
        (CHAT, {"logprobs": 2}, "logprobs", "2"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs=21: must be an integer"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        (CHAT, {"top_logprobs": 2, "logprobs": False}, "top_logprobs", "logprobs=true"),
        (COMPLETIONS, {"prompt_logprobs": 21}, "prompt_logprobs", "from 0 to 20"),
        (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not streamed"),
        (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not streamed"),
        (COMPLETIONS, {"echo": "yes"}, "echo", "'yes'"),
    ],
)
def test_what_cannot_be(
    server: LiveServer, path: str, change: dict[str, Any], param: str, words: str
) -> None:
    response = server.post(path, json=body_of(path, **change))
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


@pytest.mark.parametrize("body", [{"logprobs": None}, {"top_logprobs": 0}, {"logprobs": False}, {}])
def test_who_asks_for_none_gets_none(server: LiveServer, body: dict[str, Any]) -> None:
    answer = server.post(CHAT, json=body_of(CHAT, **body)).json()
    assert answer["choices"][0]["logprobs"] is None
    assert server.runtime.requests[-1][1].logprobs is None


def test_a_stop_string_that_is_held_back(start: Start) -> None:
    """Logprobs come with their tokens, the text when it is known; those of the stop string are told too."""
    server = start(FakeRuntime(reply=lambda prompt: "abSTOcdSTOPef"))
    body = {"prompt": "p", "logprobs": 0, "stop": "STOP"}
    events = events_of(server.post(COMPLETIONS, json=body | {"stream": True}).text)
    assert text_of(events) == "abSTOcd"
    told = joined(events)
    assert "".join(told["tokens"]) == "abSTOcdSTOP"
    assert told["text_offset"] == list(range(11))
    assert any(event["choices"][0]["text"] == "" for event in events)
    whole = server.post(COMPLETIONS, json=body).json()["choices"][0]
    assert (whole["text"], whole["logprobs"]["tokens"]) == ("abSTOcd", told["tokens"])
    assert whole["logprobs"]["token_logprobs"] == told["token_logprobs"] == own("abSTOcdSTOP")


def test_characters_of_several_tokens_and_special_ones(start: Start) -> None:
    server = start(FakeRuntime(reply=lambda prompt: "é<end>ü"))
    body = {"prompt": "p", "logprobs": 1}
    for asked, text in ((body, "éü"), (body | {"skip_special_tokens": False}, "é<end>ü")):
        events = events_of(server.post(COMPLETIONS, json=asked | {"stream": True}).text)
        whole = server.post(COMPLETIONS, json=asked).json()["choices"][0]
        assert whole["text"] == text_of(events) == text
        assert whole["logprobs"] == joined(events)
        named = ["bytes:\\xc3", "bytes:\\xa9", "<end>", "bytes:\\xc3", "bytes:\\xbc"]
        assert whole["logprobs"]["tokens"] == named
    chat = server.post(CHAT, json=body_of(CHAT, logprobs=True)).json()["choices"][0]
    assert b"".join(bytes(one["bytes"]) for one in chat["logprobs"]["content"]) == "é<end>ü".encode()


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_tokens_as_their_ids(start: Start, has_tokenizer: bool) -> None:
    server = start(FakeRuntime() if has_tokenizer else FakeRuntime(the_tokenizer=None))
    asked = {"return_tokens_as_token_ids": True} if has_tokenizer else {}
    body = {"prompt": TOKENS.encode("ab"), "logprobs": 2, "max_tokens": 3} | asked
    (choice,) = server.post(COMPLETIONS, json=body).json()["choices"]
    ids = TOKENS.encode("You")
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    assert set(choice["logprobs"]["top_logprobs"][0]) == {"token_id:0", "token_id:1", f"token_id:{ids[0]}"}
    assert choice["text"] == ("You" if has_tokenizer else "")
    if not has_tokenizer:
        error = error_of(server.post(COMPLETIONS, json=body | {"echo": True}))
        assert (error["param"], "no tokenizer" in error["message"]) == ("echo", True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 4])
@pytest.mark.parametrize("n", [1, 2])
def test_echo(server: LiveServer, stream: bool, as_ids: bool, max_tokens: int, n: int) -> None:
    prompts = ["abc", "é"]
    given = [TOKENS.encode(prompt) for prompt in prompts] if as_ids else prompts
    body = {"prompt": given, "echo": True, "logprobs": 1, "n": n, "max_tokens": max_tokens, "stream": stream}
    response = server.post(COMPLETIONS, json=body)
    if stream:
        events = events_of(response.text)
        found = [(text_of(events, index), joined(events, index)) for index in range(2 * n)]
    else:
        answer = response.json()
        assert answer["usage"]["prompt_tokens"] == 5
        assert answer["usage"]["completion_tokens"] == 2 * n * max_tokens
        found = [(choice["text"], choice["logprobs"]) for choice in answer["choices"]]
    for index, (text, logprobs) in enumerate(found):
        prompt = prompts[index // n]
        whole = prompt + "You "[:max_tokens]
        assert text == whole
        assert logprobs["token_logprobs"] == [None, *own(whole)[1:]]
        assert logprobs["top_logprobs"][0] is None
        assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
        assert logprobs["text_offset"] == ([0, 0] if prompt == "é" else [0, 1, 2]) + [
            len(prompt) + place for place in range(max_tokens)
        ]


def test_echo_without_logprobs(server: LiveServer) -> None:
    body = {"prompt": "abc", "echo": True, "max_tokens": 4}
    (choice,) = server.post(COMPLETIONS, json=body).json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("abcYou ", None)
    assert server.runtime.requests[-1][1].prompt_logprobs is None
    events = events_of(server.post(COMPLETIONS, json=body | {"stream": True}).text)
    assert text_of(events) == "abcYou "
    cut = server.post(COMPLETIONS, json=body | {"truncate_prompt_tokens": 2}).json()
    assert cut["choices"][0]["text"] == "bcYou "


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_prompt_logprobs(server: LiveServer, path: str) -> None:
    answer = server.post(path, json=body_of(path, prompt_logprobs=2, n=2, max_tokens=0)).json()
    if path == CHAT:
        told = answer["prompt_logprobs"]
        assert len(told) == 19
        assert told[0] is None
    else:
        first, second = (choice["prompt_logprobs"] for choice in answer["choices"])
        assert first == second
        (b,) = TOKENS.encode("b")
        assert first == [
            None,
            {
                "0": {"logprob": fake_logprob(0), "rank": 1, "decoded_token": "!"},
                "1": {"logprob": fake_logprob(1), "rank": 2, "decoded_token": '"'},
                str(b): {"logprob": fake_logprob(b), "rank": None, "decoded_token": "b"},
            },
        ]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
    assert answer["usage"]["completion_tokens"] == 0


def test_nothing_is_generated_for_max_tokens_0(server: LiveServer) -> None:
    for path in (COMPLETIONS, CHAT):
        (choice,) = server.post(path, json=body_of(path, max_tokens=0)).json()["choices"]
        text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
        assert (choice["finish_reason"], text) == ("length", "")
        events = events_of(server.post(path, json=body_of(path, max_tokens=0, stream=True)).text)
        assert events[-1]["choices"][0]["finish_reason"] == "length"
