// Asynchronous copies to shared memory and the instructions of tensor cores: the only inline assembly of csrc/cuda,
// each beside its meaning on the CPU.
#pragma once

#include "cuda/device/vec.h"

namespace fastdcgan::gpu {

#ifdef __CUDACC__

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

// Four 8x8 matrices of 16-bit numbers; lane i brings the address of row i%8 of matrix i/8, and gets the two numbers
// from column i%4*2 on of row i/4 of each.
GPU_INLINE void load_matrix(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each matrix transposed: rows are given, and lane i gets the two numbers from row i%4*2 on of column i/4.
GPU_INLINE void load_matrix_transposed(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16x8, float) += a (16x16, rows) * b (16x8, columns)
#define FASTDCGAN_MULTIPLY_ADD(type)                                                   \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                  \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"  \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
GPU_INLINE void multiply_add(bf16, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  FASTDCGAN_MULTIPLY_ADD("bf16");
}
GPU_INLINE void multiply_add(fp16, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  FASTDCGAN_MULTIPLY_ADD("f16");
}
#undef FASTDCGAN_MULTIPLY_ADD

// c (16x8) += a (16x8, rows) * b (8x8, columns) of numbers that round_to_tf32 gave
GPU_INLINE void multiply_add(float, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The bits of x with the 10 bits of mantissa that tensor cores take: to nearest, ties away from zero.
GPU_INLINE unsigned round_to_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
GPU_INLINE float float_of_tf32(unsigned bits) { return __uint_as_float(bits); }

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
    detail::access(copy.to, 16, true);
    static_cast<Word*>(copy.to)[0] = words[0], static_cast<Word*>(copy.to)[1] = words[1];
  }
}

namespace detail {

inline void load_matrix(const char* name, bool transposed, unsigned (&r)[4], const void* row, cuda_on_cpu::Site site) {
  struct Row {
    uint32_t pair[4];
  } mine;
  struct Fragment {
    uint32_t r[4];
  };
  using Pair __attribute__((may_alias)) = uint32_t;
  access(row, 16, false);
  for (int i = 0; i < 4; ++i) mine.pair[i] = static_cast<const Pair*>(row)[i];
  auto got = cuda_on_cpu::engine.warp_call<Fragment>(
      name, ~0u, mine,
      [=](auto& rows, auto& out) {
        for (int lane = 0; lane < 32; ++lane)
          for (int matrix = 0; matrix < 4; ++matrix) {
            const auto at = [&](int r, int c) { return rows[matrix * 8 + r]->pair[c / 2] >> c % 2 * 16 & 0xFFFF; };
            const int line = lane / 4, first = lane % 4 * 2;
            out[lane]->r[matrix] = transposed ? at(first, line) | at(first + 1, line) << 16
                                              : at(line, first) | at(line, first + 1) << 16;
          }
      },
      site);
  std::memcpy(r, got.r, sizeof got);
}

// Number k of the 16 (of 16 bits each) or 8 (floats) along the depth of a fragment: register and half of it.
template <int kDepth, class Number>
void multiply_add(
    Number number, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], cuda_on_cpu::Site site) {
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
      [=](auto& in, auto& out) {
        constexpr int kPacked = kDepth / 8;  // numbers in a register
        // Rows are vectors of g++: the loop over products takes much of the time of the tests.
        using Row __attribute__((vector_size(8 * sizeof(float)))) = float;
        float A[16][kDepth];
        Row B[kDepth], C[16];
        for (int lane = 0; lane < 32; ++lane) {
          int group = lane / 4, pair = lane % 4 * 2, first = lane % 4 * kPacked;
          for (int i = 0; i < kPacked; ++i) {
            for (int q = 0; q < 4; ++q)
              A[group + q % 2 * 8][first + i + q / 2 * kDepth / 2] = number(in[lane]->a[q], i);
            for (int q = 0; q < 2; ++q) B[first + i + q * kDepth / 2][group] = number(in[lane]->b[q], i);
          }
          for (int i = 0; i < 2; ++i)
            for (int q = 0; q < 2; ++q) C[group + q * 8][pair + i] = in[lane]->c[q * 2 + i];
        }
        for (int m = 0; m < 16; ++m)
          for (int k = 0; k < kDepth; ++k) C[m] += A[m][k] * B[k];
        for (int lane = 0; lane < 32; ++lane)
          for (int q = 0; q < 4; ++q) out[lane]->c[q] = C[lane / 4 + q / 2 * 8][lane % 4 * 2 + q % 2];
      },
      site);
  std::memcpy(c, sum.c, sizeof sum);
}

template <class T>
void multiply_add_16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], cuda_on_cpu::Site site) {
  const auto number = [](unsigned pair, int which) { return to_float(T{static_cast<uint16_t>(pair >> 16 * which)}); };
  multiply_add<16>(number, c, a, b, site);
}

}  // namespace detail

inline void load_matrix(unsigned (&r)[4], const void* row, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  detail::load_matrix("ldmatrix", false, r, row, site);
}
inline void load_matrix_transposed(
    unsigned (&r)[4], const void* row, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  detail::load_matrix("ldmatrix.trans", true, r, row, site);
}

inline void multiply_add(
    bf16, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
    cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  detail::multiply_add_16<bf16>(c, a, b, site);
}
inline void multiply_add(
    fp16, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
    cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  detail::multiply_add_16<fp16>(c, a, b, site);
}
// A tensor core ignores the last 13 bits of a number that round_to_tf32 did not give.
inline void multiply_add(
    float, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
    cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  const auto number = [](unsigned bits, int) { return detail::float_of(bits & ~0x1FFFu); };
  detail::multiply_add<8>(number, c, a, b, site);
}

inline unsigned round_to_tf32(float x) {
  const uint32_t bits = detail::bits_of(x);
  if ((bits & 0x7F800000) == 0x7F800000) return bits & 0x7FFFFF ? 0x7FFFE000 : bits;  // NaN, infinite
  return (bits + 0x1000) & ~0x1FFFu;
}
inline float float_of_tf32(unsigned bits) { return detail::float_of(bits); }

#endif

}  // namespace fastdcgan::gpu
