"""Settings of pruning in rounds: how much is pruned when, and by which measure."""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from models import NETWORKS, PAPER_DEPTH
from slimming.errors import UserError
from slimming.pruning.importance import MEASURES
from slimming.settings import boolean, count, fraction, number, setting

MODELS = tuple(NETWORKS)
DEPTHS = {**PAPER_DEPTH, "vgg": 13}  # the depth in Lubana and Dick
FULL_RATE_EPOCHS = 80  # of 160: warm-up and rounds must end while the learning rate is full
MAX_PERCENT = 95  # percent of all filters, and of the channels of any layer; more with --bypass
_DEPTHS = ", ".join(f"{model} {depth}" for model, depth in DEPTHS.items())


def switch(text: str, *flags: str, kept: bool = True) -> Any:
    """The field of a switch that also takes True or False, as in the original."""
    return setting(False, text, *flags, kind="bool", kept=kept)


def thresholds(text: str) -> str:
    """A list of increasing percentages, as text."""
    try:
        steps = json.loads(text) if text else []
        good = all(0 <= a < b < 100 for a, b in zip([0, *steps], [*steps], strict=False))
        good = good and (not text or (isinstance(steps, list) and len(steps) > 0))
    except (ValueError, TypeError):
        good = False
    if not good:
        raise ValueError(f"must be increasing percentages like [10,50,80], not {text!r}")
    return text


def _switch_or_count(text: str) -> bool | int:
    return boolean(text) if text.lower() in ("true", "false") else count(text)


def _switch_or_count_field(value: bool | int) -> str:
    return "track_importance" if isinstance(value, bool) else "track_batches"


@dataclass(frozen=True)
class RoundsSettings:
    """A network, and the fraction of its filters that is pruned after each round.

    ``thresholds`` override ``n_rounds`` and ``prune_percent``.
    """

    title: ClassVar[str] = "network and pruning"
    model: str = setting("resnet-56", "network to prune", choices=MODELS, kept=True)
    depth: int | None = setting(
        None,
        f"depth of the network (default: from the checkpoint, else {_DEPTHS})",
        metavar="N",
        parse=count,
    )
    pretrained_path: str = setting(
        "0",
        "start from this checkpoint of main.py instead of random weights (default: none)",
        "--pretrained_path",
        metavar="FILE",
    )
    pruning_type: str = setting(
        "mag_based",
        f"measure of importance: {', '.join(MEASURES)}",
        "--pruning_type",
        metavar="M",
        choices=tuple(MEASURES),
        kept=True,
    )
    prune_percent: float = setting(
        75.0,
        f"percentage of the filters to prune, 0 to {MAX_PERCENT}",
        "--prune_percent",
        metavar="P",
        parse=number(float, 0, 100, below=True),
        kept=True,
    )
    n_rounds: int = setting(
        1,
        "number of rounds: epochs that start with pruning",
        "--n_rounds",
        metavar="N",
        parse=count,
        kept=True,
    )
    thresholds: str = setting(
        "",
        "percentage of the filters pruned after each round, such as [10,50,80] (default: equal "
        "steps)",
        metavar="LIST",
        parse=thresholds,
        kept=True,
    )
    warmup_epochs: int = setting(
        0,
        "epochs of training before the first round",
        "--warmup_epochs",
        metavar="N",
        parse=number(int, 0, 10**6),
        kept=True,
    )
    bypass: bool = switch(
        f"lift the limits: {MAX_PERCENT} % of all filters and of any layer, {FULL_RATE_EPOCHS} "
        "epochs with the full learning rate, T = 1 for grad_preserve"
    )

    def __post_init__(self) -> None:
        if self.thresholds:
            percents = json.loads(self.thresholds)
            object.__setattr__(self, "n_rounds", len(percents))
            object.__setattr__(self, "prune_percent", float(percents[-1]))

    @property
    def epochs(self) -> range:
        """The epochs that start with a round."""
        return range(self.warmup_epochs, self.warmup_epochs + self.n_rounds)

    @property
    def label(self) -> str:
        """The name of the results folder."""
        return f"{self.model}_{self.pruning_type}_{self.prune_percent:g}"

    def removed(self, rounds: int) -> float:
        """The fraction of the original filters that is pruned after this many ``rounds``."""
        if self.thresholds:
            return json.loads(self.thresholds)[rounds - 1] / 100
        return self.prune_percent / 100 * rounds / self.n_rounds


@dataclass(frozen=True)
class ImportanceSettings:
    """How the importance of filters is measured."""

    title: ClassVar[str] = "importance"
    T: float = setting(
        5.0,
        "temperature of the loss, in training and for importance",
        metavar="T",
        parse=number(float, 1e-6),
        kept=True,
    )
    grasp_T: float = setting(
        200.0,
        "temperature for GraSP",
        "--grasp_T",
        metavar="T",
        parse=number(float, 1e-6),
        kept=True,
    )
    imp_samples: int = setting(
        2560,
        "number of training images for importance",
        "--imp_samples",
        metavar="N",
        parse=count,
        kept=True,
    )
    track_importance: bool = switch(
        "average importance over minibatches of training instead", "--track_importance"
    )
    track_batches: int = setting(
        20,
        "number of minibatches to average over, the last ones of an epoch (default: 20); True or "
        "False: same as --track_importance",
        "--track_batches",  # in the original, both a switch and a number
        metavar="N",
        parse=_switch_or_count,
        field_of=_switch_or_count_field,
        kept=True,
    )
    alpha: float = setting(
        0.8, "decay of the moving average", metavar="A", parse=fraction, kept=True
    )
    use_l2: bool = switch("bias importance towards pruning small weights", "--use_l2")
    use_init: bool = switch(
        "bias importance towards pruning weights near their initial value", "--use_init"
    )

    def __post_init__(self) -> None:
        if self.use_l2 and self.use_init:
            raise UserError("--use_l2 and --use_init contradict each other: use one of them")
