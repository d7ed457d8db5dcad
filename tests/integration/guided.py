"""Requests that are held to grammars, for a tiny model whose tokens are characters."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.integration.conftest import VOCAB
from tpworker.grammar import grammar_of
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Sampling, Submit, Vocabulary
from tpworker.structured_outputs import StructuredOutputs

EOS = VOCAB - 1


def tokenizer() -> Tokenizer:
    """Token i is the character 32 + i; then comes a new line, and the end of a text."""
    alphabet = dict(zip(b" \n", "ĠĊ", strict=True))
    symbols = [alphabet.get(byte, chr(byte)) for byte in [*range(32, 127), 10]]
    made = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<eos>", special=True)])
    assert made.get_vocab_size() == VOCAB
    return made


TOKENIZER = tokenizer()
VOCABULARY = Vocabulary(0, TOKENIZER.to_str(), pack_int32([EOS]))


def _is_record(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"name", "n"} and isinstance(value["name"], str) and 0 <= value["n"] <= 99


@dataclass(frozen=True)
class Kind:
    """A grammar, and whether a text is of it."""

    outputs: StructuredOutputs
    fits: Callable[[str], object]

    @property
    def grammar(self) -> str:
        return grammar_of(self.outputs)


RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}
_CODE = "[a-f]{3,9}(-[0-9]{2}){1,3}"
WORD = StructuredOutputs(regex="[a-z]*")
KINDS = (
    Kind(WORD, re.compile("[a-z]*").fullmatch),
    Kind(StructuredOutputs(json=RECORD), _is_record),
    Kind(StructuredOutputs(regex=_CODE), re.compile(_CODE).fullmatch),
    Kind(StructuredOutputs(choice=("yes", "no", "not at all")), {"yes", "no", "not at all"}.__contains__),
    Kind(StructuredOutputs(grammar='start: "(" start ")" | /[xyz]/'), re.compile(r"\(*[xyz]\)*").fullmatch),
)


def requests(count: int = 16) -> list[Submit]:
    """Of four, three are held to a grammar; greedy and seeded, truncated and not, some to be long."""
    draw = random.Random(7)
    shared = [draw.randrange(VOCAB - 1) for _ in range(30)]
    submits = []
    for number in range(count):
        prompt = shared[: draw.choice([0, 17, 30])]
        prompt += [draw.randrange(VOCAB - 1) for _ in range(draw.randint(1, 25))]
        sampling = Sampling(
            temperature=draw.choice([0.0, 0.7, 1.3]),
            top_p=draw.choice([1.0, 0.9]),
            top_k=draw.choice([0, 0, 10]),
            seed=draw.randrange(2**40),
            max_tokens=draw.randint(6, 60),
            min_tokens=draw.choice([0, 0, 6]),
            stop_ids=pack_int32([EOS]),
        )
        grammar = None if number % 4 == 3 else draw.choice(KINDS).grammar
        submits.append(Submit(0, number, pack_int32(prompt), 0, sampling, grammar=grammar))
    return submits


def text_of(tokens: list[int]) -> str:
    """The text, without what ends it."""
    return str(TOKENIZER.decode(tokens, skip_special_tokens=True))
