// Advanced Matrix Extensions: eight tile registers of 16 rows of 64 bytes, and the product of two tiles of bfloat16
// added to one of float (Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", chapter "Programming
// with Intel AMX"). Nothing else in csrc/cpu names an instruction of it.
//
// With FASTDCGAN_BF16_EMULATED the same functions are those of tests/csrc/cpu/amx_emulated.h, for any processor.
#pragma once

#include <cstdint>

namespace fastdcgan::cpu::amx {

constexpr int kTiles = 8;
constexpr int64_t kRows = 16, kRowBytes = 64;

// What LDTILECFG reads: the shape of each tile.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64);

// Whether this processor has AMX with bfloat16, the operating system lets this process use it (asked once), and
// ATEN_CPU_CAPABILITY does not cap what is used at AVX-512.
bool usable();

}  // namespace fastdcgan::cpu::amx

#ifdef FASTDCGAN_BF16_EMULATED
#include "amx_emulated.h"
#else

namespace fastdcgan::cpu::amx {

// Tile registers belong to the thread; `configure` gives them their shapes and sets them to zero, `release` gives them
// back: a thread that holds none is switched to and from without their 8 KiB.
//
// Plain instructions, because the compilers' own functions take the number of a tile as a literal alone, and GCC's say
// nothing of the memory that they read and write.
inline void configure(const Config& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
inline void release() { asm volatile("tilerelease" : : : "memory"); }

template <int kTile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Rows are `stride` bytes apart.
template <int kTile>
inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
// sum[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1] over k: pairs of rows of B lie side by side.
template <int kSum, int kA, int kB>
inline void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace fastdcgan::cpu::amx

#endif
