// The operators' namespace, in which schemas and implementations are registered. The tests build the CUDA
// bindings a second time, with kernels that run on the CPU, under another name and for CPU tensors.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef BACKPACK_CUDA_OPERATORS
#define BACKPACK_CUDA_OPERATORS backpack_cuda
#define BACKPACK_CUDA_KEY CUDA
#endif

#define OPERATOR_LIBRARY_(name, m) STABLE_TORCH_LIBRARY(name, m)
#define OPERATOR_IMPLEMENTATIONS_(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
#define OPERATOR_LIBRARY(m) OPERATOR_LIBRARY_(BACKPACK_CUDA_OPERATORS, m)
#define CUDA_IMPLEMENTATIONS(m) OPERATOR_IMPLEMENTATIONS_(BACKPACK_CUDA_OPERATORS, BACKPACK_CUDA_KEY, m)
#define OPTION_IMPLEMENTATIONS(m) \
  OPERATOR_IMPLEMENTATIONS_(BACKPACK_CUDA_OPERATORS, CompositeExplicitAutograd, m)
