"""Pruning in rounds: how much of a network goes when, and by which measure."""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from models import PAPER_DEPTH
from slimming.errors import UserError
from slimming.pruning.importance import MEASURES
from slimming.settings import count, number, setting, share, truth

MODELS = ("vgg", "mobilenet", "resnet-56", "resnet-34", "resnet-18", "resnet", "densenet")
DEPTHS = {**PAPER_DEPTH, "vgg": 13}  # that of Lubana and Dick
FULL_RATE = 80  # epochs at the full learning rate, of 160: rounds and warm-up fit into them
MOST = 95  # percent of all filters, and of the channels of any layer; more with --bypass
_DEPTHS = ", ".join(f"{model} {depth}" for model, depth in DEPTHS.items())


def switch(text: str, *flags: str, kept: bool = True) -> Any:
    """The field of a switch that takes True and False too, as in the original."""
    return setting(False, text, *flags, kind="truth", kept=kept)


def thresholds(text: str) -> str:
    """A list of rising percentages, kept as text."""
    try:
        steps = json.loads(text) if text else []
        good = all(0 <= a < b < 100 for a, b in zip([0, *steps], [*steps], strict=False))
        good = good and (not text or (isinstance(steps, list) and len(steps) > 0))
    except (ValueError, TypeError):
        good = False
    if not good:
        raise ValueError(f"must be rising percentages like [10,50,80], not {text!r}")
    return text


def _switch_or_count(text: str) -> bool | int:
    return truth(text) if text.lower() in ("true", "false") else count(text)


def _switch_or_count_field(value: bool | int) -> str:
    return "track_importance" if isinstance(value, bool) else "track_batches"


@dataclass(frozen=True)
class RoundsSettings:
    """A network, and the share of its filters that is gone after each round of pruning.

    ``thresholds`` decide over ``n_rounds`` and ``prune_percent``.
    """

    title: ClassVar[str] = "network and pruning"
    model: str = setting("resnet-56", "network to prune", choices=MODELS, kept=True)
    depth: int | None = setting(
        None,
        f"depth of the network (default: that of the checkpoint, else {_DEPTHS})",
        metavar="N",
        parse=count,
    )
    pretrained_path: str = setting(
        "0",
        "start from this network of main.py instead of fresh weights",
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
        f"percent of the filters to prune, 0 to {MOST}",
        "--prune_percent",
        metavar="P",
        parse=number(float, 0, 100, below=True),
        kept=True,
    )
    n_rounds: int = setting(
        1, "epochs over which pruning is spread", "--n_rounds", metavar="N", parse=count, kept=True
    )
    thresholds: str = setting(
        "",
        "percent of the original filters gone after each round, in place of equal steps: "
        "[10,50,80]",
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
        f"lift the limits: {MOST} % in all and of any layer, {FULL_RATE} epochs at full learning "
        "rate, T = 1 for grad_preserve"
    )

    def __post_init__(self) -> None:
        if self.thresholds:
            percents = json.loads(self.thresholds)
            object.__setattr__(self, "n_rounds", len(percents))
            object.__setattr__(self, "prune_percent", float(percents[-1]))

    @property
    def epochs(self) -> range:
        """The epochs that begin with a round."""
        return range(self.warmup_epochs, self.warmup_epochs + self.n_rounds)

    @property
    def label(self) -> str:
        """What the folder of the results is called."""
        return f"{self.model}_{self.pruning_type}_{self.prune_percent:g}"

    def removed(self, rounds: int) -> float:
        """The share of the original filters that is gone after so many rounds."""
        if self.thresholds:
            return json.loads(self.thresholds)[rounds - 1] / 100
        return self.prune_percent / 100 * rounds / self.n_rounds


@dataclass(frozen=True)
class ImportanceSettings:
    """What the importance of a filter is measured on."""

    title: ClassVar[str] = "importance"
    T: float = setting(
        5.0,
        "temperature of the loss in training and pruning",
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
        "training images that importance is from",
        "--imp_samples",
        metavar="N",
        parse=count,
        kept=True,
    )
    track_importance: bool = switch(
        "average it over minibatches of training instead", "--track_importance"
    )
    track_batches: int = setting(
        20,
        "how many of the last minibatches (default: 20); True or False: --track_importance",
        "--track_batches",  # which the original has twice: as a switch and as a number
        metavar="N",
        parse=_switch_or_count,
        field_of=_switch_or_count_field,
        kept=True,
    )
    alpha: float = setting(0.8, "factor of that average", metavar="A", parse=share, kept=True)
    use_l2: bool = switch("bias importance towards removing small weights", "--use_l2")
    use_init: bool = switch(
        "bias it towards removing what is still near its initial value", "--use_init"
    )

    def __post_init__(self) -> None:
        if self.use_l2 and self.use_init:
            raise UserError("--use_l2 and --use_init contradict each other: give one of them")
