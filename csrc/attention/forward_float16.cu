#include "forward.cuh"

namespace ek {
template Status launch_attention_forward<half>(AttentionForward, int, Stream);
}  // namespace ek
