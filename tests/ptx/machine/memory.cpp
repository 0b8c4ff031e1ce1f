#include <algorithm>

#include "warp.h"

namespace ptx {

Area::Area(std::string name, Space space, uint64_t begin, uint64_t size, uint8_t* bytes, bool watched, bool unwritten)
    : name(std::move(name)), space(space), begin(begin), size(size), bytes(bytes) {
  // calloc leaves what isn't touched to the system.
  if (watched) cells.reset(static_cast<Cell*>(std::calloc(size + 1, sizeof(Cell))));
  if (watched || unwritten) states.reset(static_cast<uint8_t*>(std::calloc(size + 1, 1)));
  if (unwritten) std::fill_n(states.get(), size, uint8_t{kUnwritten});
}

void Memory::add(const std::string& name, uint64_t begin, uint64_t size, bool written, bool read_only) {
  const auto after = areas_.lower_bound(begin);
  const Area* before = after == areas_.begin() ? nullptr : std::prev(after)->second.get();
  if ((after != areas_.end() && after->first < begin + size) || (before && before->begin + before->size > begin)) {
    throw Fault(name + " overlaps other memory");
  }
  auto* bytes = reinterpret_cast<uint8_t*>(begin);
  auto area = std::make_unique<Area>(name, Space::global, begin, size, bytes, !read_only, !written);
  area->read_only = read_only;
  areas_[begin] = std::move(area);
}

Area* Memory::find(uint64_t address) {
  if (last_ && address - last_->begin < last_->size) return last_;
  const auto after = areas_.upper_bound(address);
  if (after == areas_.begin()) return nullptr;
  Area* area = std::prev(after)->second.get();
  return address - area->begin < area->size ? last_ = area : nullptr;
}

bool Memory::all_written(uint64_t begin, uint64_t size) {
  const Area* area = find(begin);
  if (!area || begin + size > area->begin + area->size) throw Fault("this memory isn't the machine's");
  const uint8_t* states = area->states.get();
  return !states || std::all_of(states + (begin - area->begin), states + (begin - area->begin) + size,
                                [](uint8_t state) { return state == kKnown; });
}

namespace {
std::string hex(uint64_t x) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
  return text;
}

std::string described(const Place& place) { return "byte " + std::to_string(place.at) + " of " + place.area->name; }
}  // namespace

Place locate(Warp& warp, int lane, Space space, uint64_t address, int size) {
  Block& block = warp.block;
  if (space == Space::generic || space == Space::param) {  // the parameters of a call lie in local memory
    const uint64_t window = address & kWindows;
    space = window == kSharedWindow ? Space::shared : window == kLocalWindow ? Space::local : Space::global;
    if (window) address &= ~kWindows;
  }
  if (address % size) warp.fail(lane, "address " + hex(address) + " isn't aligned to " + std::to_string(size) + " bytes");
  Area* area = nullptr;
  if (space == Space::shared) {
    address &= 0xffffffff;
    area = &block.shared;
  } else if (space == Space::local) {
    area = &warp.local[lane];
  } else {
    area = block.launch.memory.find(address);
  }
  if (!area || address - area->begin >= area->size || address - area->begin + size > area->size) {
    warp.fail(lane, std::to_string(size) + " bytes at " + hex(address) + " lie outside of " +
                        (area ? area->name + " (" + std::to_string(area->size) + " bytes)" : "all global memory"));
  }
  if (block.launch.early && area->space == Space::global && !area->read_only && !(warp.kernels_before_ended >> lane & 1)) {
    warp.fail(lane, "touches " + area->name + " before griddepcontrol.wait");
  }
  return {area, address - area->begin};
}

namespace {

std::string named(const Block& block, uint32_t agent) {
  const auto warps = static_cast<uint32_t>(block.warps.size());
  if (agent < warps * kLanes) return "thread " + std::to_string(agent);
  if (agent < warps * (kLanes + 1)) return "a wgmma of warp " + std::to_string(agent - warps * kLanes);
  return "a bulk copy";
}

[[noreturn]] void race(const Actor& actor, const char* does, const Place& place, const std::string& other, bool unfenced) {
  const std::string what = std::string(does) + " " + described(place) + ", which " + other;
  const char* before = actor.async ? "a bulk copy or wgmma " : "";
  actor.warp.fail(actor.lane, (unfenced ? "no proxy fence: " : "race: ") + (before + what));
}

// Forgets what happened before this launch, or to shared memory before this block. Returns whether another block of
// this launch wrote the byte.
bool renew(Cell& cell, const Clock& clock, bool shared) {
  const uint32_t start = shared ? clock.block_start : clock.launch_start;
  if (cell.written_at <= start) cell.written_at = 0;
  if (cell.readers && cell.read_at <= start) cell.readers = 0, cell.more = 0;
  if (cell.readers && cell.read_at <= clock.block_start) cell.group = kOtherBlock, cell.more = 0;
  return cell.written_at && cell.written_at <= clock.block_start;
}

template <class F>
void each_reading(Block& block, Cell& cell, F f) {
  if (!cell.readers) return;
  if (cell.group != kSeveral) {
    Reading one{cell.group, cell.read_at, cell.readers};
    f(one);
    cell.read_at = one.at;
  } else {
    cell.read_at = 0;
    for (Reading& reading : block.readings[cell.more]) f(reading), cell.read_at = std::max(cell.read_at, reading.at);
  }
}

// The lanes of a group count as if all read when the last of them does, but for those of which that one knows.
void note_reading(const Actor& actor, Cell& cell, uint32_t group, Lanes lanes, uint32_t at) {
  Block& block = actor.warp.block;
  if (cell.readers && cell.group == kOtherBlock) return;
  const auto follow = [&](Lanes before, uint32_t then) {
    return before != lanes && then != at && actor.knows_group(group, before, then) ? lanes : before | lanes;
  };
  if (!cell.readers || cell.group == group) {
    cell.readers = follow(cell.readers, cell.read_at), cell.group = static_cast<uint16_t>(group), cell.read_at = at;
    return;
  }
  if (cell.group != kSeveral) {
    if (block.free_readings.empty()) {
      block.free_readings.push_back(static_cast<uint32_t>(block.readings.size()));
      block.readings.emplace_back();
    }
    const Reading before{cell.group, cell.read_at, cell.readers};
    cell.more = block.free_readings.back();
    block.free_readings.pop_back();
    block.readings[cell.more] = {before};
    cell.group = kSeveral;
  }
  cell.read_at = std::max(cell.read_at, at);
  for (Reading& reading : block.readings[cell.more]) {
    if (reading.group == group) {
      reading.lanes = follow(reading.lanes, reading.at), reading.at = at;
      return;
    }
  }
  block.readings[cell.more].push_back({group, at, lanes});
}

void forget_readings(Block& block, Cell& cell) {
  if (cell.more) block.free_readings.push_back(cell.more);
  cell.readers = 0, cell.read_at = 0, cell.more = 0;
}

// Whether the bytes have unknown values; checks that those who wrote them come before.
bool may_read(const Actor& actor, const Place& place, int size) {
  Area& area = *place.area;
  Block& block = actor.warp.block;
  bool tainted = false;
  for (int k = 0; area.states && k < size; ++k) {
    const uint8_t state = area.states[place.at + k];
    if (state & kInFlight) actor.warp.fail(actor.lane, "reads " + described(place) + ", which cp.async may not have brought yet");
    if (state & kMbarrier) actor.warp.fail(actor.lane, "reads " + described(place) + ", which is an mbarrier's");
    tainted |= state != kKnown;
  }
  for (int k = 0; area.cells && k < size; ++k) {
    Cell& cell = area.cells[place.at + k];
    if (renew(cell, block.launch.clock, area.space == Space::shared)) race(actor, "reads", place, "another block writes", false);
    if (cell.written_at && !actor.knows(cell.writer, cell.written_at)) {
      const bool unfenced = actor.async && Actor{actor.warp, actor.lane}.knows(cell.writer, cell.written_at);
      race(actor, "reads", place, named(block, cell.writer) + " writes", unfenced);
    }
  }
  return tainted;
}

// Checks that those who read or wrote these bytes come before; `same`: they get the values that they have.
void may_write(const Actor& actor, const Place& place, int size, bool same) {
  Area& area = *place.area;
  Block& block = actor.warp.block;
  if (area.read_only) actor.warp.fail(actor.lane, "writes " + described(place) + ", which may only be read");
  for (int k = 0; area.states && k < size; ++k) {
    const uint8_t state = area.states[place.at + k];
    if (state & kInFlight) actor.warp.fail(actor.lane, "writes " + described(place) + ", which a cp.async is writing");
    if (state & kMbarrier) actor.warp.fail(actor.lane, "writes " + described(place) + ", which is an mbarrier's");
  }
  for (int k = 0; area.cells && k < size; ++k) {
    Cell& cell = area.cells[place.at + k];
    const bool other = renew(cell, block.launch.clock, area.space == Space::shared);
    const bool read_there = cell.readers && cell.group == kOtherBlock;
    if (other || read_there) race(actor, "writes", place, other ? "another block writes" : "another block reads", false);
    if (same) continue;
    const Actor ordinary{actor.warp, actor.lane};
    if (cell.written_at && !actor.knows(cell.writer, cell.written_at)) {
      race(actor, "writes", place, named(block, cell.writer) + " writes", ordinary.knows(cell.writer, cell.written_at));
    }
    each_reading(block, cell, [&](const Reading& reading) {
      if (actor.knows_group(reading.group, reading.lanes, reading.at)) return;
      const auto warps = static_cast<uint32_t>(block.warps.size());
      const std::string who =
          reading.group >= warps ? named(block, block.agent_of(reading.group)) + " reads"
          : reading.lanes & (reading.lanes - 1)
              ? "threads of warp " + std::to_string(reading.group) + " read"
              : "thread " + std::to_string(reading.group * kLanes + std::countr_zero(reading.lanes)) + " reads";
      race(actor, "writes", place, who, ordinary.knows_group(reading.group, reading.lanes, reading.at));
    });
  }
}

void note_writing(Block& block, const Place& place, int size, uint32_t agent) {
  for (int k = 0; place.area->cells && k < size; ++k) {
    Cell& cell = place.area->cells[place.at + k];
    cell.written_at = block.launch.clock.now;
    cell.writer = static_cast<uint16_t>(agent);
    forget_readings(block, cell);
  }
}

void set_states(const Place& place, int size, uint8_t state) {
  if (place.area->states) std::fill_n(place.area->states.get() + place.at, size, state);
}

}  // namespace

bool read(Warp& warp, int lane, Place place, int size) {
  const bool tainted = may_read({warp, lane}, place, size);
  for (int k = 0; place.area->cells && k < size; ++k) {
    note_reading({warp, lane}, place.area->cells[place.at + k], warp.index, Lanes{1} << lane, warp.block.launch.clock.now);
  }
  return tainted;
}

void write(Warp& warp, int lane, Place place, int size, const void* value, bool tainted) {
  // Who writes the same bytes in no order leaves them as they are.
  may_write({warp, lane}, place, size, !std::memcmp(place.bytes(), value, size));
  note_writing(warp.block, place, size, Actor{warp, lane}.agent());
  set_states(place, size, tainted ? kUnwritten : kKnown);
  std::memcpy(place.bytes(), value, size);
}

void begin_reading(const Actor& actor, Place place, int size, uint32_t group, uint32_t number) {
  may_read(actor, place, size);
  for (int k = 0; place.area->cells && k < size; ++k) {
    note_reading(actor, place.area->cells[place.at + k], group, 1, kUnderWay | number);
  }
}

bool end_reading(Block& block, Place place, int size, uint32_t group, uint32_t number) {
  bool tainted = false;
  for (int k = 0; k < size; ++k) {
    tainted |= place.area->states && place.area->states[place.at + k] != kKnown;
    if (!place.area->cells) continue;
    each_reading(block, place.area->cells[place.at + k], [&](Reading& reading) {
      if (reading.group == group && reading.at == (kUnderWay | number)) reading.at = block.launch.clock.now;
    });
  }
  return tainted;
}

void begin_writing(const Actor& actor, Place place, int size) {
  may_write(actor, place, size, false);
  for (int k = 0; k < size; ++k) place.bytes()[k] = static_cast<uint8_t>(255 - k);
  set_states(place, size, kInFlight);
}

void end_writing(Block& block, Place place, int size, const void* value, bool tainted, uint32_t agent) {
  note_writing(block, place, size, agent);
  set_states(place, size, tainted ? kUnwritten : kKnown);
  std::memcpy(place.bytes(), value, size);
}

void touch_mbarrier(Warp& warp, int lane, Place place) {
  set_states(place, 8, kKnown);
  read(warp, lane, place, 8);
  set_states(place, 8, kMbarrier);
}

void make_mbarrier(Warp& warp, int lane, Place place, bool made) {
  if (!made) set_states(place, 8, kUnwritten);
  const uint64_t none = ~*reinterpret_cast<const uint64_t*>(place.bytes());  // it changes
  write(warp, lane, place, 8, &none, true);
  if (made) set_states(place, 8, kMbarrier);
}

}  // namespace ptx
