// Python bindings of the SwiGLU kernels; evakernels/ops/swiglu/cuda.py calls them.
#include <pybind11/pybind11.h>

#include "../binding.hpp"
#include "swiglu.hpp"

namespace ek {
namespace {
using Address = std::uintptr_t;

SwigluShape shape(int dtype, long long rows, int width, int padded, long long gate_pitch, long long up_pitch) {
  SwigluShape s;
  s.dtype = Dtype(dtype), s.rows = rows, s.gate_pitch = gate_pitch, s.up_pitch = up_pitch;
  s.width = width, s.padded = padded, s.per_width = 1.0f / width;
  return s;
}

void forward(int dtype, long long rows, int width, int padded, Address gate, long long gate_pitch, Address up,
             long long up_pitch, Address weight, int weight_dtype, Address bias, int bias_dtype, Address y,
             Address mean, Address rstd, float eps, int multiprocessors, Address stream_) {
  SwigluForward p{};
  p.shape = shape(dtype, rows, width, padded, gate_pitch, up_pitch);
  p.gate = pointer<void>(gate), p.up = pointer<void>(up);
  p.weight = pointer<void>(weight), p.bias = pointer<void>(bias);
  p.weight_dtype = Dtype(weight_dtype), p.bias_dtype = Dtype(bias_dtype);
  p.y = pointer<void>(y), p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd), p.eps = eps;
  check(swiglu_forward(p, multiprocessors, stream(stream_)));
}

void backward(int dtype, long long rows, int width, int padded, Address dy, long long dy_pitch, Address gate,
              long long gate_pitch, Address up, long long up_pitch, Address weight, int weight_dtype, Address mean,
              Address rstd, Address dgate, Address dup, long long gradient_pitch, Address dweight, Address dbias,
              Address partial, int multiprocessors, Address stream_) {
  SwigluBackward p{};
  p.shape = shape(dtype, rows, width, padded, gate_pitch, up_pitch);
  p.dy = pointer<void>(dy), p.gate = pointer<void>(gate), p.up = pointer<void>(up), p.dy_pitch = dy_pitch;
  p.weight = pointer<void>(weight), p.weight_dtype = Dtype(weight_dtype);
  p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd);
  p.dgate = pointer<void>(dgate), p.dup = pointer<void>(dup), p.gradient_pitch = gradient_pitch;
  p.dweight = pointer<void>(dweight), p.dbias = pointer<void>(dbias), p.partial = pointer<float>(partial);
  check(swiglu_backward(p, multiprocessors, stream(stream_)));
}
}  // namespace

void bind_swiglu(pybind11::module_& m) {
  m.def("swiglu_forward", &forward);
  m.def("swiglu_backward", &backward);
  m.def("swiglu_blocks", &swiglu_blocks);
}
}  // namespace ek
