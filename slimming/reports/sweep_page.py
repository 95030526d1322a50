"""A sweep as a page: one HTML file that needs no other."""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from slimming.reports.sweep_plot import COSTS

TEMPLATE = "sweep.html"
PLACE = "/* the sweep */ null"


def page(facts: Mapping[str, Any]) -> str:
    """The page of a sweep, with its ``facts`` as `slimming.workflows.sweep` records them."""
    template = resources.files("slimming.reports").joinpath(TEMPLATE).read_text(encoding="utf-8")
    # in a script, "</script>" or "<!--" in a string would end it
    data = json.dumps({**facts, "costs": COSTS}).replace("<", "\\u003c")
    assert template.count(PLACE) == 1
    return template.replace(PLACE, data)
