// What the bindings of every family use: addresses in, exceptions out.
//
// csrc/<family>/bindings.cpp defines `void bind_<family>(pybind11::module_&)` in namespace ek, which csrc/bindings.cpp
// calls.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "launch.hpp"

namespace ek {

// Raises RuntimeError with the sentence of a status that is not 0.
inline void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.sentence);
}

// An address from Python; 0 is nullptr.
template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Stream stream(std::uintptr_t handle) { return reinterpret_cast<Stream>(handle); }

}  // namespace ek
