// Who knows of whose acts: vector clocks (Mattern, 1989), which barriers pass on. An act is in order after another when
// who does it knows of that one.
#pragma once

#include <memory>
#include <vector>

#include "program.h"

namespace ptx {

struct Block;

// Agents are the threads of a block, 32 for each warp, and then what is asynchronous: the products of each warp, and
// copies that end together. Of readers there are groups: the threads of a warp, or another agent by itself.

// Up to when the acts of each agent are known.
struct Times {
  std::vector<uint32_t> of;
  std::vector<uint32_t> least;  // of each warp's threads
};

// What is asynchronous sees of ordinary accesses to memory those after which a proxy fence came on the way to it; all
// accesses see the end of what was asynchronous (PTX ISA, "Async proxy" and "Causality order").
struct Knowledge {
  Times seen, fenced;
};
using Known = std::shared_ptr<const Knowledge>;

// A thread, or what is asynchronous on behalf of it.
struct Actor {
  Warp& warp;
  int lane;
  bool async = false;

  uint32_t agent() const;
  bool knows(uint32_t agent, uint32_t time) const;
  bool knows_group(uint32_t group, Lanes lanes, uint32_t time) const;
};

// What several know, added up until it is passed on.
class Gathering {
 public:
  void add(const Known& known);
  void add(const Warp& warp, Lanes lanes);  // and all that they have done
  void add(const Block& block, uint32_t agent);  // all that something asynchronous has done
  Known passed_on(const Block& block) const;

 private:
  Knowledge sum_;
  Known last_;
};

}  // namespace ptx
