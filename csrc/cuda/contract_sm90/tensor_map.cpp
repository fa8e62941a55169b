// The driver's function is found at run time: a library that linked libcuda would not load without a GPU.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/contract_sm90/contract_sm90_params.h"
#include "cuda/contract_sm90/dense_rows.h"

namespace backpack_cuda::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  constexpr unsigned kCuda12 = 12000;  // the version that brought it
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kCuda12,
                                                              cudaEnableDefault, &result);
  if (status != cudaSuccess) cudaGetLastError();  // no error of the caller
  const bool found = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return found ? reinterpret_cast<Encode>(function) : nullptr;
}

Encode encode() {
  static const Encode function = find_encode();
  return function;
}

}  // namespace

bool has_tensor_maps() { return encode() != nullptr; }

void make_tensor_map(const DenseRows& rows, Element element, CUtensorMap* map) {
  if (!has_tensor_maps()) throw std::runtime_error("backpack_cuda: the driver has no cuTensorMapEncodeTiled");
  constexpr int kBytes = 2;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(rows.channels), static_cast<cuuint64_t>(rows.T),
                              static_cast<cuuint64_t>(rows.N)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(rows.stride_t * kBytes),
                                static_cast<cuuint64_t>(rows.stride_n * kBytes)};
  const cuuint32_t box[] = {kSm90BoxColumns, kSm90SlabRows, 1}, steps[] = {1, 1, 1};
  const CUresult status = encode()(
      map, element == Element::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      /*rank=*/3, const_cast<void*>(rows.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("backpack_cuda: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(static_cast<int>(status)));
  }
}

}  // namespace backpack_cuda::cuda
