// What the lanes of a warp do together: shuffles, votes, matrix products.
#include <algorithm>

#include "warp.h"

namespace ptx {
namespace {

enum Shuffle { up, down, bfly, idx };

// d|p = a of another lane, which b and c name as the manual's pseudocode says.
template <Shuffle how>
void shfl(Warp& w, const Instruction& i) {
  const uint32_t* from = i.at + i.count;  // after one or two results
  const uint64_t *b = w.lanes(from[1]), *c = w.lanes(from[2]);
  const Lanes tainted = w.poison[from[0]];
  Lanes exist = 0, unknown = w.poison[from[1]] | w.poison[from[2]];
  uint64_t source[kLanes], found[kLanes];
  std::copy_n(w.lanes(from[0]), kLanes, source);
  w.each([&](int lane) {
    const int by = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int j = how == up ? lane - by : how == down ? lane + by : how == bfly ? lane ^ by : first | (by & ~segment);
    const bool exists = how == up ? j >= last : j <= last;
    if (!exists) j = lane;
    exist |= Lanes{exists} << lane;
    found[lane] = source[j] & 0xffffffff;
    // What a lane that takes no part gives isn't defined.
    if (!(w.active >> j & 1) || (tainted >> j & 1)) unknown |= Lanes{1} << lane;
  });
  uint64_t* d = w.lanes(i.at[0]);
  w.each([&](int lane) { d[lane] = found[lane]; });
  w.taint(i.at[0], unknown);
  if (i.count == 2) w.put_mask(i.at[1], exist, 0);
}

Run make_shfl(Written& n, Instruction& i) {
  if (!n.take("sync") || !n.take("b32")) return nullptr;
  i.count = static_cast<int>(n.results);
  n.expect(i.count + 4);
  i.members = static_cast<int>(n.operands.back().at);
  return n.take("up") ? shfl<up> : n.take("down") ? shfl<down> : n.take("bfly") ? shfl<bfly> : n.take("idx") ? shfl<idx> : Run{};
}

enum Vote { all, any, uni, ballot };

template <Vote how>
void vote(Warp& w, const Instruction& i) {
  const Lanes yes = w.mask(i.at[1]) & w.active;
  const Lanes tainted = w.poison[i.at[1]] & w.active ? kAll : 0;
  if (how == ballot) {
    uint64_t* d = w.lanes(i.at[0]);
    w.each([&](int lane) { d[lane] = yes; });
    return w.taint(i.at[0], tainted);
  }
  const bool holds = how == all ? yes == w.active : how == any ? yes != 0 : yes == 0 || yes == w.active;
  w.put_mask(i.at[0], holds ? kAll : 0, tainted);
}

Run make_vote(Written& n, Instruction& i) {
  n.expect(3);
  if (!n.take("sync")) return nullptr;
  i.members = static_cast<int>(n.operands.back().at);
  if (n.take("ballot") && n.take("b32")) return vote<ballot>;
  if (!n.take("pred")) return nullptr;
  return n.take("all") ? vote<all> : n.take("any") ? vote<any> : n.take("uni") ? vote<uni> : Run{};
}

// The lanes that have the same value as this one; .all: all of them, or none
template <bool everyone>
void match(Warp& w, const Instruction& i) {
  const uint32_t from = i.at[i.count];
  const std::vector<uint64_t> a(w.lanes(from), w.lanes(from) + kLanes);
  const Lanes tainted = w.poison[from] & w.active ? kAll : 0;
  const uint64_t part = ~uint64_t{0} >> (64 - i.mode);
  Lanes whole = 0;
  w.each([&](int lane) {
    Lanes same = 0;
    w.each([&](int other) { same |= Lanes{((a[lane] ^ a[other]) & part) == 0} << other; });
    if (same == w.active) whole |= Lanes{1} << lane;
    w.lanes(i.at[0])[lane] = !everyone || same == w.active ? same : 0;
  });
  w.taint(i.at[0], tainted);
  if (i.count == 2) w.put_mask(i.at[1], whole, tainted);
}

Run make_match(Written& n, Instruction& i) {
  i.count = static_cast<int>(n.results);
  n.expect(i.count + 2);
  if (!n.take("sync")) return nullptr;
  i.mode = 8 * size_of(n.take_last());
  i.members = static_cast<int>(n.operands.back().at);
  return n.take("all") ? match<true> : n.take("any") ? match<false> : Run{};
}

template <class T, auto F>
void redux(Warp& w, const Instruction& i) {
  const uint64_t* a = w.lanes(i.at[1]);
  T found = narrow<T>(a[std::countr_zero(w.active)]);
  for (Lanes left = w.active & (w.active - 1); left; left &= left - 1) found = F(found, narrow<T>(a[std::countr_zero(left)]));
  const Lanes tainted = w.poison[i.at[1]] & w.active ? kAll : 0;
  w.each([&](int lane) { w.lanes(i.at[0])[lane] = wide(found); });
  w.taint(i.at[0], tainted);
}

Run make_redux(Written& n, Instruction& i) {
  n.expect(3);
  if (!n.take("sync")) return nullptr;
  i.members = static_cast<int>(n.operands.back().at);
  return for_integer(n.take_last(), [&]<class T>(Type<T>) -> Run {
    if (n.take("add")) return redux<T, [](T a, T b) { return T(a + b); }>;
    if (n.take("min")) return redux<T, [](T a, T b) { return a < b ? a : b; }>;
    if (n.take("max")) return redux<T, [](T a, T b) { return a < b ? b : a; }>;
    if (n.take("and")) return redux<T, [](T a, T b) { return T(a & b); }>;
    if (n.take("or")) return redux<T, [](T a, T b) { return T(a | b); }>;
    if (n.take("xor")) return redux<T, [](T a, T b) { return T(a ^ b); }>;
    return nullptr;
  });
}

void activemask(Warp& w, const Instruction& i) {
  w.each([&](int lane) { w.lanes(i.at[0])[lane] = w.active; });
  w.taint(i.at[0], 0);
}

// bar.warp.sync: what the lanes wrote to memory before it, all of them see after it.
void warp_sync(Warp& w, const Instruction&) { w.block.meet(w, w.active); }

// --- mma.sync m16n8k: d = a*b + c. Lane 4*g + t has, of each matrix, E elements that lie together (two of 16 bits, one
// of TF32): of a row g or g+8 and column E*t or E*(t+4), of b column g and the same rows, of c and d the columns 2*t and
// 2*t + 1. Products are exact here, and so is nearly their sum: a GPU's is at least that of float32.

template <class T> constexpr int kElements = 2;
template <> constexpr int kElements<float> = 1;

template <class T>
double element(uint64_t bits, int e) {
  if constexpr (kElements<T> == 1) return tf32(static_cast<uint32_t>(bits));
  else return static_cast<double>(narrow<T>(bits >> 16 * e));
}

template <class T, int K>
void mma(Warp& w, const Instruction& i) {
  constexpr int E = kElements<T>, A = 16 * K / kLanes / E, B = 8 * K / kLanes / E;
  const uint32_t *d = i.at, *a = i.at + 4, *b = a + A, *c = b + B;
  double left[16][K], right[K][8];
  uint32_t bad_rows = 0, bad_columns = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < A; ++j) {
      const int row = g + 8 * (j & 1), column = E * (t + 4 * (j >> 1));
      for (int e = 0; e < E; ++e) left[row][column + e] = element<T>(w.lanes(a[j])[lane], e);
      bad_rows |= (w.poison[a[j]] >> lane & 1) << row;
    }
    for (int j = 0; j < B; ++j) {
      for (int e = 0; e < E; ++e) right[E * (t + 4 * j) + e][g] = element<T>(w.lanes(b[j])[lane], e);
      bad_columns |= (w.poison[b[j]] >> lane & 1) << g;
    }
  }
  double sums[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < 8; ++column) sums[row][column] += left[row][k] * right[k][column];
    }
  }
  for (int j = 0; j < 4; ++j) {
    Lanes tainted = w.poison[c[j]];
    const uint64_t* from = w.lanes(c[j]);
    uint64_t* to = w.lanes(d[j]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + 8 * (j >> 1), column = lane % 4 * 2 + (j & 1);
      to[lane] = wide(static_cast<float>(sums[row][column] + narrow<float>(from[lane])));
      if ((bad_rows >> row & 1) || (bad_columns >> column & 1)) tainted |= Lanes{1} << lane;
    }
    w.taint(d[j], tainted);
  }
}

Run make_mma(Written& n, Instruction& i) {
  if (!n.take("sync") || !n.take("aligned") || !n.take("row") || !n.take("col")) return nullptr;
  // .d.a.b.c
  if (n.take_last() != "f32" || n.parts.empty()) return nullptr;
  const std::string type = n.take_last();
  if (!n.take(type) || !n.take("f32")) return nullptr;
  i.members = kWholeWarp;
  if (n.take("m16n8k16")) {
    n.expect(14);
    return type == "f16" ? mma<Half, 16> : type == "bf16" ? mma<BFloat, 16> : Run{};
  }
  if (!n.take("m16n8k8")) return nullptr;
  n.expect(type == "tf32" ? 14 : 11);
  return type == "f16" ? mma<Half, 8> : type == "bf16" ? mma<BFloat, 8> : type == "tf32" ? mma<float, 8> : Run{};
}

}  // namespace

void make_collectives(Makers& all) {
  all["shfl"] = make_shfl;
  all["vote"] = make_vote;
  all["match"] = make_match;
  all["redux"] = make_redux;
  all["mma:float"] = make_mma;
  all["activemask"] = [](Written& n, Instruction&) { return n.expect(1), n.take("b32") ? activemask : Run{}; };
}

// bra, brx.idx, ret, exit, bar: what the warp does itself (warp.cpp)
void make_controls(Makers& all) {
  all["bra"] = [](Written& n, Instruction& i) {
    n.take("uni");
    i.control = Control::branch;
    return Run{};
  };
  all["brx"] = [](Written& n, Instruction& i) {
    n.expect(1);
    if (n.take("idx")) i.control = Control::table;
    return Run{};
  };
  all["ret"] = all["exit"] = [](Written& n, Instruction& i) {
    n.take("uni");
    i.control = Control::exit;
    return Run{};
  };
  all["trap"] = [](Written&, Instruction&) -> Run {
    return [](Warp& w, const Instruction&) { w.fail(std::countr_zero(w.active), "trap"); };
  };
  all["bar"] = all["barrier"] = [](Written& n, Instruction& i) -> Run {
    if (n.take("warp")) {
      n.expect(1);
      i.members = static_cast<int>(n.operands[0].at);
      return n.take("sync") ? warp_sync : Run{};
    }
    n.take("cta"), n.take("aligned");
    i.arrives = n.take("arrive");
    i.count = static_cast<int>(n.operands.size());
    if (i.count != 1 && i.count != 2) n.expect(2);
    if (i.arrives || n.take("sync")) i.control = Control::barrier;
    return Run{};
  };
}

}  // namespace ptx
