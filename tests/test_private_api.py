"""What the suite uses of PyTorch that is private: each name does what it is used for.

Where a test here fails, docs/architecture.md says what the name is for, and the code must change.
"""

# ruff: noqa: SLF001
import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from warm import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
OURS = [p for room in ("slimming", "models", "mask-impl") for p in ROOT.glob(f"{room}/**/*.py")]
OWNERS = dict.fromkeys(["_version", "_base"], "Tensor")  # of attributes
OWNERS |= dict.fromkeys(["_forward_hooks", "_forward_pre_hooks", "_orig_mod"], "Module")


def private_names(path: Path) -> set[str]:
    """The private names of PyTorch in a file, with the modules that they are imported from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in names if "._" in name}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("torch.") and "._" in a.name}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "torch" and re.match("_[^_]", node.attr):
                found.add(f"torch.{node.attr}")
            elif node.attr in OWNERS and node.value.id != "self":
                found.add(f"{OWNERS[node.attr]}.{node.attr}")
        elif isinstance(node, ast.Constant) and node.value in OWNERS:  # getattr, hasattr
            found.add(f"{OWNERS[node.value]}.{node.value}")
    return found


def test_the_page_lists_every_private_name():
    used = set().union(*(private_names(path) for path in [*OURS, *ROOT.glob("*.py")]))
    table = PAGE.partition("## Private names")[2].partition("\n## ")[0]
    listed = {name for name in re.findall(r"`([\w.]+)`", table) if "._" in name}
    assert used == listed


def test_fused_operations_on_lists():
    a, b = [torch.ones(2), torch.ones(3)], [torch.tensor([-2.0, 0.0]), torch.ones(3)]
    torch._foreach_add_(a, torch._foreach_sign(b), alpha=0.5)
    assert a[0].tolist() == [0.5, 1.0] and a[1].tolist() == [1.5] * 3
    torch._foreach_mul_(a, [torch.zeros(2), torch.ones(3)])
    assert a[0].tolist() == [0.0, 0.0]


def test_a_dispatch_mode_sees_every_operation_and_its_arguments():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func.name(), len(args)))
            return func(*args, **(kwargs or {}))

    layer, x = nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2)
    with torch.no_grad(), Mode():
        layer(x).add_(1)
    assert seen == [("aten::convolution", 9), ("aten::add_.Tensor", 2)]


def test_hooks_of_a_module_are_counted():
    layer = nn.Conv2d(1, 1, 1)
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    layer.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None)
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1


def test_a_compiled_network_holds_the_one_that_was_given():
    layer = nn.Linear(1, 1)
    assert torch.compile(layer)._orig_mod is layer


def test_trees_of_tensors():
    tree = {"a": [torch.ones(1), 2], "b": (torch.zeros(1),)}
    assert [type(leaf) for leaf in tree_leaves(tree)] == [torch.Tensor, int, torch.Tensor]
    assert tree_map(lambda leaf: leaf * 2, tree)["a"][1] == 4


def test_versions_and_views_of_tensors():
    tensor = torch.zeros(4)
    before = tensor._version
    view = tensor[:2]
    view.add_(1)
    assert tensor._version > before and view._base is tensor and tensor._base is None


def test_sgd_keeps_momentum_under_its_name():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], 0.1, 0.9)
    parameter.sum().backward()
    optimizer.step()
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [1.0, 1.0]
    optimizer.state[parameter]["momentum_buffer"] = torch.zeros(2)
    optimizer.step()  # reads what was put there
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [1.0, 1.0]


def test_operators_of_quantized_programs_are_registered():
    module = pytest.importorskip("torch.ao.quantization.fx._decomposed")
    assert module is importlib.import_module("torch.ao.quantization.fx._decomposed")
    assert torch.ops.quantized_decomposed.quantize_per_tensor
