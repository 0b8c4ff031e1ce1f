// The products of a warpgroup, done by each of its warps for its own 16 rows when it waits for them. See async.h.
#pragma once

#include "mbarrier.h"

namespace cuda_on_cpu {

inline void wgmma_fence() {
  note::ShimCode shim;
  engine.self().products.fenced = true;
}

inline void wgmma_commit() {
  note::ShimCode shim;
  ++engine.self().products.groups;
}

inline void begin_product(const Product& product) {
  note::ShimCode shim;
  Products& mine = engine.self().products;
  if (!mine.fenced) engine.fail("wgmma after its registers were written, without wgmma.fence");
  mine.under_way.push_back(product);
  mine.under_way.back().group = mine.groups;
  ++mine.begun;
  const int sums = product.columns / 2;
  if (mine.held.count(product.sum) == 0) mine.held[product.sum].assign(product.sum, product.sum + sums);
  std::fill(product.sum, product.sum + sums, std::nanf(""));
}

namespace detail {

// The number at `side` and `depth` of the factor that a descriptor stands for.
inline uint16_t number_of(uint64_t descriptor, bool transposed, unsigned side, unsigned depth) {
  using Number __attribute__((may_alias)) = uint16_t;
  const auto field = [&](int bit) { return static_cast<unsigned>(descriptor >> bit & 0x3FFF) << 4; };
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) engine.fail("a matrix descriptor of another layout");
  const unsigned start = field(0), apart = field(16), eight_rows = field(32);
  const unsigned row = transposed ? depth : side, column = transposed ? side : depth;
  const unsigned place = start + row / 8 * eight_rows + row % 8 * 128 + column / 64 * apart + column % 64 * 2;
  if (engine.unfenced_at(swizzled(place)).writes > 0) engine.fail("a wgmma of what was stored without fence.proxy.async");
  return *reinterpret_cast<const Number*>(engine.at_shared_address(swizzled(place)));
}

struct Warp {
  Thread* lanes[warpSize];
};

// Adds one product to the sums that the lanes of a warp hold, reading shared memory as the lane that calls it.
inline void multiply(const Warp& warp, size_t which) {
  Product all;
  float left[16][16], right[16][256];
  {
    note::ShimCode shim;
    all = warp.lanes[0]->products.under_way[which];
    for (Thread* lane : warp.lanes) {
      const Product& p = lane->products.under_way[which];
      if (p.b != all.b || p.columns != all.columns || p.from_registers != all.from_registers ||
          (!p.from_registers && p.a != all.a))
        engine.fail("the lanes of a warp brought different factors");
    }
  }
  const unsigned row = engine.lane() == 0 ? engine.self().index.x / warpSize % 4 * 16 : 0;
  for (unsigned k = 0; k < 16; ++k) {
    for (unsigned m = 0; m < 16 && !all.from_registers; ++m)
      left[m][k] = all.number(number_of(all.a, all.a_transposed, row + m, k));
    for (int n = 0; n < all.columns; ++n)
      right[k][n] = all.number(number_of(all.b, all.b_transposed, static_cast<unsigned>(n), k));
  }
  note::ShimCode shim;
  for (int l = 0; l < warpSize && all.from_registers; ++l)
    for (int q = 0; q < 4; ++q)
      for (int i = 0; i < 2; ++i)
        left[l / 4 + q % 2 * 8][l % 4 * 2 + i + q / 2 * 8] = all.number(
            static_cast<uint16_t>(warp.lanes[l]->products.under_way[which].registers[q] >> 16 * i));
  for (int l = 0; l < warpSize; ++l) {
    Products& products = warp.lanes[l]->products;
    std::vector<float>& held = products.held.at(products.under_way[which].sum);
    for (int i = 0; i < all.columns / 2; ++i) {
      const int m = l / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + l % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) held[static_cast<size_t>(i)] += left[m][k] * right[k][n];
    }
  }
}

}  // namespace detail

inline void wgmma_wait(int pending, Site site) {
  Thread* me = nullptr;
  {
    note::ShimCode shim;
    me = &engine.self();
  }
  const auto meet = [&] {
    return engine.warp_call<detail::Warp>(
        "wgmma.wait_group", ~0u, me,
        [](auto& in, auto& out) {
          for (auto* o : out)
            for (int lane = 0; lane < warpSize; ++lane) o->lanes[lane] = *in[lane];
        },
        site);
  };
  const detail::Warp warp = meet();
  size_t done = 0;
  {
    note::ShimCode shim;
    const Products& mine = me->products;
    while (done < mine.under_way.size() && mine.under_way[done].group < mine.groups - pending) ++done;
    for (Thread* lane : warp.lanes)
      if (lane->products.begun != me->products.begun) engine.fail("the lanes of a warp began different products");
  }
  if (engine.lane() == 0)
    for (size_t i = 0; i < done; ++i) detail::multiply(warp, i);
  meet();
  note::ShimCode shim;
  Products& mine = me->products;
  mine.under_way.erase(mine.under_way.begin(), mine.under_way.begin() + static_cast<std::ptrdiff_t>(done));
  for (auto held = mine.held.begin(); held != mine.held.end();) {
    bool under_way = false;
    for (const Product& p : mine.under_way) under_way |= p.sum == held->first;
    if (!under_way) std::copy(held->second.begin(), held->second.end(), held->first);
    held = under_way ? std::next(held) : mine.held.erase(held);
  }
  mine.fenced = false;
}

}  // namespace cuda_on_cpu
