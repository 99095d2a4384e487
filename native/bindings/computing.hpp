// How a binding calls the core.
#pragma once

#include <pybind11/pybind11.h>

#include <mutex>

#include "ropewalk/runtime.hpp"

namespace ropewalk {

// Without the GIL, and alone on the runtime's threads and scratch memory. The GIL is released before it waits.
class Computing {
 public:
  explicit Computing(CpuRuntime& runtime) : lock_(runtime.mutex()) {}

 private:
  pybind11::gil_scoped_release release_;
  std::lock_guard<std::recursive_mutex> lock_;
};

}  // namespace ropewalk
