"""export.py: a network as files that other programs run.

- `settings`: its flags
- `subject`: the network, and the images that its files are proved and judged on
- `running`: write a graph, and run its file
- `exports`: choose the form of the graph, write, prove, judge
- `timing`: the latency of all files, beside the dense network
"""
