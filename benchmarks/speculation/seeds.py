"""What a model is asked so that it writes the texts that its head learns from; texts/ is not among it.

Four kinds: questions and tasks about topics; code; passages to be copied or changed, which the model itself
has written before; and nothing, so that it makes up the question too (as in Xu et al., arXiv 2406.08464).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

TOPICS = (
    "volcanoes", "bread", "the moon", "bees", "bicycles", "the Roman Empire", "chess", "coffee",
    "glaciers", "jazz", "photosynthesis", "trains", "the human heart", "solar panels", "whales",
    "the printing press", "football", "a family holiday", "gardening", "the stock market", "dreams",
    "clouds", "the Silk Road", "batteries", "painting", "a new job", "vaccines", "rivers",
    "the Internet", "dinosaurs", "time zones", "salt", "the piano", "gravity", "a lost dog",
    "democracy", "soap", "tea", "deserts", "recycling", "the violin", "earthquakes",
    "a birthday party", "cheese", "black holes", "mathematics", "a small town", "running",
    "the sea", "languages", "winter", "robots", "healthy food", "a dragon", "clocks", "ants",
    "airplanes", "the French Revolution", "books", "friendship",
)  # fmt: skip
TASKS = (
    "What is the most important thing to know about {}?",
    "Write a short story about {}.",
    "Give me a list of ten facts about {}.",
    "Explain {} to a child.",
    "How has {} changed over the last hundred years?",
    "Write a poem about {}.",
    "What are common mistakes people make about {}?",
    "Write an e-mail to a friend about {}.",
    "Compare {} with something similar.",
    "I want to learn about {}. Where should I start?",
    "Write a dialogue between two people who talk about {}.",
    "Describe {} in one paragraph.",
    "What questions could a teacher ask about {}?",
    "Make a plan for a lesson about {}.",
    "Why do people care about {}?",
)
PROGRAMS = (
    "reverses a string", "finds the prime numbers up to n", "sorts a list of numbers",
    "counts the vowels in a text", "checks whether a word is a palindrome",
    "computes Fibonacci numbers", "merges two dictionaries", "reads a file line by line",
    "converts Celsius to Fahrenheit", "removes duplicates from a list",
    "finds the longest word in a sentence", "computes the factorial of n", "parses a date",
    "rolls two dice", "finds the greatest common divisor", "flattens a nested list",
    "counts words in a file", "draws a triangle of stars", "checks a password",
    "searches a sorted list", "adds two matrices", "downloads a page", "rounds prices",
    "groups people by age", "keeps the balance of a bank account", "shuffles a deck of cards",
)  # fmt: skip
PROGRAMMING = (
    "Write a Python function that {}.",
    "Write a JavaScript function that {}.",
    "Write a Python class with a method that {}, and a test for it.",
    "Write a C program that {}.",
    "Show me, step by step, how to write code that {}.",
)
COPYING = (
    "Repeat this text word for word:\n\n{}",
    "Correct the mistakes in this text and write all of it again:\n\n{}",
    "Write this again with a short title above it:\n\n{}",
    "Here is a text.\n\n{}\n\nWrite the same text, but in capital letters where names stand.",
    "Summarise this in its own words:\n\n{}",
    "{}\n\nWrite the text above once more, and then say what it is about.",
    "Copy the following and add one more sentence at its end.\n\n{}",
    "Change the first line of this and leave the rest as it is:\n\n{}",
)
_SHARES = {"topics": 0.35, "code": 0.15, "copying": 0.3, "nothing": 0.2}


def draw_prompts(draw: random.Random, count: int, passages: Sequence[str]) -> list[str | None]:
    """What is asked; None: nothing yet.

    Args:
        passages: of the model's own; none: nothing is copied.
    """
    kinds = [kind for kind in _SHARES if passages or kind != "copying"]
    chosen = draw.choices(kinds, [_SHARES[kind] for kind in kinds], k=count)
    return [_ask(draw, kind, passages) for kind in chosen]


def _ask(draw: random.Random, kind: str, passages: Sequence[str]) -> str | None:
    match kind:
        case "topics":
            return draw.choice(TASKS).format(draw.choice(TOPICS))
        case "code":
            return draw.choice(PROGRAMMING).format(draw.choice(PROGRAMS))
        case "copying":
            return draw.choice(COPYING).replace("{}", draw.choice(passages))
        case _:
            return None
