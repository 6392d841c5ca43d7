// Python bindings of the attention kernels; evakernels/ops/attention/cuda.py calls them.
#include <pybind11/pybind11.h>

#include <tuple>

#include "../binding.hpp"
#include "attention.hpp"

namespace ek {
namespace {
using Address = std::uintptr_t;
using Strided = std::tuple<Address, long long, long long, long long>;  // and strides of batch, token, head
// dtype, batch, tokens, heads, head dimension, scale, causal
using Shape = std::tuple<int, int, int, int, int, float, bool>;
// rows, columns, height, width, prefix, interleaved; positions, their type, their count
using Rotation = std::tuple<Address, Address, int, int, int, bool, Address, int, int>;

Heads heads(const Strided& x) {
  const auto& [address, batch, token, head] = x;
  return {pointer<void>(address), batch, token, head};
}

AttentionShape shape(const Shape& s) {
  const auto& [dtype, batch, tokens, heads, head_dim, scale, causal] = s;
  return {Dtype(dtype), batch, tokens, heads, head_dim, scale, scale * kLog2e, causal};
}

Rope rope(const Rotation& r) {
  const auto& [rows, columns, height, width, prefix, interleaved, positions, type, count] = r;
  return {pointer<float>(rows), pointer<float>(columns), height, width, 1.0f / width, prefix, interleaved,
          {pointer<void>(positions), IdType(type), count}};
}

void forward(const Shape& s, const Rotation& r, const Strided& q, const Strided& k, const Strided& v,
             const Strided& out, Address lse, int shared_memory, Address stream_) {
  const AttentionForward p{shape(s), rope(r), heads(q), heads(k), heads(v), heads(out), pointer<float>(lse), 0};
  check(attention_forward(p, shared_memory, stream(stream_)));
}

void backward(const Shape& s, const Rotation& r, const Strided& q, const Strided& k, const Strided& v,
              const Strided& out, const Strided& dout, const Strided& dq, const Strided& dk, const Strided& dv,
              Address lse, int shared_memory, Address stream_) {
  const AttentionBackward p{shape(s), rope(r), heads(q), heads(k), heads(v), heads(out), heads(dout),
                            heads(dq), heads(dk), heads(dv), pointer<float>(lse), 0};
  check(attention_backward(p, shared_memory, stream(stream_)));
}
}  // namespace

void bind_attention(pybind11::module_& m) {
  m.def("attention_forward", &forward);
  m.def("attention_backward", &backward);
}
}  // namespace ek
