// Products of warpgroups (sm_90a): four warps, the first of them a multiple of four, multiply 64 rows by up to 256
// columns. The right factor lies in shared memory, the left one there too or in registers; the sums are there after a
// wait.
#pragma once

#include "cuda/device/barriers.h"

namespace fastdcgan::gpu {

// Whether this compilation has them: for sm_90a alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// A factor in shared memory, as the instruction takes it (PTX ISA, "Matrix Descriptor Format"): rows of 128 bytes at a
// multiple of 1024, swizzled. Along a row lies either the depth, 64 numbers of it, or the factor's other side, and 8
// rows are 1024 bytes; of the other side each 64 more numbers lie `apart` bytes further.
GPU_INLINE uint64_t matrix_descriptor(const void* tile, int apart = 0) {
  constexpr uint64_t kSwizzled128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzled128 | kEightRows | static_cast<uint64_t>(apart >> 4) << 16 | (shared_address(tile) & 0x3FFFF) >> 4;
}
// `bytes` further on.
GPU_INLINE uint64_t advanced(uint64_t descriptor, int bytes) { return descriptor + static_cast<uint64_t>(bytes >> 4); }

#ifdef __CUDACC__

// Before the first product, and after the registers of its sums or of its left factor were written.
GPU_INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
GPU_INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// After ordinary stores to shared memory and before the barrier after which products read it; after ordinary loads from
// it and before the barrier after which it is copied to. By each thread that made some.
GPU_INLINE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Keeps the compiler from moving these registers' values across.
template <int N>
GPU_INLINE void hold(float (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}
template <int N>
GPU_INLINE void hold(unsigned (&numbers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(numbers[i])::"memory");
}

// Waits until at most `Pending` of the committed groups are under way.
template <int Pending>
GPU_INLINE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The registers of each thread of the warpgroup that calls it, multiples of 8, from then on: less, or waiting for those
// that others give up, more. For kernels whose launch bounds say how many there are at first.
template <int kRegisters>
GPU_INLINE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
GPU_INLINE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The registers %0 to %31 and so on; %0 is the first of the sums.
#define FASTDCGAN_REGISTERS_0 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTDCGAN_REGISTERS_1 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTDCGAN_REGISTERS_2 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTDCGAN_REGISTERS_3 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTDCGAN_SUMS_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define FASTDCGAN_SUMS_16(i) \
  FASTDCGAN_SUMS_4(i), FASTDCGAN_SUMS_4(i + 4), FASTDCGAN_SUMS_4(i + 8), FASTDCGAN_SUMS_4(i + 12)
#define FASTDCGAN_SUMS_32(i) FASTDCGAN_SUMS_16(i), FASTDCGAN_SUMS_16(i + 16)
#define FASTDCGAN_SUMS_64(i) FASTDCGAN_SUMS_32(i), FASTDCGAN_SUMS_32(i + 32)
#define FASTDCGAN_SUMS_128(i) FASTDCGAN_SUMS_64(i), FASTDCGAN_SUMS_64(i + 64)

#define FASTDCGAN_REGISTERS_ALL \
  FASTDCGAN_REGISTERS_0 ", " FASTDCGAN_REGISTERS_1 ", " FASTDCGAN_REGISTERS_2 ", " FASTDCGAN_REGISTERS_3

// sum (64 x 2 * count) += left * right of descriptors; the registers after those of the sums are %r0 and so on.
#define FASTDCGAN_WGMMA(columns, count, type, registers, r0, r1, r2, r3)                                              \
  asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type\
               "." type " {" registers "}, %" r0 ", %" r1 ", add, 1, 1, %" r2 ", %" r3 ";\n}"                         \
               : FASTDCGAN_SUMS_##count(0)                                                                            \
               : "l"(left), "l"(right), "n"(static_cast<int>(kLeft)), "n"(static_cast<int>(kRight)))
// The same with the left factor in registers.
#define FASTDCGAN_WGMMA_REGISTERS(columns, count, type, registers, r0, r1, r2, r3, r4, r5)                            \
  asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type\
               "." type " {" registers "}, {%" r0 ", %" r1 ", %" r2 ", %" r3 "}, %" r4 ", add, 1, 1, %" r5 ";\n}"     \
               : FASTDCGAN_SUMS_##count(0)                                                                            \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "n"(static_cast<int>(kRight)))
#define FASTDCGAN_WGMMA_MULTIPLY(T, type, columns, count, registers, r0, r1, r2, r3, r4, r5)                      \
  template <bool kLeft, bool kRight>                                                                                  \
  GPU_INLINE void wgmma_multiply(T, float (&sum)[count], uint64_t left, uint64_t right) {                         \
    FASTDCGAN_WGMMA(columns, count, type, registers, r0, r1, r2, r3);                                                 \
  }                                                                                                                   \
  template <bool kRight>                                                                                              \
  GPU_INLINE void wgmma_multiply(T, float (&sum)[count], const unsigned (&left)[4], uint64_t right) {             \
    FASTDCGAN_WGMMA_REGISTERS(columns, count, type, registers, r0, r1, r2, r3, r4, r5);                               \
  }

// wgmma_multiply<kLeft, kRight>(T, sum, left, right): sum += left (64 x 16) * right (16 x columns). The sums and the
// numbers of a left factor in registers are dealt out to each warp's 16 rows as by mma.sync's 16x8x16. kLeft, kRight:
// along the rows in shared memory lies not the depth but the other side.
FASTDCGAN_WGMMA_MULTIPLY(bf16, "bf16", "64", 32, FASTDCGAN_REGISTERS_0, "32", "33", "34", "35", "36", "37")
FASTDCGAN_WGMMA_MULTIPLY(bf16, "bf16", "128", 64, FASTDCGAN_REGISTERS_0 ", " FASTDCGAN_REGISTERS_1,
                             "64", "65", "66", "67", "68", "69")
FASTDCGAN_WGMMA_MULTIPLY(bf16, "bf16", "256", 128, FASTDCGAN_REGISTERS_ALL,
                             "128", "129", "130", "131", "132", "133")
FASTDCGAN_WGMMA_MULTIPLY(fp16, "f16", "64", 32, FASTDCGAN_REGISTERS_0, "32", "33", "34", "35", "36", "37")
FASTDCGAN_WGMMA_MULTIPLY(fp16, "f16", "128", 64, FASTDCGAN_REGISTERS_0 ", " FASTDCGAN_REGISTERS_1,
                             "64", "65", "66", "67", "68", "69")
FASTDCGAN_WGMMA_MULTIPLY(fp16, "f16", "256", 128, FASTDCGAN_REGISTERS_ALL, "128", "129", "130", "131", "132", "133")
#undef FASTDCGAN_WGMMA_MULTIPLY
#undef FASTDCGAN_WGMMA_REGISTERS
#undef FASTDCGAN_WGMMA
#undef FASTDCGAN_SUMS_128
#undef FASTDCGAN_SUMS_64
#undef FASTDCGAN_SUMS_32
#undef FASTDCGAN_SUMS_16
#undef FASTDCGAN_SUMS_4
#undef FASTDCGAN_REGISTERS_ALL
#undef FASTDCGAN_REGISTERS_3
#undef FASTDCGAN_REGISTERS_2
#undef FASTDCGAN_REGISTERS_1
#undef FASTDCGAN_REGISTERS_0

#else

inline void wgmma_fence() { cuda_on_cpu::wgmma_fence(); }
inline void wgmma_commit() { cuda_on_cpu::wgmma_commit(); }
inline void fence_async() { cuda_on_cpu::engine.fence_async(); }
template <class T, int N>
inline void hold(T (&)[N]) {}
template <int>
inline void give_registers() {}
template <int>
inline void take_registers() {}
template <int Pending>
inline void wgmma_wait(cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::wgmma_wait(Pending, site);
}

template <bool kLeft, bool kRight, class T, int N>
inline void wgmma_multiply(T, float (&sum)[N], uint64_t left, uint64_t right) {
  const auto number = [](uint16_t bits) { return to_float(T{bits}); };
  cuda_on_cpu::begin_product({left, right, {}, false, kLeft, kRight, 2 * N, 0, number, sum});
}
template <bool kRight, class T, int N>
inline void wgmma_multiply(T, float (&sum)[N], const unsigned (&left)[4], uint64_t right) {
  const auto number = [](uint16_t bits) { return to_float(T{bits}); };
  cuda_on_cpu::begin_product(
      {0, right, {left[0], left[1], left[2], left[3]}, true, false, kRight, 2 * N, 0, number, sum});
}

#endif

}  // namespace fastdcgan::gpu
