// The compiled library as a Python module: raw pointers, sizes, strides and a stream go in; a launch that fails raises.
// It includes no torch header, so one binary serves every torch version.

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#ifdef EVAKERNELS_EMULATED
#include <pybind11/stl.h>

#include <array>
#include <vector>
#endif

namespace py = pybind11;

// The build defines EVAKERNELS_FAMILIES as FAMILY(norm) FAMILY(swiglu) ..., one for each csrc/<family>/bindings.cpp.
#ifndef EVAKERNELS_FAMILIES
#define EVAKERNELS_FAMILIES
#endif
namespace ek {
#define FAMILY(name) void bind_##name(py::module_&);
EVAKERNELS_FAMILIES
#undef FAMILY
}  // namespace ek

#ifdef EVAKERNELS_EMULATED
extern "C" void emu_track(void* address, std::size_t bytes);
extern "C" void emu_untrack_all();
extern "C" unsigned long emu_bank_conflicts();
extern "C" void emu_record(std::vector<std::array<std::size_t, 3>>* launches);
#endif

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled CUDA kernels of evakernels";
    py::list families;
#define FAMILY(name) ek::bind_##name(m), families.append(#name);
    EVAKERNELS_FAMILIES
#undef FAMILY
    m.def(
        "build_info",
        [families] {
            py::dict info;
            info["cuda"] = EVAKERNELS_CUDA;
            info["architectures"] = EVAKERNELS_ARCHITECTURES;
#ifdef EVAKERNELS_EMULATED
            info["device"] = "cpu";
#else
            info["device"] = "cuda";
#endif
            info["families"] = families;
            return info;
        },
        "What was built: CUDA version, architectures, the device it runs on, and the kernel families in it.");
#ifdef EVAKERNELS_EMULATED
    m.def(
        "track", [](std::uintptr_t address, std::size_t bytes) { emu_track(reinterpret_cast<void*>(address), bytes); },
        "Memory that the next launches may access; with none tracked, global memory is not checked.");
    m.def("untrack_all", [] { emu_untrack_all(); }, "Forget what was tracked.");
    m.def(
        "bank_conflicts", [] { return emu_bank_conflicts(); },
        "Extra passes over shared memory that ldmatrix needed since the last call.");
    m.def(
        "launches",
        [](const py::function& go) {
            std::vector<std::array<std::size_t, 3>> launches;
            emu_record(&launches);
            struct End {
                ~End() { emu_record(nullptr); }
            } end;
            go();
            return launches;
        },
        "What `go` launches, which does not run: the kernel's place in this file, threads of a block, shared memory.");
#endif
}
