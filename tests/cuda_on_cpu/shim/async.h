// What runs beside the threads of a block: barriers in shared memory, bulk copies of tensor tiles, and products of
// warpgroups. All of it happens as late as it may:
//   - where a bulk copy goes, nothing is to be read from its issue on; it is done by a thread that waits for it, when no
//     other thread can go on, or by chance before
//   - a product reads shared memory when it is waited for, and until then its sums are NaN
// so a wait that is missing, or a stage that is used again too early, is seen.
//
// Copies and products go through the async proxy, a thread's own accesses through the generic one. What a thread has
// read may be copied to, and what it has written may be multiplied, once it has called fence.proxy.async before it met
// others at a barrier or arrived at one (PTX ISA, "Proxies").
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "language.h"

namespace cuda_on_cpu {

// A tensor as a tensor map describes it, in bytes but for `size` and `tile`.
struct TensorTiles {
  const char* base = nullptr;
  int rank = 0, item = 0;
  uint64_t size[5] = {}, stride[5] = {};  // the stride of the first dimension is `item`
  uint32_t tile[5] = {};
};

struct BulkCopy {
  TensorTiles from;
  int at[5];
  char* to;
};

struct Mbarrier {
  int count = 0, pending = 0;  // arrivals of a phase, and those still to come
  int64_t bytes = 0;           // still to come
  unsigned phase = 0;
  bool visible = false;  // to the copy engine
  std::deque<BulkCopy> copies;
  char sync[2] = {}, issued = 0;  // addresses for the thread sanitizer

  bool passed(unsigned parity) const { return phase % 2 != parity; }
};

struct NamedBarrier {
  unsigned arrived = 0, expected = 0, generation = 0;
  char sync[2] = {};
};

// One wgmma of a thread: the factors that shared memory has (`a` if there are no registers), and where the sums go.
struct Product {
  uint64_t a, b;
  unsigned registers[4];
  bool from_registers, a_transposed, b_transposed;
  int columns, group;
  float (*number)(uint16_t);
  float* sum;
};

// A thread's products. Sums are held here while products that add to them are under way.
struct Products {
  std::deque<Product> under_way;
  std::map<float*, std::vector<float>> held;
  int groups = 0, begun = 0;
  bool fenced = false;
};

// How many of the threads' own accesses to 16 bytes of shared memory no fence of theirs has followed in time.
struct Unfenced {
  static constexpr unsigned kBytes = 16;
  unsigned reads = 0, writes = 0;
};

// All of a block's.
struct Asynchronous {
  std::map<const void*, Mbarrier> mbarriers;
  std::vector<Unfenced> unfenced;  // of blocks that have mbarriers
  NamedBarrier named[16];
};

// Bytes of a tile, all of which arrive, those beyond the tensor as zeros.
inline int64_t tma_tile_bytes(const TensorTiles& t) {
  int64_t bytes = t.item;
  for (int i = 0; i < t.rank; ++i) bytes *= t.tile[i];
  return bytes;
}

// The 16 bytes of a row of 128 that a swizzled place in shared memory is exchanged for.
constexpr unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

}  // namespace cuda_on_cpu
