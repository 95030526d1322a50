"""Modules by the names that they had before they got rooms, for programs that import these."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

# where they are now -> what they were called, without "slimming."
NAMES = {
    "channels.groups": "channels.wires",
    "channels.labels": "channels.partition",
    "choosing.allocation": "pruning.allocation",
    "choosing.budget": "pruning.budget pruning.front",
    "choosing.importance": "pruning.evidence pruning.importance",
    "choosing.moments": "pruning.least_squares pruning.patches",
    "choosing.obs": "pruning.obs",
    "choosing.ranking": "pruning.ranking",
    "choosing.threshold": "pruning.choice pruning.sparsity pruning.threshold",
    "choosing.tracking": "pruning.tracking",
    "cli.flags": "cli.parser",
    "commands.evaluate.report": "reports.evaluation",
    "commands.evaluate.run": "workflows.evaluation",
    "commands.evaluate.settings": "workflows.evaluation_settings",
    "commands.experiment.methods": "workflows.methods",
    "commands.experiment.page": "reports.page",
    "commands.experiment.record": "workflows.record",
    "commands.experiment.report": "workflows.experiment_page",
    "commands.experiment.run": (
        "workflows.base_network workflows.experiment workflows.scoring workflows.stages"
    ),
    "commands.experiment.settings": "workflows.experiment_settings",
    "commands.export": "workflows.exporting",
    "commands.export.report": "reports.exports",
    "commands.export.run": (
        "workflows.exporting.exports workflows.exporting.running "
        "workflows.exporting.subject workflows.exporting.timing"
    ),
    "commands.export.settings": "workflows.exporting.settings",
    "commands.prune.report": "reports.preact",
    "commands.prune.run": "workflows.before_after",
    "commands.pruning": "workflows.budgets workflows.repairing workflows.rounding",
    "commands.rounds.run": "workflows.filter_scores workflows.rounds",
    "commands.rounds.settings": "workflows.flow_settings workflows.rounds_settings",
    "commands.settings": "workflows.checkpoint_settings workflows.settings",
    "commands.sweep": "workflows.sweep",
    "commands.sweep.report": (
        "reports.sweep_page reports.sweep_plot reports.sweep_text workflows.sweep.record"
    ),
    "commands.sweep.run": "workflows.sweep.points workflows.sweep.subject",
    "commands.sweep.settings": "workflows.sweep.settings",
    "commands.train.run": "workflows.training",
    "data.batches": "data.order data.pixels",
    "data.datasets": "data.settings",
    "data.image_folder": "data.stream",
    "deploy": "measuring.export",
    "deploy.engines": "measuring.export.engines",
    "deploy.fold": "measuring.deploy",
    "deploy.formats": "measuring.export.formats",
    "deploy.forms": "measuring.forms",
    "deploy.graph": "measuring.export.graph measuring.export.proof",
    "deploy.int8": "measuring.export.int8",
    "deploy.onnx_file": "measuring.export.onnx_file",
    "deploy.openvino_file": "measuring.export.openvino_file",
    "deploy.quiet": "measuring.export.quiet",
    "deploy.torch_file": "measuring.export.torch_file",
    "measuring.figures": "measuring.profiling",
    "measuring.latency": "measuring.layer_times measuring.rounding",
    "repair.layer_by_layer": "pruning.repair",
    "repair.one_pass": "pruning.one_pass pruning.statistics",
    "repair.streaming": "pruning.streaming",
    "reports.plots": "reports.board",
    "reports.tables": "reports.figures",
    "runtime.device": (
        "runtime.memory runtime.precision runtime.randomness runtime.strides runtime.threads"
    ),
    "slicing": "pruning.slicing",
    "slicing.kernels": "pruning.kernels",
    "slicing.proof": "pruning.liveness pruning.slicing.proof",
    "slicing.prune": "pruning.slicing.trial",
    "slicing.slim": "pruning.slicing.slim",
    "slicing.unread": "pruning.activations pruning.unread",
    "storage.checkpoint": "storage.slim_file",
    "storage.files": "storage.claim",
    "training.settings": "training.run_folder",
    "training.trainer": "training.optimizer",
}
MOVED = {f"slimming.{old}": f"slimming.{new}" for new, all in NAMES.items() for old in all.split()}
# called like a function of its package, which importing it would replace: found with the package
WITH_PACKAGE = {
    "slimming.pruning.slicing": {"slimming.pruning.slicing.prune": "slimming.slicing.prune"}
}
ROOMS = ("slimming.pruning", "slimming.workflows")  # packages that are no more


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its old name, with a DeprecationWarning that tells the new one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in MOVED and name not in ROOMS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=name in ROOMS)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        if spec.name in ROOMS:
            return None
        warnings.warn(f"{spec.name} is {MOVED[spec.name]} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__
        for old, new in WITH_PACKAGE.get(spec.name, {}).items():
            sys.modules[old] = importlib.import_module(new)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.loader_state is not None:  # it has run under its new name
            module.__spec__ = spec.loader_state


def install() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())  # before a moved package finds its files by its own path
