// What the Kronecker factor operators do on every device: checks. A device supplies the computation as a
// template argument, a function of
//   linear         (input [*, D], update, tf32, out [D', D'])
//   convolutions   (patches, update, tf32, out [groups, D', D'])
// that also serves inputs without rows or without entries. out is contiguous and has at least one entry.
#pragma once

#include "common/check.h"
#include "ops/convolution.h"

namespace backpack_cuda {

// out = decay * out + scale * sum_r x_r x_r^T. Of out the upper triangle is read, and nothing where decay is
// 0; both are written, equal to the last bit.
struct KronUpdate {
  double scale, decay;
  bool homogeneous;  // every row x_r ends with a 1 that is not in memory: D' = D + 1
};

inline void check_kron_out(const Tensor& out, const Tensor& input, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(out.is_cpu() == input.is_cpu() && out.get_device_index() == input.get_device_index(),
                  "out and input must be on the same device");
  STD_TORCH_CHECK(out.scalar_type() == statistics_dtype(input),
                  "out must be float64 for float64 input and float32 for others");
  bool fits = out.dim() == int64_t(shape.size()) && out.is_contiguous();
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = out.size(d) == shape[d];
  STD_TORCH_CHECK(fits, "out must be contiguous with dims of ", shape.back(), ", got shape ", shape_text(out),
                  " for input ", shape_text(input));
}

template <auto kCompute>
void linear_kron_factor(Tensor out, const Tensor& input, double scale, double decay, bool homogeneous,
                        bool tf32) {
  check_floating(input, "input");
  STD_TORCH_CHECK(input.dim() >= 1, "input must have at least 1 dim");
  const int64_t size = input.size(input.dim() - 1) + homogeneous;
  check_kron_out(out, input, {size, size});
  if (out.numel() > 0) kCompute(input, KronUpdate{scale, decay, homogeneous}, tf32, out);
}

template <auto kCompute>
void conv_kron_factor(Tensor out, const Tensor& input, Ints kernel_size, Ints stride, Ints padding,
                      Ints dilation, Ints positions, int64_t groups, double scale, double decay,
                      bool homogeneous, bool tf32) {
  const Patches patches(input, kernel_size, stride, padding, dilation, positions, groups);
  const int64_t size = patches.size() + homogeneous;
  check_kron_out(out, input, {groups, size, size});
  if (out.numel() > 0) kCompute(patches, KronUpdate{scale, decay, homogeneous}, tf32, out);
}

}  // namespace backpack_cuda
