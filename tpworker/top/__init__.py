"""`tpworker top`: what a tpworker does, live in the terminal, from its status board or from a URL.

sources.py ─► Snapshot ─► rates.py ─► Rates ─► screen.py ─► lines ─► terminal.py
  a thread reads           of some seconds       as many as fit        paints, and reads keys
"""
