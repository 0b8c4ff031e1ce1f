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
  if (space == Space::generic) {
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
  return {area, address - area->begin};
}

namespace {

// Whether this lane knows what a thread of its block did at `time`.
bool knows(const Warp& warp, int lane, uint16_t thread, uint32_t time) {
  const int other = thread / kLanes, its_lane = thread % kLanes;
  if (other != warp.index) return warp.known[other] >= time;
  return its_lane == lane || (warp.met_at[lane] >= time && (warp.met[lane] >> its_lane & 1));
}

bool knows_readers(const Warp& warp, int lane, const Cell& cell) {
  for (Lanes left = cell.readers; left; left &= left - 1) {
    const int other = std::countr_zero(left);
    if (other != warp.index) {
      if (warp.known[other] < cell.read_at) return false;
    } else if (cell.reader != other * kLanes + lane) {
      const bool all = cell.reader == kSeveral || cell.reader / kLanes != other;
      if (warp.met_at[lane] < cell.read_at || (all ? warp.met[lane] != warp.alive : !knows(warp, lane, cell.reader, cell.read_at))) {
        return false;
      }
    }
  }
  return true;
}

// Forgets what happened before this launch, or to shared memory before this block. Returns whether another block of
// this launch wrote the byte.
bool renew(Cell& cell, const Clock& clock, bool shared) {
  const uint32_t start = shared ? clock.block_start : clock.launch_start;
  if (cell.written_at <= start) cell.written_at = 0;
  if (cell.read_at <= start) cell.read_at = 0, cell.readers = 0, cell.reader = 0;
  if (cell.read_at && cell.read_at <= clock.block_start) cell.reader = kOtherBlock, cell.readers = 0;
  return cell.written_at && cell.written_at <= clock.block_start;
}

}  // namespace

bool read(Warp& warp, int lane, Place place, int size) {
  Area& area = *place.area;
  bool tainted = false;
  if (area.states) {
    for (int k = 0; k < size; ++k) {
      const uint8_t state = area.states[place.at + k];
      if (state & kInFlight) warp.fail(lane, "reads " + described(place) + ", which cp.async may not have brought yet");
      tainted |= state != kKnown;
    }
  }
  if (!area.cells) return tainted;
  const Clock& clock = warp.block.launch.clock;
  const auto me = static_cast<uint16_t>(warp.index * kLanes + lane);
  for (int k = 0; k < size; ++k) {
    Cell& cell = area.cells[place.at + k];
    if (renew(cell, clock, area.space == Space::shared)) {
      warp.fail(lane, "race: reads " + described(place) + ", which another block writes");
    }
    if (cell.written_at && !knows(warp, lane, cell.writer, cell.written_at)) {
      warp.fail(lane, "race: reads " + described(place) + ", which thread " + std::to_string(cell.writer) + " writes");
    }
    if (cell.reader == kOtherBlock) continue;
    cell.reader = cell.readers == 0 || cell.reader == me ? me : kSeveral;
    cell.readers |= Lanes{1} << warp.index;
    cell.read_at = clock.now;
  }
  return tainted;
}

void write(Warp& warp, int lane, Place place, int size, const void* value, bool tainted) {
  Area& area = *place.area;
  if (area.read_only) warp.fail(lane, "writes " + described(place) + ", which may only be read");
  if (area.cells) {
    const Clock& clock = warp.block.launch.clock;
    // Who writes the same bytes in no order leaves them as they are.
    const bool same = !std::memcmp(place.bytes(), value, size);
    for (int k = 0; k < size; ++k) {
      Cell& cell = area.cells[place.at + k];
      if (area.states[place.at + k] & kInFlight) warp.fail(lane, "writes " + described(place) + ", which a cp.async is writing");
      const bool other = renew(cell, clock, area.space == Space::shared);
      if (other || cell.reader == kOtherBlock) {
        warp.fail(lane, "race: writes " + described(place) + ", which another block " + (other ? "writes" : "reads"));
      }
      if (cell.written_at && !same && !knows(warp, lane, cell.writer, cell.written_at)) {
        warp.fail(lane, "race: writes " + described(place) + ", which thread " + std::to_string(cell.writer) + " writes");
      }
      if (cell.read_at && !same && !knows_readers(warp, lane, cell)) {
        warp.fail(lane, "race: writes " + described(place) + ", which " +
                            (cell.reader == kSeveral ? "threads read" : "thread " + std::to_string(cell.reader) + " reads"));
      }
      cell.written_at = clock.now;
      cell.writer = static_cast<uint16_t>(warp.index * kLanes + lane);
      cell.readers = 0, cell.read_at = 0, cell.reader = 0;
    }
  }
  if (area.states) std::fill_n(area.states.get() + place.at, size, tainted ? kUnwritten : kKnown);
  std::memcpy(place.bytes(), value, size);
}

}  // namespace ptx
