"""Prune networks, and prove that the slim network computes the same.

Which channels are coupled:
- `coupling.Group`, `coupling.Member`, `coupling.lists_widths`: channels that are removed together
- `groups.groups`, `groups.declared`, `tracing.traced`: the groups of a network
- `widths.widths`, `widths.set_widths`, `widths.fit_to`: how many channels layers read and write

Which ones stay:
- `scaling.scaling_factors`, `scaling.alive_channels`, `scaling.batch_norms`: γ, and what is alive
- `sparsity.near_zero`: how much can be pruned without harm
- `threshold.choose_channels`: the paper's threshold on |γ|
- `evidence.Evidence`, `importance.MEASURES`: measures of importance, and what they look at
- `obs.elimination_errors`: the measure `obs`, Optimal Brain Surgeon for whole channels
- `tracking.Tracker`: importance during training, as a moving average
- `ranking.choose`, `choice.Choice`: a choice by any scores
- `allocation.choose`, `allocation.ALLOCATIONS`: which layer loses how much
- `front.front`, `front.knee`: the best of many slim networks
- `budget.smallest_fit`: the smallest ratio that fits a budget
- `kernels.kernel_masks`, `kernels.pattern_masks`: weights inside filters instead of channels

The slim network:
- `slicing.prune`, `slicing.apply`, `slicing.sliced`, `slicing.load_slim_state`: make it, load it
- `proof.prove_equal`: that it computes the same as the masked one
- `liveness.liveness`: that it still tells images apart
- `unread.without_unread_channels`: without the channels that no layer reads any more

Its repair:
- `repair.repair`: fit its weights to the activations of the dense network, layer by layer
- `one_pass.OnePass`: the same in closed form, from one pass over the images
- `statistics.mean_and_variance`, `statistics.move_statistics`: what BatchNorm reads
- `streaming.Stream`: a network runs up to one layer after the other, and resumes where it can
- `patches.patches`, `patches.matrix`: a layer as rows of a matrix product
- `least_squares.best_ridge`, `least_squares.Gram`, `least_squares.Moments`: ridge regression
"""
