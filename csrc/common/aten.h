// Calls of torch's own operators that libtorch's stable headers lack.
#pragma once

#include <array>

#include <torch/csrc/stable/ops.h>

#include "common/dtype.h"

namespace backpack_cuda::aten {

template <size_t kArguments>
Tensor call(const char* name, const char* overload, std::array<StableIValue, kArguments> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline StableIValue value(const Tensor& tensor) { return torch::stable::detail::from(tensor); }

inline Tensor detach(const Tensor& tensor) { return call<1>("aten::detach", "", {value(tensor)}); }

inline Tensor mul(const Tensor& a, const Tensor& b) {
  return call<2>("aten::mul", "Tensor", {value(a), value(b)});
}

// out = a * b, broadcast
inline void mul_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  call<3>("aten::mul", "out", {value(a), value(b), value(out)});
}

// out = a b
inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  call<3>("aten::mm", "out", {value(a), value(b), value(out)});
}

// out [O, I] = b^T a
inline void transposed_product(Tensor b,         // [rows, O]
                               const Tensor& a,  // [rows, I]
                               const Tensor& out) {
  mm_out(torch::stable::transpose(b, 0, 1), a, out);
}

}  // namespace backpack_cuda::aten
