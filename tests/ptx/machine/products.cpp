// wgmma: products of a warpgroup, of which each warp has 16 rows here. They read shared memory from their issue to the
// wait, and their sums are there after it.
#include "tensor_map.h"
#include "warp.h"

namespace ptx {
namespace {

// A factor in shared memory, by its descriptor (PTX ISA, "Matrix Descriptor Format" and "Shared Memory Matrix Layout").
struct Factor {
  uint64_t descriptor;
  bool across;  // along its rows lies not the depth but the other side
  int item;     // bytes of a number

  uint64_t field(int bit) const { return (descriptor >> bit & 0x3fff) << 4; }
  // Modes 1, 2, 3 are swizzles of 128, 64, 32 bytes.
  int swizzle() const { return static_cast<int>((4 - (descriptor >> 62)) % 4); }

  // Of the number at a place along the side and the depth. 8 rows, as wide as the swizzle's span, make a unit (a row of
  // 16 bytes without one). Units follow each other by the stride and by the leading offset.
  uint64_t address(int side, int depth) const {
    const int row = across ? depth : side, byte = (across ? side : depth) * item, span = 16 << swizzle();
    const uint64_t leading = field(16), stride = field(32);
    const bool plain_across = across && !swizzle();  // where the two change places
    const uint64_t to_row = row / 8 * (plain_across ? leading : stride), to_byte = byte / span * (plain_across ? stride : leading);
    return swizzled((field(0) + to_row + row % 8 * span + to_byte + byte % span) & 0x3ffff, swizzle());
  }
};

template <class T> constexpr int kItem = 2;
template <> constexpr int kItem<float> = 4;

template <class T>
double number(uint64_t bits) {
  if constexpr (kItem<T> == 4) return tf32(static_cast<uint32_t>(bits));
  else return static_cast<double>(narrow<T>(bits));
}

// i.sums: registers of sums; i.count: 1 or 4 operands of the left factor; i.mode: bit 0 left, bit 1 right across
Factor left_of(const Instruction& i, const Product& p, int item) { return {p.left, (i.mode & 1) != 0, item}; }
Factor right_of(const Instruction& i, const Product& p, int item) { return {p.right, (i.mode & 2) != 0, item}; }

// f(place, side, depth) for the numbers of a factor in shared memory.
template <class F>
void each_number(Warp& w, const Factor& factor, int first, int sides, int depths, F f) {
  for (int depth = 0; depth < depths; ++depth) {
    for (int side = 0; side < sides; ++side) {
      f(locate(w, 0, Space::shared, factor.address(first + side, depth), factor.item), side, depth);
    }
  }
}

uint64_t uniform(Warp& w, uint32_t at, const char* what) {
  w.demand(at, what);
  for (int lane = 1; lane < kLanes; ++lane) {
    if (w.lanes(at)[lane] != w.lanes(at)[0]) w.fail(lane, std::string("the lanes have different ones: ") + what);
  }
  return w.lanes(at)[0];
}

template <class T>
void end_product(Warp& w, const Product& p);

template <class T>
void wgmma(Warp& w, const Instruction& i) {
  constexpr int K = 32 / kItem<T>;
  Block& block = w.block;
  Products& all = w.products;
  const uint32_t *d = i.at, *a = i.at + i.sums, *b = a + i.count;
  w.demand(b[1], "a predicate");
  Product p{&i, end_product<T>, 0, uniform(w, b[0], "a descriptor"), w.mask(b[1]) != 0, all.groups, ++block.begun, {}, {}};
  if (w.mask(b[1]) != 0 && w.mask(b[1]) != kAll) w.fail(0, "the lanes have different predicates");
  const auto unfenced = [&](uint32_t at) {
    if (all.changed[at]) w.fail(0, "wgmma without wgmma.fence after a register of it was written");
  };
  if (i.count == 1) p.left = uniform(w, a[0], "a descriptor");
  for (int k = 0; k < i.count && i.count == 4; ++k) {
    unfenced(a[k]);
    std::copy_n(w.lanes(a[k]), kLanes, p.registers[k].begin());  // the compiler keeps them as they are
    p.poison[k] = w.poison[a[k]];
  }
  for (int k = 0; k < i.sums; ++k) {
    unfenced(d[k]);
    Products::Sum& sum = all.sums.try_emplace(d[k], Products::Sum{0, w.poison[d[k]]}).first->second;
    ++sum.under_way;
    w.poison[d[k]] = kAll;
  }
  const size_t warpgroup = w.index / 4;
  if (warpgroup >= block.products.size()) w.fail(0, "there are not four warps for a warpgroup");
  const Alike alike{static_cast<uint64_t>(i.line), p.left, p.right, p.adds};
  auto& known = block.products[warpgroup];
  if (all.begun == known.size()) known.push_back(alike);
  if (known[all.begun++] != alike) w.fail(0, "the warps of a warpgroup have different products");

  const Actor engine{w, 0, true};
  const uint32_t group = block.group_of(block.products_of(w));
  const auto begin = [&](const Place& place, int, int) { begin_reading(engine, place, kItem<T>, group, p.number); };
  const Factor left = left_of(i, p, kItem<T>), right = right_of(i, p, kItem<T>);
  for (const uint64_t descriptor : {p.left, p.right}) {
    if (descriptor >> 49 & 7) w.fail(0, "a base offset of a descriptor isn't known here");
  }
  if (i.count == 1) each_number(w, left, w.index % 4 * 16, 16, K, begin);
  each_number(w, right, 0, 2 * i.sums, K, begin);
  all.under_way.push_back(p);
}

// The product is there: as mma.sync in collectives.cpp, for 16 rows and each 8 columns.
template <class T>
void end_product(Warp& w, const Product& p) {
  constexpr int K = 32 / kItem<T>, E = kItem<T> == 4 ? 1 : 2;
  const Instruction& i = *p.instruction;
  Block& block = w.block;
  const uint32_t group = block.group_of(block.products_of(w));
  const int columns = 2 * i.sums;
  static double left[16][16], right[16][256];
  uint32_t bad_rows = 0;
  std::vector<bool> bad_columns(columns);
  const auto bits = [](const Place& place) {
    uint64_t found = 0;
    std::memcpy(&found, place.bytes(), kItem<T>);
    return found;
  };
  if (i.count == 1) {
    each_number(w, left_of(i, p, kItem<T>), w.index % 4 * 16, 16, K, [&](const Place& place, int row, int depth) {
      if (end_reading(block, place, kItem<T>, group, p.number)) bad_rows |= 1u << row;
      left[row][depth] = number<T>(bits(place));
    });
  } else {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int k = 0; k < 4; ++k) {
        const int row = lane / 4 + 8 * (k & 1), depth = E * (lane % 4 + 4 * (k >> 1));
        for (int e = 0; e < E; ++e) left[row][depth + e] = number<T>(p.registers[k][lane] >> 16 * e);
        bad_rows |= (p.poison[k] >> lane & 1) << row;
      }
    }
  }
  each_number(w, right_of(i, p, kItem<T>), 0, columns, K, [&](const Place& place, int column, int depth) {
    if (end_reading(block, place, kItem<T>, group, p.number)) bad_columns[column] = true;
    right[depth][column] = number<T>(bits(place));
  });
  double sums[16][256] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < columns; ++column) sums[row][column] += left[row][k] * right[k][column];
    }
  }
  for (int j = 0; j < i.sums; ++j) {
    const uint32_t at = i.at[j];
    if (w.products.changed[at]) w.fail(0, "a register of this wgmma's sums was written before it was waited for");
    Products::Sum& sum = w.products.sums.at(at);
    Lanes tainted = p.adds ? sum.tainted : 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + 8 * (j >> 1 & 1), column = j / 4 * 8 + lane % 4 * 2 + (j & 1);
      uint64_t& to = w.lanes(at)[lane];
      to = wide(static_cast<float>(sums[row][column] + (p.adds ? narrow<float>(to) : 0)));
      if ((bad_rows >> row & 1) || bad_columns[column]) tainted |= Lanes{1} << lane;
    }
    sum.tainted = tainted;
    if (--sum.under_way) continue;
    w.poison[at] = tainted;
    w.products.sums.erase(at);
  }
}

// wgmma.wait_group n: all but the last n groups.
void await_products(Warp& w, const Instruction& i) {
  const auto pending = static_cast<uint32_t>(w.lanes(i.at[0])[0]);
  Products& all = w.products;
  if (all.under_way.empty() || all.under_way.front().group + pending >= all.groups) return;
  const int pc = w.current.pc;
  while (!all.under_way.empty() && all.under_way.front().group + pending < all.groups) {
    const Product& p = all.under_way.front();
    w.current.pc = static_cast<int>(p.instruction - w.block.launch.function.code.data());
    p.end(w, p);
    all.under_way.pop_front();
  }
  w.current.pc = pc;
  Gathering done;
  done.add(w.block, w.block.products_of(w));
  w.block.learn(w, kAll, done.passed_on(w.block));
  ++w.block.launch.clock.now;
}

void fence(Warp& w, const Instruction&) { std::fill(w.products.changed.begin(), w.products.changed.end(), uint8_t{0}); }
void commit(Warp& w, const Instruction&) { ++w.products.groups; }

Run make_wgmma(Written& n, Instruction& i) {
  if (!n.take("sync") || !n.take("aligned")) return nullptr;
  i.members = kWholeWarp;
  if (n.take("fence")) return n.expect(0), fence;
  if (n.take("commit_group")) return n.expect(0), commit;
  if (n.take("wait_group")) return n.expect(1), await_products;
  if (!n.take("mma_async") || n.parts.size() != 4) return nullptr;
  // .m64nNkK.f32.type.type
  const std::string type = n.take_last();
  if (!n.take(type) || !n.take("f32")) return nullptr;
  i.sums = static_cast<int>(n.results);
  if (!n.take("m64n" + std::to_string(2 * i.sums) + (type == "tf32" ? "k8" : "k16"))) return nullptr;
  if (i.sums % 4 || i.sums < 4 || i.sums > 128) return nullptr;
  // {sums}, left or {left}, right, p, +-1, +-1, across...
  const auto operands = static_cast<int>(n.operands.size());
  const int of_sixteen = type != "tf32";
  i.count = operands - i.sums == 5 + 2 * of_sixteen ? 1 : 4;
  n.expect(i.sums + i.count + 4 + (of_sixteen ? 1 + (i.count == 1) : 0));
  const auto constant = [&](int at) {
    if (!n.operands[at].is_constant) throw Fault("a constant expected");
    return n.operands[at].offset;
  };
  for (int k = 0; k < 2; ++k) {
    if (constant(i.sums + i.count + 2 + k) != 1) return nullptr;  // a factor that is negated
  }
  if (of_sixteen) {
    if (i.count == 1) i.mode |= constant(operands - 2) ? 1 : 0;
    i.mode |= constant(operands - 1) ? 2 : 0;
  }
  i.results = 0;  // they aren't there yet
  return type == "f16" ? wgmma<Half> : type == "bf16" ? wgmma<BFloat> : type == "tf32" ? wgmma<float> : Run{};
}

}  // namespace

void make_products(Makers& all) { all["wgmma"] = make_wgmma; }

}  // namespace ptx
