"""Files that other programs run without this suite.

- `graph.Feed`, `graph.traced`: what a program feeds, and the graph that it runs
- `formats.FORMATS`: the formats by name, each in a file of its own
- `engines`: runs such files; a program of its own, which imports nothing else of this suite
- `proof.run_alone`: the logits of a file in a fresh process
"""
