// Barriers in shared memory (mbarrier), fences between proxies, and the small instructions of sm_90.
#include "warp.h"

namespace ptx {

Mbarrier& Block::mbarrier_at(Warp& warp, int lane, Place place) {
  const auto found = mbarriers.find(place.at);
  if (found == mbarriers.end()) warp.fail(lane, "there is no mbarrier at byte " + std::to_string(place.at) + " of shared memory");
  touch_mbarrier(warp, lane, place);
  return found->second;
}

uint32_t Block::slot(uint64_t key) {
  const auto [found, is_new] = slots.try_emplace(key, agents() - kOthers + static_cast<uint32_t>(slots.size()));
  if (slots.size() > kOthers) throw Fault("more mbarriers and threads that copy than this machine has room for");
  return found->second;
}

// `arrivals` and `bytes` of what the phase waits for have come.
void Block::come(Mbarrier& barrier, int arrivals, int64_t bytes) {
  barrier.pending -= arrivals, barrier.bytes -= bytes;
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase, barrier.pending = barrier.count;
  barrier.passed = barrier.arrivals.passed_on(*this);
  for (auto& warp : warps) {
    for (Group& group : warp->others) {
      if (group.wait == Group::at_mbarrier) group.wait = Group::nothing;
    }
  }
}

// mbarrier.try_wait.parity p, [barrier], parity: it waits as long as it takes; in random order it gives up at times.
Lanes Block::ended(Warp& warp, const Instruction& i) {
  warp.demand(i.at[1], "an address"), warp.demand(i.at[2], "a parity");
  Lanes found = 0, together = 0;  // lanes mostly wait for the same
  Known passed;
  warp.each([&](int lane) {
    const Place place = locate(warp, lane, Space::shared, warp.lanes(i.at[1])[lane] + i.offset[0], 8);
    Mbarrier& barrier = mbarrier_at(warp, lane, place);
    if (barrier.phase % 2 == (warp.lanes(i.at[2])[lane] & 1)) return;
    if (barrier.passed != passed) {
      if (passed) learn(warp, together, passed);
      passed = barrier.passed, together = 0;
    }
    found |= Lanes{1} << lane, together |= Lanes{1} << lane;
  });
  if (passed) learn(warp, together, passed);
  const bool gives_up = !found && launch.order.kind == Order::random && launch.order.generator() % 8 == 0;
  const Lanes all = warp.active;
  if (!gives_up) warp.active = found;
  if (warp.active) warp.put_mask(i.at[0], found, 0);
  const Lanes done = warp.active;
  warp.active = all;
  return done;
}

void Block::fail_at_mbarrier(Warp& warp, int lane) {
  const Instruction& i = launch.function.code[warp.current.pc];
  const Place place = locate(warp, lane, Space::shared, warp.lanes(i.at[1])[lane] + i.offset[0], 8);
  const Mbarrier& barrier = mbarriers.at(place.at);
  warp.fail(lane, "deadlock: waits at the mbarrier at byte " + std::to_string(place.at) + " for a phase of parity " +
                      std::to_string(barrier.phase % 2) + ", of which " + std::to_string(barrier.pending) + " arrivals and " +
                      std::to_string(barrier.bytes) + " bytes never come");
}

namespace {

Place place_of(Warp& w, const Instruction& i, int lane, int operand) {
  return locate(w, lane, Space::shared, w.lanes(i.at[operand])[lane] + i.offset[0], 8);
}

void init(Warp& w, const Instruction& i) {
  w.demand(i.at[0], "an address"), w.demand(i.at[1], "a count");
  w.each([&](int lane) {
    const Place place = place_of(w, i, lane, 0);
    const auto count = static_cast<int>(w.lanes(i.at[1])[lane]);
    if (count < 1 || count >= 1 << 20) w.fail(lane, "an mbarrier takes 1 to 2^20 - 1 arrivals");
    make_mbarrier(w, lane, place, true);
    w.block.mbarriers[place.at] = {place.at, count, count, 0, 0, w.block.slot(place.at), {}, nullptr};
  });
}

void inval(Warp& w, const Instruction& i) {
  w.demand(i.at[0], "an address");
  w.each([&](int lane) {
    const Place place = place_of(w, i, lane, 0);
    const Mbarrier& barrier = w.block.mbarrier_at(w, lane, place);
    for (const BulkCopy& copy : w.block.bulk_copies) {
      if (copy.mbarrier == barrier.address) w.fail(lane, "bytes still come to this mbarrier");
    }
    make_mbarrier(w, lane, place, false);
    w.block.mbarriers.erase(place.at);
  });
}

// [arrive.]expect_tx, arrive with a count or without: i.mode: 1: expects bytes, 2: arrives; i.count: results
void arrive(Warp& w, const Instruction& i) {
  w.demand(i.at[i.count], "an address");
  const bool expects = i.mode & 1, arrives = i.mode & 2;
  if (i.saturated) w.demand(i.at[i.count + 1], "a count");  // there is a last operand
  w.each([&](int lane) {
    Mbarrier& barrier = w.block.mbarrier_at(w, lane, place_of(w, i, lane, i.count));
    const auto given = i.saturated ? static_cast<uint32_t>(w.lanes(i.at[i.count + 1])[lane]) : 1;
    if (arrives) {
      barrier.arrivals.add(w, Lanes{1} << lane);
      ++w.block.launch.clock.now;
    }
    const int arrivals = arrives ? (expects ? 1 : static_cast<int>(given)) : 0;
    if (barrier.pending < arrivals) w.fail(lane, "more arrivals at an mbarrier than it was initialised for");
    w.block.come(barrier, arrivals, expects ? -static_cast<int64_t>(given) : 0);
  });
  if (i.count) w.taint(i.at[0], kAll);  // a state, which only waits without a parity take
}

Run make_mbarrier_instruction(Written& n, Instruction& i) {
  // "shared" is the block's own
  if (!n.take("b64") || !(n.take("shared::cta") || n.take("shared::cluster") || n.take("shared"))) return nullptr;
  n.take("cta");  // the scope
  if (n.take("init")) return n.expect(2), init;
  if (n.take("inval")) return n.expect(1), inval;
  if (n.take("try_wait")) {
    n.take("acquire");
    if (n.operands.size() != 4) n.expect(3);  // the time is a hint
    if (n.take("parity")) i.control = Control::mbarrier;
    return nullptr;
  }
  n.take("release"), n.take("relaxed");
  i.mode = (n.take("arrive") ? 2 : 0) | (n.take("expect_tx") ? 1 : 0);
  i.count = i.mode & 2 ? 1 : 0;
  i.saturated = static_cast<int>(n.operands.size()) > i.count + 1;
  if (!i.mode || ((i.mode & 1) && !i.saturated)) return nullptr;
  n.expect(i.count + 1 + i.saturated);
  return arrive;
}

// --- fence, elect, setmaxnreg, griddepcontrol, prefetch -------------------------------------------------------------

void nothing(Warp&, const Instruction&) {}
void proxy_fence(Warp& w, const Instruction&) { w.block.fence(w, w.active); }

Run make_fence(Written& n, Instruction&) {
  n.expect(0);
  if (n.take("proxy")) {
    const bool known = n.take("async");
    n.take("shared::cta"), n.take("global");
    return known ? proxy_fence : Run{};
  }
  if (n.take("mbarrier_init")) return n.take("release") && n.take("cluster") ? nothing : Run{};
  return nullptr;
}

// One lane of those that the mask names. The manual leaves open which one; Triton counts on the first, as GPUs have it.
void elect(Warp& w, const Instruction& i) {
  const int lane = std::countr_zero(w.active);
  w.each([&](int each) { w.lanes(i.at[0])[each] = lane; });
  w.taint(i.at[0], 0);
  w.put_mask(i.at[1], Lanes{1} << lane, 0);
}

void set_registers(Warp& w, const Instruction& i) {
  const uint64_t count = w.lanes(i.at[0])[0];
  if (count < 24 || count > 256 || count % 8) w.fail(0, "24 to 256 registers, a multiple of 8");
}

// mapa d, a, rank: the address in shared memory of the cluster's block of that rank. A cluster is one block here.
void mapa(Warp& w, const Instruction& i) {
  w.demand(i.at[1], "an address"), w.demand(i.at[2], "a rank");
  w.each([&](int lane) {
    if (w.lanes(i.at[2])[lane] != 0) w.fail(lane, "clusters of several blocks aren't known here");
    w.lanes(i.at[0])[lane] = w.lanes(i.at[1])[lane];
  });
  w.taint(i.at[0], 0);
}

void await_kernels_before(Warp& w, const Instruction&) { w.kernels_before_ended |= w.active; }

}  // namespace

void make_mbarriers(Makers& all) {
  all["mbarrier"] = make_mbarrier_instruction;
  all["fence"] = make_fence;
  all["elect"] = [](Written& n, Instruction& i) -> Run {
    n.expect(3);
    i.members = static_cast<int>(n.operands[2].at);
    return n.take("sync") ? elect : Run{};
  };
  all["setmaxnreg"] = [](Written& n, Instruction& i) -> Run {
    n.expect(1);
    i.members = kWholeWarp;
    const bool known = (n.take("inc") || n.take("dec")) && n.take("sync") && n.take("aligned") && n.take("u32");
    return known ? set_registers : Run{};
  };
  all["mapa"] = [](Written& n, Instruction&) -> Run {
    n.expect(3);
    return n.take("shared::cluster") && n.take("u32") ? mapa : Run{};
  };
  all["griddepcontrol"] = [](Written& n, Instruction&) -> Run {
    n.expect(0);
    return n.take("wait") ? await_kernels_before : n.take("launch_dependents") ? nothing : Run{};
  };
  all["prefetch"] = [](Written& n, Instruction&) -> Run { return n.expect(1), n.take("tensormap") ? nothing : Run{}; };
}

}  // namespace ptx
