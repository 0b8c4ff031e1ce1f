// cp.async.bulk.tensor: boxes of tensors, between global and shared memory, by a tensor map.
#include <algorithm>

#include "tensor_map.h"
#include "warp.h"

namespace ptx {
namespace {

const TensorMap& map_at(Warp& w, int lane, uint64_t address, int dimensions) {
  const Place place = locate(w, lane, Space::generic, address, 64);
  const auto& map = *reinterpret_cast<const TensorMap*>(place.bytes());
  if (place.at + 128 > place.area->size || map.mark != TensorMap::kMark) w.fail(lane, "there is no tensor map here");
  if (map.rank != dimensions) w.fail(lane, "the tensor has " + std::to_string(map.rank) + " dimensions");
  return map;
}

uint64_t bytes_of(const TensorMap& map) {
  uint64_t bytes = map.item;
  for (int d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
}

// f(address in shared memory, address in global memory or 0 beyond the tensor), for each element of the box.
template <class F>
void each_element(const BulkCopy& copy, const TensorMap& map, F f) {
  uint64_t shared = copy.shared;
  each_in_box(map, copy.at, [&](uint64_t global) { f(swizzled(shared, map.swizzle), global), shared += map.item; });
}

// The key of a thread's stores: they read shared memory as one agent, and write global memory as another.
uint64_t key(const Warp& w, int lane, bool writes) {
  return uint64_t{1} << 32 | (static_cast<uint64_t>(w.index * kLanes + lane) << 1) | writes;
}

// i.mode: dimensions; i.arrives: to global memory
void bulk_copy(Warp& w, const Instruction& i) {
  for (int k = 0; k < i.count; ++k) w.demand(i.at[k], "an operand");
  const int d = i.mode, first = i.arrives ? 1 : 2;  // [map, {coordinates}], [shared]  or  [shared], [map, {..}], [mbarrier]
  const size_t before = w.block.bulk_copies.size();
  w.each([&](int lane) {
    const auto value = [&](int operand) { return w.lanes(i.at[operand])[lane]; };
    BulkCopy copy{&i, w.current.pc, &w, lane, Lanes{1} << lane, 0, {}, 0, 0, 0, ++w.block.begun, {}, {}};
    copy.map = value(first - 1) + i.offset[first - 1];
    for (int k = 0; k < d; ++k) copy.at[k] = static_cast<int32_t>(value(first + k));
    copy.shared = (i.arrives ? value(d + 1) + i.offset[1] : value(0) + i.offset[0]) & 0xffffffff;
    const TensorMap& map = map_at(w, lane, copy.map, d);
    if (copy.shared % 128) w.fail(lane, "the box in shared memory isn't aligned to 128 bytes");
    locate(w, lane, Space::shared, copy.shared, 16), locate(w, lane, Space::shared, copy.shared + bytes_of(map) - 16, 16);
    const Actor engine{w, lane, true};
    uint32_t reader;
    if (i.arrives) {
      copy.group = w.bulk_groups[lane];
      // A box that lanes store together is stored once: a warp of CUTLASS's does so.
      for (size_t k = before; k < w.block.bulk_copies.size(); ++k) {
        BulkCopy& same = w.block.bulk_copies[k];
        if (same.map != copy.map || same.shared != copy.shared || same.group != copy.group || !std::equal(same.at, same.at + d, copy.at)) continue;
        same.lanes |= copy.lanes;
        return;
      }
      reader = w.block.slot(key(w, lane, false));
    } else {
      const Place barrier = locate(w, lane, Space::shared, value(d + 2) + i.offset[2], 8);
      reader = w.block.mbarrier_at(w, lane, barrier).agent;
      copy.mbarrier = barrier.at;
    }
    each_element(copy, map, [&](uint64_t shared, uint64_t global) {
      const Place near = locate(w, lane, Space::shared, shared, map.item);
      const Place far = global ? locate(w, lane, Space::global, global, map.item) : near;
      if (i.arrives) {
        begin_reading(engine, near, map.item, w.block.group_of(reader), copy.number);
        if (global) begin_writing(engine, far, map.item);
      } else {
        if (global) begin_reading(engine, far, map.item, w.block.group_of(reader), copy.number);
        begin_writing(engine, near, map.item);
      }
    });
    w.block.bulk_copies.push_back(copy);
  });
}

void commit(Warp& w, const Instruction&) {
  w.each([&](int lane) { ++w.bulk_groups[lane]; });
}

const TensorMap& map_of(const BulkCopy& copy) { return *reinterpret_cast<const TensorMap*>(copy.map); }

Place at(Block& block, uint64_t shared) { return {&block.shared, shared}; }

// A store has read its shared memory.
void take(Block& block, BulkCopy& copy) {
  const TensorMap& map = map_of(copy);
  const uint32_t group = block.group_of(block.slot(key(*copy.warp, copy.lane, false)));
  each_element(copy, map, [&](uint64_t shared, uint64_t) {
    const Place place = at(block, shared);
    copy.tainted.push_back(end_reading(block, place, map.item, group, copy.number));
    copy.taken.insert(copy.taken.end(), place.bytes(), place.bytes() + map.item);
  });
}

// It has written its global memory.
void put(Block& block, const BulkCopy& copy) {
  const TensorMap& map = map_of(copy);
  size_t k = 0;
  each_element(copy, map, [&](uint64_t, uint64_t global) {
    const size_t element = k++;
    if (!global) return;
    if (copy.tainted[element]) copy.warp->fail(copy.lane, "a bulk copy stores a value that nobody wrote");
    const Place place{block.launch.memory.find(global), global - block.launch.memory.find(global)->begin};
    end_writing(block, place, map.item, &copy.taken[element * map.item], false, block.slot(key(*copy.warp, copy.lane, true)));
  });
}

// cp.async.bulk.wait_group[.read] n: all but the last n groups of the thread have been done, or have read.
void await_stores(Warp& w, const Instruction& i) {
  const auto pending = static_cast<uint32_t>(w.lanes(i.at[0])[0]);
  Block& block = w.block;
  std::erase_if(block.bulk_copies, [&](BulkCopy& copy) {
    Lanes waiting = 0;
    w.each([&](int lane) { waiting |= Lanes{copy.group + pending < w.bulk_groups[lane]} << lane; });
    waiting &= copy.lanes;
    if (copy.warp != &w || !copy.instruction->arrives || !waiting) return false;
    if (copy.taken.empty()) take(block, copy);
    if (!i.mode) put(block, copy);
    Gathering done;
    done.add(block, block.slot(key(w, copy.lane, false)));
    if (!i.mode) done.add(block, block.slot(key(w, copy.lane, true)));
    block.learn(w, waiting, done.passed_on(block));
    return !i.mode;
  });
  ++block.launch.clock.now;
}

}  // namespace

Run make_bulk_copy(Written& n, Instruction& i) {
  if (n.take("commit_group")) return n.expect(0), commit;
  if (n.take("wait_group")) return n.expect(1), i.mode = n.take("read"), await_stores;
  if (!n.take("tensor")) return nullptr;
  for (int d = 1; d <= 5; ++d) {
    if (n.take(std::to_string(d) + "d")) i.mode = d;
  }
  n.take("tile");
  if (n.take("L2::cache_hint") && !n.operands.empty()) n.operands.pop_back();
  i.arrives = n.take("bulk_group");
  const bool loads = n.take("mbarrier::complete_tx::bytes");
  if (i.arrives == loads || !i.mode || !n.take("global") || !(n.take("shared::cta") || n.take("shared::cluster"))) return nullptr;
  i.count = i.mode + (i.arrives ? 2 : 3);
  n.expect(i.count);
  return bulk_copy;
}

// A load has brought its box.
void Block::end_copy(size_t which) {
  const BulkCopy copy = bulk_copies[which];
  bulk_copies.erase(bulk_copies.begin() + static_cast<std::ptrdiff_t>(which));
  const TensorMap& map = map_of(copy);
  Mbarrier& barrier = mbarriers.at(copy.mbarrier);
  each_element(copy, map, [&](uint64_t shared, uint64_t global) {
    uint8_t bytes[8] = {};
    bool tainted = false;
    if (global) {
      const Place place{launch.memory.find(global), global - launch.memory.find(global)->begin};
      tainted = end_reading(*this, place, map.item, group_of(barrier.agent), copy.number);
      std::memcpy(bytes, place.bytes(), map.item);
    } else if (map.nan) {
      std::fill_n(bytes, 8, uint8_t{0xff});
    }
    end_writing(*this, at(*this, shared), map.item, bytes, tainted, barrier.agent);
  });
  barrier.arrivals.add(*this, barrier.agent);
  ++launch.clock.now;
  const auto bytes = static_cast<int64_t>(bytes_of(map));
  if (barrier.pending == 0 && barrier.bytes < bytes) {
    copy.warp->current.pc = copy.pc;
    copy.warp->fail(copy.lane, "brings more bytes than its mbarrier expects");
  }
  come(barrier, 0, bytes);
}

bool Block::end_a_copy(bool chance) {
  std::vector<size_t> awaited;
  for (size_t k = 0; k < bulk_copies.size(); ++k) {
    const BulkCopy& copy = bulk_copies[k];
    if (copy.instruction->arrives) continue;
    bool waits = chance;
    for (const auto& warp : warps) {
      for (const Group& group : warp->others) {
        if (waits || group.wait != Group::at_mbarrier) continue;
        const Instruction& i = launch.function.code[group.pc];
        const uint64_t address = warp->lanes(i.at[1])[std::countr_zero(group.lanes)] + i.offset[0];
        waits = (address & 0xffffffff) == copy.mbarrier;
      }
    }
    if (waits) awaited.push_back(k);
  }
  if (awaited.empty()) return false;
  end_copy(awaited[launch.order.of(static_cast<int>(awaited.size()))[0]]);
  return true;
}

// Stores end with the kernel, if they have read what is gone then; loads and products may not be under way.
void Block::at_the_end() {
  for (BulkCopy& copy : bulk_copies) {
    copy.warp->current.pc = copy.pc;
    if (copy.taken.empty()) copy.warp->fail(copy.lane, "the block ends before this bulk copy does");
    put(*this, copy);
  }
  for (auto& warp : warps) {
    if (warp->products.under_way.empty()) continue;
    const Product& product = warp->products.under_way.front();
    warp->current.pc = static_cast<int>(product.instruction - launch.function.code.data());
    warp->fail(0, "the warp ends before this wgmma does");
  }
}

}  // namespace ptx
