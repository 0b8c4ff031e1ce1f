#include "knowledge.h"

#include <algorithm>

#include "warp.h"

namespace ptx {

uint32_t Actor::agent() const { return warp.index * kLanes + lane; }

bool Actor::knows(uint32_t other, uint32_t time) const {
  if (other == agent()) return !async || warp.fenced_at[lane] >= time || warp.known[lane]->fenced.of[other] >= time;
  const Knowledge& known = *warp.known[lane];
  return (async ? known.fenced : known.seen).of[other] >= time;
}

bool Actor::knows_group(uint32_t group, Lanes lanes, uint32_t time) const {
  const Knowledge& known = *warp.known[lane];
  const size_t warps = warp.block.warps.size();
  if (group >= warps) return knows(warp.block.agent_of(group), time);
  if ((async ? known.fenced : known.seen).least[group] >= time) return true;
  for (; lanes; lanes &= lanes - 1) {
    if (!knows(group * kLanes + std::countr_zero(lanes), time)) return false;
  }
  return true;
}

namespace {

void join(Times& sum, const Times& more) {
  sum.of.resize(std::max(sum.of.size(), more.of.size()));
  for (size_t k = 0; k < more.of.size(); ++k) sum.of[k] = std::max(sum.of[k], more.of[k]);
}

void set_least(Times& times, const Block& block) {
  times.of.resize(block.agents());
  times.least.resize(block.warps.size());
  for (size_t k = 0; k < block.warps.size(); ++k) {
    times.least[k] = *std::min_element(times.of.begin() + k * kLanes, times.of.begin() + (k + 1) * kLanes);
  }
}

}  // namespace

void Gathering::add(const Known& known) {
  if (known == last_) return;
  join(sum_.seen, known->seen), join(sum_.fenced, known->fenced);
  last_ = known;
}

void Gathering::add(const Warp& warp, Lanes lanes) {
  for (; lanes; lanes &= lanes - 1) {
    const int lane = std::countr_zero(lanes);
    add(warp.known[lane]);
    const size_t me = warp.index * kLanes + lane;
    sum_.seen.of[me] = warp.block.launch.clock.now;
    sum_.fenced.of[me] = std::max(sum_.fenced.of[me], warp.fenced_at[lane]);
  }
}

void Gathering::add(const Block& block, uint32_t agent) {
  for (Times* times : {&sum_.seen, &sum_.fenced}) {
    times->of.resize(block.agents());
    times->of[agent] = block.launch.clock.now;
  }
}

Known Gathering::passed_on(const Block& block) const {
  Knowledge found = sum_;
  set_least(found.seen, block), set_least(found.fenced, block);
  return std::make_shared<const Knowledge>(std::move(found));
}

// --- of the block -----------------------------------------------------------------------------------------------------

void Block::learn(Warp& warp, Lanes lanes, const Known& more) {
  Known before, after;  // lanes mostly know the same
  for (; lanes; lanes &= lanes - 1) {
    Known& known = warp.known[std::countr_zero(lanes)];
    if (known != before) {
      before = known;
      Gathering all;
      all.add(known), all.add(more);
      after = all.passed_on(*this);
    }
    known = after;
  }
}

void Block::meet(Warp& warp, Lanes lanes) {
  Gathering all;
  all.add(warp, lanes);
  ++launch.clock.now;
  const Known known = all.passed_on(*this);
  for (Lanes left = lanes; left; left &= left - 1) warp.known[std::countr_zero(left)] = known;
}

// All that a lane knows, and has done, precedes a proxy fence from now on.
void Block::fence(Warp& warp, Lanes lanes) {
  Known before, after;
  for (; lanes; lanes &= lanes - 1) {
    const int lane = std::countr_zero(lanes);
    if (warp.known[lane] != before) {
      before = warp.known[lane];
      after = std::make_shared<const Knowledge>(Knowledge{before->seen, before->seen});
    }
    warp.known[lane] = after;
    warp.fenced_at[lane] = launch.clock.now;
  }
  ++launch.clock.now;
}

}  // namespace ptx
