"""Base of quantities that others write and whose modules hand quantities back to each other."""

from backpack_cuda.extensions.backprop_extension import BackpropExtension


class SecondOrderBackpropExtension(BackpropExtension):
    """A BackpropExtension with backpropagated quantities; see `ModuleExtension.backpropagate`."""

    def expects_backpropagation_quantities(self) -> bool:
        return True
