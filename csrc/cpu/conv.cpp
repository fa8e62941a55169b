#include "cpu/conv.h"

#include <memory>
#include <numeric>

#include "cpu/options.h"
#include "cpu/strided.h"

namespace backpack_cuda::cpu {
namespace {

using Dims = ConvGeometry::Dims;

int64_t product(const Dims& dims) { return dims[0] * dims[1] * dims[2]; }

// A tensor [N, channels, *spatial] with three spatial dims.
struct Image {
  const void* data;
  Storage storage;
  int64_t channels, sample_stride, channel_stride, v_stride;  // from one of V such tensors to the next
  Dims size{1, 1, 1}, stride{0, 0, 0};

  Image(const Tensor& tensor, int64_t v_stride)
      : data(tensor.const_data_ptr()),
        storage(storage_of(tensor)),
        channels(tensor.size(1)),
        sample_stride(tensor.stride(0)),
        channel_stride(tensor.stride(1)),
        v_stride(v_stride) {
    const int64_t dims = tensor.dim() - 2;
    for (int64_t d = 0; d < dims; ++d)
      size[3 - dims + d] = tensor.size(2 + d), stride[3 - dims + d] = tensor.stride(2 + d);
  }
};

// How the packed image of one sample and slab is laid out. Only the positions on the grid that patches read
// exist: position i of a dim is coordinate i * step - padding of the image, plus the slab's origin.
//   kRows     [group][position][channel]; a column vector runs along a row of the kernel
//   kBlocked  [group][block of `lanes` channels][position][lane]
//   kPatches  [group][block of columns][t][column]: the patches themselves
//   kGrouped  [block of `lanes` groups][position][channel][lane = group]
template <class Acc>
class ConvOperands : public Operands<Acc> {
 public:
  using Piece = typename Operands<Acc>::Piece;

  ConvOperands(const Convolution& conv, const OutputGradients<Acc>& gradients, Method method)
      : image_(conv.image(), conv.transposed ? gradients.stride : 0),
        pixels_(conv.pixels(), conv.transposed ? 0 : gradients.stride),
        pixel_rows_(conv.pixels(), 2, conv.pixels().dim()),
        geometry_(conv.geometry),
        method_(method),
        kernels_(kernels<Acc>()) {
    const ConvGeometry& geometry = geometry_;
    const int64_t groups = geometry.groups, lanes = kernels_.lanes;
    channels_ = image_.channels / groups;
    for (int d = 0; d < 3; ++d) {
      step_[d] =
          geometry.kernel[d] == 1 ? geometry.stride[d] : std::gcd(geometry.stride[d], geometry.dilation[d]);
      stride_[d] = geometry.stride[d] / step_[d],
      dilation_[d] = geometry.kernel[d] == 1 ? 1 : geometry.dilation[d] / step_[d];
    }
    const int64_t positions = product(geometry.kernel);
    const bool whole_row = dilation_[2] == 1;
    runs_ = whole_row ? positions / geometry.kernel[2] : positions;
    run_length_ = whole_row ? channels_ * geometry.kernel[2] : channels_;
    channel_blocks_ = ceil_div(channels_, lanes);

    plan.lanes_are_groups = method == kGrouped ? groups : 0;
    plan.groups = method == kGrouped ? ceil_div(groups, lanes) : groups;
    plan.all_rows = pixels_.channels, plan.rows = pixels_.channels / groups;
    plan.columns = plan.row_length = channels_ * positions;
    plan.samples = conv.input.size(0);
    plan.V = gradients.V, plan.v_in_a = conv.transposed;
    plan.choose_tile(kernels_, method == kRows      ? runs_ * ceil_div(run_length_, lanes)
                               : method == kBlocked ? positions * channel_blocks_
                               : method == kPatches ? ceil_div(plan.columns, lanes)
                                                    : positions * channels_);
    pitch_ = method == kRows ? channels_ : method == kBlocked ? lanes : channels_ * lanes;
    choose_slab();
  }

  // Rough cost of a sample in vector instructions: contraction, and about two per element packed one by one.
  double cost() const {
    const double packed = method_ == kPatches
                              ? double(plan.groups * plan.slabs * plan.slab_rows * plan.columns)
                              : double(plan.groups * plan.slabs * plan.a_group);
    const double copies = plan.v_in_a ? double(plan.V) : 1.0;
    return double(plan.V * product(pixels_.size)) * plan.cost() + 2 * copies * packed;
  }

  // Fills the plan's tables.
  void finish_plan() {
    fill_offsets();
    const int64_t lanes = plan.lanes, tile_width = plan.tile.nv * lanes;
    for (int64_t t = 0; t < plan.slab_rows; ++t) {
      const int64_t w = t % slab_[2], h = t / slab_[2] % slab_[1], d = t / slab_[2] / slab_[1];
      plan.row_offset.push_back(
          int32_t(method_ == kPatches ? t * tile_width
                                      : position(d * stride_[0], h * stride_[1], w * stride_[2]) * pitch_));
    }
    int64_t vector = 0;
    const auto add_vector = [&](int64_t offset, int64_t valid) {
      plan.column_offset[vector] = offset;
      plan.column_lanes[vector++] = int32_t(std::min(valid, lanes));
    };
    const Dims& kernel = geometry_.kernel;
    if (method_ == kPatches) {
      for (int64_t k = 0; k < plan.columns; k += lanes)
        add_vector(k / tile_width * plan.slab_rows * tile_width + k % tile_width, plan.columns - k);
      return;  // columns are in the weight's order
    }
    plan.source.resize(plan.columns);
    const auto place = [&](int64_t channel, int64_t kernel_position,
                           int64_t lane) {  // in the vector about to be added
      plan.source[channel * product(kernel) + kernel_position] = int32_t(
          (vector / plan.tile.nv * plan.tile.mr * plan.tile.nv + vector % plan.tile.nv) * lanes + lane);
    };
    if (method_ == kRows) {
      const int64_t row_positions = run_length_ / channels_;  // kernel positions per run
      for (int64_t run = 0; run < runs_; ++run)
        for (int64_t begin = 0; begin < run_length_; begin += lanes) {
          for (int64_t e = begin; e < std::min(begin + lanes, run_length_); ++e)
            place(e % channels_, run * row_positions + e / channels_, e - begin);
          add_vector(kernel_offset(run * row_positions) * pitch_ + begin, run_length_ - begin);
        }
    } else if (method_ == kBlocked) {
      for (int64_t block = 0; block < channel_blocks_; ++block)
        for (int64_t k = 0; k < product(kernel); ++k) {
          for (int64_t c = block * lanes; c < std::min((block + 1) * lanes, channels_); ++c)
            place(c, k, c - block * lanes);
          add_vector((block * product(box_) + kernel_offset(k)) * lanes, channels_ - block * lanes);
        }
    } else {
      for (int64_t c = 0; c < channels_; ++c)
        for (int64_t k = 0; k < product(kernel); ++k) {
          place(c, k, 0);
          add_vector((kernel_offset(k) * channels_ + c) * lanes, lanes);
        }
    }
  }

  int64_t rows_in_slab(int64_t slab) const override {
    const Dims begin = slab_origin(slab);
    int64_t rows = 1;
    for (int d = 0; d < 3; ++d) rows *= std::min(slab_[d], pixels_.size[d] - begin[d]);
    return rows;
  }

  void pack_a(const Piece& piece, int64_t group_begin, int64_t group_end, Acc* dst) const override {
    if (method_ == kPatches)
      pack_patches(piece, group_begin, group_end, dst);
    else
      pack_image(piece, group_begin, group_end, dst);
  }

  void pack_b(const Piece& piece, int64_t strip_begin, int64_t strip_end, Acc* dst) const override {
    const Dims origin = slab_origin(piece.slab);
    const int64_t first = (origin[0] * pixels_.size[1] + origin[1]) * pixels_.size[2] +
                          origin[2];  // a slab's rows are consecutive
    const int64_t rows = rows_in_slab(piece.slab), begin = first + rows * piece.part / piece.parts,
                  end = first + rows * (piece.part + 1) / piece.parts;
    const int64_t mr = plan.tile.mr, lanes = plan.lanes, groups = plan.lanes_are_groups;
    for (int64_t strip = strip_begin; strip < strip_end; ++strip, dst += rows * mr * plan.b_lanes()) {
      const int64_t group = strip / plan.panels, o = strip % plan.panels * mr;
      pixel_rows_.for_runs(begin, end, [&](int64_t row, int64_t count, int64_t offset, int64_t stride) {
        offset += piece.n * pixels_.sample_stride + piece.v * pixels_.v_stride;
        if (!groups) {
          const PackColumns columns{pixel_offset_.data(), std::min(mr, plan.rows - o), mr,
                                    pixels_.channel_stride == 1};
          const int64_t channel = group * plan.rows + o;
          kernels_.pack[pixels_.storage](pixels_.data, offset + channel * pixels_.channel_stride, stride,
                                         count, columns, false, dst + (row - first) * mr, mr);
          return;
        }
        for (int64_t m = 0; m < mr; ++m) {
          const int64_t valid = o + m < plan.rows ? std::min(lanes, groups - group * lanes) : 0;
          const PackColumns columns{pixel_offset_.data(), valid, lanes,
                                    pixels_.channel_stride == 1 && plan.rows == 1};
          const int64_t channel = group * lanes * plan.rows + o + m;
          kernels_.pack[pixels_.storage](pixels_.data, offset + channel * pixels_.channel_stride, stride,
                                         count, columns, false, dst + ((row - first) * mr + m) * lanes,
                                         mr * lanes);
        }
      });
      if (this->sample_weights) {
        const Acc sample_weight = this->sample_weights[piece.n];
        const int64_t row_size = mr * plan.b_lanes();
        kernels_.scale(dst + (begin - first) * row_size, sample_weight, (end - begin) * row_size,
                       dst + (begin - first) * row_size);
      }
    }
  }

  ContractPlan<Acc> plan;

 private:
  int64_t position(int64_t d, int64_t h, int64_t w) const { return (d * box_[1] + h) * box_[2] + w; }
  int64_t kernel_offset(int64_t k) const {  // of a kernel position, in positions
    const Dims& kernel = geometry_.kernel;
    return position(k / kernel[2] / kernel[1] * dilation_[0], k / kernel[2] % kernel[1] * dilation_[1],
                    k % kernel[2] * dilation_[2]);
  }

  // First output position of a slab.
  Dims slab_origin(int64_t slab) const {
    const int64_t per_row = ceil_div(pixels_.size[2], slab_[2]),
                  per_plane = ceil_div(pixels_.size[1], slab_[1]);
    return {slab / per_row / per_plane * slab_[0], slab / per_row % per_plane * slab_[1],
            slab % per_row * slab_[2]};
  }

  // The largest slab (all, some planes, some rows of one plane, or part of one row) whose packed operands
  // fit.
  void choose_slab() {
    const int64_t limit = options().chunk_bytes ? options().chunk_bytes : kSlabBytes;
    slab_ = pixels_.size;
    int64_t V = 1;
    for (int d = 0;; V = plan.slab_V()) {
      for (int i = 0; i < 3; ++i)
        box_[i] = (slab_[i] - 1) * stride_[i] + (geometry_.kernel[i] - 1) * dilation_[i] + 1;
      plan.slab_rows = product(slab_);
      plan.a_group = method_ == kPatches
                         ? plan.blocks * plan.tile.nv * plan.lanes * plan.slab_rows
                         : product(box_) * pitch_ * (method_ == kBlocked ? channel_blocks_ : 1);
      const int64_t b = plan.strips_per_pass() * plan.slab_rows * plan.tile.mr * plan.b_lanes();
      if (plan.packed(plan.groups_per_pass() * plan.a_group, b, V) * int64_t(sizeof(Acc)) <= limit) break;
      while (d < 3 && slab_[d] == 1) ++d;
      if (d == 3) break;
      slab_[d] = ceil_div(slab_[d], 2);
    }
    plan.slabs = 1;
    for (int d = 0; d < 3; ++d) plan.slabs *= ceil_div(pixels_.size[d], slab_[d]);
  }

  // Offsets of the rows or columns that one call to `pack` copies.
  void fill_offsets() {
    const auto multiples = [](int64_t count, int64_t stride) {
      std::vector<int64_t> offsets(count);
      for (int64_t i = 0; i < count; ++i) offsets[i] = i * stride;
      return offsets;
    };
    const int64_t lanes = plan.lanes;
    pixel_offset_ = method_ == kGrouped ? multiples(lanes, plan.rows * pixels_.channel_stride)
                                        : multiples(plan.rows, pixels_.channel_stride);
    if (method_ != kPatches) {
      image_offset_ = method_ == kGrouped ? multiples(lanes, channels_ * image_.channel_stride)
                                          : multiples(channels_, image_.channel_stride);
      return;
    }
    line_offset_ = multiples(box_[2], step_[2] * image_.stride[2]);
    const Dims& kernel = geometry_.kernel;  // in a window [channel, kd, kh, w]
    for (int64_t k = 0; k < plan.columns; ++k)
      image_offset_.push_back(k / kernel[2] * box_[2] + k % kernel[2] * dilation_[2]);
  }

  void pack_image(const Piece& piece, int64_t group_begin, int64_t group_end, Acc* dst) const {
    const int64_t lines = box_[0] * box_[1], lanes = plan.lanes;
    const Dims origin = slab_origin(piece.slab);
    const bool contiguous = image_.channel_stride == 1;
    for (int64_t line = lines * piece.part / piece.parts; line < lines * (piece.part + 1) / piece.parts;
         ++line) {
      const Line source = line_of(piece, origin, line / box_[1], line % box_[1]);
      for (int64_t group = group_begin; group < group_end; ++group) {
        Acc* to = dst + (group - group_begin) * plan.a_group + line * box_[2] * pitch_;
        const auto pack = [&](int64_t channel, int64_t valid, int64_t width, bool side_by_side, Acc* out) {
          pack_line(source, channel, {image_offset_.data(), valid, width, side_by_side}, out);
        };
        if (method_ == kRows) {
          pack(group * channels_, channels_, channels_, contiguous, to);
        } else if (method_ == kBlocked) {
          for (int64_t c = 0; c < channels_; c += lanes)
            pack(group * channels_ + c, std::min(lanes, channels_ - c), lanes, contiguous,
                 to + c * product(box_));
        } else {
          const int64_t groups = std::min(lanes, plan.lanes_are_groups - group * lanes);
          for (int64_t c = 0; c < channels_; ++c)
            pack(group * lanes * channels_ + c, groups, lanes, contiguous && channels_ == 1, to + c * lanes);
        }
      }
    }
  }

  // The positions of one line of the box that lie inside the image: [begin, end), the first at `offset`.
  struct Line {
    int64_t begin, end, offset, stride;
  };
  Line line_of(const Piece& piece, const Dims& origin, int64_t d, int64_t h) const {
    const auto coordinate = [&](int dim, int64_t index) {
      return origin[dim] * geometry_.stride[dim] + index * step_[dim] - geometry_.padding[dim];
    };
    const int64_t y = coordinate(1, h), z = coordinate(0, d), x = coordinate(2, 0);
    if (z < 0 || z >= image_.size[0] || y < 0 || y >= image_.size[1]) return {0, 0, 0, 0};
    Line line;
    line.begin = std::min(x < 0 ? ceil_div(-x, step_[2]) : 0, box_[2]);
    line.end = std::clamp(ceil_div(image_.size[2] - x, step_[2]), line.begin, box_[2]);
    line.offset = piece.n * image_.sample_stride + piece.v * image_.v_stride + z * image_.stride[0] +
                  y * image_.stride[1] + (x + line.begin * step_[2]) * image_.stride[2];
    line.stride = step_[2] * image_.stride[2];
    return line;
  }

  // One line of some channels, zeros where it leaves the image.
  void pack_line(const Line& line, int64_t channel, const PackColumns& columns, Acc* dst) const {
    const auto zero = [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) std::fill_n(dst + w * pitch_, columns.width, Acc(0));
    };
    zero(0, line.begin);
    if (line.begin < line.end)
      kernels_.pack[image_.storage](image_.data, line.offset + channel * image_.channel_stride, line.stride,
                                    line.end - line.begin, columns, false, dst + line.begin * pitch_, pitch_);
    zero(line.end, box_[2]);
  }

  // Output line by output line: the lines of the image under the kernel are copied to a window [channel, kd,
  // kh, w] with zeros outside of the image, and the patches are gathered from there.
  void pack_patches(const Piece& piece, int64_t group_begin, int64_t group_end, Acc* dst) const {
    const Dims origin = slab_origin(piece.slab), &kernel = geometry_.kernel;
    const int64_t line_length = std::min(slab_[2], pixels_.size[2] - origin[2]),
                  lines = rows_in_slab(piece.slab) / line_length;
    const int64_t width = plan.tile.nv * plan.lanes, window_lines = kernel[0] * kernel[1];
    const Storage storage = sizeof(Acc) == 8 ? kFloat64 : kFloat32;
    std::vector<Acc> window(channels_ * window_lines * box_[2]);
    for (int64_t line = lines * piece.part / piece.parts; line < lines * (piece.part + 1) / piece.parts;
         ++line)
      for (int64_t group = group_begin; group < group_end; ++group) {
        for (int64_t k = 0; k < window_lines; ++k) {
          const Line source =
              line_of(piece, origin, line / slab_[1] * stride_[0] + k / kernel[1] * dilation_[0],
                      line % slab_[1] * stride_[1] + k % kernel[1] * dilation_[1]);
          for (int64_t c = 0; c < channels_; ++c) {
            Acc* to = window.data() + (c * window_lines + k) * box_[2];
            std::fill(to, to + source.begin, Acc(0));
            if (source.begin < source.end)
              kernels_.pack[image_.storage](
                  image_.data, source.offset + (group * channels_ + c) * image_.channel_stride, 0, 1,
                  {line_offset_.data(), source.end - source.begin, source.end - source.begin,
                   source.stride == 1},
                  false, to + source.begin, 0);
            std::fill(to + source.end, to + box_[2], Acc(0));
          }
        }
        for (int64_t block = 0; block < plan.blocks; ++block) {
          const PackColumns columns{image_offset_.data() + block * width,
                                    std::min(width, plan.columns - block * width), width, false};
          kernels_.pack[storage](window.data(), 0, stride_[2], line_length, columns, false,
                                 dst + (group - group_begin) * plan.a_group +
                                     (block * plan.slab_rows + line * line_length) * width,
                                 width);
        }
      }
  }

  const Image image_, pixels_;
  const Rows pixel_rows_;
  const ConvGeometry& geometry_;
  const Method method_;
  const Kernels<Acc>& kernels_;
  int64_t channels_;                   // per group
  Dims step_, stride_, dilation_;      // of the packed grid in coordinates; stride and dilation on that grid
  int64_t runs_, run_length_;          // kRows: kernel rows, or kernel positions when dilated
  int64_t channel_blocks_;             // kBlocked
  int64_t pitch_;                      // elements between packed positions
  Dims slab_, box_;                    // output positions of a slab, packed positions that it reads
  std::vector<int64_t> image_offset_;  // of the columns that one call packs
  std::vector<int64_t> line_offset_;   // kPatches: of the positions in a line
  std::vector<int64_t> pixel_offset_;  // of the rows o, or of the lanes
};

}  // namespace

template <class Acc>
void conv_contract(const Convolution& conv, const ContractResults& results,
                   const std::function<void(int64_t, int64_t)>& chunk_packed, const Acc* sample_weights,
                   const OutputGradients<Acc>& gradients) {
  const auto candidate = [&](Method method) {
    return std::make_unique<ConvOperands<Acc>>(conv, gradients, method);
  };
  std::unique_ptr<ConvOperands<Acc>> best;
  for (Method method : {kBlocked, kRows, kPatches, kGrouped}) {
    if (method == kGrouped && conv.geometry.groups == 1) continue;
    auto operands = candidate(method);
    const bool forced = options().method == method;
    if (!best || forced || operands->cost() < best->cost()) best = std::move(operands);
    if (forced) break;
  }
  best->finish_plan();
  best->sample_weights = sample_weights, best->signs = gradients.signs;
  contract<Acc>(best->plan, *best, results, chunk_packed);
}

#define INSTANTIATE(Acc)                                                                     \
  template void conv_contract<Acc>(const Convolution&, const ContractResults&,               \
                                   const std::function<void(int64_t, int64_t)>&, const Acc*, \
                                   const OutputGradients<Acc>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace backpack_cuda::cpu
