// Where a launch hangs. A library that is compiled with FASTDCGAN_BOUNDED_WAITS, for checks, gives up to wait at a barrier
// after seconds, notes which one it was in memory of the host, and ends the launch; the note is printed when the process
// ends. Printing it from the kernel would not do: in a kernel that calls a function every product waits for the one
// before, and what is checked and measured would be another kernel.
#pragma once

#include "cuda/device/launch.h"
#if defined(__CUDACC__) && defined(FASTDCGAN_BOUNDED_WAITS)
#include <cstdio>
#endif

namespace fastdcgan::gpu {

struct Hang {
  enum Barrier : int { none, full, empty };
  Barrier barrier = none;
  int stage = 0, parity = 0, block = 0, part = 0, thread = 0;
};

// Ends the launch.
GPU_INLINE void hangs([[maybe_unused]] Hang* note, [[maybe_unused]] Hang::Barrier barrier, [[maybe_unused]] int stage,
                      [[maybe_unused]] int parity) {
#ifdef __CUDACC__
  const int block = static_cast<int>(blockIdx.x), part = static_cast<int>(blockIdx.y);
  *note = {barrier, stage, parity, block, part, static_cast<int>(threadIdx.x)};
  __threadfence_system();
#endif
  trap();
}

// The place for a note; nullptr in a library whose waits have no bound.
inline Hang* hang_note() {
#if defined(__CUDACC__) && defined(FASTDCGAN_BOUNDED_WAITS)
  struct Note {
    Hang* hang = nullptr;
    Note() {
      check(cudaHostAlloc(reinterpret_cast<void**>(&hang), sizeof(Hang), cudaHostAllocPortable), "cudaHostAlloc");
      *hang = {};
    }
    ~Note() {  // the memory is the process's, which ends
      if (hang->barrier == Hang::none) return;
      std::fprintf(stderr, "block (%d,%d) thread %d: barrier %s[%d] did not end its phase of parity %d\n", hang->block,
                   hang->part, hang->thread, hang->barrier == Hang::full ? "full" : "empty", hang->stage, hang->parity);
    }
  };
  static const Note note;
  return note.hang;
#else
  return nullptr;
#endif
}

}  // namespace fastdcgan::gpu
