"""Which channels a network has, and which are coupled: the trace on labels.

- `groups.channels`: the groups of coupled channels of a network, found by one run; `groups.traced`
- `labels.Trace`: the run on labels; `operations.rule`: what each operation does to them
- `kinds.register`: kinds of layers, and which dimensions of their tensors are channels
- `scaling`: the scaling factors γ of each BatchNorm, and which channels are present and alive
- `widths`: how many channels layers read and write; networks at other widths
- `inputs`: the arguments of any network, and the tensors of what it returns
- `recording.Recording`: which calls of a run read what others returned
"""
