"""sweep.py: what each percentage of each allocation would give.

- `settings`: its flags
- `subject`: the network, and the images that slim ones are judged by
- `record`: sweep.json
- `points`: measure, choose, report
"""
