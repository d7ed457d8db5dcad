"""Chat templates: programs in Jinja that came with a model, run where they can do no harm.

renderer.py is this process's side; process.py the child's, with environment.py and content.py, which import
jinja2 and are imported nowhere else.
"""
