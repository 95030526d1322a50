"""Modules are found under the names that they had."""

import importlib

import pytest

from slimming.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_module_is_found_under_its_old_name(old):
    with pytest.warns(DeprecationWarning, match=MOVED[old].replace(".", r"\.")):
        found = importlib.import_module(old)
    new = importlib.import_module(MOVED[old])
    assert found is new and found.__name__ == new.__name__ == found.__spec__.name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_old_module_does_not_replace_the_function_of_its_name():
    found = importlib.import_module("slimming.pruning.slicing.prune")
    assert found is importlib.import_module("slimming.slicing.prune")
    assert callable(importlib.import_module("slimming.slicing").prune)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_are_imported_from_old_modules():
    from slimming.pruning import importance, slicing
    from slimming.pruning.repair import repair

    assert callable(repair) and importance.MEASURES and slicing.masked
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("slimming.pruning.nothing")
