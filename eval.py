"""Evaluate a checkpoint: network, widths, accuracy, size and speed, compared to the dense network.

python eval.py logs/vgg-pruned
python eval.py --model vgg --pruned True --model_path logs/pruned.pth.tar --test_acc True
"""

import contextlib
import sys

from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.evaluate.report import as_json, as_text
from slimming.commands.evaluate.run import evaluate, load
from slimming.commands.evaluate.settings import SWITCHES, EvaluationRun


def make_parser() -> Parser:
    return flags.make_parser(__doc__, EvaluationRun)


def words() -> list[str]:
    """The command line, with ``--flops FILE`` replaced by ``--flops=True FILE``."""
    typed = sys.argv[1:]
    valued = [after.lower() in ("true", "false") for after in [*typed[1:], ""]]
    pairs = zip(typed, valued, strict=False)
    return [f"{word}=True" if word in SWITCHES and not has else word for word, has in pairs]


def main() -> None:
    run: EvaluationRun = flags.read(make_parser(), words())
    with contextlib.redirect_stdout(sys.stderr):  # stdout is only for the answer
        answer = evaluate(load(run))
    print(as_json(answer) if run.answers.json else as_text(answer))


if __name__ == "__main__":
    entry.run(main)
