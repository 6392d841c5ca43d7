// Picks the attention kernels by dtype.
#include "select.hpp"

namespace ek {
Status attention_forward(const AttentionForward& p, int shared_memory, Stream stream) {
  if (p.shape.dtype == Dtype::bfloat16) return launch_attention_forward<bf16>(p, shared_memory, stream);
#ifndef EVAKERNELS_FEW_KERNELS
  if (p.shape.dtype == Dtype::float16) return launch_attention_forward<half>(p, shared_memory, stream);
#endif
  return {-1, "attention: there is no kernel for this dtype"};
}

Status attention_backward(const AttentionBackward& p, int shared_memory, Stream stream) {
  if (p.shape.dtype == Dtype::bfloat16) return launch_attention_backward<bf16>(p, shared_memory, stream);
#ifndef EVAKERNELS_FEW_KERNELS
  if (p.shape.dtype == Dtype::float16) return launch_attention_backward<half>(p, shared_memory, stream);
#endif
  return {-1, "attention: there is no kernel for this dtype"};
}
}  // namespace ek
