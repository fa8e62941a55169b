#include <string>
#include <utility>

#include <torch/headeronly/util/Exception.h>

#include "common/operator_library.h"
#include "ops/cuda_call.h"

namespace backpack_cuda::cuda {

Options& options() {
  static Options options;
  return options;
}

namespace {

int64_t set_option(std::string name, int64_t value) {
  const std::pair<const char*, int64_t*> known[] = {
      {"way", &options().way},       {"tile", &options().tile},         {"loader", &options().loader},
      {"splits", &options().splits}, {"t_splits", &options().t_splits}, {"sm_count", &options().sm_count}};
  STD_TORCH_CHECK(value >= 0, name, " must not be negative, got ", value);
  for (const auto& [known_name, option] : known) {
    if (name == known_name) return std::exchange(*option, value);
  }
  STD_TORCH_CHECK(false, "unknown option ", name, "; known: way, tile, loader, splits, t_splits, sm_count");
}

}  // namespace
}  // namespace backpack_cuda::cuda

OPTION_IMPLEMENTATIONS(m) { m.impl("_cuda_option", TORCH_BOX(&backpack_cuda::cuda::set_option)); }
