// Barriers beside __syncthreads (sm_90): in shared memory, for what is copied there and for its readers, and by number,
// for a part of the threads of a block.
#pragma once

#include "cuda/device/vec.h"
#if defined(__CUDACC__) && defined(FASTDCGAN_BOUNDED_WAITS)
#include <cstdio>
#endif

namespace fastdcgan::gpu {

// A barrier goes through phases. A phase ends with its last arrival, or with the last byte that was expected if that is
// later; the parity of the first is 0, and before it lies one with parity 1 that has ended.
using Mbarrier = uint64_t;

#ifdef __CUDACC__

GPU_INLINE void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the last mbarrier_init: the copy engine sees them.
GPU_INLINE void mbarrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
GPU_INLINE void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.release.cta.shared::cta.b64 state, [%0];\n}" ::"r"(
                   shared_address(barrier))
               : "memory");
}
// One arrival; the phase waits for that many bytes more.
GPU_INLINE void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  asm volatile(
      "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.release.cta.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
          shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Whether the phase of that parity has ended, after up to `kPollTime` nanoseconds.
constexpr int kPollTime = 1000;
GPU_INLINE bool mbarrier_poll(Mbarrier* barrier, int parity) {
  unsigned ended;
  asm volatile(
      "{\n.reg .pred ended;\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2, %3;\n"
      "selp.b32 %0, 1, 0, ended;\n}"
      : "=r"(ended)
      : "r"(shared_address(barrier)), "r"(parity), "r"(kPollTime)
      : "memory");
  return ended != 0;
}
// Waits until the phase of that parity of barriers[which], which are called `name`, has ended. A build with
// FASTDCGAN_BOUNDED_WAITS, for checks, ends a launch that has waited for seconds and says where: it would hang.
GPU_INLINE void mbarrier_wait([[maybe_unused]] const char* name, Mbarrier* barriers, int which, int parity) {
#ifdef FASTDCGAN_BOUNDED_WAITS
  for (int polls = 0; !mbarrier_poll(&barriers[which], parity); ++polls)
    if (polls == 1 << 23) {
      printf("block (%d,%d) thread %d: mbarrier %s[%d] never ended its phase of parity %d\n", blockIdx.x, blockIdx.y,
             threadIdx.x, name, which, parity);
      trap();
    }
#else
  while (!mbarrier_poll(&barriers[which], parity)) continue;
#endif
}

// Waits for `threads` threads, whole warps, at barrier `number` of 1 to 15.
GPU_INLINE void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

#else

inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
  detail::require_aligned(barrier, 8);
  *barrier = static_cast<uint64_t>(arrivals);  // seen by the thread sanitizer
  cuda_on_cpu::mbarrier_init(barrier, arrivals);
}
inline void mbarrier_init_done() { cuda_on_cpu::mbarrier_init_done(); }
inline void mbarrier_arrive(Mbarrier* barrier) {
  [[maybe_unused]] volatile uint64_t is_there = *barrier;
  cuda_on_cpu::mbarrier_arrive(barrier, 0);
}
inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  [[maybe_unused]] volatile uint64_t is_there = *barrier;
  cuda_on_cpu::mbarrier_arrive(barrier, bytes);
}
inline void mbarrier_wait(const char* name, Mbarrier* barriers, int which, int parity,
                          cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  [[maybe_unused]] volatile uint64_t is_there = barriers[which];
  cuda_on_cpu::mbarrier_wait(&barriers[which], static_cast<unsigned>(parity), name, site);
}
inline void named_barrier(int number, int threads, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::named_barrier(number, static_cast<unsigned>(threads), site);
}

#endif

}  // namespace fastdcgan::gpu
