// Python bindings of the norm kernels; evakernels/ops/norm/cuda.py calls them.
#include <pybind11/pybind11.h>

#include "../binding.hpp"
#include "norm.hpp"

namespace ek {
namespace {
using Address = std::uintptr_t;

void forward(int kind, int wide, int narrow, Address x, Address residual, Address weight, Address bias,
             Address layer_scale, Address row_scale, int weight_dtype, int bias_dtype, int layer_scale_dtype, Address y,
             Address sum, Address mean, Address rstd, long long rows, long long rows_per_sample, int width, float eps,
             bool rms, int multiprocessors, Address stream_) {
  NormForward p{};
  p.kind = NormKind(kind), p.wide = Dtype(wide), p.narrow = Dtype(narrow);
  p.x = pointer<void>(x), p.residual = pointer<void>(residual);
  p.weight = pointer<void>(weight), p.bias = pointer<void>(bias), p.layer_scale = pointer<void>(layer_scale);
  p.row_scale = pointer<float>(row_scale);
  p.weight_dtype = Dtype(weight_dtype), p.bias_dtype = Dtype(bias_dtype);
  p.layer_scale_dtype = Dtype(layer_scale_dtype);
  p.y = pointer<void>(y), p.sum = pointer<void>(sum), p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd);
  p.rows = rows, p.rows_per_sample = rows_per_sample, p.width = width, p.eps = eps, p.rms = rms;
  check(norm_forward(p, multiprocessors, stream(stream_)));
}

void backward(int kind, int wide, int narrow, Address dy, Address dsum, Address x, Address branch, Address weight,
              Address bias, Address layer_scale, Address row_scale, int weight_dtype, int bias_dtype,
              int layer_scale_dtype, Address mean, Address rstd, Address dx, Address dbranch, Address dweight,
              Address dbias, Address dlayer_scale, Address partial, long long rows, long long rows_per_sample,
              int width, bool rms, int multiprocessors, Address stream_) {
  NormBackward p{};
  p.kind = NormKind(kind), p.wide = Dtype(wide), p.narrow = Dtype(narrow);
  p.dy = pointer<void>(dy), p.dsum = pointer<void>(dsum), p.x = pointer<void>(x), p.branch = pointer<void>(branch);
  p.weight = pointer<void>(weight), p.bias = pointer<void>(bias), p.layer_scale = pointer<void>(layer_scale);
  p.row_scale = pointer<float>(row_scale);
  p.weight_dtype = Dtype(weight_dtype), p.bias_dtype = Dtype(bias_dtype);
  p.layer_scale_dtype = Dtype(layer_scale_dtype);
  p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd);
  p.dx = pointer<void>(dx), p.dbranch = pointer<void>(dbranch);
  p.dweight = pointer<void>(dweight), p.dbias = pointer<void>(dbias), p.dlayer_scale = pointer<void>(dlayer_scale);
  p.partial = pointer<float>(partial);
  p.rows = rows, p.rows_per_sample = rows_per_sample, p.width = width, p.rms = rms;
  check(norm_backward(p, multiprocessors, stream(stream_)));
}
}  // namespace

void bind_norm(pybind11::module_& m) {
  m.def("norm_forward", &forward);
  m.def("norm_backward", &backward);
  m.def("norm_blocks", &norm_blocks);
}
}  // namespace ek
