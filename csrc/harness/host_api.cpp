// The functions of the CUDA runtime and driver that launchers call on the host.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

#include "harness/instructions_sm90.h"

namespace {

cudaError_t last_status = cudaSuccess;

cudaError_t finish(cudaError_t status) {
  if (status != cudaSuccess) last_status = status;
  return status;
}

}  // namespace

// Failed launches have thrown already: only the calls below leave an error.
cudaError_t cudaGetLastError() {
  const cudaError_t status = last_status;
  last_status = cudaSuccess;
  return status;
}
const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : status == cudaErrorInvalidValue ? "invalid argument" : "error";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// CUDA_ON_CPU_CAPABILITY names the device: 80 (the default), 90, ...
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* const text = getenv("CUDA_ON_CPU_CAPABILITY");
  const int capability = text ? atoi(text) : 80;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 232448;
      return cudaSuccess;
    default:
      return finish(cudaErrorInvalidValue);
  }
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool shared = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  return shared && (value < 0 || value > 232448) ? finish(cudaErrorInvalidValue) : cudaSuccess;
}

// CUDA_ON_CPU_OLD_DRIVER (set): one from before tensor maps.
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult* result) {
  const bool known = !strcmp(symbol, "cuTensorMapEncodeTiled") && !getenv("CUDA_ON_CPU_OLD_DRIVER");
  *function = known ? reinterpret_cast<void*>(&cuda_on_cpu::encode_tensor_map) : nullptr;
  if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
