// The block of A for kernel positions i and i' is the sum over output positions o of
//   x[o * stride + i * dilation] x[o * stride + i' * dilation]^T
// (coordinates of the padded image, x a vector of channels). It depends on i alone only through the range of
// coordinates that it sums over: pairs (i, i') of one lag i' - i, in one residue of i * dilation modulo the
// stride, sum the same products over shifted ranges. These ranges are cut where one of them begins or ends,
// in each dim; the sum over each piece is formed once, and a block adds up its pieces. Nothing is subtracted.
// Lags of the other sign give the transposed blocks.
//
// That pays where a vector of channels fills vector registers. Dims may also be unfolded, the innermost ones
// first: then the vector at an output position holds the patch in these dims, and lags remain in the others.
// With all dims unfolded this is an implicit im2col. A model of the costs chooses.
//
// The operand is packed, chunk by chunk of samples or slabs of positions, in panels [panel][sample][position]
// [width], out-of-image positions left out (in unfolded dims: zero).

#include "cpu/kron.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <numeric>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/integers.h"
#include "cpu/contract.h"
#include "cpu/options.h"
#include "cpu/strided.h"

namespace backpack_cuda::cpu {
namespace {

using torch::stable::parallel_for;
using Dims = KronSource::Dims;

constexpr int64_t kItems = 16;  // split-up work: fixed, so that results do not depend on the threads
constexpr int64_t kDepthBytes = 24 << 10;  // of a panel of columns: stays in the L1 cache
constexpr int64_t kLargestTile = 1 << 10;  // elements
constexpr int64_t kLargestKernel = 256;    // along one dim; wider ones are unfolded

int64_t product(const Dims& dims) { return dims[0] * dims[1] * dims[2]; }

struct Range {
  int64_t begin, end;
  int64_t length() const { return std::max<int64_t>(end - begin, 0); }
};

// Pairs (i, i') of kernel positions in one dim whose products are the same, but for their range.
struct LagClass {
  struct Member {
    int64_t i, other;
    int64_t first, last;  // its pieces
  };
  int64_t lag;      // i' - i
  int64_t residue;  // coordinates are stride * j + residue
  std::vector<Member> members;
  std::vector<Range> pieces;  // of j
};

// One dim of the convolution, on the grid of coordinates that patches read: grid coordinate y is coordinate
// y * step - padding of the image.
struct Axis {
  int64_t kernel, positions, step, stride, dilation, padding;
  Range image;  // grid coordinates that patches read inside of the image
  std::vector<LagClass> classes;

  Axis(const KronSource& source, int d)
      : kernel(source.geometry.kernel[d]),
        positions(source.positions[d]),
        step(kernel == 1 ? source.geometry.stride[d]
                         : std::gcd(source.geometry.stride[d], source.geometry.dilation[d])),
        stride(source.geometry.stride[d] / step),
        dilation(kernel == 1 ? 1 : source.geometry.dilation[d] / step),
        padding(source.geometry.padding[d]) {
    image.begin = std::max<int64_t>(ceil_div(padding, step), 0);
    const int64_t size = source.size[d] + padding;
    image.end =
        std::min(size > 0 ? ceil_div(size, step) : 0, (positions - 1) * stride + (kernel - 1) * dilation + 1);
    if (positions == 0) image.end = 0;
    image.end = std::max(image.end, image.begin);
  }

  bool can_lag() const { return kernel <= kLargestKernel; }

  void find_classes() {
    std::map<std::pair<int64_t, int64_t>, LagClass> found;
    for (int64_t i = 0; i < kernel; ++i)
      for (int64_t other = 0; other < kernel; ++other) {
        LagClass& entry = found[{other - i, i * dilation % stride}];
        entry.lag = other - i, entry.residue = i * dilation % stride;
        entry.members.push_back({i, other, 0, 0});
      }
    for (auto& [key, entry] : found) {
      std::vector<int64_t> cuts;
      for (const auto& member : entry.members)
        for (int64_t end : {int64_t{0}, positions}) cuts.push_back(member.i * dilation / stride + end);
      std::sort(cuts.begin(), cuts.end());
      cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
      // A member's range is a run of pieces; what lies between ranges is no piece.
      for (size_t cut = 0; cut + 1 < cuts.size(); ++cut) {
        const int64_t piece = int64_t(entry.pieces.size());
        bool covered = false;
        for (auto& member : entry.members) {
          const int64_t begin = member.i * dilation / stride;
          if (cuts[cut] < begin || cuts[cut] >= begin + positions) continue;
          if (!covered) entry.pieces.push_back({cuts[cut], cuts[cut + 1]});
          if (cuts[cut] == begin) member.first = piece;
          member.last = piece + 1;
          covered = true;
        }
      }
      classes.push_back(std::move(entry));
    }
  }

  // j of the products of a piece whose left factor lies in `left` and whose right factor lies in the image.
  Range products(const LagClass& lags, const Range& piece, const Range& left) const {
    const int64_t shift = lags.lag * dilation;
    const int64_t begin = std::max(left.begin, image.begin - shift) - lags.residue,
                  end = std::min(left.end, image.end - shift) - lags.residue;
    return {std::max(piece.begin, begin > 0 ? ceil_div(begin, stride) : 0),
            std::min(piece.end, end > 0 ? ceil_div(end, stride) : 0)};
  }
};

// What the products of one dim cost.
struct AxisCost {
  double products = 0, pieces = 0;                  // of all lags
  double products_of_zero = 0, pieces_of_zero = 0;  // of lag 0
};

// How a factor is computed.
template <class Acc>
struct KronPlan {
  const KronSource& source;
  const std::array<Axis, 3>& axes;
  std::array<bool, 3> unfolded;
  bool lanes_are_groups;
  ProductTile<Acc> tile;
  const int64_t lanes;
  int64_t channels;        // per group
  int64_t features;        // of a packed vector
  int64_t inner, outer;    // kernel positions of the unfolded dims, and of the others
  int64_t group_blocks;    // the groups, or blocks of `lanes` of them
  int64_t panel_features;  // of a panel of columns
  int64_t panels, row_panels;
  int64_t feature_stride;  // elements between features in a panel

  KronPlan(const KronSource& source, const std::array<Axis, 3>& axes, int unfold, bool grouped,
           const ProductTile<Acc>& tile, int64_t lanes)
      : source(source), axes(axes), lanes_are_groups(grouped), tile(tile), lanes(lanes) {
    const int64_t groups = source.geometry.groups;
    channels = source.channels / groups;
    inner = outer = 1;
    for (int d = 2; d >= 0; --d)
      if (!axes[d].can_lag()) unfold = std::max(unfold, 3 - d);
    for (int d = 0; d < 3; ++d) {
      unfolded[d] = axes[d].kernel > 1 && d >= 3 - unfold;
      (unfolded[d] ? inner : outer) *= axes[d].kernel;
    }
    features = channels * inner;
    group_blocks = grouped ? ceil_div(groups, lanes) : groups;
    feature_stride = grouped ? lanes : 1;
    panel_features = grouped ? tile.nv : tile.nv * lanes;
    panels = ceil_div(features, panel_features);
    row_panels = ceil_div(features, tile.mr);
  }

  // Elements of a panel per position, and of a tile.
  int64_t pitch() const { return tile.nv * lanes; }
  int64_t tile_size() const { return tile.mr * pitch(); }
  // The first panel of columns that reaches the diagonal.
  int64_t first_panel(int64_t row_panel) const { return row_panel * tile.mr / panel_features; }
  bool unfolds() const { return inner > 1; }
  // Packed grid coordinates in a dim that has not been cut into slabs.
  Range extent(int d) const { return unfolded[d] ? Range{0, axes[d].positions} : axes[d].image; }
  // Distances of packed positions in the sums over j.
  int64_t step(int d) const { return unfolded[d] ? 1 : axes[d].stride; }

  // Rough cost in cycles.
  double cost(const std::array<AxisCost, 3>& axis_costs) const {
    double products = 1, pieces = 1, products_of_zero = 1, pieces_of_zero = 1, positions = 1;
    for (int d = 0; d < 3; ++d) {
      positions *= double(extent(d).length());
      const double outputs = double(axes[d].positions);
      products *= unfolded[d] ? outputs : axis_costs[d].products;
      pieces *= unfolded[d] ? 1 : axis_costs[d].pieces;
      products_of_zero *= unfolded[d] ? outputs : axis_costs[d].products_of_zero;
      pieces_of_zero *= unfolded[d] ? 1 : axis_costs[d].pieces_of_zero;
    }
    double upper = 0;  // tiles that reach the upper triangle
    for (int64_t panel = 0; panel < row_panels; ++panel) upper += double(panels - first_panel(panel));
    const double tiles = double(panels * row_panels);
    const double fmas = tile.mr * tile.nv, loads = tile.mr + tile.nv;
    // Two FMAs or two loads per cycle, four cycles from an FMA to the next on the same register.
    const double per_product = std::max({fmas / 2, loads / 2, 4.0}) + 1;
    const double packed = positions * double(panels * pitch());
    const double bytes = packed * double(group_blocks * int64_t(sizeof(Acc)));
    const double together = std::clamp(double(kChunkBytes) / std::max(bytes, 1.0), 1.0,
                                       double(std::max<int64_t>(source.samples, 1)));
    const double per_piece = (2 * fmas + 30) / together;
    const double sums = per_product * (upper * products_of_zero + tiles * (products - products_of_zero) / 2) +
                        per_piece * (upper * pieces_of_zero + tiles * (pieces - pieces_of_zero) / 2);
    return double(group_blocks) * (sums + packed * (unfolds() ? 1.0 : 0.5));
  }
};

// Classes of three dims together, with a lag of zero or a positive one.
struct KronClass {
  std::array<const LagClass*, 3> axes;
  bool diagonal;           // lag zero
  size_t first_piece = 0;  // in the table of a split
  int64_t pieces() const {
    return int64_t(axes[0]->pieces.size() * axes[1]->pieces.size() * axes[2]->pieces.size());
  }
};

template <class Acc>
class KronFactor {
 public:
  KronFactor(const KronPlan<Acc>& plan, const KronUpdate& update, Acc* out)
      : plan_(plan),
        source_(plan.source),
        update_(update),
        out_(out),
        kernels_(kernels<Acc>()),
        scale_(Acc(update.scale)),
        decay_(Acc(update.decay)) {
    size_ = plan.channels * plan.inner * plan.outer + update.homogeneous;
    for (int64_t f = 0; f < plan.features; ++f)
      rows_.push_back(f / plan.inner * plan.inner * plan.outer + f % plan.inner);
    choose_slabs();
    fill_offsets();
    list_strips();
  }

  void run() {
    packed_ = workspace_.get<Acc>(std::max<int64_t>(chunk_ * box_positions_ * position_size_, 1));
    for (size_t begin = 0; begin < strips_.size();) {
      size_t end = begin;
      int64_t elements = 0;
      for (; end < strips_.size(); ++end) {
        const int64_t bytes = (elements + strips_[end].size) * splits_ * int64_t(sizeof(Acc));
        if (end > begin && bytes > kAccumulatorBytes) break;
        strips_[end].offset = elements;
        elements += strips_[end].size;
      }
      pass(begin, end, elements);
      begin = end;
    }
    if (update_.homogeneous) corner();
    if (!stores_tiles_ || source_.samples == 0 || slabs_ == 0) mirror();
  }

 private:
  // All tiles of some rows in one class.
  struct Strip {
    int64_t block, row_panel;  // row_panel == row_panels: the sums of the vectors themselves
    size_t lags;
    int64_t first_panel, size, offset;  // its tiles [panel][piece][mr][width]
  };
  struct TileOf {
    size_t strip;
    int64_t panel;
  };
  // The positions of one piece in one split of a chunk.
  struct Piece {
    int64_t count[4], stride[4];
    int64_t left, right;
  };

  // --- What is summed when. ---

  void list_strips() {
    for (int d = 0; d < 3; ++d) {
      whole_[d] = {0, 0, {{0, 0, 0, 1}}, {{0, plan_.axes[d].positions}}};
      if (plan_.axes[d].positions == 0) whole_[d].pieces.clear(), whole_[d].members[0].last = 0;
    }
    const auto classes = [&](int d) {
      std::vector<const LagClass*> list;
      if (plan_.unfolded[d]) {
        list.push_back(&whole_[d]);
      } else {
        for (const LagClass& entry : plan_.axes[d].classes) list.push_back(&entry);
      }
      return list;
    };
    for (const LagClass* a : classes(0))
      for (const LagClass* b : classes(1))
        for (const LagClass* c : classes(2)) {
          const int64_t sign = a->lag ? a->lag : b->lag ? b->lag : c->lag;
          if (sign >= 0) classes_.push_back({{a, b, c}, sign == 0});
        }
    for (int64_t block = 0; block < plan_.group_blocks; ++block)
      for (int64_t panel = 0; panel < plan_.row_panels + update_.homogeneous; ++panel)
        for (size_t c = 0; c < classes_.size(); ++c) {
          const KronClass& lags = classes_[c];
          const bool sums = panel == plan_.row_panels;
          if (sums && !lags.diagonal) continue;
          const int64_t first = lags.diagonal && !sums ? plan_.first_panel(panel) : 0;
          strips_.push_back(
              {block, panel, c, first, lags.pieces() * (plan_.panels - first) * plan_.tile_size(), 0});
        }
    splits_ = std::clamp<int64_t>(ceil_div(kItems, std::max<int64_t>(int64_t(strips_.size()), 1)), 1, kItems);
    stores_tiles_ = plan_.outer == 1 && !plan_.lanes_are_groups && splits_ == 1;
  }

  // The largest slab (all, some planes, some lines of one plane, or part of one line) whose packed vectors
  // fit. A slab is a range of left factors; right factors lie in it or in a border around it.
  void choose_slabs() {
    const int64_t limit = options().chunk_bytes ? options().chunk_bytes : kSlabBytes;
    for (int d = 0; d < 3; ++d) slab_[d] = std::max<int64_t>(plan_.extent(d).length(), 1);
    bool first = true;
    for (int d = 0; d < 3; ++d) {
      const int64_t reach = plan_.unfolded[d] ? 0 : (plan_.axes[d].kernel - 1) * plan_.axes[d].dilation;
      after_[d] = reach, before_[d] = first ? 0 : reach;  // the first lag that is not zero is positive
      if (reach) first = false;
    }
    const auto box_positions = [&] {
      int64_t positions = 1;
      for (int d = 0; d < 3; ++d)
        positions *=
            std::min(before_[d] + slab_[d] + after_[d], std::max<int64_t>(plan_.extent(d).length(), 1));
      return positions;
    };
    position_size_ = std::max<int64_t>(plan_.group_blocks * plan_.panels * plan_.pitch(), 1);
    for (int d = 0; box_positions() * position_size_ * int64_t(sizeof(Acc)) > limit;) {
      while (d < 3 && slab_[d] == 1) ++d;
      if (d == 3) break;
      slab_[d] = ceil_div(slab_[d], 2);
    }
    slabs_ = 1;
    for (int d = 0; d < 3; ++d) slabs_ *= ceil_div(plan_.extent(d).length(), slab_[d]);
    box_positions_ = box_positions();
    const int64_t target = options().chunk_bytes ? options().chunk_bytes : kChunkBytes;
    chunk_ = slabs_ > 1
                 ? 1
                 : std::clamp<int64_t>(target / (box_positions_ * position_size_ * int64_t(sizeof(Acc))), 1,
                                       std::max<int64_t>(source_.samples, 1));
  }

  // Left factors of slab `index`, and everything that it reads.
  void place_slab(int64_t index) {
    for (int d = 2; d >= 0; --d) {
      const Range extent = plan_.extent(d);
      const int64_t count = ceil_div(extent.length(), slab_[d]),
                    begin = extent.begin + index % count * slab_[d];
      index /= count;
      left_[d] = {begin, std::min(begin + slab_[d], extent.end)};
      box_[d] = {std::max(begin - before_[d], extent.begin), std::min(left_[d].end + after_[d], extent.end)};
    }
    box_stride_ = {box_[1].length() * box_[2].length(), box_[2].length(), 1};
  }

  void pass(size_t strip_begin, size_t strip_end, int64_t elements) {
    const int64_t chunks = ceil_div(source_.samples, chunk_) * slabs_;
    Workspace workspace;
    Acc* sums = workspace.get<Acc>(std::max<int64_t>(splits_ * elements, 1));
    if (chunks == 0) std::fill_n(sums, splits_ * elements, Acc(0));
    std::vector<TileOf> tiles;
    for (size_t s = strip_begin; s < strip_end; ++s)
      for (int64_t panel = strips_[s].first_panel; panel < plan_.panels; ++panel) tiles.push_back({s, panel});
    std::stable_sort(tiles.begin(), tiles.end(), [&](const TileOf& a, const TileOf& b) {
      return std::pair(strips_[a.strip].block, a.panel) < std::pair(strips_[b.strip].block, b.panel);
    });
    for (int64_t chunk = 0, slab = 0; slab < slabs_; ++slab) {
      place_slab(slab);
      for (int64_t n = 0; n < source_.samples; n += chunk_, ++chunk) {
        const int64_t samples = std::min(chunk_, source_.samples - n);
        if (chunks > 1 || strip_begin == 0) pack(n, samples);  // a single chunk stays
        place_pieces(samples);
        const int64_t count = int64_t(tiles.size());
        parallel_for(0, count * splits_, 1, [&](int64_t begin, int64_t end) {
          // A few rows at a time, whose panel of columns is still in the L1 cache for the next tile.
          for (int64_t depth = 0; depth < depths_; ++depth)
            for (int64_t i = begin; i < end; ++i) {
              const TileOf& tile = tiles[i % count];
              const int64_t split = i / count;
              add_tile(strips_[tile.strip], tile.panel, split, depth, samples, chunk == 0,
                       chunk + 1 == chunks, sums + split * elements);
            }
        });
      }
    }
    finish(strip_begin, strip_end, elements, sums, chunks == 0);
  }

  // Where the factors of every piece lie in the packed samples.
  void place_pieces(int64_t samples) {
    pieces_.clear();
    const int64_t box = product(box_lengths());
    for (int64_t split = 0; split < splits_; ++split) {
      Range share{0, samples};  // of the samples, or else of the longest dim
      std::array<Range, 3> left = left_;
      const auto cut = [&](Range& range) {
        const int64_t length = range.length();
        range = {range.begin + length * split / splits_, range.begin + length * (split + 1) / splits_};
      };
      int longest = 0;
      for (int d = 1; d < 3; ++d)
        if (left[d].length() > left[longest].length()) longest = d;
      cut(samples >= splits_ || samples >= left[longest].length() ? share : left[longest]);
      for (KronClass& lags : classes_) {
        lags.first_piece = pieces_.size() - (split ? split * split_pieces_ : 0);
        int64_t shift = 0;
        for (int d = 0; d < 3; ++d) shift += lags.axes[d]->lag * plan_.axes[d].dilation * box_stride_[d];
        for (const Range& a : lags.axes[0]->pieces)
          for (const Range& b : lags.axes[1]->pieces)
            for (const Range& c : lags.axes[2]->pieces) {
              const std::array<const Range*, 3> ranges{&a, &b, &c};
              Piece piece{{share.length()}, {box}, share.begin * box, 0};
              for (int d = 0; d < 3; ++d) {
                const Axis& axis = plan_.axes[d];
                const Range j = plan_.unfolded[d] ? Range{std::max(ranges[d]->begin, left[d].begin),
                                                          std::min(ranges[d]->end, left[d].end)}
                                                  : axis.products(*lags.axes[d], *ranges[d], left[d]);
                piece.count[d + 1] = j.length(), piece.stride[d + 1] = plan_.step(d) * box_stride_[d];
                piece.left +=
                    (j.begin * plan_.step(d) + lags.axes[d]->residue - box_[d].begin) * box_stride_[d];
              }
              piece.right = piece.left + shift;
              merge_dims(piece);
              pieces_.push_back(piece);
            }
      }
      if (split == 0) split_pieces_ = int64_t(pieces_.size());
    }
    depths_ = 1;
    if (plan_.outer > 1) return;
    depth_rows_ = std::max<int64_t>(kDepthBytes / (plan_.pitch() * int64_t(sizeof(Acc))), 1);
    for (const Piece& piece : pieces_) {
      if (piece.count[0] * piece.count[1] * piece.count[2] > 1) return;
      depths_ = std::max(depths_, ceil_div(piece.count[3], depth_rows_));
    }
  }

  // Adds one split of the packed samples to a tile of every piece.
  void add_tile(const Strip& strip, int64_t panel, int64_t split, int64_t depth, int64_t samples,
                bool first_chunk, bool last_chunk, Acc* sums) const {
    static constexpr Acc kOnes[8 * 64 / sizeof(Acc)] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const ProductTile<Acc>& tile = plan_.tile;
    const int64_t panel_stride = samples * product(box_lengths()) * plan_.pitch();
    const Acc* block = packed_ + strip.block * plan_.panels * panel_stride;
    const bool ones = strip.row_panel == plan_.row_panels,
               stores = stores_tiles_ && last_chunk && depth + 1 == depths_ && !ones;
    const int64_t row = strip.row_panel * tile.mr;
    const Acc* left =
        block + row / plan_.panel_features * panel_stride + row % plan_.panel_features * plan_.feature_stride;
    const Acc* right = block + panel * panel_stride;
    const KronClass& lags = classes_[strip.lags];
    const Piece* pieces = pieces_.data() + split * split_pieces_ + lags.first_piece;
    const int64_t count = lags.pieces();
    Acc* to = sums + strip.offset + (panel - strip.first_panel) * count * plan_.tile_size();
    alignas(64) Acc whole[kLargestTile];  // a tile that is complete at once
    if (stores && first_chunk && depths_ == 1) to = whole;
    ProductJob<Acc> job;
    job.left_pitch = ones ? 0 : plan_.pitch(), job.right_pitch = plan_.pitch();
    job.add = !first_chunk || depth > 0;
    for (int64_t p = 0; p < count; ++p, to += plan_.tile_size()) {
      const Piece& piece = pieces[p];
      std::copy_n(piece.count, 4, job.count);
      std::copy_n(piece.stride, 4, job.stride);
      int64_t begin = 0;
      if (depths_ > 1) {
        begin = std::min(depth * depth_rows_, piece.count[3]);
        job.count[3] = std::min(depth_rows_, piece.count[3] - begin);
        begin *= piece.stride[3];
      }
      if (job.count[3] == 0 && !job.add) std::fill_n(to, plan_.tile_size(), Acc(0));
      if (job.count[3] > 0) {
        job.left = ones ? kOnes : left + (piece.left + begin) * plan_.pitch();
        job.right = right + (piece.right + begin) * plan_.pitch();
        job.sum = to;
        tile.run(job);
      }
      if (stores) store_tile(strip, panel, to);
    }
  }

  void store_tile(const Strip& strip, int64_t panel, const Acc* tile) const {
    const int64_t row = strip.row_panel * plan_.tile.mr, column = panel * plan_.panel_features;
    plan_.tile.store({scale_, decay_, out_ + strip.block * size_ * size_, size_}, tile, row,
                     std::min<int64_t>(plan_.tile.mr, plan_.features - row), column,
                     std::min(plan_.panel_features, plan_.features - column));
  }

  // The innermost dim as long as possible; no position at all is an innermost count of 0.
  static void merge_dims(Piece& job) {
    for (int d = 0; d < 3; ++d)
      if (job.count[d] == 0) job.count[3] = 0;
    for (int d = 2; d >= 0; --d) {
      if (job.count[d] != 1 && job.stride[d] != job.count[3] * job.stride[3] && job.count[3] != 1) continue;
      if (job.count[d] == 1) continue;
      if (job.count[3] == 1) job.stride[3] = job.stride[d];
      job.count[3] *= job.count[d], job.count[d] = 1;
    }
  }

  Dims box_lengths() const { return {box_[0].length(), box_[1].length(), box_[2].length()}; }

  // --- Packing. ---

  int64_t groups_in(int64_t block) const {
    return plan_.lanes_are_groups ? std::min(plan_.lanes, source_.geometry.groups - block * plan_.lanes) : 1;
  }
  int64_t first_channel(int64_t block) const {
    return block * (plan_.lanes_are_groups ? plan_.lanes : 1) * plan_.channels;
  }

  // Where the entries of a vector lie, in the order of the panels: relative to the first channel of the
  // block, or in a window of lines [channel][kernel line][w].
  void fill_offsets() {
    for (int64_t block : {int64_t{0}, plan_.group_blocks - 1}) {
      std::vector<int64_t>& offsets = offsets_[block > 0];
      offsets.clear();
      const int64_t groups = groups_in(block), w = plan_.unfolded[2] ? plan_.axes[2].kernel : 1;
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
  int64_t window_width() const {
    const int64_t width =
        std::min(before_[2] + slab_[2] + after_[2], std::max<int64_t>(plan_.extent(2).length(), 1));
    return plan_.unfolded[2]
               ? (width - 1) * plan_.axes[2].stride + (plan_.axes[2].kernel - 1) * plan_.axes[2].dilation + 1
               : width;
  }

  void pack(int64_t first, int64_t samples) const {
    const int64_t lines = box_[0].length() * box_[1].length(), width = box_[2].length(),
                  blocks = plan_.group_blocks;
    const int64_t parts = std::clamp<int64_t>(ceil_div(kItems, samples * blocks), 1, lines * width);
    const bool by_lines = lines >= parts;
    parallel_for(0, samples * blocks * parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<Acc> window(
          plan_.unfolds() ? groups_in(0) * plan_.channels * window_lines() * window_width() : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i % parts, block = i / parts % blocks, sample = i / parts / blocks;
        const auto share = [&](int64_t length, bool cut) {
          return cut ? Range{length * part / parts, length * (part + 1) / parts} : Range{0, length};
        };
        const Range some_lines = share(lines, by_lines), columns = share(width, !by_lines);
        Acc* to = packed_ + (block * plan_.panels * samples + sample) * lines * width * plan_.pitch();
        for (int64_t line = some_lines.begin; line < some_lines.end; ++line) {
          const int64_t d = box_[0].begin + line / box_[1].length(),
                        h = box_[1].begin + line % box_[1].length();
          Acc* dst = to + (line * width + columns.begin) * plan_.pitch();
          const int64_t panel_stride = samples * lines * width * plan_.pitch();
          const Range w{box_[2].begin + columns.begin, box_[2].begin + columns.end};
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
                first_channel(block) * source_.channel_stride;
            const bool contiguous =
                source_.channel_stride == 1 &&
                (!plan_.lanes_are_groups || (plan_.channels == 1 && groups_in(block) == plan_.lanes));
            pack_panels(source_.storage, source_.data, offset, plan_.axes[2].step * source_.stride[2],
                        w.length(), block, contiguous, dst, panel_stride);
          }
        }
      }
    });
  }

  void pack_panels(Storage storage, const void* from, int64_t offset, int64_t stride, int64_t count,
                   int64_t block, bool contiguous, Acc* dst, int64_t panel_stride) const {
    const std::vector<int64_t>& offsets = offsets_[block > 0 && block + 1 == plan_.group_blocks];
    const int64_t entries = int64_t(offsets.size()), pitch = plan_.pitch();
    for (int64_t begin = 0; begin < entries; begin += pitch, dst += panel_stride)
      kernels_.pack[storage](from, offset, stride, count,
                             {offsets.data() + begin, std::min(pitch, entries - begin), pitch, contiguous},
                             false, dst, pitch);
  }

  // Coordinate in the image of packed coordinate y and kernel position k of an unfolded dim.
  int64_t coordinate(int d, int64_t y, int64_t k) const {
    const Axis& axis = plan_.axes[d];
    return (plan_.unfolded[d] ? y * axis.stride + k * axis.dilation : y) * axis.step - axis.padding;
  }
  int64_t window_lines() const { return plan_.inner / (plan_.unfolded[2] ? plan_.axes[2].kernel : 1); }

  // The lines of the image under the unfolded part of the kernel at (d, h, w): [channel][kernel line][w],
  // zeros outside of the image.
  void fill_window(int64_t n, int64_t block, int64_t d, int64_t h, const Range& w, Acc* window) const {
    const int64_t kernel_h = plan_.unfolded[1] ? plan_.axes[1].kernel : 1, lines = window_lines(),
                  width = window_width();
    const Axis& axis = plan_.axes[2];
    const int64_t length = plan_.unfolded[2]
                               ? (w.length() - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1
                               : w.length();
    const int64_t x = coordinate(2, w.begin, 0);
    Range inside;
    inside.begin = std::min(x < 0 ? ceil_div(-x, axis.step) : 0, length);
    inside.end =
        std::clamp(source_.size[2] > x ? ceil_div(source_.size[2] - x, axis.step) : 0, inside.begin, length);
    const int64_t count = groups_in(block) * plan_.channels;
    for (int64_t k = 0; k < lines; ++k) {
      const int64_t z = coordinate(0, d, k / kernel_h), y = coordinate(1, h, k % kernel_h);
      const bool exists =
          z >= 0 && z < source_.size[0] && y >= 0 && y < source_.size[1] && inside.length() > 0;
      const Range valid = exists ? inside : Range{0, 0};
      for (int64_t c = 0; c < count; ++c) {
        Acc* to = window + (c * lines + k) * width;
        std::fill(to, to + valid.begin, Acc(0));
        if (exists) {
          const int64_t offset = n * source_.sample_stride +
                                 (first_channel(block) + c) * source_.channel_stride + z * source_.stride[0] +
                                 y * source_.stride[1] + (x + inside.begin * axis.step) * source_.stride[2];
          kernels_.pack[source_.storage](
              source_.data, offset, 0, 1,
              {line_offsets_.data(), inside.length(), inside.length(), axis.step * source_.stride[2] == 1},
              false, to + inside.begin, 0);
        }
        std::fill(to + valid.end, to + length, Acc(0));
      }
    }
  }

  // --- From pieces to the factor. ---

  // Row of feature f at outer kernel position i.
  int64_t row_of(int64_t f, int64_t i) const { return rows_[f] + i * plan_.inner; }

  void finish(size_t strip_begin, size_t strip_end, int64_t elements, const Acc* sums,
              bool nothing_stored) const {
    std::vector<size_t> firsts;  // of the strips of one row panel
    for (size_t s = strip_begin; s < strip_end; ++s) {
      const Strip& strip = strips_[s];
      if (stores_tiles_ && !nothing_stored && strip.row_panel < plan_.row_panels) continue;
      if (firsts.empty() || strip.row_panel != strips_[firsts.back()].row_panel ||
          strip.block != strips_[firsts.back()].block)
        firsts.push_back(s);
    }
    parallel_for(0, int64_t(firsts.size()), 1, [&](int64_t begin, int64_t end) {
      std::vector<Acc> row(plan_.panels * plan_.pitch());
      for (int64_t i = begin; i < end; ++i)
        for (size_t s = firsts[i]; s < strip_end && strips_[s].row_panel == strips_[firsts[i]].row_panel &&
                                   strips_[s].block == strips_[firsts[i]].block;
             ++s)
          finish_strip(strips_[s], elements, sums + strips_[s].offset, row.data());
    });
  }

  // Writes all blocks of a strip: the entry of (f, i) and (f', i') to the row of (f, i).
  void finish_strip(const Strip& strip, int64_t elements, const Acc* tiles, Acc* row) const {
    const bool ones = strip.row_panel == plan_.row_panels;
    const int64_t begin = strip.row_panel * plan_.tile.mr,
                  rows = ones ? 1 : std::min<int64_t>(plan_.tile.mr, plan_.features - begin);
    const KronClass& lags = classes_[strip.lags];
    const int64_t groups = groups_in(strip.block);
    for (const auto& a : lags.axes[0]->members)
      for (const auto& b : lags.axes[1]->members)
        for (const auto& c : lags.axes[2]->members) {
          const int64_t i = outer_position(a.i, b.i, c.i), other = outer_position(a.other, b.other, c.other);
          for (int64_t m = 0; m < rows; ++m) {
            add_pieces(strip, elements, tiles + m * plan_.pitch(), {a, b, c}, row);
            for (int64_t g = 0; g < groups; ++g) {
              Acc* out = out_ + (strip.block * plan_.feature_stride + g) * size_ * size_;
              if (ones) {
                write_sums(out, other, row + g);
              } else {
                write_row(out, begin + m, i, other, lags.diagonal, strip.first_panel * plan_.panel_features,
                          row + g);
              }
            }
          }
        }
  }

  int64_t outer_position(int64_t d, int64_t h, int64_t w) const {
    const auto kernel = [&](int axis) { return plan_.unfolded[axis] ? 1 : plan_.axes[axis].kernel; };
    return (d * kernel(1) + h) * kernel(2) + w;
  }

  // One row of the tiles of a member, its pieces and splits added up.
  void add_pieces(const Strip& strip, int64_t elements, const Acc* tiles,
                  const std::array<LagClass::Member, 3>& member, Acc* row) const {
    const KronClass& lags = classes_[strip.lags];
    const int64_t pitch = plan_.pitch(), panels = plan_.panels - strip.first_panel;
    std::fill_n(row, panels * pitch, Acc(0));
    for (int64_t split = 0; split < splits_; ++split)
      for (int64_t a = member[0].first; a < member[0].last; ++a)
        for (int64_t b = member[1].first; b < member[1].last; ++b)
          for (int64_t c = member[2].first; c < member[2].last; ++c) {
            const int64_t piece =
                (a * int64_t(lags.axes[1]->pieces.size()) + b) * int64_t(lags.axes[2]->pieces.size()) + c;
            const Acc* from = tiles + split * elements + piece * plan_.tile_size();
            for (int64_t panel = 0; panel < panels; ++panel, from += lags.pieces() * plan_.tile_size())
              for (int64_t e = 0; e < pitch; ++e) row[panel * pitch + e] += from[e];
          }
  }

  // scale * value + decay * before
  Acc updated(Acc value, const Acc& before) const {
    return update_.decay == 0 ? scale_ * value : scale_ * value + decay_ * before;
  }

  void write_row(Acc* out, int64_t f, int64_t i, int64_t other, bool diagonal, int64_t first_feature,
                 const Acc* row) const {
    const int64_t r = row_of(f, i), stride = plan_.feature_stride;
    Acc* to = out + r * size_;
    for (int64_t g = diagonal ? f : 0; g < plan_.features; ++g) {
      const int64_t s = row_of(g, other);
      to[s] = updated(row[(g - first_feature) * stride], r < s ? to[s] : out[s * size_ + r]);
    }
  }

  // The column of the homogeneous coordinate.
  void write_sums(Acc* out, int64_t i, const Acc* row) const {
    for (int64_t f = 0; f < plan_.features; ++f) {
      const int64_t r = row_of(f, i);
      Acc& entry = out[r * size_ + size_ - 1];
      entry = updated(row[f * plan_.feature_stride], entry);
      out[(size_ - 1) * size_ + r] = entry;
    }
  }

  void corner() const {
    const Acc rows = Acc(double(source_.samples) * double(product(source_.positions)));
    for (int64_t group = 0; group < source_.geometry.groups; ++group) {
      Acc& entry = out_[(group + 1) * size_ * size_ - 1];
      entry = updated(rows, entry);
    }
  }

  // The entries that no strip wrote: of (f, i) and (f', i') with i' < i, or i' = i and f' < f.
  void mirror() const {
    const int64_t groups = source_.geometry.groups;
    constexpr int64_t kBlock = 16;  // features
    const int64_t blocks = ceil_div(plan_.features, kBlock);
    parallel_for(0, groups * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        // Rows far down have many entries: from both ends by turns.
        const int64_t k = item % blocks, block = k % 2 ? blocks - 1 - k / 2 : k / 2;
        Acc* out = out_ + item / blocks * size_ * size_;
        const int64_t f_begin = block * kBlock, f_end = std::min(f_begin + kBlock, plan_.features);
        for (int64_t g_begin = 0; g_begin < plan_.features; g_begin += kBlock)
          mirror_block(out, f_begin, f_end, g_begin, std::min(g_begin + kBlock, plan_.features));
      }
    });
  }

  void mirror_block(Acc* out, int64_t f_begin, int64_t f_end, int64_t g_begin, int64_t g_end) const {
    for (int64_t f = f_begin; f < f_end; ++f)
      for (int64_t g = g_begin; g < g_end; ++g)
        for (int64_t i = 0; i < plan_.outer; ++i) {
          Acc* to = out + row_of(f, i) * size_ + row_of(g, 0);
          const Acc* from = out + row_of(g, 0) * size_ + row_of(f, i);
          for (int64_t other = 0; other < i + (g < f); ++other)
            to[other * plan_.inner] = from[other * plan_.inner * size_];
        }
  }

  const KronPlan<Acc>& plan_;
  const KronSource& source_;
  const KronUpdate& update_;
  Acc* const out_;
  const Kernels<Acc>& kernels_;
  const Acc scale_, decay_;
  int64_t size_;  // D'
  Workspace workspace_;
  Acc* packed_;
  Dims slab_, before_, after_;       // left factors of a slab, and how far right factors reach out of it
  int64_t slabs_, chunk_;            // per sample; samples per chunk
  int64_t position_size_;            // packed elements per position, all panels
  int64_t box_positions_;            // packed at most per sample and slab
  std::array<Range, 3> left_, box_;  // of this slab, in packed coordinates
  Dims box_stride_;
  std::array<LagClass, 3> whole_;
  std::vector<KronClass> classes_;
  std::vector<Strip> strips_;
  int64_t splits_;
  std::vector<Piece> pieces_;  // of every split and class
  int64_t split_pieces_, depths_, depth_rows_;
  bool stores_tiles_;                // tiles go to `out` once they are complete
  std::vector<int64_t> rows_;        // of the features at the first outer kernel position
  std::vector<int64_t> offsets_[2];  // of the first blocks of groups, of the last
  std::vector<int64_t> line_offsets_;
};

}  // namespace

int64_t KronSource::row_dims(const Tensor& rows) {
  return int64_t(Rows(rows, 0, rows.dim() - 1).sizes.size());
}

KronSource::KronSource(const Tensor& rows) : data(rows.const_data_ptr()), storage(storage_of(rows)) {
  const int64_t last = rows.dim() - 1;
  channels = rows.size(last), channel_stride = rows.stride(last);
  const Rows merged(rows, 0, last);
  const int64_t dims = int64_t(merged.sizes.size());
  for (int64_t d = 0; d < std::min<int64_t>(dims, 3); ++d) {
    size[2 - d] = merged.sizes[dims - 1 - d];
    stride[2 - d] = merged.strides[dims - 1 - d];
  }
  if (dims == 4) samples = merged.sizes[0], sample_stride = merged.strides[0];
  positions = size;
}

KronSource::KronSource(const Patches& patches)
    : data(patches.input.const_data_ptr()),
      storage(storage_of(patches.input)),
      samples(patches.input.size(0)),
      sample_stride(patches.input.stride(0)),
      channels(patches.input.size(1)),
      channel_stride(patches.input.stride(1)),
      geometry(patches.geometry),
      positions(patches.positions) {
  const int64_t dims = patches.input.dim() - 2;
  for (int64_t d = 0; d < dims; ++d)
    size[3 - dims + d] = patches.input.size(2 + d), stride[3 - dims + d] = patches.input.stride(2 + d);
}

template <class Acc>
void kron_factor(const KronSource& source, const KronUpdate& update, Acc* out) {
  std::array<Axis, 3> axes{Axis(source, 0), Axis(source, 1), Axis(source, 2)};
  std::array<AxisCost, 3> costs;
  for (int d = 0; d < 3; ++d) {
    if (!axes[d].can_lag()) continue;
    axes[d].find_classes();
    for (const LagClass& lags : axes[d].classes)
      for (const Range& piece : lags.pieces) {
        const double products = double(axes[d].products(lags, piece, axes[d].image).length());
        costs[d].products += products, costs[d].pieces += 1;
        if (lags.lag == 0) costs[d].products_of_zero += products, costs[d].pieces_of_zero += 1;
      }
  }
  const Kernels<Acc>& kernels = cpu::kernels<Acc>();
  const int64_t forced = options().kron;
  std::unique_ptr<KronPlan<Acc>> best;
  double best_cost = 0;
  for (int grouped = 0; grouped < (source.geometry.groups > 1 ? 2 : 1); ++grouped)
    for (int unfold = 0; unfold <= 3; ++unfold) {
      if (forced && forced != 1 + unfold && forced != 5 + unfold) continue;
      if (forced && source.geometry.groups > 1 && grouped != forced / 5) continue;
      const ProductTile<Acc>* tiles = grouped ? kernels.grouped_products : kernels.dense_products;
      for (int t = 0; t < (grouped ? kernels.grouped_product_count : kernels.dense_product_count); ++t) {
        auto plan = std::make_unique<KronPlan<Acc>>(source, axes, unfold, grouped, tiles[t], kernels.lanes);
        const double cost = plan->cost(costs);
        if (!best || cost < best_cost) best = std::move(plan), best_cost = cost;
      }
    }
  KronFactor<Acc>(*best, update, out).run();
}

template void kron_factor<float>(const KronSource&, const KronUpdate&, float*);
template void kron_factor<double>(const KronSource&, const KronUpdate&, double*);

}  // namespace backpack_cuda::cpu
