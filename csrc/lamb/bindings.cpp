#include <pybind11/pybind11.h>

#include "../binding.hpp"
#include "lamb.hpp"

namespace ek {
namespace {
using Address = std::uintptr_t;

void step(Address words, long long tensors, long long groups, long long pieces, Address bounds, long long batches,
          int correction, double max_grad_norm, Address lrs, Address grad_scale, Address found_inf, Address total,
          Address table, Address rules, Address partials, Address factor, Address stream_) {
  Lamb p{};
  p.words = pointer<std::int64_t>(words);
  p.tensors = int(tensors), p.groups = int(groups), p.pieces = int(pieces);
  p.bounds = pointer<int>(bounds), p.batches = int(batches);
  p.correction = LambCorrection(correction), p.max_grad_norm = max_grad_norm;
  p.lrs = pointer<double>(lrs), p.grad_scale = pointer<float>(grad_scale), p.found_inf = pointer<float>(found_inf);
  p.total = pointer<float>(total);
  p.table = pointer<std::int64_t>(table), p.rules = pointer<LambRule>(rules);
  p.partials = pointer<float>(partials), p.factor = pointer<float>(factor);
  check(lamb_step(p, stream(stream_)));
}
}  // namespace

void bind_lamb(pybind11::module_& m) { m.def("lamb_step", &step); }
}  // namespace ek
