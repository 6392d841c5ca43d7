#include "backward.cuh"

namespace ek {
template Status launch_attention_backward<bf16>(AttentionBackward, int, Stream);
}  // namespace ek
