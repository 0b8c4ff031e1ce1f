// Counts what the warps of a launch do, by the rules that a GPU's memory goes by. Off where a launch has none.
#pragma once

#include <map>
#include <set>
#include <unordered_map>
#include <unordered_set>

#include "warp.h"

namespace ptx {

// By the unit that runs them. Moves are names of registers, and constants: ptxas leaves few of them.
enum class Kind : uint8_t { integer, floating, special, memory, tensor, control, move };
constexpr int kKinds = 7;

struct Requests {  // of warps: one for each instruction
  uint64_t requests = 0, bytes = 0, sectors = 0, least_sectors = 0, uncoalesced = 0;
};
// Shared memory gives each of its 32 banks' 4 bytes once in a wavefront. A request has a phase for 32 lanes of up to 4 bytes,
// 16 of 8, 8 of 16, and for each matrix of ldmatrix; without conflicts a phase is one wavefront. Bulk copies and wgmma take 128
// bytes at a time, and their layouts have no conflicts; the four warps of a warpgroup read the right factor once.
struct Wavefronts {
  uint64_t wavefronts = 0, phases = 0;
};
struct Waste {  // of a line of PTX
  uint64_t requests = 0, sectors = 0, wavefronts = 0;  // the last two: more than the least
};

class Counting {
 public:
  // Blocks are run until their warps have run `most` instructions, in an order that spreads them over the grid.
  explicit Counting(uint64_t most) : most_(most) {}

  std::vector<int> sample(int blocks);
  bool next_block();  // whether another is to be run
  void see(const Warp& warp, const Instruction& instruction);  // before it runs, for the active lanes
  std::string text() const;  // a name and a number a line
  std::string lines() const;  // wasteful lines of PTX: line, requests, sectors and wavefronts beyond the least

 private:
  struct Known {  // of an instruction
    Kind kind;
    enum Access : uint8_t { none, load, store, copy, matrices, box, products } access;
    int size;          // bytes of a lane; of products: of a warp
    bool through_l1;
    uint64_t flops;
  };
  static Known known(const Instruction& instruction);
  void global(const Warp& warp, const uint64_t* address, const int* sizes, bool loads, bool through_l1, Waste& waste);
  void global(const Area* area, const std::set<uint64_t>& sectors, uint64_t bytes, bool loads, bool through_l1, Waste& waste);
  void box(const Warp& warp, const Instruction& instruction, Waste& waste);
  void shared(uint64_t bytes, bool loads);
  void shared(const uint64_t* address, Lanes lanes, int size, bool loads, Waste& waste);

  uint64_t most_, blocks_ = 0, blocks_run_ = 0, kinds_[kKinds] = {}, flops_ = 0, local_bytes_ = 0, l2_sectors_ = 0;
  Requests loads_, stores_;
  Wavefronts shared_loads_, shared_stores_;
  std::set<const Area*> read_, written_;
  std::unordered_map<const Instruction*, Known> instructions_;
  std::map<int, Waste> lines_;
  std::unordered_set<uint64_t> l1_;  // the sectors that the block has loaded
};

}  // namespace ptx
