// The functions of csrc/cpu/amx/amx.h in plain C++: what the manual says of each instruction. What the processor
// answers with an exception (a tile that was never configured or has another shape, a shape that there isn't) throws
// std::logic_error.
#pragma once

#include <cstdint>

namespace fastdcgan::cpu::amx {

namespace emulated {

void zero(int tile);
void load(int tile, const void* from, int64_t stride);
void store(int tile, void* to, int64_t stride);
void multiply(int sum, int a, int b);

}  // namespace emulated

void configure(const Config&);
void release();

template <int kTile>
void zero() {
  emulated::zero(kTile);
}
template <int kTile>
void load(const void* from, int64_t stride) {
  emulated::load(kTile, from, stride);
}
template <int kTile>
void store(void* to, int64_t stride) {
  emulated::store(kTile, to, stride);
}
template <int kSum, int kA, int kB>
void multiply() {
  emulated::multiply(kSum, kA, kB);
}

}  // namespace fastdcgan::cpu::amx
