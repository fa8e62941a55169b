// For the C entry points through which tests call launchers: turns exceptions into a status and a message.
#pragma once

#include <cstdio>
#include <exception>

namespace cuda_on_cpu {

extern char last_error[4096];

// 0, or 1 when `call` threw; tests then ask cuda_on_cpu_last_error() for the message.
template <class Call>
int guarded(Call&& call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    snprintf(last_error, sizeof last_error, "%s", error.what());
    return 1;
  }
}

}  // namespace cuda_on_cpu

extern "C" const char* cuda_on_cpu_last_error();
