"""`tpworker bench`: how fast any OpenAI-compatible server answers.

    target.py ─► plan.py ─► load.py ─► client.py ─► Record ─► summary.py ─► report.py, picture.py
    what it is   what is    when       connection.py          figures       tables, JSON
                 asked

With several processes each runs its share of a level (`worker.py`), and the records are put together.
"""
