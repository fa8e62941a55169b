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

#include <torch/csrc/stable/ops.h>

#include "cpu/contract.h"
#include "cpu/kron_pack.h"
#include "cpu/strided.h"

namespace backpack_cuda::cpu {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kDepthBytes = 24 << 10;   // of a panel of columns: stays in the L1 cache
constexpr int64_t kSplitRows = 256;         // at least, for a split of its own
constexpr int64_t kTaskProducts = 4 << 10;  // positions times tiles that are worth a thread
constexpr int64_t kLargestTile = 1 << 10;   // elements

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
        scale_(Acc(update.scale)),
        decay_(Acc(update.decay)),
        pack_(plan) {
    size_ = plan.channels * plan.inner * plan.outer + update.homogeneous;
    for (int64_t f = 0; f < plan.features; ++f)
      rows_.push_back(f / plan.inner * plan.inner * plan.outer + f % plan.inner);
    list_strips();
  }

  void run() {
    packed_ = workspace_.get<Acc>(plan_.packed_size());
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
    if (!stores_tiles_ || source_.samples == 0 || plan_.slabs == 0) mirror();
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
    // Few tiles: threads share the rows, where there are many.
    int64_t tiles = 0;
    for (const Strip& strip : strips_) tiles += plan_.panels - strip.first_panel;
    const int64_t rows = source_.samples * product(source_.positions);
    splits_ = std::clamp<int64_t>(
        std::min(ceil_div(kKronItems, std::max<int64_t>(tiles, 1)), rows / kSplitRows), 1, kKronItems);
    stores_tiles_ = plan_.outer == 1 && !plan_.lanes_are_groups && splits_ == 1;
  }

  void pass(size_t strip_begin, size_t strip_end, int64_t elements) {
    const int64_t chunks = ceil_div(source_.samples, plan_.chunk) * plan_.slabs;
    Workspace workspace;
    Acc* sums = workspace.get<Acc>(std::max<int64_t>(splits_ * elements, 1));
    if (chunks == 0) std::fill_n(sums, splits_ * elements, Acc(0));
    std::vector<TileOf> tiles;
    for (size_t s = strip_begin; s < strip_end; ++s)
      for (int64_t panel = strips_[s].first_panel; panel < plan_.panels; ++panel) tiles.push_back({s, panel});
    std::stable_sort(tiles.begin(), tiles.end(), [&](const TileOf& a, const TileOf& b) {
      return std::pair(strips_[a.strip].block, a.panel) < std::pair(strips_[b.strip].block, b.panel);
    });
    for (int64_t chunk = 0, index = 0; index < plan_.slabs; ++index) {
      const KronSlab slab(plan_, index);
      for (int64_t n = 0; n < source_.samples; n += plan_.chunk, ++chunk) {
        const int64_t samples = std::min(plan_.chunk, source_.samples - n);
        if (chunks > 1 || strip_begin == 0) pack_.pack(slab, n, samples, packed_);  // a single chunk stays
        place_pieces(slab, samples);
        const int64_t count = int64_t(tiles.size());
        const int64_t grain = ceil_div(kTaskProducts, samples * slab.positions() / splits_ + 1);
        parallel_for(0, count * splits_, grain, [&](int64_t begin, int64_t end) {
          // A few rows at a time, whose panel of columns is still in the L1 cache for the next tile.
          for (int64_t depth = 0; depth < depths_; ++depth)
            for (int64_t i = begin; i < end; ++i) {
              const TileOf& tile = tiles[i % count];
              const int64_t split = i / count;
              add_tile(strips_[tile.strip], tile.panel, split, depth, chunk == 0, chunk + 1 == chunks,
                       sums + split * elements);
            }
        });
      }
    }
    finish(strip_begin, strip_end, elements, sums, chunks == 0);
  }

  // Where the factors of every piece lie in the packed samples.
  void place_pieces(const KronSlab& slab, int64_t samples) {
    pieces_.clear();
    const int64_t box = slab.positions();
    const Dims box_stride = slab.stride();
    panel_stride_ = samples * box * plan_.pitch();
    for (int64_t split = 0; split < splits_; ++split) {
      Range share{0, samples};  // of the samples, or else of the longest dim
      std::array<Range, 3> left = slab.left;
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
        for (int d = 0; d < 3; ++d) shift += lags.axes[d]->lag * plan_.axes[d].dilation * box_stride[d];
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
                piece.count[d + 1] = j.length(), piece.stride[d + 1] = plan_.step(d) * box_stride[d];
                piece.left +=
                    (j.begin * plan_.step(d) + lags.axes[d]->residue - slab.box[d].begin) * box_stride[d];
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
  void add_tile(const Strip& strip, int64_t panel, int64_t split, int64_t depth, bool first_chunk,
                bool last_chunk, Acc* sums) const {
    static constexpr Acc kOnes[8 * 64 / sizeof(Acc)] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const ProductTile<Acc>& tile = plan_.tile;
    const Acc* block = packed_ + strip.block * plan_.panels * panel_stride_;
    const bool ones = strip.row_panel == plan_.row_panels,
               stores = stores_tiles_ && last_chunk && depth + 1 == depths_ && !ones;
    const int64_t row = strip.row_panel * tile.mr;
    const Acc* left = block + row / plan_.panel_features * panel_stride_ +
                      row % plan_.panel_features * plan_.feature_stride;
    const Acc* right = block + panel * panel_stride_;
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
    const int64_t groups = plan_.groups_in(strip.block);
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
  const Acc scale_, decay_;
  int64_t size_;  // D'
  Workspace workspace_;
  const KronPack<Acc> pack_;
  Acc* packed_;
  int64_t panel_stride_;  // of this chunk
  std::array<LagClass, 3> whole_;
  std::vector<KronClass> classes_;
  std::vector<Strip> strips_;
  int64_t splits_;
  std::vector<Piece> pieces_;  // of every split and class
  int64_t split_pieces_, depths_, depth_rows_;
  bool stores_tiles_;          // tiles go to `out` once they are complete
  std::vector<int64_t> rows_;  // of the features at the first outer kernel position
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
  for (Axis& axis : axes)
    if (axis.can_lag()) axis.find_classes();
  const auto plan = choose_plan<Acc>(source, axes);
  KronFactor<Acc>(*plan, update, out).run();
}

template void kron_factor<float>(const KronSource&, const KronUpdate&, float*);
template void kron_factor<double>(const KronSource&, const KronUpdate&, double*);

}  // namespace backpack_cuda::cpu
