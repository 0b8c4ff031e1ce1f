// A warp: its registers, its lanes' places in the program, and how instructions run for its active lanes.
#pragma once

#include <bit>
#include <cstring>
#include <random>
#include <utility>

#include "asynchronous.h"
#include "memory.h"

namespace ptx {

// Lanes that are at the same instruction. Those that wait there are woken by the block, or by lanes that come.
struct Group {
  enum Wait : uint8_t { nothing, for_lanes, at_barrier, at_mbarrier };
  int pc;
  Lanes lanes;
  Wait wait = nothing;
};

struct Copy {  // of a cp.async
  int lane;
  Place to, from;
  int size, read;  // the bytes after `read` are filled with zeros
  uint32_t group;
};

struct Block;

struct Warp {
  Block& block;
  int index;
  Lanes alive;
  Lanes active = 0;          // those that run the current instruction
  Group current;
  std::vector<Group> others;
  std::vector<uint64_t> values;   // of register r: values[32*r + lane]; a predicate has a bit for each lane in the first
  std::vector<Lanes> poison;      // of each register: the lanes in which nobody wrote it
  std::vector<std::vector<uint8_t>> local_bytes;
  std::vector<Area> local;        // of each lane
  std::vector<Copy> copies;
  uint32_t committed[kLanes] = {};
  Known known[kLanes];               // of the acts of others
  uint32_t fenced_at[kLanes] = {};   // up to when its own precede a proxy fence
  Lanes kernels_before_ended = 0;    // the lanes that waited for that
  Products products;
  uint32_t bulk_groups[kLanes] = {};  // of copies to global memory, committed

  Warp(Block& block, int index);

  // Run until all lanes wait or have ended, or for so many instructions.
  void run(int64_t instructions);
  bool can_run() const;
  bool ended() const { return !current.lanes && others.empty(); }

  uint64_t* lanes(uint32_t at) { return values.data() + size_t{at} * kLanes; }
  Lanes& mask(uint32_t at) { return reinterpret_cast<Lanes*>(lanes(at))[0]; }
  void taint(uint32_t at, Lanes tainted) { poison[at] = (poison[at] & ~active) | (tainted & active); }
  void put_mask(uint32_t at, Lanes value, Lanes tainted) {
    mask(at) = (mask(at) & ~active) | (value & active);
    taint(at, tainted);
  }
  template <class F>
  void each(F f) const {
    if (active == kAll) {
      for (int lane = 0; lane < kLanes; ++lane) f(lane);
    } else {
      for (Lanes left = active; left; left &= left - 1) f(std::countr_zero(left));
    }
  }
  // The value of a register that may not be unwritten, such as an address.
  void demand(uint32_t at, const char* what);
  [[noreturn]] void fail(int lane, const std::string& what) const;

 private:
  void settle();
  bool together(const Instruction& i);
  void part(const Group& group);
  void control(const Instruction& i);
  friend struct Block;
};

struct Order {
  enum Kind { forward, reverse, random } kind = forward;
  std::mt19937 generator;
  std::vector<int> of(int count);
};

struct Dim {
  uint32_t x, y, z;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

class Counting;

struct Launch {
  Program& program;
  Function& function;
  Memory& memory;
  Clock& clock;
  Dim grid, block;
  uint64_t dynamic_bytes;
  Order order;
  Counting* counting = nullptr;
  bool early = false;  // it may begin before the kernels before it have ended
};

struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<std::pair<Warp*, Lanes>> waiting;
  Gathering known;  // by those that arrived
};

struct Block {
  Launch& launch;
  Dim index;
  std::vector<uint8_t> shared_bytes;
  Area shared;
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier barriers[16];
  std::map<uint64_t, Mbarrier> mbarriers;      // by their addresses
  std::vector<BulkCopy> bulk_copies;           // under way
  std::map<uint64_t, uint32_t> slots;          // of what else is asynchronous: the number of its agent
  std::vector<std::vector<Reading>> readings;  // of bytes that several groups read; the first stands for none
  std::vector<uint32_t> free_readings;
  uint32_t begun = 0;                                  // asynchronous readings
  std::vector<std::vector<Alike>> products;            // of each warpgroup

  Block(Launch& launch, Dim index);
  void run();
  void arrive(Warp& warp, const Instruction& i, Lanes lanes);

  uint32_t agents() const { return static_cast<uint32_t>(warps.size()) * (kLanes + 1) + kOthers; }
  uint32_t group_of(uint32_t agent) const { return agent - static_cast<uint32_t>(warps.size()) * (kLanes - 1); }
  uint32_t agent_of(uint32_t group) const { return group + static_cast<uint32_t>(warps.size()) * (kLanes - 1); }
  uint32_t products_of(const Warp& warp) const { return static_cast<uint32_t>(warps.size()) * kLanes + warp.index; }
  // The agent of an mbarrier's copies, or of those of a thread, by a key of its own.
  uint32_t slot(uint64_t key);
  // Lanes of a warp come together, and see what each of them did.
  void meet(Warp& warp, Lanes lanes);
  void learn(Warp& warp, Lanes lanes, const Known& more);
  void fence(Warp& warp, Lanes lanes);

  // The lanes whose phase of an mbarrier has ended, and which then know what happened before.
  Lanes ended(Warp& warp, const Instruction& i);
  Mbarrier& mbarrier_at(Warp& warp, int lane, Place place);
  void come(Mbarrier& barrier, int arrivals, int64_t bytes);
  // Ends a copy to shared memory that somebody waits for. Returns whether there is one.
  bool end_a_copy(bool chance = false);
  void end_copy(size_t which);
  void at_the_end();
  [[noreturn]] void fail_at_mbarrier(Warp& warp, int lane);
  void stuck();
};

void run(Launch& launch);

// --- how values lie in registers: signed integers extended to 64 bits, everything else by zeros -------------------

template <class T>
T narrow(uint64_t value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(value);
  } else {
    T found;
    std::memcpy(static_cast<void*>(&found), &value, sizeof(T));
    return found;
  }
}

template <class T>
uint64_t wide(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<uint64_t>(static_cast<int64_t>(value));
  } else {
    uint64_t found = 0;
    std::memcpy(&found, &value, sizeof(T));
    return found;
  }
}

// D = F(S...) in each active lane.
template <auto F, class D, class... S, size_t... k>
void apply(Warp& w, const Instruction& i, std::index_sequence<k...>) {
  uint64_t* d = w.lanes(i.at[0]);
  const uint64_t* s[] = {w.lanes(i.at[1 + k])...};
  w.each([&](int lane) { d[lane] = wide<D>(F(narrow<S>(s[k][lane])...)); });
  w.taint(i.at[0], (w.poison[i.at[1 + k]] | ...));
}
template <auto F, class D, class... S>
void lanewise(Warp& w, const Instruction& i) {
  apply<F, D, S...>(w, i, std::index_sequence_for<S...>{});
}
// The same for functions that ask the instruction for its rounding.
template <auto F, class D, class... S, size_t... k>
void apply_as(Warp& w, const Instruction& i, std::index_sequence<k...>) {
  uint64_t* d = w.lanes(i.at[0]);
  const uint64_t* s[] = {w.lanes(i.at[1 + k])...};
  w.each([&](int lane) { d[lane] = wide<D>(F(i, narrow<S>(s[k][lane])...)); });
  w.taint(i.at[0], (w.poison[i.at[1 + k]] | ...));
}
template <auto F, class D, class... S>
void lanewise_as(Warp& w, const Instruction& i) {
  apply_as<F, D, S...>(w, i, std::index_sequence_for<S...>{});
}

// --- types by their names -------------------------------------------------------------------------------------------

template <class T>
struct Type {
  using type = T;
};

template <class F>
Run for_integer(const std::string& name, F f) {
  if (name == "u8" || name == "b8") return f(Type<uint8_t>{});
  if (name == "s8") return f(Type<int8_t>{});
  if (name == "u16" || name == "b16") return f(Type<uint16_t>{});
  if (name == "s16") return f(Type<int16_t>{});
  if (name == "u32" || name == "b32") return f(Type<uint32_t>{});
  if (name == "s32") return f(Type<int32_t>{});
  if (name == "u64" || name == "b64") return f(Type<uint64_t>{});
  if (name == "s64") return f(Type<int64_t>{});
  return nullptr;
}

template <class F>
Run for_float(const std::string& name, F f) {
  if (name == "f16") return f(Type<Half>{});
  if (name == "bf16") return f(Type<BFloat>{});
  if (name == "f32") return f(Type<float>{});
  if (name == "f64") return f(Type<double>{});
  return nullptr;
}

template <class F>
Run for_pair(const std::string& name, F f) {
  if (name == "f16x2") return f(Type<Pair<Half>>{});
  if (name == "bf16x2") return f(Type<Pair<BFloat>>{});
  return nullptr;
}

inline int size_of(const std::string& type) {  // in bytes
  const int bits = std::atoi(type.c_str() + type.find_first_of("0123456789"));
  return type.ends_with("x2") ? bits / 4 : bits / 8;
}

inline Space take_space(Written& n) {
  static const std::pair<const char*, Space> spaces[] = {{"global", Space::global}, {"shared", Space::shared},
      {"shared::cta", Space::shared}, {"local", Space::local}, {"param", Space::param}, {"const", Space::constant}};
  for (const auto& [name, space] : spaces) {
    if (n.take(name)) return space;
  }
  return Space::generic;
}

// Takes .rn and its like from a name.
inline void take_rounding(Written& n, Instruction& i) {
  static const std::pair<const char*, Rounding> modes[] = {
      {"rn", Rounding::nearest}, {"rz", Rounding::zero}, {"rm", Rounding::down}, {"rp", Rounding::up}, {"rna", Rounding::away}};
  static const char* whole_modes[] = {"rni", "rzi", "rmi", "rpi"};
  for (const auto& [name, mode] : modes) {
    if (n.take(name)) i.rounding = mode;
  }
  for (int k = 0; k < 4; ++k) {
    if (n.take(whole_modes[k])) i.rounding = modes[k].second, i.integral = true;
  }
}

}  // namespace ptx
