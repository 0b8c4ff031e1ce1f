// The instruction and its emulation on random numbers of all kinds; prints how many lanes were compared, and how many
// differ in a bit. NaNs are alike.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>

#include "avx512_bf16_emulated.h"
#include "cpu/bf16/avx512_bf16.h"

using namespace fastdcgan::cpu;

int main() {
  std::mt19937 random(1);
  // Exponents of operands and sums, as ranges: all alike, of sums that cancel, of denormal results, any.
  const uint32_t ranges[][4] = {{127, 4, 127, 8}, {87, 80, 67, 120}, {0, 130, 0, 20}, {0, 256, 0, 256}};
  long compared = 0, different = 0;
  for (const auto& [low, count, sum_low, sum_count] : ranges)
    for (int i = 0; i < 100000; ++i) {
      uint32_t a[16], b[16], sum[16], found[16], expected[16];
      const auto number = [&] { return (random() & 1) << 15 | (low + random() % count) << 7 | (random() & 127); };
      for (int n = 0; n < 16; ++n) {
        a[n] = number() << 16 | number();
        b[n] = number() << 16 | number();
        sum[n] = (random() & 1) << 31 | (sum_low + random() % sum_count) << 23 | (random() & 0x7fffff);
      }
      const auto floats = [](const uint32_t* x) { return load(reinterpret_cast<const float*>(x)); };
      store(reinterpret_cast<float*>(found), avx512_bf16::dot(floats(sum), floats(a), floats(b)));
      store(reinterpret_cast<float*>(expected), avx512_bf16::emulated::dot(floats(sum), floats(a), floats(b)));
      const auto nan = [](uint32_t x) { return (x & 0x7fffffff) > 0x7f800000; };
      for (int n = 0; n < 16; ++n, ++compared)
        different += found[n] != expected[n] && !(nan(found[n]) && nan(expected[n]));
    }
  std::printf("%ld %ld\n", compared, different);
}
