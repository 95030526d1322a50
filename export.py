"""Export a network to files that other programs run: ONNX, OpenVINO, torch.export.

Each file is proved on real images in a fresh process before it is kept; lower precisions are judged
by their accuracy on test images.

    python export.py logs/vgg-refined --format onnx,openvino --precision fp32,int8
"""

from slimming.cli import entry, flags
from slimming.cli.parser import Parser
from slimming.settings import build
from slimming.storage.claim import claimed
from slimming.workflows.exporting import exports, subject, timing
from slimming.workflows.exporting.settings import ExportRun


def make_parser() -> Parser:
    return flags.make_parser(__doc__, ExportRun)


def main() -> None:
    run = build(ExportRun, flags.parse(make_parser()))
    network = subject.load(run)
    exports.check_forms(network)
    with claimed(run.folder), timing.reported(network) as written:
        for kind, precision in run.graph.targets:
            written.append(exports.export(network, kind, precision))


if __name__ == "__main__":
    entry.run(main)
