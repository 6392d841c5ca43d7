// The compiled library as a Python module: raw pointers, sizes, strides and a stream go in, status codes come out.
// It includes no torch header, so one binary serves every torch version.

#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled CUDA kernels of evakernels";
    m.def(
        "build_info",
        [] {
            py::dict info;
            info["cuda"] = EVAKERNELS_CUDA;
            info["architectures"] = EVAKERNELS_ARCHITECTURES;
            info["device"] = "cuda";
            info["families"] = py::list();
            return info;
        },
        "What was built: CUDA version, architectures, the device it runs on, and the kernel families in it.");
}
