// Packs what a Kronecker factor is computed from: panels [block of groups][panel][sample][position][width] of
// the vectors at the positions of a slab's box. Positions outside of the image are left out; in unfolded dims
// they are zero.
#pragma once
#include "cpu/kron_plan.h"

namespace backpack_cuda::cpu {

template <class Acc>
class KronPack {
 public:
  explicit KronPack(const KronPlan<Acc>& plan);
  // Samples [first, first + samples) of a slab.
  void pack(const KronSlab& slab, int64_t first, int64_t samples, Acc* packed) const;

 private:
  void fill_offsets();
  int64_t window_width() const;
  int64_t window_lines() const;
  int64_t coordinate(int d, int64_t y, int64_t k) const;
  void fill_window(int64_t n, int64_t block, int64_t d, int64_t h, const Range& w, Acc* window) const;
  void pack_panels(Storage storage, const void* from, int64_t offset, int64_t stride, int64_t count,
                   int64_t block, bool contiguous, Acc* dst, int64_t panel_stride) const;

  const KronPlan<Acc>& plan_;
  const KronSource& source_;
  const Kernels<Acc>& kernels_;
  std::vector<int64_t>
      offsets_[2];  // of a vector's entries: in all blocks of groups but the last, in the last
  std::vector<int64_t> line_offsets_;  // of the positions of a window's line
};

}  // namespace backpack_cuda::cpu
