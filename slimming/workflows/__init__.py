"""The workflows that the scripts run.

main.py:
- `training.main_run`, `training.prepare`, `training.run_epochs`: train, fine-tune, resume
- `settings.TrainingRun`: its settings

Pruning scripts:
- `before_after.load`, `before_after.save_pruned`: the network to prune, and the result beside it
- `settings.PruningRun`: their settings
- `budgets.BudgetSettings`: --flops, --params, --latency in place of a share of channels
- `repairing.RepairSettings`: --repair, after pruning
- `rounding.measured`: the multiples of --round-to auto

flowprune.py:
- `rounds.flow_run`, `rounds.prepare`, `rounds.Rounds`: pruning in rounds during training
- `flow_settings.FlowRun`, `rounds_settings.RoundsSettings`: its settings
- `filter_scores.FilterScores`: importance of filters for the next round

run.py:
- `experiment.begin_experiment`, `experiment.Experiment`: an experiment and its folder
- `experiment_settings.ExperimentSettings`: its settings
- `base_network.check`, `base_network.given`: the network to prune
- `stages.train_base`, `stages.prune`, `stages.repair`, `stages.fine_tune`: its stages
- `methods.METHODS`: its pruning methods by name
- `scoring.evaluate`, `record.Record`, `experiment_page.write`: scores, results, report

sweep.py:
- `sweep.subject.load`: the network to prune, and the images that slim ones are judged by
- `sweep.points.measure`, `sweep.points.choose`, `sweep.points.report`: what pruning would give
- `sweep.settings.SweepRun`, `sweep.record.SweepRecord`: its settings, and sweep.json

export.py:
- `exporting.subject.load`: the network, and the images that its files are proved and judged on
- `exporting.exports.export`, `exporting.timing.rows`: write, prove and judge a file; latency
- `exporting.settings.ExportRun`: its settings

eval.py:
- `evaluation.load`, `evaluation.evaluate`: describe and evaluate a checkpoint
- `evaluation_settings.EvaluationRun`: its settings
"""
