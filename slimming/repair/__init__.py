"""The weights that are left reproduce what the dense network computed.

- `layer_by_layer.repair`: fit one layer after the other, against the errors of those before
- `one_pass.OnePass`: the same in closed form, from one pass over the images
- `streaming.Stream`: a network runs up to one layer after the other, and resumes where it can
"""
