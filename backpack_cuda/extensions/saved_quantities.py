"""What an extension's modules hand back to each other during a backward pass."""

from collections.abc import Callable, Hashable
from typing import Any


class SavedQuantities:
    """Quantities that belong to tensors of the graph, until the module that formed the tensor has used them.

    The key of a tensor is its place in the graph, not its address, which the next tensor may get.
    """

    def __init__(self):
        self._saved_quantities: dict[Hashable, Any] = {}

    def save_quantity(self, key: Hashable, quantity: Any, accumulation_function: Callable[[Any, Any], Any]) -> None:
        """Saves a quantity; with one that is there already it becomes `accumulation_function(existing, quantity)`."""
        if key in self._saved_quantities:
            quantity = accumulation_function(self._saved_quantities.pop(key), quantity)
        self._saved_quantities[key] = quantity

    def retrieve_quantity(self, key: Hashable, delete_old: bool) -> Any:
        """The quantity of a key, or None; `delete_old` forgets it."""
        return self._saved_quantities.pop(key, None) if delete_old else self._saved_quantities.get(key)
