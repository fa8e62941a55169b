// Weight statistics of convolutions, transposed or not.
#pragma once
#include "cpu/contract.h"
#include "ops/convolution.h"

namespace backpack_cuda::cpu {

// G_n[o, c, k] = sum_p pixels[n, o, p] * image[n, c, p * stride + k * dilation - padding], zero outside of
// the image. A convolution has image = input and pixels = grad_output, its transpose image = grad_output and
// pixels = input. image [N, groups * columns, *], pixels [N, groups * rows, *out], weight [groups * rows,
// columns, *kernel]. conv.grad_output is the first one of `gradients`.
template <class Acc>
void conv_contract(const Convolution& conv, const ContractResults& results,
                   const std::function<void(int64_t, int64_t)>& chunk_packed,
                   const Acc* sample_weights = nullptr,  // [N]: G_n times these
                   const OutputGradients<Acc>& gradients = {});

}  // namespace backpack_cuda::cpu
