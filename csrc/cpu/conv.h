// Weight statistics of convolutions, transposed or not.
#pragma once
#include "cpu/contract.h"
#include "ops/convolution.h"

namespace backpack_cuda::cpu {

// G_n[o, c, k] = sum_p pixels[n, o, p] * image[n, c, p * stride + k * dilation - padding], zero outside of
// the image. A convolution has image = input and pixels = grad_output, its transpose image = grad_output and
// pixels = input. image [N, groups * columns, *], pixels [N, groups * rows, *out], weight [groups * rows,
// columns, *kernel].
template <class Acc>
void conv_contract(const Tensor& image, const Tensor& pixels, const ConvGeometry& geometry, int64_t want,
                   const StatsTensors& weight, const std::function<void(int64_t, int64_t)>& chunk_packed,
                   const Acc* sample_weights = nullptr);  // [N]: G_n times these

}  // namespace backpack_cuda::cpu
