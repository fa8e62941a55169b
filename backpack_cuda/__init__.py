"""Everything a training step knows beyond the average gradient, from fused kernels.

Three ways in:

* layers: ``bp.Linear``, ``bp.Conv2d``, ...: torch's layers, prepared for quantities;
* BackPACK's interface: ``extend(model)``, ``with backpack(extensions.BatchL2Grad()): loss.backward()``;
* low-level calls on a layer's saved input and output gradient: ``bp.ops.linear_grad_stats(input, grad_output, want)``.
"""

from backpack_cuda import extensions, ops
from backpack_cuda._version import __version__
from backpack_cuda.activation import backpack
from backpack_cuda.context import CTX, disable
from backpack_cuda.custom_module.graph_utils import convert_module_to_backpack
from backpack_cuda.extending import extend, hook_run_extensions, hook_store_io
from backpack_cuda.extensions import BackpropExtension
from backpack_cuda.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Embedding,
    Linear,
)
from backpack_cuda.rules.registered import register_layer
from backpack_cuda.stored import memory_cleanup
from backpack_cuda.utils.hooks import no_op
from backpack_cuda.utils.module_classification import is_no_op

__all__ = [
    "CTX",
    "BackpropExtension",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "Linear",
    "__version__",
    "backpack",
    "convert_module_to_backpack",
    "disable",
    "extend",
    "extensions",
    "hook_run_extensions",
    "hook_store_io",
    "is_no_op",
    "memory_cleanup",
    "no_op",
    "ops",
    "register_layer",
]
