#include "cpu/bf16/avx512_bf16.h"

namespace fastdcgan::cpu::avx512_bf16 {

bool usable() { return true; }

}  // namespace fastdcgan::cpu::avx512_bf16

// For the tests of the emulation: one instruction on 16 floats and 16 pairs each.
extern "C" void avx512_bf16_emulated_dot(float* sum, const void* a, const void* b) {
  using namespace fastdcgan::cpu;
  store(sum, avx512_bf16::dot(load(sum), load(static_cast<const float*>(a)), load(static_cast<const float*>(b))));
}
