"""BackPACK's import path of derivatives, which this library does not have; see `backpack_cuda.core.derivatives`."""
