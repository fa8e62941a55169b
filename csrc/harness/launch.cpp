// Launching a grid: blocks in random order, a few resident at a time, until all threads have exited or one
// failed. Environment: CUDA_ON_CPU_SEED (schedule, default 0), CUDA_ON_CPU_RESIDENT (blocks that run at the
// same time, default 1), CUDA_ON_CPU_SEQUENTIAL (set: a fixed order, for debugging).
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "harness/guarded_call.h"
#include "harness/sanitizers.h"

namespace cuda_on_cpu {

Thread* current_thread = nullptr;
Launch current_launch;
char last_error[4096];

namespace {

constexpr size_t kMaxSharedBytes = 232448;  // 227 KiB, sm_90

uint64_t environment_number(const char* name, uint64_t otherwise) {
  const char* const text = getenv(name);
  return text ? strtoull(text, nullptr, 10) : otherwise;
}

void check_configuration(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > kMaxSharedBytes) {
    throw std::runtime_error("cuda_on_cpu: invalid launch configuration");
  }
}

void start_block(Block& block, size_t first_fiber, uint64_t number, dim3 grid, dim3 size) {
  const unsigned threads = size.x * size.y * size.z, warps = (threads + kWarpSize - 1) / kWarpSize;
  block.live_threads = block.threads = threads;
  block.warps.assign(warps, Warp{});
  block.priorities.resize(warps);
  for (unsigned w = 0; w < warps; ++w) block.priorities[w] = w;
  random_shuffle(block.priorities);
  for (Barrier& barrier : block.barriers) {
    barrier.arrived = 0;
    barrier.waiting.clear();  // left over from a launch that failed
  }
  prepare_shared_memory(block.shared);
  block.barrier_waiters.clear();
  block.unfenced_barriers.clear();
  block.tensor_copies.clear();
  block.warpgroups.assign(warps / 4, Warpgroup{});
  block.pending_wgmmas.clear();
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = pooled_fiber(first_fiber + t);
    fiber.thread_index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    fiber.block_index = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                         unsigned(number / grid.x / grid.y)};
    fiber.block_size = size;
    fiber.grid_size = grid;
    fiber.lane = t % kWarpSize;
    fiber.block = &block;
    fiber.warp = &block.warps[t / kWarpSize];
    fiber.warp->fibers[fiber.lane] = &fiber;
    fiber.warp->live |= 1u << fiber.lane;
    fiber.warp->ready = fiber.warp->live;
    fiber.done = false;
    fiber.registers_fenced = false;
  }
}

void run_resident_blocks() {
  sanitizers::release(&current_launch.start_word);
  unsigned threads_left = 0;
  for (Block* block : current_launch.resident) threads_left += block->live_threads;
  while (threads_left) {
    Fiber* const fiber = pick_fiber();
    if (!fiber) throw std::runtime_error(deadlock_report());
    resume(*fiber);
    if (current_launch.error) std::rethrow_exception(current_launch.error);
    if (fiber->done) threads_left--;
  }
  for (Block* block : current_launch.resident) {
    if (block->tensor_copies.empty()) continue;
    fail("the block ended before a copy into its shared memory, issued", block->tensor_copies[0].site);
  }
  sanitizers::acquire(&current_launch.end_word);
}

struct ThreadName {  // of the current thread; empty outside kernels
  char text[128] = "";
  ThreadName() {
    if (!current_thread) return;
    const uint3 b = current_thread->block_index, t = current_thread->thread_index;
    snprintf(text, sizeof text, " [block (%u, %u, %u) thread (%u, %u, %u)]", b.x, b.y, b.z, t.x, t.y, t.z);
  }
};

// A bad access kills the process, as it kills a CUDA context; say first which thread made it.
class FaultReporter {
 public:
  FaultReporter() {
    if (sanitizers::any_active()) return;  // they report better
    static char handler_stack[64 << 10];
    stack_t alternative{};
    alternative.ss_sp = handler_stack;
    alternative.ss_size = sizeof handler_stack;
    sigaltstack(&alternative, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = report;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESETHAND;
    sigaction(SIGSEGV, &action, &old_action_);
    installed_ = true;
  }
  ~FaultReporter() {
    if (!installed_) return;
    sigaction(SIGSEGV, &old_action_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static void report(int, siginfo_t* info, void*) {
    ThreadName thread;
    char text[256];
    int length = snprintf(text, sizeof text, "cuda_on_cpu: invalid memory access%s", thread.text);
    if (current_thread) {
      const long bytes = long(current_launch.shared_bytes);
      const long offset = static_cast<char*>(info->si_addr) - current_fiber().block->shared.dynamic_begin;
      if (offset >= bytes && offset < bytes + 4096) {
        length += snprintf(text + length, sizeof text - length,
                           ": byte %ld of %ld bytes of dynamic shared memory", offset, bytes);
      }
    }
    text[length++] = '\n';
    if (write(STDERR_FILENO, text, length) < 0) _exit(1);
    // Returning repeats the access, now with the default action.
  }
  bool installed_ = false;
  stack_t old_stack_{};
  struct sigaction old_action_{};
};

}  // namespace

std::string place(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

void fail(const char* what, Site site) {
  throw std::runtime_error(std::string("cuda_on_cpu: ") + what + " at " + place(site) + ThreadName().text);
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context) {
  if (current_thread) throw std::runtime_error("cuda_on_cpu: a kernel launches a kernel");
  check_configuration(grid, block, shared_bytes);
  static std::vector<std::unique_ptr<Block>> block_pool;
  current_launch.body = body;
  current_launch.context = context;
  current_launch.shared_bytes = shared_bytes;
  current_launch.error = nullptr;
  current_launch.sequential = getenv("CUDA_ON_CPU_SEQUENTIAL") != nullptr;
  seed_random(environment_number("CUDA_ON_CPU_SEED", 0));
  sanitizers::remember_scheduler();
  FaultReporter reporter;

  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t b = 0; b < order.size(); ++b) order[b] = b;
  random_shuffle(order);
  const size_t resident = std::max<size_t>(1, environment_number("CUDA_ON_CPU_RESIDENT", 1));
  const size_t threads = size_t{block.x} * block.y * block.z;
  try {
    for (uint64_t begin = 0; begin < order.size(); begin += resident) {
      current_launch.resident.clear();
      for (size_t i = 0; i < resident && begin + i < order.size(); ++i) {
        if (block_pool.size() <= i) block_pool.push_back(std::make_unique<Block>());
        start_block(*block_pool[i], i * threads, order[begin + i], grid, block);
        current_launch.resident.push_back(block_pool[i].get());
      }
      run_resident_blocks();
    }
  } catch (...) {
    current_launch.error = nullptr;
    abandon_all_fibers();
    throw;
  }
}

}  // namespace cuda_on_cpu

extern "C" const char* cuda_on_cpu_last_error() { return cuda_on_cpu::last_error; }
