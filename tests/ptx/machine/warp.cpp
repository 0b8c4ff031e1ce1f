// Where the lanes of a warp are, and how they part and come together; what the warps of a block do in turn.
#include <algorithm>
#include <numeric>

#include "counting.h"

namespace ptx {

Warp::Warp(Block& block, int index) : block(block), index(index) {
  const Launch& launch = block.launch;
  const Function& function = launch.function;
  const uint64_t threads = launch.block.count(), first = uint64_t{kLanes} * index;
  alive = threads - first >= kLanes ? kAll : (Lanes{1} << (threads - first)) - 1;
  current = {0, alive};
  values.resize(size_t{function.registers} * kLanes);
  poison.assign(function.registers, kAll);
  if (function.has_products) products.changed.assign(function.registers, 1);
  for (const auto& [at, value] : function.constants) {
    std::fill_n(lanes(at), kLanes, value);
    poison[at] = 0;
  }
  const Dim &d = launch.block, &g = launch.grid;
  for (const Special& special : function.specials) {
    poison[special.at] = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t thread = first + lane;
      const std::pair<const char*, uint64_t> known_ones[] = {
          {"%tid.x", thread % d.x}, {"%tid.y", thread / d.x % d.y}, {"%tid.z", thread / d.x / d.y},
          {"%ntid.x", d.x}, {"%ntid.y", d.y}, {"%ntid.z", d.z},
          {"%ctaid.x", block.index.x}, {"%ctaid.y", block.index.y}, {"%ctaid.z", block.index.z},
          {"%nctaid.x", g.x}, {"%nctaid.y", g.y}, {"%nctaid.z", g.z},
          {"%cluster_ctaid.x", 0}, {"%cluster_ctaid.y", 0}, {"%cluster_ctaid.z", 0}, {"%cluster_ctarank", 0},  // of one block
          {"%laneid", lane}, {"%warpid", index}, {"%nwarpid", (threads + kLanes - 1) / kLanes},
          {"%lanemask_lt", (Lanes{1} << lane) - 1}, {"%lanemask_eq", Lanes{1} << lane},
          {"dynamic shared memory", launch.program.dynamic_begin()}};
      const auto found = std::find_if(std::begin(known_ones), std::end(known_ones),
                                      [&](const auto& each) { return special.name == each.first; });
      if (found == std::end(known_ones)) throw Fault("the register " + special.name + " isn't known");
      lanes(special.at)[lane] = found->second;
    }
  }
  if (function.local_bytes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      local_bytes.emplace_back(function.local_bytes);
      local.emplace_back("local memory", Space::local, 0, function.local_bytes, local_bytes.back().data(), false, true);
    }
  }
}

void Warp::fail(int lane, const std::string& what) const {
  const Launch& launch = block.launch;
  const int line = launch.function.code[current.pc].line;
  throw Fault("kernel " + launch.function.name + ", block (" + std::to_string(block.index.x) + ", " +
              std::to_string(block.index.y) + ", " + std::to_string(block.index.z) + "), thread " +
              std::to_string(index * kLanes + lane) + ": " + what + "\n    line " + std::to_string(line) + ": " +
              (line ? launch.program.lines[line - 1] : "(end of the kernel)"));
}

void Warp::demand(uint32_t at, const char* what) {
  const Lanes unknown = poison[at] & active;
  if (unknown) fail(std::countr_zero(unknown), std::string(what) + " that nobody wrote");
}

bool Warp::can_run() const {
  return current.lanes || std::any_of(others.begin(), others.end(), [](const Group& g) { return g.wait == Group::nothing; });
}

// The group that is furthest behind runs, so that the others can come together with it.
void Warp::settle() {
  for (;;) {
    if (current.lanes) {
      // Groups at one place become one; lanes that waited for others here look again whether all have come.
      std::erase_if(others, [&](const Group& g) {
        const bool here = g.pc == current.pc && g.wait != Group::at_barrier && g.wait != Group::at_mbarrier;
        if (here) current.lanes |= g.lanes;
        return here;
      });
    }
    auto lowest = others.end();
    for (auto it = others.begin(); it != others.end(); ++it) {
      if (it->wait == Group::nothing && (lowest == others.end() || it->pc < lowest->pc)) lowest = it;
    }
    if (lowest == others.end() || (current.lanes && current.pc <= lowest->pc)) return;
    if (current.lanes) {
      std::swap(current, *lowest);
    } else {
      current = *lowest;
      others.erase(lowest);
    }
  }
}

// The active lanes go elsewhere, or wait there; the others of the current group go on.
void Warp::part(const Group& group) {
  current.lanes &= ~group.lanes;
  others.push_back(group);
}

// Whether all lanes that an instruction names are here; else those that are wait for the others.
bool Warp::together(const Instruction& i) {
  Lanes members = kAll;
  if (i.members >= 0) {
    demand(i.members, "a mask of lanes");
    members = static_cast<Lanes>(lanes(i.members)[std::countr_zero(active)]);
    each([&](int lane) {
      if (static_cast<Lanes>(lanes(i.members)[lane]) != members) fail(lane, "the lanes here have different masks");
      if (!(members >> lane & 1)) fail(lane, "the lane isn't in its own mask");
    });
  }
  if (active == members) return true;
  if (members & ~alive) fail(std::countr_zero(active), "waits for a lane that has ended");
  const Group waiting{current.pc, active, Group::for_lanes};
  current.lanes &= ~active;
  ++current.pc;  // of those that the guard sends on
  others.push_back(waiting);
  return false;
}

void Warp::control(const Instruction& i) {
  const int pc = current.pc;
  ++current.pc;
  if (!active) return;
  switch (i.control) {
    case Control::branch:
      if (active == current.lanes) current.pc = i.target;
      else part({i.target, active});
      break;
    case Control::table: {
      const auto& targets = block.launch.function.tables[i.target];
      current.pc = pc;
      demand(i.at[0], "an index");
      current.pc = pc + 1;
      each([&](int lane) {
        const auto index = static_cast<uint32_t>(lanes(i.at[0])[lane]);
        if (index >= targets.size()) fail(lane, "the table of branches has no such entry");
        part({targets[index], Lanes{1} << lane});
      });
      break;
    }
    case Control::exit:
      current.lanes &= ~active;
      alive &= ~active;
      break;
    case Control::barrier:
      if (!i.arrives) part({pc + 1, active, Group::at_barrier});
      current.pc = pc;
      block.arrive(*this, i, active);
      current.pc = pc + 1;
      break;
    case Control::mbarrier: {
      current.pc = pc;
      const Lanes ended = block.ended(*this, i);
      current.pc = pc + 1;
      if (ended != active) part({pc, active & ~ended, Group::at_mbarrier});
      break;
    }
    case Control::none: break;
  }
}

void Warp::run(int64_t instructions) {
  const Function& function = block.launch.function;
  while (instructions-- > 0) {
    if (!others.empty()) settle();
    if (!current.lanes) break;
    const Instruction& i = function.code[current.pc];
    active = current.lanes;
    if (i.guard >= 0) {
      demand(i.guard, "a predicate");
      active &= i.negated ? ~mask(i.guard) : mask(i.guard);
    }
    const bool waits = i.control == Control::none && active && i.members != kNoMembers && !together(i);
    if (waits) continue;
    if (block.launch.counting) block.launch.counting->see(*this, i);
    if (i.control != Control::none) {
      control(i);
    } else {
      if (active) i.run(*this, i);
      ++current.pc;
      if (!products.changed.empty()) {
        for (int k = 0; k < i.results; ++k) products.changed[i.at[k]] = 1;
      }
    }
  }
  const bool waits = std::any_of(others.begin(), others.end(), [](const Group& g) { return g.wait == Group::for_lanes; });
  if (!current.lanes && waits && std::none_of(others.begin(), others.end(), [](const Group& g) { return g.wait != Group::for_lanes; })) {
    current.pc = others.front().pc;
    fail(std::countr_zero(others.front().lanes), "waits for lanes that never come");
  }
}

std::vector<int> Order::of(int count) {
  std::vector<int> found(count);
  std::iota(found.begin(), found.end(), 0);
  if (kind == reverse) std::reverse(found.begin(), found.end());
  if (kind == random) std::shuffle(found.begin(), found.end(), generator);
  return found;
}

Block::Block(Launch& launch, Dim index)
    : launch(launch), index(index),
      shared_bytes(launch.dynamic_bytes ? launch.program.dynamic_begin() + launch.dynamic_bytes : launch.program.shared_bytes),
      shared("shared memory", Space::shared, 0, shared_bytes.size(), shared_bytes.data(), true, true) {
  const auto count = static_cast<int>((launch.block.count() + kLanes - 1) / kLanes);
  for (int k = 0; k < count; ++k) warps.push_back(std::make_unique<Warp>(*this, k));
  readings.resize(1), products.resize(warps.size() / 4);
  Gathering nothing;
  nothing.add(*this, agents() - 1);
  const Known known = nothing.passed_on(*this);
  for (auto& warp : warps) std::fill_n(warp->known, kLanes, known);
}

void Block::arrive(Warp& warp, const Instruction& i, Lanes lanes) {
  const auto operand = [&](int k) {
    warp.demand(i.at[k], "a barrier's operand");
    return static_cast<uint32_t>(warp.lanes(i.at[k])[std::countr_zero(lanes)]);
  };
  const uint32_t number = operand(0);
  if (number >= 16) warp.fail(std::countr_zero(lanes), "there are 16 barriers");
  Barrier& barrier = barriers[number];
  const int expected = i.count == 2 ? static_cast<int>(operand(1)) : static_cast<int>(launch.block.count());
  if (barrier.arrived && barrier.expected != expected) warp.fail(std::countr_zero(lanes), "others expect other numbers at this barrier");
  barrier.expected = expected;
  barrier.arrived += std::popcount(lanes);
  if (barrier.arrived > expected) warp.fail(std::countr_zero(lanes), "more threads at a barrier than it expects");
  barrier.known.add(warp, lanes);
  ++launch.clock.now;
  if (!i.arrives) barrier.waiting.emplace_back(&warp, lanes);
  if (barrier.arrived < expected) return;
  const Known known = barrier.known.passed_on(*this);
  for (auto& [each, its_lanes] : barrier.waiting) {
    for (Lanes left = its_lanes; left; left &= left - 1) each->known[std::countr_zero(left)] = known;
    for (Group& group : each->others) {
      if (group.wait == Group::at_barrier && (group.lanes & its_lanes)) group.wait = Group::nothing;
    }
  }
  barrier = {};
}

void Block::run() {
  launch.clock.block_start = launch.clock.now++;
  for (;;) {
    bool ended = true, ran = false;
    for (const int k : launch.order.of(static_cast<int>(warps.size()))) {
      Warp& warp = *warps[k];
      if (warp.can_run()) {
        warp.run(launch.order.kind == Order::random ? 1 + launch.order.generator() % 64 : INT64_MAX);
        ran = true;
      }
      ended &= warp.ended();
    }
    if (ended) return at_the_end();
    const bool chance = launch.order.kind == Order::random && launch.order.generator() % 4 == 0;
    if (ran ? !chance || end_a_copy(true) : end_a_copy()) continue;
    if (!ran) stuck();
  }
}

// Names who waits.
void Block::stuck() {
  for (auto& warp : warps) {
    if (warp->ended()) continue;
    const auto group = std::find_if(warp->others.begin(), warp->others.end(),
                                    [](const Group& g) { return g.wait != Group::for_lanes; });
    const int lane = std::countr_zero(group->lanes);
    const bool at_mbarrier = group->wait == Group::at_mbarrier;
    warp->current.pc = group->pc - !at_mbarrier;
    if (at_mbarrier) fail_at_mbarrier(*warp, lane);
    warp->fail(lane, "waits at a barrier for threads that never come");
  }
}

void run(Launch& launch) {
  const Function& f = launch.function;
  const uint32_t sizes[3] = {launch.block.x, launch.block.y, launch.block.z};
  const uint64_t threads = launch.block.count();
  if (threads < 1 || threads > 1024 || !launch.grid.count()) throw Fault("no such grid or block");
  if (f.most[0] && threads > uint64_t(f.most[0]) * f.most[1] * f.most[2]) throw Fault("more threads than .maxntid says");
  for (int k = 0; k < 3; ++k) {
    if (f.required[0] && sizes[k] != static_cast<uint32_t>(f.required[k])) throw Fault("other threads than .reqntid says");
  }
  launch.clock.launch_start = launch.clock.now++;
  const auto blocks = static_cast<int>(launch.grid.count());
  for (const int k : launch.counting ? launch.counting->sample(blocks) : launch.order.of(blocks)) {
    if (launch.counting && !launch.counting->next_block()) break;
    const auto number = static_cast<uint32_t>(k);
    const Dim& g = launch.grid;
    Block(launch, {number % g.x, number / g.x % g.y, number / g.x / g.y}).run();
  }
}

}  // namespace ptx
