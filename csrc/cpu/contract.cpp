#include "cpu/contract.h"

#include <limits>

#include <torch/csrc/stable/ops.h>

#include "cpu/options.h"

namespace backpack_cuda::cpu {

using torch::stable::parallel_for;

template <class Acc>
void ContractPlan<Acc>::choose_tile(const Kernels<Acc>& kernels, int64_t column_vectors) {
  const Tile<Acc>* tiles = lanes_are_groups ? kernels.grouped : kernels.dense;
  const int count = lanes_are_groups ? kernels.grouped_count : kernels.dense_count;
  Tile<Acc> best_tile = tiles[0];
  double best_cost = std::numeric_limits<double>::infinity();
  for (int i = 0; i <= count; ++i) {
    tile = i < count ? tiles[i] : best_tile;
    panels = ceil_div(rows, tile.mr);
    blocks = ceil_div(column_vectors, tile.nv);
    if (cost() < best_cost) best_cost = cost(), best_tile = tile;
  }
  lanes = kernels.lanes;
  column_offset.assign(blocks * tile.nv, 0);
  column_lanes.assign(blocks * tile.nv, 0);
}

template <class Acc>
double ContractPlan<Acc>::cost() const {
  // Two FMAs or two loads per cycle, four cycles from an FMA to the next on the same register, and the loop
  // itself.
  const double fmas = tile.mr * tile.nv, loads = tile.mr + tile.nv;
  return double(groups * panels * blocks) * (std::max({fmas, loads, 8.0}) + tile.nv + 1);
}

template <class Acc>
int64_t ContractPlan<Acc>::strips_per_pass() const {
  constexpr int64_t kArrays = 3;  // sums, sums of squares, unfinished tiles
  return std::clamp<int64_t>(kAccumulatorBytes / (strip_size() * kArrays * int64_t(sizeof(Acc))), 1,
                             strips());
}

namespace {

// One call of contract(): its buffers and its loops.
template <class Acc>
class Contraction {
 public:
  Contraction(const ContractPlan<Acc>& plan, const Operands<Acc>& operands, const ContractResults& results)
      : plan_(plan), operands_(operands), out_(results), kernels_(kernels<Acc>()) {
    centered_ = !plan.rows_are_samples && out_.sum_grad_centered_squared;
    partial_ = plan.slabs > 1 && !plan.rows_are_samples &&
               (out_.squares() || out_.batch_grad || out_.batch_l2 || out_.batch_square);
    whole_strips_ = out_.batch_grad || out_.batch_square;
    strips_per_pass_ = plan.strips_per_pass();
    const int64_t items = plan.strips() * (whole_strips_ ? 1 : plan.blocks);
    splits_ = plan.slabs > 1 ? 1
                             : std::min({ceil_div(kItems, items), split_samples(plan.samples, plan.V),
                                         strips_per_pass_ < plan.strips() ? 1 : kItems});
    store_ = {plan.tile.mr, plan.tile.nv * plan.lanes, plan.rows,
              plan.columns, plan.column_begin,         plan.row_length,
              plan.panels,  plan.lanes_are_groups,     plan.source.empty() ? nullptr : plan.source.data(),
              nullptr};

    split_size_ = strips_per_pass_ * plan.strip_size();
    if (out_.grad || out_.sum_grad_centered_squared) sum_ = workspace_.get<Acc>(splits_ * split_size_);
    if (out_.squares() || out_.batch_square) square_ = workspace_.get<Acc>(splits_ * split_size_);
    if (out_.batch_square && out_.sum_grad_squared) total_ = workspace_.get<Acc>(splits_ * split_size_);

    choose_chunk();
    constexpr int64_t kSlack = 64;  // the last column vector may reach past the last row
    a_ =
        workspace_.get<Acc>(chunk_ * (plan.v_in_a ? V_ : 1) * plan.groups_per_pass() * plan.a_group + kSlack);
    b_ = workspace_.get<Acc>(chunk_ * (plan.v_in_a ? 1 : V_) * strips_per_pass_ * b_strip());
    if (partial_) partial_tiles_ = workspace_.get<Acc>(V_ * split_size_);
    if (out_.batch_l2) norm_ = workspace_.get<double>(chunk_ * strips_per_pass_ * plan.blocks);
    if (out_.batch_grad) {
      strip_scratch_ = plan.strip_size() + plan.columns;
      scratch_ = workspace_.get<Acc>(kItems * strip_scratch_);
    }
  }

  void run(const std::function<void(int64_t, int64_t)>& chunk_packed) {
    const int64_t passes = ceil_div(plan_.strips(), strips_per_pass_),
                  strips = ceil_div(plan_.strips(), passes);
    for (int64_t begin = 0; begin < plan_.strips(); begin += strips) {
      strip_begin_ = begin, strip_end_ = std::min(begin + strips, plan_.strips());
      group_begin_ = strip_begin_ / plan_.panels, group_end_ = ceil_div(strip_end_, plan_.panels);
      count_.assign(splits_, 0);
      for (int64_t n = 0; n < plan_.samples; n += chunk_) {
        const int64_t samples = std::min(chunk_, plan_.samples - n);
        for (int64_t v = 0; v < plan_.V; v += V_) {
          const int64_t V = std::min(V_, plan_.V - v);
          for (int64_t slab = 0; slab < plan_.slabs; ++slab) {
            product(n, samples, v, V, slab, false);
            if (slab == 0 && begin == 0 && plan_.column_begin == 0)
              chunk_packed(n * plan_.V + v, n * plan_.V + v + samples * V);
            if (plan_.rows_are_samples && square_) product(n, samples, v, V, slab, true);
            if (partial_ && slab + 1 < plan_.slabs) continue;
            if (out_.batch_square && v + V < plan_.V) continue;
            const int64_t counted = split_samples(samples, V);
            for (int64_t split = 0; split < splits_; ++split)
              count_[split] += split_begin(counted, split + 1) - split_begin(counted, split);
          }
        }
        if (norm_) reduce_norms(n, samples);
      }
      finish();
    }
  }

 private:
  // Split-up work for threads: fixed, so that results do not depend on their number.
  static constexpr int64_t kItems = 16;

  // What splits divide between them: samples (n, v), or samples n where their sums over v are wanted.
  int64_t split_samples(int64_t samples, int64_t V) const {
    return out_.batch_square ? samples : samples * V;
  }

  // How many samples are packed at a time, or how many output gradients of one sample.
  void choose_chunk() {
    const int64_t size = int64_t(sizeof(Acc)), a = plan_.groups_per_pass() * plan_.a_group * size,
                  b = strips_per_pass_ * b_strip() * size, V = plan_.V;
    const bool whole = plan_.slabs == 1;
    const int64_t target = options().chunk_bytes ? options().chunk_bytes : whole ? kChunkBytes : kSlabBytes;
    const int64_t shared = plan_.packed(a, b, 0), all = std::max<int64_t>(plan_.packed(a, b, V), 1);
    chunk_ = whole ? std::clamp<int64_t>(target / all, 1, plan_.samples) : 1;
    V_ = V;
    if (all > target) V_ = V * std::max(target - shared, target / 2) / std::max<int64_t>(all - shared, 1);
    if (partial_) V_ = std::min(V_, kAccumulatorBytes / (split_size_ * size) - 2);
    V_ = ceil_div(V, ceil_div(V, std::clamp<int64_t>(V_, 1, V)));  // of about equal numbers
  }

  int64_t b_strip() const { return plan_.slab_rows * plan_.tile.mr * plan_.b_lanes(); }
  int64_t split_begin(int64_t samples, int64_t split) const { return ceil_div(samples * split, splits_); }

  // Packs output gradients [v, v + V) of samples [n, n + samples), or a slab of one sample, and contracts
  // them.
  void product(int64_t n, int64_t samples, int64_t v, int64_t V, int64_t slab, bool square) {
    const int64_t groups = group_end_ - group_begin_, strips = strip_end_ - strip_begin_;
    ContractJob<Acc> job{};
    job.a = a_, job.b = b_;
    job.V = V, job.v_begin = v, job.v_end = plan_.V;
    if (operands_.signs) job.signs = operands_.signs + n * plan_.V + v;
    const int64_t a_size = groups * plan_.a_group;
    job.a_v = plan_.v_in_a ? a_size : 0, job.a_sample = plan_.v_in_a ? V * a_size : a_size;
    job.a_group = plan_.a_group;
    job.row_offset = plan_.row_offset.data(), job.column_offset = plan_.column_offset.data(),
    job.column_lanes = plan_.column_lanes.data();
    job.T = operands_.rows_in_slab(slab);
    const int64_t b_size = strips * job.T * plan_.tile.mr * plan_.b_lanes();
    job.b_v = plan_.v_in_a ? 0 : b_size, job.b_sample = plan_.v_in_a ? b_size : V * b_size;
    job.rows = plan_.rows, job.panels = plan_.panels, job.blocks = plan_.blocks,
    job.lanes_are_groups = plan_.lanes_are_groups;
    job.unit_begin = strip_begin_ * plan_.blocks, job.units = strips * plan_.blocks;
    if (plan_.rows_are_samples) {
      job.sum = square ? square_ : sum_;
    } else {
      job.sum = sum_, job.square = square_;
    }
    job.split_size = split_size_;
    job.centered = centered_;
    if (partial_)
      job.partial = partial_tiles_, job.load_partial = slab > 0, job.store_partial = slab + 1 < plan_.slabs;
    job.norm = norm_;
    job.store = store_;
    job.batch_rows = plan_.all_rows, job.batch_v = plan_.samples * plan_.all_rows;
    const int64_t sample_size = plan_.all_rows * plan_.row_length;
    if (out_.batch_grad) {
      job.batch_grad = static_cast<char*>(out_.batch_grad->mutable_data_ptr()) +
                       (v * plan_.samples + n) * sample_size * int64_t(out_.batch_grad->element_size());
      job.store.convert = converter<Acc>(storage_of(*out_.batch_grad));
    }
    if (out_.batch_square)
      job.batch_square = static_cast<Acc*>(out_.batch_square->mutable_data_ptr()) + n * sample_size;
    job.total = total_;

    pack(job, n, samples, slab, square);

    const int64_t units_per_item = whole_strips_ ? plan_.blocks : 1, items = job.units / units_per_item;
    const int64_t slots = std::min(splits_ * items, whole_strips_ ? kItems : splits_ * items);
    const int64_t counted = split_samples(samples, V), per_count = samples * V / counted;
    parallel_for(0, slots, 1, [&](int64_t slot_begin, int64_t slot_end) {
      const int64_t begin = slot_begin * splits_ * items / slots, end = slot_end * splits_ * items / slots;
      for (int64_t i = begin; i < end;) {  // runs of items of one split
        const int64_t split = i / items, last = std::min(end, (split + 1) * items);
        ContractRange<Acc> range;
        range.unit_begin = job.unit_begin + (i - split * items) * units_per_item;
        range.unit_end = job.unit_begin + (last - split * items) * units_per_item;
        range.sample_begin = split_begin(counted, split) * per_count;
        range.sample_end = split_begin(counted, split + 1) * per_count;
        range.split = split, range.split_count = count_[split];
        range.strip = scratch_ ? scratch_ + slot_begin * strip_scratch_ : nullptr;
        plan_.tile.run(job, range);
        i = last;
      }
    });
  }

  // Packs what `job` takes. The operand without V stays from the sample's first output gradients to its last.
  void pack(const ContractJob<Acc>& job, int64_t n, int64_t samples, int64_t slab, bool square) {
    const int64_t shared = job.v_begin == 0 || plan_.slabs > 1 ? samples : 0, all = samples * job.V;
    const int64_t parts = all < kItems ? ceil_div(kItems, all) : 1;
    parallel_for(0, (shared + all) * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t item = i / parts;
        const bool once = item < shared;
        const int64_t sample = once ? item : (item - shared) / job.V, v = once ? 0 : (item - shared) % job.V;
        const typename Operands<Acc>::Piece piece{n + sample, job.v_begin + v, slab,
                                                  i % parts,  parts,           square};
        if (once != plan_.v_in_a)
          operands_.pack_a(piece, group_begin_, group_end_, a_ + sample * job.a_sample + v * job.a_v);
        else
          operands_.pack_b(piece, strip_begin_, strip_end_, b_ + sample * job.b_sample + v * job.b_v);
      }
    });
  }

  void reduce_norms(int64_t n, int64_t samples) {
    Acc* l2 = static_cast<Acc*>(out_.batch_l2->mutable_data_ptr()) + n;
    const int64_t units = (strip_end_ - strip_begin_) * plan_.blocks;
    for (int64_t i = 0; i < samples; ++i) {
      double total = strip_begin_ > 0 || plan_.column_begin > 0 ? l2[i] : 0.0;
      for (int64_t unit = 0; unit < units; ++unit) total += norm_[i * units + unit];
      l2[i] = Acc(total);
    }
  }

  // Adds up the splits of a strip, into the first one.
  void merge_splits(Acc* sum, Acc* square) const {
    for (int64_t split = 1, total = count_[0]; split < splits_; total += count_[split], ++split) {
      if (count_[split] == 0) continue;
      const int64_t other = split * split_size_;
      const Acc inverse = Acc(1.0 / double(total)), other_inverse = Acc(1.0 / double(count_[split]));
      const Acc weight = Acc(double(total) * double(count_[split]) / double(total + count_[split]));
      for (int64_t i = 0; i < plan_.strip_size(); ++i) {
        if (centered_) {  // Chan, Golub and LeVeque 1979
          const Acc difference = sum[other + i] * other_inverse - sum[i] * inverse;
          square[i] += square[other + i] + difference * difference * weight;
        } else if (square) {
          square[i] += square[other + i];
        }
        if (sum) sum[i] += sum[other + i];
      }
    }
  }

  // Writes one strip to a result of the weight's shape.
  void write(const Tensor& result, const Acc* tiles, int64_t strip, Acc* scratch) const {
    StripStore<Acc> store = store_;
    store.convert = converter<Acc>(storage_of(result));
    kernels_.store_strip(store, tiles, strip, scratch, result.mutable_data_ptr(), 0);
  }

  // Writes the sums of one strip; overwrites `square`.
  void finish_strip(Acc* sum, Acc* square, int64_t strip, Acc* scratch) const {
    merge_splits(sum, square);
    const Acc inverse = Acc(1 / double(plan_.rows_are_samples ? plan_.rows_are_samples : plan_.samples));
    const int64_t size = plan_.strip_size();
    if (out_.grad) write(*out_.grad, sum, strip, scratch);
    if (centered_) {
      write(*out_.sum_grad_centered_squared, square, strip, scratch);
      if (!out_.sum_grad_squared) return;
      for (int64_t i = 0; i < size; ++i) square[i] = uncentered(square[i], sum[i], inverse);
    }
    if (out_.sum_grad_squared) write(*out_.sum_grad_squared, square, strip, scratch);
    if (centered_ || !out_.sum_grad_centered_squared) return;
    kernels_.center(sum, inverse, size, square);
    write(*out_.sum_grad_centered_squared, square, strip, scratch);
  }

  void finish() {
    if (!out_.sums()) return;
    Acc* const squares = total_ ? total_ : square_;
    parallel_for(strip_begin_, strip_end_, 1, [&](int64_t begin, int64_t end) {
      std::vector<Acc> scratch(plan_.columns);
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t offset = (strip - strip_begin_) * plan_.strip_size();
        finish_strip(sum_ ? sum_ + offset : nullptr, squares ? squares + offset : nullptr, strip,
                     scratch.data());
      }
    });
  }

  const ContractPlan<Acc>& plan_;
  const Operands<Acc>& operands_;
  const ContractResults& out_;
  Workspace workspace_;
  const Kernels<Acc>& kernels_;
  bool centered_, partial_, whole_strips_;
  int64_t strips_per_pass_, splits_, split_size_, chunk_, V_, strip_scratch_ = 0;
  StripStore<Acc> store_;
  Acc *sum_ = nullptr, *square_ = nullptr;  // [splits, strips of a pass, blocks, mr, nv, lanes]
  Acc* total_ = nullptr;                    // the same; square_ is then that of one sample
  Acc* partial_tiles_ = nullptr;            // [V, strips of a pass, blocks, mr, nv, lanes]
  Acc *a_, *b_, *scratch_ = nullptr;
  double* norm_ = nullptr;  // [samples of a chunk, units of a pass]
  int64_t strip_begin_ = 0, strip_end_ = 0, group_begin_ = 0, group_end_ = 0;  // of this pass
  std::vector<int64_t> count_;                                                 // samples in each split
};

}  // namespace

template <class Acc>
void contract(const ContractPlan<Acc>& plan, const Operands<Acc>& operands, const ContractResults& results,
              const std::function<void(int64_t, int64_t)>& chunk_packed) {
  Contraction<Acc>(plan, operands, results).run(chunk_packed);
}

#define INSTANTIATE(Acc)                                                                              \
  template struct ContractPlan<Acc>;                                                                  \
  template void contract<Acc>(const ContractPlan<Acc>&, const Operands<Acc>&, const ContractResults&, \
                              const std::function<void(int64_t, int64_t)>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace backpack_cuda::cpu
