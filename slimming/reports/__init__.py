"""Present figures: tables, plots, TensorBoard, HTML pages.

- `tables.table`, `tables.layers_text`, `tables.sparsity_text`: text tables
- `figures.before_after_text`, `figures.stage_text`, `figures.scores_text`: figures as text
- `evaluation.as_text`, `evaluation.as_json`: the output of eval.py
- `preact.text`: a summary of pruning in the format of another suite
- `plots.write_picture`, `plots.draw_curves`, `plots.draw_pruning`, ...: pictures as PNG
- `board.TensorBoard`: scalars and histograms of γ
- `sweep_text.line`, `sweep_plot.write`, `sweep_page.page`: a sweep as text, picture and page
- `page.write_report`: an experiment as one HTML file
"""
