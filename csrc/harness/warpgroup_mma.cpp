// wgmma. The product is formed when the four warps have met at the instruction, but the accumulators of each
// warp are poisoned until its wait_group, and the operands must then still hold what they held: a missing
// wait, an accumulator touched too early and a refill of an operand in use all show.
#include <cuda_fp16.h>

#include <algorithm>

#include "harness/instructions_sm90.h"
#include "harness/sanitizers.h"

namespace cuda_on_cpu {

struct WarpgroupSlot {
  const char* name;
  WarpgroupProduct* product;
};

namespace {

constexpr unsigned kWarpgroupThreads = 128;
constexpr uint32_t kPoison = 0xffffffffu;
constexpr int kRows = 64;

uint64_t wgmmas_issued = 0;

bool is_poison(const float* variable) {
  uint32_t bits;
  memcpy(&bits, variable, 4);
  return bits == kPoison;
}

// All 16-byte chunks of an operand [mn, k], with the element each begins at.
struct Chunk {
  const char* where;
  int mn, k;
};
std::vector<Chunk> chunks(uint64_t descriptor, bool mn_major, int mn_size, int k_size, int element_bytes,
                          Site site) {
  const int per_chunk = 16 / element_bytes;
  const int mn_step = mn_major ? per_chunk : 1, k_step = mn_major ? 1 : per_chunk;
  std::vector<Chunk> result;
  for (int k = 0; k < k_size; k += k_step) {
    for (int mn = 0; mn < mn_size; mn += mn_step) {
      const uint32_t address = descriptor_address(descriptor, mn_major, mn, k, element_bytes, site);
      result.push_back({shared_pointer(address, 16, site), mn, k});
    }
  }
  return result;
}

std::vector<Chunk> chunks_of_a(const WarpgroupProduct& p, Site site) {
  return chunks(p.a, p.a_mn_major, kRows, p.depth, p.element == MmaElement::kTf32 ? 4 : 2, site);
}
std::vector<Chunk> chunks_of_b(const WarpgroupProduct& p, Site site) {
  return chunks(p.b, p.b_mn_major, p.columns, p.depth, p.element == MmaElement::kTf32 ? 4 : 2, site);
}

// out [mn, 16]
void read_operand(const std::vector<Chunk>& chunks, MmaElement element, bool mn_major, float (*out)[16]) {
  const int per_word = element == MmaElement::kTf32 ? 1 : 2;
  for (const Chunk& chunk : chunks) {
    for (int word = 0; word < 4; ++word) {
      uint32_t bits;
      memcpy(&bits, chunk.where + 4 * word, 4);
      for (int e = 0; e < per_word; ++e) {
        const int along = word * per_word + e;
        out[chunk.mn + (mn_major ? along : 0)][chunk.k + (mn_major ? 0 : along)] = unpack(element, bits, e);
      }
    }
  }
}

// The accumulators of one warp: [32 lanes, columns / 2] values, from the registers or, while an earlier wgmma
// on the same registers is in flight, as that one leaves them.
Accumulators& take_accumulators(Warp& warp, WarpgroupSlot* const* slots, Site site) {
  const auto [entry, is_new] = warp.in_flight.try_emplace(slots[0]->product->d[0]);
  Accumulators& accumulators = entry->second;
  std::vector<float*> variables;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const auto& d = slots[lane]->product->d;
    variables.insert(variables.end(), d.begin(), d.end());
    if (is_new && !warp.fibers[lane]->registers_fenced) {
      fail("wgmma on registers that no wgmma.fence has ordered since they could last change", site);
    }
  }
  if (is_new) {
    accumulators.variables = variables;
    accumulators.values.resize(variables.size());
    for (size_t i = 0; i < variables.size(); ++i) accumulators.values[i] = *variables[i];
  } else if (accumulators.variables != variables) {
    fail("wgmma on some of the registers that another wgmma in flight works on", site);
  } else if (!std::all_of(variables.begin(), variables.end(), is_poison)) {
    fail("an accumulator was written while a wgmma in flight worked on it", site);
  }
  for (float* variable : variables) memset(static_cast<void*>(variable), 0xff, 4);
  return accumulators;
}

// With g = lane / 4, t = lane % 4: register r of a lane of warp w is row 16 w + g + 8 (r / 2 % 2), column 8
// (r / 4) + 2 t + r % 2.
void multiply(Block& block, unsigned first_warp, const std::vector<WarpgroupSlot*>& slots, Site site) {
  static float a[kRows][16], b[256][16];
  const WarpgroupProduct& shape = *slots[0]->product;
  const std::vector<Chunk> a_chunks = chunks_of_a(shape, site), b_chunks = chunks_of_b(shape, site);
  read_operand(a_chunks, shape.element, shape.a_mn_major, a);
  read_operand(b_chunks, shape.element, shape.b_mn_major, b);
  const uint64_t number = ++wgmmas_issued;
  PendingWgmma& pending = block.pending_wgmmas[number];
  for (const auto* list : {&a_chunks, &b_chunks}) {
    for (const Chunk& chunk : *list) {
      pending.operands.push_back({chunk.where, {}});
      memcpy(pending.operands.back().bytes, chunk.where, 16);
    }
  }
  const size_t registers = size_t(shape.columns) / 2;
  const double sign = shape.scale_a * shape.scale_b;
  for (unsigned w = 0; w < 4; ++w) {
    Warp& warp = block.warps[first_warp + w];
    Accumulators& accumulators = take_accumulators(warp, &slots[w * kWarpSize], site);
    accumulators.last_wgmma = number;
    warp.open_wgmmas.push_back(number);
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      for (size_t r = 0; r < registers; ++r) {
        const size_t row = 16 * w + lane / 4 + 8 * (r / 2 % 2), column = 8 * (r / 4) + 2 * (lane % 4) + r % 2;
        float& value = accumulators.values[lane * registers + r];
        double sum = shape.accumulate ? value : 0.;
        for (int k = 0; k < shape.depth; ++k) sum += sign * double{a[row][k]} * b[column][k];
        value = truncate(sum);
      }
    }
  }
}

// Contiguous stretches, for fewer calls.
void announce_operand(std::vector<Chunk> chunks, Site site) {
  std::sort(chunks.begin(), chunks.end(), [](const Chunk& x, const Chunk& y) { return x.where < y.where; });
  for (size_t i = 0; i < chunks.size();) {
    size_t end = i + 1;
    while (end < chunks.size() && chunks[end].where == chunks[i].where + 16 * (end - i)) ++end;
    announce_read(chunks[i].where, 16 * (end - i), site);
    i = end;
  }
}

void check_same(const WarpgroupSlot& x, const WarpgroupSlot& y, Site site) {
  const WarpgroupProduct &p = *x.product, &q = *y.product;
  if (strcmp(x.name, y.name) != 0)
    fail("the threads of a warpgroup execute different wgmma instructions", site);
  if (p.a != q.a || p.b != q.b || p.accumulate != q.accumulate) {
    fail("wgmma: descriptors or scale-d differ between the threads of the warpgroup", site);
  }
}

}  // namespace

uint32_t descriptor_address(uint64_t descriptor, bool mn_major, int mn, int k, int element_bytes, Site site) {
  const uint64_t used = 0x3fff | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
  if (descriptor & ~used) fail("wgmma: reserved bits of a matrix descriptor are set", site);
  if (descriptor >> 49 & 7) fail("wgmma: base offsets of matrix descriptors are not modelled", site);
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const int layout = int(descriptor >> 62);  // 0 no swizzle, 1, 2, 3: 128, 64, 32 bytes
  const int span = layout == 0 ? 16 : 256 >> layout;
  const int per_chunk = 16 / element_bytes;
  uint32_t offset;
  if (mn_major) {
    // Lines of `span` bytes along mn, one for each of 8 k.
    const int chunk = mn / per_chunk, chunks_per_line = span / 16;
    const uint32_t next_line = layout == 0 ? stride : leading, next_8_k = layout == 0 ? leading : stride;
    offset =
        chunk % chunks_per_line * 16 + chunk / chunks_per_line * next_line + k % 8 * span + k / 8 * next_8_k;
  } else {
    // Lines of `span` bytes along k, one for each of 8 mn.
    const int chunk = k / per_chunk;
    offset = mn % 8 * span + mn / 8 * stride + chunk * (layout == 0 ? leading : 16);
  }
  return swizzled(start + offset, span);
}

void warpgroup_product(const char* name, WarpgroupProduct& product, Site site) {
  Quiet quiet;
  Fiber& fiber = current_fiber();
  Block& block = *fiber.block;
  const unsigned warp = unsigned(fiber.warp - block.warps.data()), group_number = warp / 4;
  if (group_number >= block.warpgroups.size()) fail("wgmma needs four whole warps", site);
  if (fiber.lane == 0) {
    announce_operand(chunks_of_a(product, site), site);
    announce_operand(chunks_of_b(product, site), site);
  }
  for (unsigned w = 0; w < 4; ++w) {
    if (block.warps[4 * group_number + w].live != ~0u)
      fail("wgmma: a lane of the warpgroup has exited", site);
  }
  Warpgroup& group = block.warpgroups[group_number];
  group.fibers.resize(kWarpgroupThreads);
  group.slots.resize(kWarpgroupThreads);
  WarpgroupSlot slot{name, &product};
  const unsigned position = warp % 4 * kWarpSize + fiber.lane;
  group.fibers[position] = &fiber;
  group.slots[position] = &slot;
  if (++group.arrived < kWarpgroupThreads) return wait_here("wgmma", site);
  for (const WarpgroupSlot* other : group.slots) check_same(slot, *other, site);
  multiply(block, 4 * group_number, group.slots, site);
  group.arrived = 0;
  for (Fiber* other : group.fibers) {
    if (other != &fiber) make_ready(*other);
  }
}

void warpgroup_fence() { current_fiber().registers_fenced = true; }

void warpgroup_commit_group() {
  Quiet quiet;
  if (current_thread->lane != 0) return;
  Warp& warp = *current_fiber().warp;
  warp.committed_wgmmas.push_back(std::move(warp.open_wgmmas));
  warp.open_wgmmas.clear();
}

void warpgroup_wait_group(const char* name, unsigned pending_groups, Site site) {
  Quiet quiet;
  Fiber& fiber = current_fiber();
  Warp& warp = *fiber.warp;
  if (fiber.lane == 0) sanitizers::release(&warp.wgmma_sync_word);  // it announced the operands
  struct Slot {
    unsigned pending_groups;
    Site site;
  } slot{pending_groups, site};
  warp_collective(
      name, ~0u, true, &slot,
      [](void** slots, uint32_t) {
        const Slot& slot = *static_cast<Slot*>(slots[0]);
        Warp& warp = *current_fiber().warp;
        Block& block = *current_fiber().block;
        uint64_t done = 0;
        while (warp.committed_wgmmas.size() > slot.pending_groups) {
          for (uint64_t number : warp.committed_wgmmas.front()) {
            done = number;
            PendingWgmma& pending = block.pending_wgmmas.at(number);
            for (const OperandBytes& operand : pending.operands) {
              if (memcmp(operand.where, operand.bytes, 16) != 0) {
                fail("an operand in shared memory changed while a wgmma in flight read it", slot.site);
              }
            }
            if (--pending.warps_to_wait == 0) block.pending_wgmmas.erase(number);
          }
          warp.committed_wgmmas.erase(warp.committed_wgmmas.begin());
        }
        for (auto entry = warp.in_flight.begin(); entry != warp.in_flight.end();) {
          const Accumulators& accumulators = entry->second;
          if (accumulators.last_wgmma > done) {
            ++entry;
            continue;
          }
          for (size_t i = 0; i < accumulators.variables.size(); ++i) {
            if (!is_poison(accumulators.variables[i])) {
              fail("an accumulator was written while a wgmma in flight worked on it", slot.site);
            }
            *accumulators.variables[i] = accumulators.values[i];
          }
          entry = warp.in_flight.erase(entry);
          for (Fiber* lane : warp.fibers) lane->registers_fenced = false;
        }
      },
      site);
  sanitizers::acquire(&warp.wgmma_sync_word);
}

}  // namespace cuda_on_cpu
