// What was compiled, for people and for error messages. This module is tied to the Python it was built for;
// the operators' library (_C.so) is not, so everything works without this one.
#include "build_info.h"

#include <pybind11/pybind11.h>

#include <string>

namespace {

std::string summary() {
  std::string text = "backpack_cuda " BACKPACK_CUDA_VERSION;
#if BACKPACK_CUDA_BUILT_WITH_CUDA
  text += ", CUDA kernels for " BACKPACK_CUDA_ARCHS " by nvcc " BACKPACK_CUDA_NVCC_VERSION;
#else
  text += ", no CUDA kernels";
#endif
  return text + ", built with torch " BACKPACK_CUDA_TORCH_BUILT " for torch " BACKPACK_CUDA_TORCH_TARGET
                " and later";
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What this build of backpack_cuda holds.";
  m.attr("with_cuda") = static_cast<bool>(BACKPACK_CUDA_BUILT_WITH_CUDA);
  m.attr("cuda_archs") = BACKPACK_CUDA_ARCHS;           // "80 90a-real", empty without CUDA
  m.attr("cuda_version") = BACKPACK_CUDA_NVCC_VERSION;  // of nvcc, empty without CUDA
  m.attr("torch_built") = BACKPACK_CUDA_TORCH_BUILT;    // whose headers were compiled against
  m.attr("torch_target") = BACKPACK_CUDA_TORCH_TARGET;  // the oldest torch that can load _C.so
  m.def("summary", &summary, "All of it in one line.");
}
