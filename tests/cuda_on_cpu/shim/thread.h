// What the engine keeps of each CUDA thread, and of a launch.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "async.h"
#include "fiber.h"
#include "language.h"

namespace cuda_on_cpu {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes;
  const char* name;
  bool early = false;  // the kernel waits for those before it
};

struct AsyncCopy {  // one cp.async under way
  void* to;
  unsigned char data[16];
  int group;
};

struct Thread {
  enum class State : uint8_t { ready, at_barrier, in_warp_call, asleep, returned };

  Fiber* fiber = nullptr;
  State state = State::ready;
  uint3 index{};
  const char* call = "";  // the collective it waits in, and where
  Site site{"", 0};
  unsigned mask = 0;
  const void* in = nullptr;
  void* out = nullptr;
  unsigned barriers = 0, warp_barriers = 0;
  std::deque<AsyncCopy> copies;
  int copy_groups = 0;
  bool waited = false;  // for the kernels before
  bool does_a_copy = false;  // of those that the barrier waits for at which it sleeps
  std::vector<std::pair<unsigned, bool>> unfenced;  // accesses since the last barrier: which 16 bytes, and if written
  Products products;

  // For the next block.
  void restart(Fiber& on) {
    fiber = &on, state = State::ready, barriers = warp_barriers = 0, copies.clear(), copy_groups = 0;
    waited = does_a_copy = false, unfenced.clear(), products = {};
  }
};

}  // namespace cuda_on_cpu
