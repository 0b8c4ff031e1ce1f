// CUDA kernels on a CPU: just enough of the CUDA language for g++ to compile a kernel file and run it, thread for
// thread, so that a machine without a GPU can prove the kernel right. What is checked:
//   - a barrier or warp collective that not every thread reaches, or reaches at another line
//   - reads of shared memory nobody wrote, and use of a cp.async result before its wait
//   - an mbarrier, bulk copy or wgmma whose result is used before its wait, or whose memory is used again too early
//   - global memory touched before a launch has waited for the kernels before it
//   - accesses past the ends of a GuardedBuffer, and writes to one that is read-only
//   - with -fsanitize=address any access out of bounds, with -fsanitize=thread any data race
// What a CPU can't show: bank conflicts, tensor-core rounding, memory-order subtleties, register limits, timing.
#pragma once

#include "builtins.h"
#include "engine.h"
#include "language.h"
#include "mbarrier.h"
#include "wgmma.h"
