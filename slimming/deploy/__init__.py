"""The form for inference, and its files.

- `fold.deploy`: fold BatchNorm where a trace shows that it can be, and prove it
- `forms.FORMS`: the forms by name, chosen by `export.py`
- `formats.FORMATS`: the formats by name, each written in a file of its own
- `graph.traced`: the graph that a file holds, and what a program feeds
- `engines`: runs such files; a program of its own, which imports nothing else of this suite
"""
