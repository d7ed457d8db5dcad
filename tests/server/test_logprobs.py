"""Logprobs as the endpoints write them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

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


def test_ids_where_there_is_no_tokenizer_or_they_are_asked_for(tokenizer: Tokenizer) -> None:
    for writer in (LogprobWriter(None), LogprobWriter(tokenizer, as_ids=True)):
        assert writer.token(17) == ("token_id:17", b"token_id:17")


@pytest.mark.parametrize("logprob", [-math.inf, math.nan, -1e30])
def test_what_json_has_no_number_for(logprob: float) -> None:
    found = LogprobWriter(None).completion([(1, told(1, logprob, (2, logprob)))], Offsets(), True)
    assert json.loads(json.dumps(found, allow_nan=False))["token_logprobs"] == [LEAST_LOGPROB]
    assert found["top_logprobs"] == [{"token_id:2": LEAST_LOGPROB, "token_id:1": LEAST_LOGPROB}]
