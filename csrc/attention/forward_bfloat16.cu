#include "forward.cuh"

namespace ek {
template Status launch_attention_forward<bf16>(AttentionForward, int, Stream);
}  // namespace ek
