// What goes on beside the threads of a block: mbarriers, bulk copies of tensors, products of warpgroups. All of it ends
// as late as it may.
#pragma once

#include <array>
#include <deque>
#include <map>

#include "memory.h"

namespace ptx {

// Of one group of agents (knowledge.h) that reads a byte. What is asynchronous reads it until it ends: then `at` is
// kUnderWay with the reading's number, and no time that anybody knows of.
struct Reading {
  uint32_t group, at;
  Lanes lanes;
};
constexpr uint32_t kUnderWay = uint32_t{1} << 31;
constexpr uint32_t kOthers = 96;  // agents besides threads and products

// A barrier in shared memory. A phase ends with its last arrival, or with the last byte that was expected.
struct Mbarrier {
  uint64_t address;
  int count, pending;   // arrivals of a phase, and those still to come
  int64_t bytes = 0;    // still to come
  uint32_t phase = 0;
  uint32_t agent;       // its copies
  Gathering arrivals;
  Known passed;         // at the end of the last phase
};

struct BulkCopy {
  const Instruction* instruction;
  int pc;  // where it was issued
  Warp* warp;
  int lane;            // the first of those that issued it
  Lanes lanes;
  uint64_t map;        // the address of the tensor map
  int32_t at[5];
  uint64_t shared;     // address
  uint64_t mbarrier;   // of a load: its address
  uint32_t group = 0;  // of a store: the threads' groups that they had committed
  uint32_t number = 0;
  std::vector<uint8_t> taken, tainted;  // of a store whose shared memory was read
};

// A wgmma of a warp, until a wait.
struct Product {
  const Instruction* instruction;
  void (*end)(Warp&, const Product&);
  uint64_t left, right;  // descriptors
  bool adds;
  uint32_t group, number;
  std::array<std::array<uint64_t, kLanes>, 4> registers;  // of a left factor there
  std::array<Lanes, 4> poison;
};

struct Products {
  struct Sum {
    int under_way;
    Lanes tainted;  // when it is there
  };
  std::deque<Product> under_way;
  std::map<uint32_t, Sum> sums;   // registers
  std::vector<uint8_t> changed;   // by each register: whether it was written since the last wgmma.fence
  uint32_t groups = 0;            // committed
  size_t begun = 0;
};

// What the four warps of a warpgroup have to have in common: the instruction, the descriptors, whether it adds.
using Alike = std::array<uint64_t, 4>;

}  // namespace ptx
