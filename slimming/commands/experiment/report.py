"""The last stage of an experiment: measure latency, and write report.html with all stages."""

from pathlib import Path

from torch import nn

from slimming.commands.experiment import page
from slimming.commands.experiment.run import Experiment, batches
from slimming.measuring.figures import latency_by_batch
from slimming.reports import plots
from slimming.storage import architecture
from slimming.storage.architecture import Architecture

CAPTIONS = {
    "curves-base": "Base training, by epoch",
    "curves-fine-tuned": "Fine-tuning, by epoch",
    "weights": "Weights of all convolutions, before and after",
    "layers": "Layers, before and after",
}


def write(experiment: Experiment) -> None:
    """Measure latency, write pictures and report.html; delete what only --save-model keeps."""
    folder, record, models = experiment.folder, experiment.record, {}
    pictures: dict[str, bytes | None] = {}
    for stage in record.facts["stages"]:
        models[stage["name"]], network, _ = architecture.load(folder / stage["file"])
        if stage["history"]:
            title = f"{stage['name']}: {network}"
            pictures[f"curves-{stage['name']}"] = plots.draw_curves(stage["history"], title)
    _measure_latency(experiment, list(models.values()), network)
    if len(models) > 1:
        pictures["weights"] = plots.draw_weights(models["base"], list(models.values())[-1])
        counted, rows = list(record.facts["layers"].items())[-1]
        pictures["layers"] = plots.draw_layers(rows, counted)
    for name, picture in pictures.items():
        plots.write_picture(folder / f"{name}.png", picture)
    captioned = {CAPTIONS[name]: picture for name, picture in pictures.items() if picture}
    page.write_report(folder / "report.html", experiment.config, record.facts, captioned)
    if not experiment.settings.execution.save_model:
        _drop_others(folder, last=folder / record.facts["stages"][-1]["file"])
    print(f"wrote {folder / 'report.html'}")


def _measure_latency(
    experiment: Experiment, models: list[nn.Module], network: Architecture
) -> None:
    """Measure the latency of all stages at batch sizes 1 and 64, in turns."""
    record = experiment.record
    images = batches(experiment.settings, network, "test").first(64)
    images = images.repeat(-(-64 // len(images)), 1, 1, 1)[:64]  # small datasets repeat images
    models = [model.to(images.device) for model in models]
    latencies = latency_by_batch(models, images)
    for stage, latency in zip(record.facts["stages"], latencies, strict=True):
        stage["latency"] = {str(batch): seconds for batch, seconds in latency.items()}
    record.update()


def _drop_others(folder: Path, last: Path) -> None:
    """Delete all networks but the ``last``."""
    for path in (*folder.glob("*/*.pth.tar"), *folder.glob("*.pth")):
        if path != last:
            path.unlink()
    print(f"kept only the network {last.name}: --save-model keeps all")
