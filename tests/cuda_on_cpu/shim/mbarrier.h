// Barriers in shared memory and bulk copies that arrive at them; barriers by number. See async.h.
#pragma once

#include "engine.h"

namespace cuda_on_cpu {

namespace detail {

inline Mbarrier& mbarrier_at(const void* at) {
  note::ShimCode shim;
  const auto found = engine.asynchronous.mbarriers.find(at);
  if (found == engine.asynchronous.mbarriers.end()) engine.fail("an mbarrier that was not initialised");
  return found->second;
}

inline char* sync_of(Mbarrier& barrier) {
  note::ShimCode shim;
  return &barrier.sync[barrier.phase % 2];
}

// `arrivals` and `bytes` of what the phase waits for have come.
inline void come(const void* at, Mbarrier& barrier, int arrivals, int64_t bytes) {
  note::ShimCode shim;
  if (barrier.pending < arrivals) engine.fail("more arrivals at an mbarrier than it was initialised for");
  barrier.pending -= arrivals, barrier.bytes -= bytes;
  if (barrier.bytes < 0) engine.fail("bytes arrive at an mbarrier that it did not expect");
  if (barrier.pending > 0 || barrier.bytes > 0) return;
  ++barrier.phase, barrier.pending = barrier.count;
  engine.wake(at);
}

inline void do_copy(const void* at, Mbarrier& barrier) {
  note::acquire(&barrier.issued);
  BulkCopy copy;
  {
    note::ShimCode shim;
    copy = barrier.copies.front();
    barrier.copies.pop_front();
  }
  using Number __attribute__((may_alias)) = uint16_t;
  const TensorTiles& t = copy.from;
  const unsigned to = engine.shared_address(copy.to);
  const int64_t all = tma_tile_bytes(t) / t.item;
  for (int64_t i = 0; i < all; ++i) {
    int64_t rest = i, offset = 0;
    bool inside = true;
    for (int d = 0; d < t.rank; ++d) {
      const int64_t index = copy.at[d] + rest % t.tile[d];
      rest /= t.tile[d];
      inside &= index >= 0 && index < static_cast<int64_t>(t.size[d]);
      offset += index * static_cast<int64_t>(t.stride[d]);
    }
    const unsigned place = swizzled(to + static_cast<unsigned>(i * t.item));
    *reinterpret_cast<Number*>(engine.at_shared_address(place)) =
        inside ? *reinterpret_cast<const Number*>(t.base + offset) : Number{0};
  }
  note::release(sync_of(barrier));
  come(at, barrier, 0, tma_tile_bytes(t));
}

}  // namespace detail

inline void mbarrier_init(const void* at, int arrivals) {
  note::ShimCode shim;
  Mbarrier barrier;
  barrier.count = barrier.pending = arrivals;
  engine.asynchronous.mbarriers[at] = barrier;
}

inline void mbarrier_init_done() {
  note::ShimCode shim;
  for (auto& barrier : engine.asynchronous.mbarriers) barrier.second.visible = true;
}

inline void mbarrier_arrive(const void* at, int bytes) {
  engine.meet_others();
  Mbarrier& barrier = detail::mbarrier_at(at);
  note::release(detail::sync_of(barrier));
  detail::come(at, barrier, 1, -bytes);
}

inline void mbarrier_wait(const void* at, unsigned parity, Site site) {
  Mbarrier& barrier = detail::mbarrier_at(at);
  for (bool passed = false, copies = false;;) {
    {
      note::ShimCode shim;
      passed = barrier.passed(parity);
      copies = std::exchange(engine.self().does_a_copy, false) && !barrier.copies.empty();
    }
    if (passed) break;
    if (copies)
      detail::do_copy(at, barrier);
    else
      engine.sleep(at, "mbarrier.try_wait", site);
  }
  note::acquire(&barrier.sync[parity % 2]);
}

// Begins to copy the tile at `at` to shared memory.
inline void copy_tma_tile(char* to, const TensorTiles& from, const int* at, const void* arrives_at) {
  Mbarrier& barrier = detail::mbarrier_at(arrives_at);
  {
    note::ShimCode shim;
    if (!barrier.visible) engine.fail("an mbarrier that the copy engine may not see yet");
  }
  if (engine.shared_address(to) % 1024) engine.fail("a swizzled tile is not at a multiple of 1024 bytes");
  for (int64_t i = 0; i < tma_tile_bytes(from); i += Unfenced::kBytes) {
    const Unfenced own = engine.unfenced_at(engine.shared_address(to) + static_cast<unsigned>(i));
    if (own.reads + own.writes > 0) engine.fail("a bulk copy to what threads accessed without fence.proxy.async");
  }
  using Word __attribute__((may_alias)) = uint64_t;
  for (int64_t i = 0; i < tma_tile_bytes(from) / 8; ++i)
    reinterpret_cast<Word*>(to)[i] = ~uint64_t{0};  // not there yet
  note::release(&barrier.issued);
  note::ShimCode shim;
  BulkCopy copy{from, {}, to};
  std::copy(at, at + from.rank, copy.at);
  barrier.copies.push_back(copy);
}

inline void named_barrier(int number, unsigned threads, Site site) {
  if (number < 1 || number > 15 || threads % warpSize) engine.fail("no such barrier");
  engine.meet_others();
  NamedBarrier& barrier = engine.asynchronous.named[number];
  char* sync = nullptr;
  {
    note::ShimCode shim;
    sync = &barrier.sync[barrier.generation % 2];
  }
  note::release(sync);
  {
    note::ShimCode shim;
    if (barrier.arrived == 0) barrier.expected = threads;
    if (barrier.expected != threads)
      engine.fail("a barrier of " + std::to_string(barrier.expected) + " threads, or of " + std::to_string(threads));
    if (++barrier.arrived == threads) {
      barrier.arrived = 0, ++barrier.generation;
      engine.wake(&barrier);
    } else {
      engine.sleep(&barrier, "bar.sync", site);
    }
  }
  note::acquire(sync);
}

}  // namespace cuda_on_cpu
