// The instructions of sm_90 in inline PTX.
#include <cstdlib>

#include "harness/instructions_sm90.h"
#include "harness/ptx_execution.h"
#include "harness/sanitizers.h"

namespace cuda_on_cpu::ptx_interpreter {

bool Execution::step_sm90() {
  const string& family = now_->modifiers[0];
  if (family == "mbarrier") return mbarrier(), true;
  if (family == "wgmma") return wgmma(), true;
  if (family == "elect") return elect(), true;
  if (opcode_starts("cp.async.bulk.tensor.")) return copy_tensor_box(), true;
  if (opcode_starts("fence.mbarrier_init.") || opcode_starts("fence.proxy.async")) {
    fence_memory_barrier_init();
    return true;
  }
  if (opcode_starts("prefetch.tensormap")) {
    check_tensor_map(reinterpret_cast<const void*>(address(0)), site_);
    return true;
  }
  if (family == "setmaxnreg") {
    const uint64_t registers = get(operand(0));
    if (!has("sync") || !has("aligned") || has("inc") == has("dec")) bad("unsupported instruction");
    if (registers < 24 || registers > 256 || registers % 8) {
      bad("the register count must be a multiple of 8 from 24 to 256");
    }
    int no_slot;
    warp_collective(now_->opcode.c_str(), ~0u, true, &no_slot, [](void**, uint32_t) {}, site_);
    return true;
  }
  return false;
}

uint64_t* Execution::memory_barrier(size_t k) {
  const uint32_t where = uint32_t(address(k));
  if (where % 8) bad("misaligned mbarrier");
  return reinterpret_cast<uint64_t*>(shared_pointer(where, 8, site_));
}

void Execution::mbarrier() {
  if (!has("b64") || has("shared::cluster")) bad("unsupported mbarrier");
  if (has("init")) return init_memory_barrier(memory_barrier(0), unsigned(get(operand(1))), site_);
  if (has("inval")) return invalidate_memory_barrier(memory_barrier(0), site_);
  if (has("try_wait")) {
    if (!has("parity")) bad("unsupported mbarrier");
    const bool done = wait_for_phase(memory_barrier(1), unsigned(get(operand(2)) & 1), site_);
    return set(operand(0), done);
  }
  if (has("arrive")) {  // the state it returns is not modelled
    if (operand(0).kind != Operand::kSink) bad("unsupported mbarrier");
    uint64_t* const barrier = memory_barrier(1);
    if (has("expect_tx")) {
      expect_bytes(barrier, int64_t(uint32_t(get(operand(2)))), site_);
      return arrive(barrier, 1, site_);
    }
    return arrive(barrier, operand_count() > 2 ? unsigned(get(operand(2))) : 1, site_);
  }
  if (has("expect_tx")) return expect_bytes(memory_barrier(0), int64_t(uint32_t(get(operand(1)))), site_);
  bad("unsupported mbarrier");
}

// elect.sync d|p, mask: which lane is unspecified; here the lowest.
void Execution::elect() {
  const vector<Operand>& results = vector_operand(0, 2);
  struct Slot {
    uint32_t lane;
  } slot{0};
  warp_collective(
      now_->opcode.c_str(), uint32_t(get(operand(1))), false, &slot,
      [](void** slots, uint32_t present) {
        for (unsigned lane = 0; lane < 32; ++lane) {
          if (present >> lane & 1) static_cast<Slot*>(slots[lane])->lane = unsigned(__builtin_ctz(present));
        }
      },
      site_);
  set(results[0], slot.lane);
  set(results[1], slot.lane == current_thread->lane);
}

// cp.async.bulk.tensor.Nd.shared.global...: [destination], [map, {coordinates}], [mbarrier], cache policy
void Execution::copy_tensor_box() {
  const bool to_shared = has("shared::cluster") || has("shared::cta");
  const bool known_order = to_shared && has("global") && opcode_starts("cp.async.bulk.tensor.") &&
                           now_->opcode.find("shared") < now_->opcode.find("global");
  if (!known_order || !has("mbarrier::complete_tx::bytes") || has("multicast::cluster") || has("im2col") ||
      operand_count() < 3) {
    bad("unsupported tensor copy");
  }
  const Operand& source = operand(1);
  if (source.kind != Operand::kMemory || source.parts.size() != 2 ||
      source.parts[1].kind != Operand::kVector) {
    bad("operand 1 must be [map, {coordinates}]");
  }
  const auto& coordinates = source.parts[1].parts;
  if (now_->modifiers[4] != std::to_string(coordinates.size()) + "d") bad("wrong number of coordinates");
  vector<int32_t> corner;
  for (const Operand& coordinate : coordinates) corner.push_back(int32_t(get_word(coordinate)));
  copy_tensor(uint32_t(address(0)), reinterpret_cast<const void*>(address(1)), corner, memory_barrier(2),
              site_);
}

// wgmma.mma_async.sync.aligned.m64n..k..: {d}, a-desc, b-desc, scale-d, scale-a, scale-b[, a-trans, b-trans]
void Execution::wgmma() {
  if (!has("sync") || !has("aligned")) bad("unsupported wgmma");
  if (has("fence")) return warpgroup_fence();
  if (has("commit_group")) return warpgroup_commit_group();
  if (has("wait_group")) {
    return warpgroup_wait_group(now_->opcode.c_str(), unsigned(get(operand(0))), site_);
  }
  struct Type {
    const char* name;
    MmaElement element;
    int depth;
  };
  static const Type types[] = {{".f32.bf16.bf16", MmaElement::kBFloat16, 16},
                               {".f32.f16.f16", MmaElement::kFloat16, 16},
                               {".f32.tf32.tf32", MmaElement::kTf32, 8}};
  static const string start = "wgmma.mma_async.sync.aligned.m64n";
  const int columns = opcode_starts(start.c_str()) ? atoi(now_->opcode.c_str() + start.size()) : 0;
  if (columns < 8 || columns > 256 || columns % 8) bad("unsupported wgmma shape or type");
  for (const Type& type : types) {
    if (now_->opcode != start + std::to_string(columns) + "k" + std::to_string(type.depth) + type.name)
      continue;
    const bool half = type.element != MmaElement::kTf32;
    if (operand_count() != (half ? 8 : 6)) bad("wrong number of operands");
    if (operand(1).kind == Operand::kVector) bad("A from registers is not supported");
    for (size_t k : {size_t{1}, size_t{2}}) want_constraint(operand(k), 'l');
    WarpgroupProduct product{};
    product.element = type.element;
    product.columns = columns;
    product.depth = type.depth;
    product.a = get(operand(1));
    product.b = get(operand(2));
    product.accumulate = get(operand(3)) != 0;
    product.scale_a = int(get(operand(4)));
    product.scale_b = int(get(operand(5)));
    if (abs(product.scale_a) != 1 || abs(product.scale_b) != 1) bad("scales must be 1 or -1");
    if (half) {
      product.a_mn_major = get(operand(6)) != 0;
      product.b_mn_major = get(operand(7)) != 0;
    }
    for (const Operand& d : vector_operand(0, columns / 2)) {
      want_constraint(d, 'f');
      if (d.kind != Operand::kArgument || !argument(d).writable) bad("accumulators must be \"+f\"");
      product.d.push_back(static_cast<float*>(argument(d).variable));
    }
    warpgroup_product(now_->opcode.c_str(), product, site_);
    return;
  }
  bad("unsupported wgmma shape or type");
}

}  // namespace cuda_on_cpu::ptx_interpreter
