// PTX in a compact form: what the parser makes and the machine runs.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "floats.h"

namespace ptx {

constexpr int kLanes = 32;
using Lanes = uint32_t;  // a bit for each
constexpr Lanes kAll = ~Lanes{0};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Warp;
struct Instruction;
using Run = void (*)(Warp&, const Instruction&);  // for the warp's active lanes

enum class Space : uint8_t { generic, global, shared, local, param, constant };

// What the machine itself does, besides running: where lanes part, wait or end.
enum class Control : uint8_t { none, branch, table, exit, barrier, mbarrier };

constexpr int kNoMembers = -1, kWholeWarp = -2;

struct Instruction {
  Run run = nullptr;
  Control control = Control::none;
  const uint32_t* at = nullptr;  // its registers, results first; immediates and symbols lie in registers too
  int guard = -1;                // the predicate's register
  bool negated = false;          // @!p
  int members = kNoMembers;      // the register with the lanes that must come together here
  int line = 0;
  const std::string* name = nullptr;  // as written; null: the end of the kernel
  int results = 0;           // registers that it writes, the first of `at`
  int target = -1;           // of a branch: the index of an instruction, or of a table of them
  int64_t offset[3] = {0, 0, 0};  // of its addresses
  // Modifiers, as far as they aren't part of `run`.
  Space space = Space::generic;
  Rounding rounding = Rounding::nearest;
  bool integral = false, saturated = false, flushed = false, relu = false, arrives = false;
  int count = 1;  // of a vector, of matrices, of operands
  int sums = 0;   // of a wgmma
  int mode = 0;
};

struct Operand {
  uint32_t at = 0;
  int64_t offset = 0;  // of an address; of a constant the number itself
  bool is_address = false, is_constant = false;
};

// An instruction as it is written. Whoever makes it takes the parts of its name that it knows; one that is left is an
// error.
struct Written {
  std::string base;
  std::vector<std::string> parts;
  std::vector<Operand> operands;
  size_t results = 0;  // operands before the first comma

  bool take(const std::string& part) {
    for (auto it = parts.begin(); it != parts.end(); ++it) {
      if (*it == part) return parts.erase(it), true;
    }
    return false;
  }
  std::string take_last() {
    if (parts.empty()) throw Fault("a type is missing");
    std::string last = parts.back();
    parts.pop_back();
    return last;
  }
  void expect(size_t count) const {
    if (operands.size() != count) {
      throw Fault(std::to_string(operands.size()) + " operands, expected " + std::to_string(count));
    }
  }
};

using Make = std::function<Run(Written&, Instruction&)>;
// By the first part of an instruction's name; "add:float" is what add is for types of floats.
using Makers = std::map<std::string, Make>;
inline bool is_float(const std::string& type) { return type.find('f') != std::string::npos; }
const Makers& makers();
void make_integers(Makers&);
void make_floats(Makers&);
void make_moves(Makers&);
void make_accesses(Makers&);
void make_collectives(Makers&);
void make_controls(Makers&);
void make_mbarriers(Makers&);
void make_products(Makers&);
Run make_bulk_copy(Written&, Instruction&);

// A variable or a parameter: where it begins in its space.
struct Symbol {
  Space space;
  uint64_t begin;
  uint64_t bytes;
};

struct Special {
  std::string name;
  uint32_t at;
};

struct alignas(64) Line {  // what a tensor map is aligned to
  uint8_t bytes[64];
};

struct Function {
  std::string name;
  std::vector<Instruction> code;
  std::vector<uint32_t> operands;               // of all instructions
  std::vector<std::vector<int>> tables;         // .branchtargets
  std::vector<std::pair<uint32_t, uint64_t>> constants;  // registers and what is in them
  std::vector<Special> specials;                // registers such as %tid.x
  uint32_t registers = 0;
  uint64_t local_bytes = 0;
  bool has_products = false;  // of warpgroups
  std::vector<Line> parameters;  // their memory during a launch
  uint64_t parameter_bytes = 0;
  std::vector<std::pair<uint64_t, uint64_t>> fields;  // of each parameter: offset, bytes
  int required[3] = {0, 0, 0}, most[3] = {0, 0, 0};  // .reqntid, .maxntid
};

struct Variable {
  std::string name;
  std::vector<uint8_t> bytes;
  bool constant;
};

struct Program {
  std::vector<std::string> lines;
  std::map<std::string, std::unique_ptr<Function>> functions;
  std::vector<std::unique_ptr<Variable>> variables;  // .global and .const
  uint64_t shared_bytes = 0;                         // of static variables
  std::map<std::string, int> names;                  // of instructions, and how often they are written

  uint64_t dynamic_begin() const { return (shared_bytes + 1023) / 1024 * 1024; }  // aligned as well as it may be
};

std::unique_ptr<Program> parse(const std::string& text);

}  // namespace ptx
