"""The operations of a network, where torch.fx can trace it."""

from torch import fx, nn

from slimming.errors import UserError, raise_if_of_the_machine


class _Tracer(fx.Tracer):
    """Treats channel selection as a leaf module, like the layers of PyTorch."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return hasattr(module, "indexes") or super().is_leaf_module(module, name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of the operations of a network. UserError if torch.fx cannot trace it."""
    try:
        return _Tracer().trace(model)
    except Exception as error:  # whatever the user's forward does with a proxy
        raise_if_of_the_machine(error)
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"torch.fx cannot trace the network ({reason})") from error
