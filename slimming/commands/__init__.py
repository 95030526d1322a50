"""A folder for each command: settings.py (its flags), run.py (its steps), report.py (what it
tells). Beside them what several share: settings, and pruning (how much, and how).

- `train`: main.py and mask-impl/main_mask.py
- `prune`: vggprune.py, resprune.py, denseprune.py, mask-impl/prune_mask.py
- `experiment`: run.py; `rounds`: flowprune.py; `evaluate`: eval.py; `sweep`, `export`
"""
