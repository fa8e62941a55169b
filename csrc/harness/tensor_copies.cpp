// TMA: cuTensorMapEncodeTiled and cp.async.bulk.tensor into shared memory. The destination is poisoned at the
// issue and written at a random moment afterwards, at the latest when no thread can run: in between nobody
// may read it (a missing or wrong wait shows) nor still need it (a refill before its release shows).
#include <cuda.h>

#include "harness/instructions_sm90.h"
#include "harness/sanitizers.h"

namespace cuda_on_cpu {
namespace {

constexpr uint32_t kMagic = 0x7e4507a9;
constexpr int kInvalidValue = 1;  // CUDA_ERROR_INVALID_VALUE

// What the opaque 128 bytes of a CUtensorMap hold here.
struct TensorMap {
  uint32_t magic;
  int rank, element_bytes, span;  // swizzle span in bytes; 16: none
  char* address;
  int64_t sizes[5], strides[5];  // strides in bytes
  int box[5];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

int bytes_of(int type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    default:
      return 0;
  }
}

}  // namespace

uint32_t swizzled(uint32_t address, int span) {
  // Bits 4 to 6 (as many as choose a chunk within the span) change by the number of the 128-byte line.
  return address ^ (address >> 3 & uint32_t(span - 16));
}

int encode_tensor_map(void* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                      const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                      int interleave, int swizzle, int, int out_of_bounds) {
  TensorMap result{kMagic, int(rank), bytes_of(type), 16, static_cast<char*>(address), {}, {}, {}};
  if (uintptr_t(map) % 64 || uintptr_t(address) % 16 || rank < 1 || rank > 5 || !result.element_bytes ||
      interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || out_of_bounds != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return kInvalidValue;
  }
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      break;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      result.span = 32;
      break;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      result.span = 64;
      break;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      result.span = 128;
      break;
    default:
      return kInvalidValue;
  }
  for (unsigned d = 0; d < rank; ++d) {
    if (sizes[d] < 1 || sizes[d] > uint64_t{1} << 32 || box[d] < 1 || box[d] > 256 ||
        element_strides[d] != 1) {
      return kInvalidValue;
    }
    result.sizes[d] = int64_t(sizes[d]);
    result.box[d] = int(box[d]);
    result.strides[d] = d ? int64_t(strides[d - 1]) : result.element_bytes;
    // The manual wants every dim's stride to cover the dims before it.
    if (d && (strides[d - 1] % 16 || strides[d - 1] >= uint64_t{1} << 40 ||
              (sizes[d] > 1 && result.strides[d] < result.strides[d - 1] * result.sizes[d - 1]))) {
      return kInvalidValue;
    }
  }
  const int line = result.box[0] * result.element_bytes;
  if (line % 16 || (result.span > 16 && line > result.span)) return kInvalidValue;
  memset(map, 0xff, sizeof(CUtensorMap));
  memcpy(map, &result, sizeof result);
  return 0;
}

void check_tensor_map(const void* map, Site site) {
  if (uintptr_t(map) % 64) fail("a tensor map must be aligned to 64 bytes", site);
  uint32_t magic;
  memcpy(&magic, map, sizeof magic);
  if (magic != kMagic) fail("not a tensor map", site);
}

void copy_tensor(uint32_t destination, const void* map_address, const std::vector<int32_t>& corner,
                 uint64_t* barrier, Site site) {
  Quiet quiet;
  check_tensor_map(map_address, site);
  TensorMap map;
  memcpy(&map, map_address, sizeof map);
  if (int(corner.size()) != map.rank) fail("as many coordinates are needed as the tensor map has dims", site);
  if (destination % 128) fail("cp.async.bulk.tensor: the shared address is not 128-byte aligned", site);
  const int line = map.box[0] * map.element_bytes;
  if (map.span > 16 && line != map.span) fail("boxes narrower than their swizzle are not modelled", site);
  Block& block = *current_fiber().block;
  if (*barrier == ~uint64_t{0}) fail("the mbarrier is used before mbarrier.init", site);
  if (block.unfenced_barriers.count(barrier)) {
    fail("the mbarrier was initialised without a fence.mbarrier_init (or fence.proxy.async) after it", site);
  }
  announce_read(barrier, 8, site);

  int64_t lines = 1;
  for (int d = 1; d < map.rank; ++d) lines *= map.box[d];
  TensorCopy copy{{}, barrier, site};
  for (int64_t l = 0; l < lines; ++l) {
    const char* source = map.address + corner[0] * int64_t{map.element_bytes};
    bool inside = true;
    int64_t rest = l;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t x = corner[d] + rest % map.box[d];
      rest /= map.box[d];
      inside = inside && x >= 0 && x < map.sizes[d];
      source += x * map.strides[d];
    }
    if (corner[0] < 0) fail("negative coordinates are not modelled", site);
    const int64_t width = (map.sizes[0] - corner[0]) * map.element_bytes;
    const uint32_t valid = inside && width > 0 ? uint32_t(std::min<int64_t>(width, line)) : 0;
    if (valid) announce_read(source, valid, site);
    for (int at = 0; at < line; at += 16) {
      char* const to = shared_pointer(swizzled(destination + uint32_t(l * line + at), map.span), 16, site);
      announce_write(to, 16, site);
      memset(to, 0xff, 16);
      const uint32_t left = valid > uint32_t(at) ? valid - at : 0;
      copy.pieces.push_back({to, source + at, std::min(left, 16u)});
    }
  }
  // The waiters see what this thread did before, and what it announced for the copy.
  release_copy(barrier);
  block.tensor_copies.push_back(std::move(copy));
}

bool perform_a_tensor_copy(Block& block) {
  auto& copies = block.tensor_copies;
  if (copies.empty()) return false;
  const size_t chosen = random_below(copies.size());
  const TensorCopy copy = std::move(copies[chosen]);
  copies.erase(copies.begin() + chosen);
  sanitizers::SchedulerQuiet quiet;
  for (const TensorCopy::Piece& piece : copy.pieces) {
    if (piece.source_size) memcpy(piece.destination, piece.source, piece.source_size);
    memset(piece.destination + piece.source_size, 0, 16 - piece.source_size);
  }
  complete_bytes(block, copy.barrier, int64_t(copy.pieces.size()) * 16, copy.site);
  return true;
}

}  // namespace cuda_on_cpu
