"""Which units go.

- `threshold.choose_channels`, `threshold.Choice`: the paper's threshold on |γ|
- `allocation.choose`, `allocation.ALLOCATIONS`: which layer loses how much
- `ranking.choose`: a choice by any scores
- `importance.MEASURES`, `importance.Evidence`: measures of importance, and what they look at
- `obs`: Optimal Brain Surgeon for whole channels; `tracking`: importance during training
- `moments`: what layers read, as moments, for `obs` and for repair
- `budget.smallest_fit`, `budget.front`, `budget.knee`: the ratio for a budget, the best of many
"""
