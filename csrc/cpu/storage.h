// Element types of tensors in memory.
#pragma once

#include "common/dtype.h"
#include "cpu/kernels.h"

namespace backpack_cuda::cpu {

Storage storage_of(const Tensor& tensor);

// Writes `count` values to element `to_offset` of `to`; null where the storage is Acc itself.
template <class Acc>
using Convert = void (*)(const Acc* from, int64_t count, void* to, int64_t to_offset);
template <class Acc>
Convert<Acc> converter(Storage storage);

}  // namespace backpack_cuda::cpu
