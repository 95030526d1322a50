"""Export a network to files that other programs run: ONNX, OpenVINO, torch.export.

Each file is proved on real images in a fresh process before it is kept; lower precisions are judged
by their accuracy on test images.

    python export.py logs/vgg-refined --format onnx,openvino --precision fp32,int8
"""

from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.export import run as exporting
from slimming.commands.export.settings import ExportRun
from slimming.storage.files import claimed


def make_parser() -> Parser:
    return flags.make_parser(__doc__, ExportRun)


def main() -> None:
    run: ExportRun = flags.read(make_parser())
    network = exporting.load(run)
    exporting.check_forms(network)
    with claimed(run.folder), exporting.reported(network) as written:
        for kind, precision in run.graph.targets:
            written.append(exporting.export(network, kind, precision))


if __name__ == "__main__":
    entry.run(main)
