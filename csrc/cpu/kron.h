// Kronecker factors: sums of outer products of rows or patches with themselves.
#pragma once
#include "cpu/storage.h"
#include "ops/kron_factor.h"

namespace backpack_cuda::cpu {

// An image [N, C, *] with three spatial dims and what is read of it.
struct KronSource {
  using Dims = ConvGeometry::Dims;

  const void* data;
  Storage storage;
  int64_t samples = 1, sample_stride = 0, channels, channel_stride;
  Dims size{1, 1, 1}, stride{0, 0, 0};
  ConvGeometry geometry{{1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, 1};
  Dims positions{1, 1, 1};

  // Rows [*, D] as pixels, of which at most four dims may remain when neighbours are merged.
  explicit KronSource(const Tensor& rows);
  explicit KronSource(const Patches& patches);
  // Dims of rows that are left when neighbours are merged.
  static int64_t row_dims(const Tensor& rows);
};

template <class Acc>
void kron_factor(const KronSource& source, const KronUpdate& update, Acc* out);  // [groups, D', D']

}  // namespace backpack_cuda::cpu
