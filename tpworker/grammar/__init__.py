"""Grammars that outputs are held to: what users give, compiled by llguidance within bounds."""
