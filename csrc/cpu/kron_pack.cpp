#include "cpu/kron_pack.h"

#include <torch/csrc/stable/ops.h>

namespace backpack_cuda::cpu {

using torch::stable::parallel_for;

constexpr int64_t kTaskElements = 16 << 10;  // that are worth a thread

template <class Acc>
KronPack<Acc>::KronPack(const KronPlan<Acc>& plan)
    : plan_(plan), source_(plan.source), kernels_(kernels<Acc>()) {
  fill_offsets();
}

// Where the entries of a vector lie, in the order of the panels: relative to the first channel of the
// block, or in a window of lines [channel][kernel line][w].
template <class Acc>
void KronPack<Acc>::fill_offsets() {
  for (int64_t block : {int64_t{0}, plan_.group_blocks - 1}) {
    std::vector<int64_t>& offsets = offsets_[block > 0];
    offsets.clear();
    const int64_t groups = plan_.groups_in(block), w = plan_.unfolded[2] ? plan_.axes[2].kernel : 1;
    for (int64_t f = 0; f < plan_.features; ++f)
      for (int64_t lane = 0; lane < plan_.feature_stride; ++lane) {  // lanes without a group hold another's
        const int64_t channel = (lane < groups ? lane : 0) * plan_.channels + f / plan_.inner,
                      k = f % plan_.inner;
        offsets.push_back(plan_.unfolds() ? (channel * (plan_.inner / w) + k / w) * window_width() +
                                                k % w * plan_.axes[2].dilation
                                          : channel * source_.channel_stride);
      }
  }
  for (int64_t i = 0; i < window_width(); ++i)
    line_offsets_.push_back(i * plan_.axes[2].step * source_.stride[2]);
}

// Grid coordinates of the innermost dim that a line of a slab reads.
template <class Acc>
int64_t KronPack<Acc>::window_width() const {
  const int64_t width = std::min(plan_.before[2] + plan_.slab[2] + plan_.after[2],
                                 std::max<int64_t>(plan_.extent(2).length(), 1));
  return plan_.unfolded[2]
             ? (width - 1) * plan_.axes[2].stride + (plan_.axes[2].kernel - 1) * plan_.axes[2].dilation + 1
             : width;
}

template <class Acc>
void KronPack<Acc>::pack(const KronSlab& slab, int64_t first, int64_t samples, Acc* packed) const {
  const std::array<Range, 3>& box = slab.box;
  const int64_t lines = box[0].length() * box[1].length(), width = box[2].length(),
                blocks = plan_.group_blocks;
  const int64_t parts = std::clamp<int64_t>(ceil_div(kKronItems, samples * blocks), 1, lines * width);
  const bool by_lines = lines >= parts;
  const int64_t items = samples * blocks * parts, elements = samples * lines * width * plan_.position_size();
  parallel_for(0, items, ceil_div(kTaskElements * items, elements + 1), [&](int64_t begin, int64_t end) {
    std::vector<Acc> window(
        plan_.unfolds() ? plan_.groups_in(0) * plan_.channels * window_lines() * window_width() : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts, block = i / parts % blocks, sample = i / parts / blocks;
      const auto share = [&](int64_t length, bool cut) {
        return cut ? Range{length * part / parts, length * (part + 1) / parts} : Range{0, length};
      };
      const Range some_lines = share(lines, by_lines), columns = share(width, !by_lines);
      Acc* to = packed + (block * plan_.panels * samples + sample) * lines * width * plan_.pitch();
      for (int64_t line = some_lines.begin; line < some_lines.end; ++line) {
        const int64_t d = box[0].begin + line / box[1].length(), h = box[1].begin + line % box[1].length();
        Acc* dst = to + (line * width + columns.begin) * plan_.pitch();
        const int64_t panel_stride = samples * lines * width * plan_.pitch();
        const Range w{box[2].begin + columns.begin, box[2].begin + columns.end};
        if (w.length() == 0) continue;
        if (plan_.unfolds()) {
          fill_window(first + sample, block, d, h, w, window.data());
          constexpr Storage storage = sizeof(Acc) == 8 ? kFloat64 : kFloat32;
          pack_panels(storage, window.data(), 0, plan_.unfolded[2] ? plan_.axes[2].stride : 1, w.length(),
                      block, false, dst, panel_stride);
        } else {
          const int64_t offset =
              (first + sample) * source_.sample_stride + coordinate(0, d, 0) * source_.stride[0] +
              coordinate(1, h, 0) * source_.stride[1] + coordinate(2, w.begin, 0) * source_.stride[2] +
              plan_.first_channel(block) * source_.channel_stride;
          const bool contiguous =
              source_.channel_stride == 1 &&
              (!plan_.lanes_are_groups || (plan_.channels == 1 && plan_.groups_in(block) == plan_.lanes));
          pack_panels(source_.storage, source_.data, offset, plan_.axes[2].step * source_.stride[2],
                      w.length(), block, contiguous, dst, panel_stride);
        }
      }
    }
  });
}

template <class Acc>
void KronPack<Acc>::pack_panels(Storage storage, const void* from, int64_t offset, int64_t stride,
                                int64_t count, int64_t block, bool contiguous, Acc* dst,
                                int64_t panel_stride) const {
  const std::vector<int64_t>& offsets = offsets_[block > 0 && block + 1 == plan_.group_blocks];
  const int64_t entries = int64_t(offsets.size()), pitch = plan_.pitch();
  for (int64_t begin = 0; begin < entries; begin += pitch, dst += panel_stride)
    kernels_.pack[storage](from, offset, stride, count,
                           {offsets.data() + begin, std::min(pitch, entries - begin), pitch, contiguous},
                           false, dst, pitch);
}

// Coordinate in the image of packed coordinate y and kernel position k of an unfolded dim.
template <class Acc>
int64_t KronPack<Acc>::coordinate(int d, int64_t y, int64_t k) const {
  const Axis& axis = plan_.axes[d];
  return (plan_.unfolded[d] ? y * axis.stride + k * axis.dilation : y) * axis.step - axis.padding;
}
template <class Acc>
int64_t KronPack<Acc>::window_lines() const {
  return plan_.inner / (plan_.unfolded[2] ? plan_.axes[2].kernel : 1);
}

// The lines of the image under the unfolded part of the kernel at (d, h, w): [channel][kernel line][w],
// zeros outside of the image.
template <class Acc>
void KronPack<Acc>::fill_window(int64_t n, int64_t block, int64_t d, int64_t h, const Range& w,
                                Acc* window) const {
  const int64_t kernel_h = plan_.unfolded[1] ? plan_.axes[1].kernel : 1, lines = window_lines(),
                width = window_width();
  const Axis& axis = plan_.axes[2];
  const int64_t length =
      plan_.unfolded[2] ? (w.length() - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1 : w.length();
  const int64_t x = coordinate(2, w.begin, 0);
  Range inside;
  inside.begin = std::min(x < 0 ? ceil_div(-x, axis.step) : 0, length);
  inside.end =
      std::clamp(source_.size[2] > x ? ceil_div(source_.size[2] - x, axis.step) : 0, inside.begin, length);
  const int64_t count = plan_.groups_in(block) * plan_.channels;
  for (int64_t k = 0; k < lines; ++k) {
    const int64_t z = coordinate(0, d, k / kernel_h), y = coordinate(1, h, k % kernel_h);
    const bool exists = z >= 0 && z < source_.size[0] && y >= 0 && y < source_.size[1] && inside.length() > 0;
    const Range valid = exists ? inside : Range{0, 0};
    for (int64_t c = 0; c < count; ++c) {
      Acc* to = window + (c * lines + k) * width;
      std::fill(to, to + valid.begin, Acc(0));
      if (exists) {
        const int64_t offset = n * source_.sample_stride +
                               (plan_.first_channel(block) + c) * source_.channel_stride +
                               z * source_.stride[0] + y * source_.stride[1] +
                               (x + inside.begin * axis.step) * source_.stride[2];
        kernels_.pack[source_.storage](
            source_.data, offset, 0, 1,
            {line_offsets_.data(), inside.length(), inside.length(), axis.step * source_.stride[2] == 1},
            false, to + inside.begin, 0);
      }
      std::fill(to + valid.end, to + length, Acc(0));
    }
  }
}

template class KronPack<float>;
template class KronPack<double>;

}  // namespace backpack_cuda::cpu
