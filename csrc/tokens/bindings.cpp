// Python bindings of token dropping; evakernels/ops/tokens/cuda.py calls them.
#include <pybind11/pybind11.h>

#include "../binding.hpp"
#include "tokens.hpp"

namespace ek {
namespace {

using Address = std::uintptr_t;

void sample(Address kept, Address offset_at, long long offset, unsigned long long seed, long long batch, int patches,
            int keep, Address stream_) {
  check(sample_kept_tokens({pointer<std::int16_t>(kept), pointer<const std::int64_t>(offset_at), offset, seed, batch,
                            patches, keep},
                           stream(stream_)));
}

using Gather = Status (*)(const GatherTokens&, Stream);

template <Gather function>
void gather(Address from, Address to, long long batch_stride, long long token_stride, Address kept, int type, int count,
            long long batch, int prefix, int tokens, int row, Address stream_) {
  const KeptIds ids{pointer<const void>(kept), IdType(type), count};
  check(function({pointer<const void>(from), pointer<void>(to), batch_stride, token_stride, ids, batch, prefix, tokens,
                  row},
                 stream(stream_)));
}

using Cut = Status (*)(const Patchify&, Stream);

template <Cut function>
void cut(Address from, Address to, long long stride0, long long stride1, long long stride2, Address kept, int type,
         int count, long long batch, int channels, int grid_rows, int grid_columns, int rows, int columns,
         Address stream_) {
  const KeptIds ids{pointer<const void>(kept), IdType(type), count};
  check(function({pointer<const void>(from), pointer<void>(to), {stride0, stride1, stride2}, ids, batch, channels,
                  grid_rows, grid_columns, rows, columns},
                 stream(stream_)));
}

}  // namespace

void bind_tokens(pybind11::module_& m) {
  m.def("sample_kept_tokens", &sample);
  m.def("gather_tokens", &gather<gather_tokens>);
  m.def("gather_tokens_backward", &gather<gather_tokens_backward>);
  m.def("patchify", &cut<patchify>);
  m.def("patchify_backward", &cut<patchify_backward>);
}

}  // namespace ek
