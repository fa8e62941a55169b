// Per-sample gradients that are sums of outer products, and what is wanted of them: the plain data that the
// CUDA launchers take. One description serves Linear layers, convolutions and transposed convolutions:
//
//   G_n[o, c, k] = sum_p  b[n, o, p] * a[n, c, p * step + k * dilation - padding]      (a is 0 outside)
//
// per group, with p over the positions (T of them) and k over the kernel, three dims each. A Linear layer has
// kernel 1; its positions are the middle dims. A transposed convolution swaps the roles: a is its output
// gradient, b its input. In matrix terms G_n is [O, I] with I = channels * kernel volume, column
// i = (c, kd, kh, kw).
#pragma once

#include <cstdint>

namespace backpack_cuda::cuda {

enum class Element : int { kFloat32, kBFloat16, kFloat16 };

inline int element_size(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// A tensor [N, groups * channels, 3 dims]; strides in elements, any.
struct Operand {
  const void* data;
  int64_t stride_n, stride_c, stride[3];
};

struct OuterProblem {
  Element element;
  bool tf32;         // float32 operands: one TF32 pass instead of three (float32-accurate)
  int64_t N;         // samples, at least 1
  int groups;        // at least 1
  int O, channels;   // rows o and channels c of one group, at least 1
  int positions[3];  // of b; T = their product, at least 1, below 2^31
  int size[3];       // of a
  int kernel[3], step[3], padding[3], dilation[3];
  Operand a, b;

  int kernel_volume() const { return kernel[0] * kernel[1] * kernel[2]; }
  int I() const { return channels * kernel_volume(); }
  int T() const { return positions[0] * positions[1] * positions[2]; }
};

// Results, each null where it is not wanted. R = groups * O rows.
struct StatsOutputs {
  void* grad;                        // [R, I]     sum_n G_n, in the element type
  void* batch_grad;                  // [N, R, I]  G_n, in the element type
  float* batch_l2;                   // [N]        |G_n|^2
  float* sum_grad_squared;           // [R, I]     sum_n G_n^2
  float* sum_grad_centered_squared;  // [R, I]     sum_n (G_n - mean G)^2
  // [N], or null: grad becomes sum_n weights[n] G_n. Then nothing else is wanted.
  const float* weights;

  bool squares() const { return sum_grad_squared || sum_grad_centered_squared; }
};

// Second order: V output gradients of every sample, the columns of a square root of a curvature matrix. G_vn
// is the gradient of sample n with column v. The problem's operands are those of v = 0; a and b of the others
// lie stride_v elements apart, 0 for the operand that has no columns.
struct ColumnOutputs {
  int V;  // at least 1
  int64_t a_stride_v, b_stride_v;
  const float* signs;  // [V, N], or null: all 1
  // Results, each null where it is not wanted. R = groups * O rows.
  void* factor;       // [V, N, R, I]  G_vn, in the element type
  float* batch_diag;  // [N, R, I]     sum_v signs[v, n] G_vn^2
  float* diag;        // [R, I]        sum_vn signs[v, n] G_vn^2
};

}  // namespace backpack_cuda::cuda
