// What Python calls. Functions return an error's text, or null; it stays until the next one.
#include <algorithm>

#include "tensor_map.h"
#include "warp.h"

namespace {

struct Machine;
struct Module {
  Machine& machine;
  std::unique_ptr<ptx::Program> program;
};
struct Machine {
  ptx::Memory memory;
  ptx::Clock clock;
  std::vector<std::unique_ptr<Module>> modules;
};

std::string error;

template <class F>
const char* caught(F f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    return (error = e.what()).c_str();
  }
}

}  // namespace

extern "C" {

Machine* ptx_machine() { return new Machine; }
void ptx_machine_free(Machine* machine) { delete machine; }

const char* ptx_memory_add(Machine* machine, const char* name, void* begin, uint64_t bytes, int written) {
  return caught([&] { machine->memory.add(name, reinterpret_cast<uint64_t>(begin), bytes, written, false); });
}
const char* ptx_memory_written(Machine* machine, void* begin, uint64_t bytes, int* all) {
  return caught([&] { *all = machine->memory.all_written(reinterpret_cast<uint64_t>(begin), bytes); });
}

const char* ptx_load(Machine* machine, const char* text, Module** loaded) {
  return caught([&] {
    auto module = std::make_unique<Module>(Module{*machine, ptx::parse(text)});
    const auto add = [&](const std::string& name, void* bytes, uint64_t size, bool read_only) {
      if (size) machine->memory.add(name, reinterpret_cast<uint64_t>(bytes), size, true, read_only);
    };
    for (auto& variable : module->program->variables) {
      add(variable->name, variable->bytes.data(), variable->bytes.size(), variable->constant);
    }
    for (auto& [name, function] : module->program->functions) {
      add("parameters of " + name, function->parameters.data(), std::max<uint64_t>(function->parameter_bytes, 1), true);
    }
    *loaded = machine->modules.emplace_back(std::move(module)).get();
  });
}

// The names of kernels, or of instructions, one a line.
const char* ptx_names(Module* module, int instructions) {
  static std::string found;
  found.clear();
  if (instructions) {
    for (const auto& [name, count] : module->program->names) found += name + "\n";
  } else {
    for (const auto& [name, function] : module->program->functions) found += name + "\n";
  }
  return found.c_str();
}

// `parameters`: each one's value; what they take is known from the kernel. order: 0 forward, 1 reverse, 2 random;
// counting: null, or what counts
const char* ptx_launch(Module* module, const char* name, const uint32_t* grid, const uint32_t* block, uint64_t dynamic_bytes,
                       const void* parameters, uint64_t bytes, int order, uint32_t seed, int early,
                       ptx::Counting* counting) {
  return caught([&] {
    const auto found = module->program->functions.find(name);
    if (found == module->program->functions.end()) throw ptx::Fault(std::string("there is no kernel ") + name);
    ptx::Function& function = *found->second;
    if (bytes != function.parameter_bytes) {
      throw ptx::Fault(std::to_string(bytes) + " bytes of parameters, expected " + std::to_string(function.parameter_bytes));
    }
    std::memcpy(function.parameters.data(), parameters, bytes);
    ptx::Launch launch{*module->program, function, module->machine.memory, module->machine.clock,
                       {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dynamic_bytes,
                       {static_cast<ptx::Order::Kind>(order), std::mt19937(seed)}, counting, early != 0};
    ptx::run(launch);
  });
}

// A tensor map at `map`, of 128 bytes. Its arguments are those of the driver's cuTensorMapEncodeTiled.
const char* ptx_tensor_map(void* map, int type, uint32_t rank, void* base, const uint64_t* sizes, const uint64_t* strides,
                           const uint32_t* box, int swizzle, int fill) {
  return caught([&] {
    const uint32_t ones[] = {1, 1, 1, 1, 1};
    const char* wrong = ptx::encode(map, type, rank, base, sizes, strides, box, ones, 0, swizzle, fill);
    if (wrong) throw ptx::Fault(std::string("a tensor map: ") + wrong);
  });
}

// The offsets and sizes of a kernel's parameters: up to `most` pairs. Returns how many there are.
int ptx_parameters(Module* module, const char* name, uint64_t* pairs, int most) {
  const auto found = module->program->functions.find(name);
  if (found == module->program->functions.end()) return -1;
  const auto& fields = found->second->fields;
  for (int k = 0; k < most && k < static_cast<int>(fields.size()); ++k) {
    pairs[2 * k] = fields[k].first, pairs[2 * k + 1] = fields[k].second;
  }
  return static_cast<int>(fields.size());
}
}
