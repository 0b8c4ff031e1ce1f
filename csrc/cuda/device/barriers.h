// Barriers beside __syncthreads (sm_90): in shared memory, for what is copied there and for its readers, and by number,
// for a part of the threads of a block.
#pragma once

#include "cuda/device/hangs.h"
#include "cuda/device/vec.h"

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
// Waits until the phase of that parity has ended, and returns true. With FASTDCGAN_BOUNDED_WAITS (hangs.h) it gives up
// after seconds, and returns false.
GPU_INLINE bool mbarrier_wait(Mbarrier* barrier, int parity) {
#ifdef FASTDCGAN_BOUNDED_WAITS
  for (int polls = 0; polls < 1 << 23; ++polls)
    if (mbarrier_poll(barrier, parity)) return true;
  return false;
#else
  while (!mbarrier_poll(barrier, parity)) continue;
  return true;
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
inline bool mbarrier_wait(Mbarrier* barrier, int parity, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  [[maybe_unused]] volatile uint64_t is_there = *barrier;
  cuda_on_cpu::mbarrier_wait(barrier, static_cast<unsigned>(parity), site);
  return true;  // or the engine says where there is a deadlock
}
inline void named_barrier(int number, int threads, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::named_barrier(number, static_cast<unsigned>(threads), site);
}

#endif

}  // namespace fastdcgan::gpu
