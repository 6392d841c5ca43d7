#include "backward.cuh"

namespace ek {
template Status launch_attention_backward<half>(AttentionBackward, int, Stream);
}  // namespace ek
