"""Generative passage-level mixture of experts: retrieved passages become experts inside a frozen LLM."""

TYPE_CHECKING = False  # this runs at every start of an interpreter, and importing typing would cost more than all else
if TYPE_CHECKING:
    from typing import Any

    from genpoe_plugin.checkpoints.checkpoint import HypernetworkCheckpoint
    from genpoe_plugin.errors import InputError
    from genpoe_plugin.model import GenPoEModel

__version__ = "0.1.0"
__all__ = ["GenPoEModel", "HypernetworkCheckpoint", "InputError", "__version__"]


def __getattr__(name: str) -> "Any":
    """The public classes, imported on use: the start-up file of the package must cost nothing."""
    if name == "GenPoEModel":
        from genpoe_plugin.model import GenPoEModel

        return GenPoEModel
    if name == "HypernetworkCheckpoint":
        from genpoe_plugin.checkpoints.checkpoint import HypernetworkCheckpoint

        return HypernetworkCheckpoint
    if name == "InputError":
        from genpoe_plugin.errors import InputError

        return InputError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
