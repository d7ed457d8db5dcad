"""Grammars that outputs are held to: what users give, compiled by llguidance within bounds.

    StructuredOutputs ── grammar_of ──► a text that llguidance reads ── Compiler.matcher ──► an LLMatcher

llguidance is imported on first use. Neither torch nor a library of models is.
"""

from tpworker.grammar.compiler import Compiler
from tpworker.grammar.errors import GrammarError
from tpworker.grammar.translation import grammar_of

__all__ = ["Compiler", "GrammarError", "grammar_of"]
