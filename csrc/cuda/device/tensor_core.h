// Asynchronous copies to shared memory and the instructions of tensor cores: the only inline assembly of csrc/cuda,
// each beside its meaning on the CPU.
#pragma once

#include "vec.h"

namespace fastdcgan::gpu {

#ifdef __CUDACC__

GPU_INLINE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, or 16 zero bytes where !valid; there after the wait.
GPU_INLINE void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
GPU_INLINE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of this thread's committed groups are under way.
template <int Pending>
GPU_INLINE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane i brings the address of row i%8 of matrix i/8.
GPU_INLINE void load_matrix(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16x8, float) += a (16x16, bf16, rows) * b (16x8, bf16, columns)
GPU_INLINE void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

inline void copy_async(void* to, const void* from, bool valid) {
  detail::require_aligned(to, 16);
  if (valid) detail::require_aligned(from, 16);
  cuda_on_cpu::AsyncCopy copy{to, {}, 0};
  if (valid) std::memcpy(copy.data, from, 16);
  // Nothing to be read before the wait. Plain stores: g++ inlines a constant memset or memcpy unseen by the thread
  // sanitizer.
  using Word __attribute__((may_alias)) = uint64_t;
  static_cast<Word*>(to)[0] = static_cast<Word*>(to)[1] = ~uint64_t{0};
  cuda_on_cpu::engine.begin_copy(copy);
}
inline void copy_async_commit() { cuda_on_cpu::engine.commit_copies(); }
template <int Pending>
inline void copy_async_wait() {
  using Word __attribute__((may_alias)) = uint64_t;
  for (cuda_on_cpu::AsyncCopy copy; cuda_on_cpu::engine.finish_copy(Pending, copy);) {
    Word words[2];
    std::memcpy(words, copy.data, 16);
    static_cast<Word*>(copy.to)[0] = words[0], static_cast<Word*>(copy.to)[1] = words[1];
  }
}

inline void load_matrix(unsigned (&r)[4], const void* row, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  struct Row {
    uint32_t pair[4];
  } mine;
  struct Fragment {
    uint32_t r[4];
  };
  using Pair __attribute__((may_alias)) = uint32_t;
  detail::require_aligned(row, 16);
  for (int i = 0; i < 4; ++i) mine.pair[i] = static_cast<const Pair*>(row)[i];
  auto got = cuda_on_cpu::engine.warp_call<Fragment>(
      "ldmatrix", ~0u, mine,
      [](auto& rows, auto& out) {
        for (int lane = 0; lane < 32; ++lane)
          for (int matrix = 0; matrix < 4; ++matrix) out[lane]->r[matrix] = rows[matrix * 8 + lane / 4]->pair[lane % 4];
      },
      site);
  std::memcpy(r, got.r, sizeof got);
}

inline void multiply_add(
    float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
    cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  struct Operands {
    unsigned a[4], b[2];
    float c[4];
  } mine;
  struct Sum {
    float c[4];
  };
  std::memcpy(mine.a, a, sizeof a), std::memcpy(mine.b, b, sizeof b), std::memcpy(mine.c, c, sizeof c);
  auto sum = cuda_on_cpu::engine.warp_call<Sum>(
      "mma.sync", ~0u, mine,
      [](auto& in, auto& out) {
        auto half = [](unsigned pair, int which) {
          return to_float(bf16{static_cast<uint16_t>(pair >> 16 * which)});
        };
        float A[16][16], B[16][8], C[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          int group = lane / 4, pair = lane % 4 * 2;
          for (int i = 0; i < 2; ++i) {
            for (int q = 0; q < 4; ++q) A[group + q % 2 * 8][pair + i + q / 2 * 8] = half(in[lane]->a[q], i);
            for (int q = 0; q < 2; ++q) B[pair + i + q * 8][group] = half(in[lane]->b[q], i);
            for (int q = 0; q < 2; ++q) C[group + q * 8][pair + i] = in[lane]->c[q * 2 + i];
          }
        }
        for (int m = 0; m < 16; ++m)
          for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) C[m][n] += A[m][k] * B[k][n];
        for (int lane = 0; lane < 32; ++lane)
          for (int q = 0; q < 4; ++q) out[lane]->c[q] = C[lane / 4 + q / 2 * 8][lane % 4 * 2 + q % 2];
      },
      site);
  std::memcpy(c, sum.c, sizeof sum);
}

#endif

}  // namespace fastdcgan::gpu
