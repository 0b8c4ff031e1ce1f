// Memory with bounds, alignment, what nobody wrote, and races between the threads of a launch.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "knowledge.h"

namespace ptx {

// Of a byte: who wrote it last and who has read it since.
struct Cell {
  uint32_t written_at, read_at;  // Clock::now, 0: never; the last of the readers
  Lanes readers;                 // of the group that reads it
  uint16_t writer;               // an agent, see knowledge.h
  uint16_t group;                // that reads it; several groups: kSeveral, and `more` is where Block::readings has them
  uint32_t more;
};
constexpr uint16_t kSeveral = 0xffff, kOtherBlock = 0xfffe;

enum State : uint8_t { kKnown = 0, kUnwritten = 1, kInFlight = 2, kMbarrier = 4 };

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// A stretch of memory with an address in one of the spaces.
struct Area {
  std::string name;
  Space space;
  uint64_t begin, size;  // its first address
  uint8_t* bytes;
  bool read_only = false;
  std::unique_ptr<uint8_t[], Free> states;  // null: every byte is known
  std::unique_ptr<Cell[], Free> cells;      // null: no other thread gets here

  // With cells and states where asked for; the states say that nobody wrote anything.
  Area(std::string name, Space space, uint64_t begin, uint64_t size, uint8_t* bytes, bool watched, bool unwritten);
};

// Orders what happens in a launch. It only ever grows: what came before a launch or a block is at or before its start.
struct Clock {
  uint32_t now = 1, launch_start = 0, block_start = 0;
};

class Memory {
 public:
  // Global memory; `written`: its bytes have values already. Throws a Fault where it overlaps other memory.
  void add(const std::string& name, uint64_t begin, uint64_t size, bool written, bool read_only);
  Area* find(uint64_t address);
  // States of global memory: whether all of it was written.
  bool all_written(uint64_t begin, uint64_t size);

 private:
  std::map<uint64_t, std::unique_ptr<Area>> areas_;
  Area* last_ = nullptr;
};

// Generic addresses of a block's shared memory and a thread's local memory.
constexpr uint64_t kSharedWindow = uint64_t{1} << 60, kLocalWindow = uint64_t{2} << 60, kWindows = uint64_t{7} << 60;

struct Place {
  Area* area;
  uint64_t at;  // within the area
  uint8_t* bytes() const { return area->bytes + at; }
};

// Where a lane's `size` bytes at `address` are. Throws a Fault where they aren't in one area or not aligned.
Place locate(Warp& warp, int lane, Space space, uint64_t address, int size);
// Whether some of the bytes that are read were never written; checks races.
bool read(Warp& warp, int lane, Place place, int size);
// Notes the writing of `value`, and whether nobody wrote that; checks races.
void write(Warp& warp, int lane, Place place, int size, const void* value, bool tainted);

// --- what is asynchronous (the async proxy): on behalf of a thread, from its issue to its end -----------------------

// From its beginning on nobody may write what is read, until `group` is known to have ended. A later reading of the
// same group has a greater `number`.
void begin_reading(const Actor& actor, Place place, int size, uint32_t group, uint32_t number);
// Whether some of the bytes were never written.
bool end_reading(Block& block, Place place, int size, uint32_t group, uint32_t number);
// Nobody may touch what is written until its end, and then who knows of `agent`.
void begin_writing(const Actor& actor, Place place, int size);
void end_writing(Block& block, Place place, int size, const void* value, bool tainted, uint32_t agent);

// An mbarrier, whose instructions may meet in any order; `made`: it is one from now on, or no more.
void touch_mbarrier(Warp& warp, int lane, Place place);
void make_mbarrier(Warp& warp, int lane, Place place, bool made);

}  // namespace ptx
