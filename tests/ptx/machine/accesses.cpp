// Loads, stores, asynchronous copies, and the matrices that a warp loads together.
#include <algorithm>

#include "warp.h"

namespace ptx {
namespace {

// A vector of i.count values of T.
template <class T>
void load(Warp& w, const Instruction& i) {
  const int size = static_cast<int>(sizeof(T)) * i.count;
  const uint32_t base = i.at[i.count];
  w.demand(base, "an address");
  const uint64_t* address = w.lanes(base);
  Lanes tainted[8] = {};
  w.each([&](int lane) {
    const Place place = locate(w, lane, i.space, address[lane] + i.offset[0], size);
    for (int k = 0; k < i.count; ++k) {
      const Place part{place.area, place.at + k * sizeof(T)};
      tainted[k] |= Lanes{read(w, lane, part, sizeof(T))} << lane;
    }
    // All of it is read before a register is written, for one of them may be the address.
    T values[8];
    std::memcpy(values, place.bytes(), size);
    for (int k = 0; k < i.count; ++k) w.lanes(i.at[k])[lane] = wide(values[k]);
  });
  for (int k = 0; k < i.count; ++k) w.taint(i.at[k], tainted[k]);
}

template <class T>
void store(Warp& w, const Instruction& i) {
  const int size = static_cast<int>(sizeof(T)) * i.count;
  w.demand(i.at[0], "an address");
  const uint64_t* address = w.lanes(i.at[0]);
  w.each([&](int lane) {
    const Place place = locate(w, lane, i.space, address[lane] + i.offset[0], size);
    for (int k = 0; k < i.count; ++k) {
      const uint32_t from = i.at[1 + k];
      const T value = narrow<T>(w.lanes(from)[lane]);
      const bool tainted = w.poison[from] >> lane & 1;
      if (tainted && place.area->space == Space::global) w.fail(lane, "stores a value that nobody wrote");
      write(w, lane, {place.area, place.at + k * sizeof(T)}, sizeof(T), &value, tainted);
    }
  });
}

template <bool loads>
Run make_access(Written& n, Instruction& i) {
  const std::string type = n.take_last();
  for (int count : {2, 4, 8}) {
    if (n.take("v" + std::to_string(count))) i.count = count;
  }
  n.expect(i.count + 1);
  i.space = take_space(n);
  // How the caches hold it changes nothing here.
  for (const char* hint : {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "volatile", "relaxed", "gpu", "cta", "sys",
                           "L1::no_allocate", "L1::evict_last", "L1::evict_first", "L2::128B", "L2::256B"}) {
    n.take(hint);
  }
  const auto run = [&]<class T>(Type<T>) -> Run { return loads ? load<T> : store<T>; };
  return is_float(type) ? for_float(type, run) : for_integer(type, run);
}

// --- cp.async: the bytes arrive at the wait, and until then nobody may touch them

void copy(Warp& w, const Instruction& i) {
  w.demand(i.at[0], "an address"), w.demand(i.at[1], "an address");
  if (i.count == 4) w.demand(i.at[3], "a size");
  w.each([&](int lane) {
    const auto size = static_cast<int>(w.lanes(i.at[2])[lane]);
    if (size != 16 && (i.mode || (size != 4 && size != 8))) w.fail(lane, "copies have no such size");
    const auto given = i.count == 4 ? static_cast<int>(static_cast<uint32_t>(w.lanes(i.at[3])[lane])) : size;
    if (given < 0 || given > size) w.fail(lane, "copies " + std::to_string(given) + " of " + std::to_string(size) + " bytes");
    const Place to = locate(w, lane, Space::shared, w.lanes(i.at[0])[lane] + i.offset[0], size);
    Place from{nullptr, 0};
    if (given) {
      const uint64_t address = w.lanes(i.at[1])[lane] + i.offset[1];
      if (address % size) w.fail(lane, "the source isn't aligned to " + std::to_string(size) + " bytes");
      from = locate(w, lane, Space::global, address, 1);
      if (from.at + given > from.area->size) w.fail(lane, "the source ends within these bytes");
    }
    static const uint8_t garbage[16] = {255, 254, 253, 252, 251, 250, 249, 248, 247, 246, 245, 244, 243, 242, 241, 240};
    write(w, lane, to, size, garbage, true);
    std::fill_n(to.area->states.get() + to.at, size, uint8_t{kInFlight});
    w.copies.push_back({lane, to, from, size, given, w.committed[lane]});
  });
}

void arrive(Warp& w, const Copy& c) {
  uint8_t bytes[16] = {};
  bool tainted = false;
  if (c.read) {
    for (int k = 0; k < c.read; ++k) tainted |= read(w, c.lane, {c.from.area, c.from.at + k}, 1);
    std::memcpy(bytes, c.from.bytes(), c.read);
  }
  std::fill_n(c.to.area->states.get() + c.to.at, c.size, uint8_t{kKnown});
  write(w, c.lane, c.to, c.size, bytes, tainted);
}

void commit(Warp& w, const Instruction&) {
  w.each([&](int lane) { ++w.committed[lane]; });
}

// All but the last i.mode groups; a negative i.mode: all, committed or not.
void await_copies(Warp& w, const Instruction& i) {
  std::erase_if(w.copies, [&](const Copy& c) {
    const bool done = (w.active >> c.lane & 1) && (i.mode < 0 || c.group + i.mode < w.committed[c.lane]);
    if (done) arrive(w, c);
    return done;
  });
}

// The number lies in a constant register.
void await_groups(Warp& w, const Instruction& i) {
  Instruction known = i;
  known.mode = static_cast<int>(w.lanes(i.at[0])[0]);
  await_copies(w, known);
}

Run make_copy(Written& n, Instruction& i) {
  if (!n.take("async")) return nullptr;
  if (n.take("bulk")) return make_bulk_copy(n, i);
  if (n.take("commit_group")) return n.expect(0), commit;
  if (n.take("wait_all")) return n.expect(0), i.mode = -1, await_copies;
  if (n.take("wait_group")) return n.expect(1), await_groups;
  const bool through_l1 = n.take("ca");
  if (!through_l1 && !n.take("cg")) return nullptr;
  n.take("L2::128B"), n.take("L2::256B");
  if (!n.take("shared") || !n.take("global")) return nullptr;
  i.mode = !through_l1;  // .cg: 16 bytes alone
  i.count = static_cast<int>(n.operands.size());
  if (i.count != 3 && i.count != 4) n.expect(4);
  return copy;
}

// --- ldmatrix, stmatrix: eight rows of 16 bytes for each matrix, whose addresses its eight lanes have. Of a matrix a lane
// holds the elements (lane/4, 2*(lane%4)) and the next one in its row, or with .trans in its column.

template <bool transposed>
void ldmatrix(Warp& w, const Instruction& i) {
  const uint32_t base = i.at[i.count];
  w.demand(base, "an address");
  const std::vector<uint64_t> address(w.lanes(base), w.lanes(base) + kLanes);  // which may be among the results
  for (int m = 0; m < i.count; ++m) {
    uint16_t rows[8][8];
    bool unknown[8][8];
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * m + row;
      const Place place = locate(w, lane, i.space, address[lane] + i.offset[0], 16);
      for (int c = 0; c < 8; ++c) unknown[row][c] = read(w, lane, {place.area, place.at + 2 * c}, 2);
      std::memcpy(rows[row], place.bytes(), 16);
    }
    Lanes tainted = 0;
    uint64_t found[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int a = lane / 4, b = lane % 4 * 2;
      found[lane] = transposed ? rows[b][a] | uint32_t{rows[b + 1][a]} << 16 : rows[a][b] | uint32_t{rows[a][b + 1]} << 16;
      const bool is = transposed ? unknown[b][a] || unknown[b + 1][a] : unknown[a][b] || unknown[a][b + 1];
      tainted |= Lanes{is} << lane;
    }
    std::copy(found, found + kLanes, w.lanes(i.at[m]));
    w.taint(i.at[m], tainted);
  }
}

template <bool transposed>
void stmatrix(Warp& w, const Instruction& i) {
  w.demand(i.at[0], "an address");
  for (int m = 0; m < i.count; ++m) {
    uint16_t rows[8][8];
    bool unknown[8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int e = 0; e < 2; ++e) {
        const int a = lane / 4, b = lane % 4 * 2 + e;
        (transposed ? rows[b][a] : rows[a][b]) = static_cast<uint16_t>(w.lanes(i.at[1 + m])[lane] >> 16 * e);
        (transposed ? unknown[b][a] : unknown[a][b]) = w.poison[i.at[1 + m]] >> lane & 1;
      }
    }
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * m + row;
      const Place place = locate(w, lane, i.space, w.lanes(i.at[0])[lane] + i.offset[0], 16);
      for (int c = 0; c < 8; ++c) write(w, lane, {place.area, place.at + 2 * c}, 2, &rows[row][c], unknown[row][c]);
    }
  }
}

template <bool loads>
Run make_matrices(Written& n, Instruction& i) {
  if (!n.take("sync") || !n.take("aligned") || !n.take("m8n8") || !n.take("b16")) return nullptr;
  for (int count : {1, 2, 4}) {
    if (n.take("x" + std::to_string(count))) i.count = count;
  }
  n.expect(i.count + 1);
  i.space = take_space(n);
  i.members = kWholeWarp;
  const bool transposed = n.take("trans");
  return loads ? (transposed ? ldmatrix<true> : ldmatrix<false>) : (transposed ? stmatrix<true> : stmatrix<false>);
}

}  // namespace

void make_accesses(Makers& all) {
  all["ld"] = all["ld:float"] = make_access<true>;
  all["st"] = all["st:float"] = make_access<false>;
  all["cp"] = make_copy;
  all["ldmatrix"] = make_matrices<true>;
  all["stmatrix"] = make_matrices<false>;
}

}  // namespace ptx
