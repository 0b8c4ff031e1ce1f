#include "counting.h"

#include <algorithm>
#include <numeric>
#include <sstream>

#include "tensor_map.h"

namespace ptx {
namespace {

constexpr int kSector = 32, kBanks = 32, kWord = 4;
// A block's share of the first-level cache, which keeps nothing more once it is full: 32 KB.
constexpr size_t kL1Sectors = 1024;

bool is_float_type(const std::string& part) {
  return part.starts_with("bf16") || part.starts_with("tf32") || (part[0] == 'f' && std::isdigit(static_cast<unsigned char>(part[1])));
}

std::vector<std::string> parts_of(const std::string& name) {
  std::istringstream stream(name);
  std::vector<std::string> found;
  for (std::string part; std::getline(stream, part, '.');) found.push_back(part);
  return found;
}

Kind kind_of(const std::vector<std::string>& parts) {
  const auto is = [&](std::initializer_list<const char*> names) {
    return std::any_of(names.begin(), names.end(), [&](const char* name) { return parts[0] == name; });
  };
  const bool floats = std::any_of(parts.begin() + 1, parts.end(), is_float_type);
  if (is({"mov", "cvta"}) || (is({"ld"}) && parts[1] == "param")) return Kind::move;
  // shfl passes through the lanes of shared memory.
  if (is({"ld", "st", "cp", "ldmatrix", "stmatrix", "atom", "red", "prefetch", "shfl"})) return Kind::memory;
  if (is({"mma", "wgmma"})) return Kind::tensor;
  if (is({"bra", "brx", "ret", "exit", "trap", "bar", "barrier", "vote", "match", "activemask", "fence", "membar", "mbarrier", "elect",
          "setmaxnreg", "griddepcontrol"})) return Kind::control;
  if (is({"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"}) || (is({"div"}) && floats)) return Kind::special;
  return floats ? Kind::floating : Kind::integer;
}

}  // namespace

Counting::Known Counting::known(const Instruction& i) {
  const auto parts = parts_of(*i.name);
  const auto has = [&](const char* part) { return std::find(parts.begin(), parts.end(), part) != parts.end(); };
  Known found{kind_of(parts), Known::none, 0, false, 0};
  const std::string& base = parts[0];
  if ((base == "ld" || base == "st") && found.kind != Kind::move && i.space != Space::constant) {
    found.access = base == "ld" ? Known::load : Known::store;
    found.size = size_of(parts.back()) * i.count;
    found.through_l1 = !has("cg") && !has("cv") && !has("volatile") && !has("relaxed");
  } else if (base == "cp" && has("tensor")) {
    found.access = Known::box;
  } else if (base == "cp" && i.count >= 3) {
    found.access = Known::copy;
    found.through_l1 = has("ca");
  } else if (base == "ldmatrix") {
    found.access = Known::matrices;
    found.size = 16;
  } else if (base == "mma" || has("mma_async")) {
    const int warps = base == "mma" ? 1 : 4;
    int m = 0, n = 0, k = 0;
    for (const auto& part : parts) {
      if (std::sscanf(part.c_str(), "m%dn%dk%d", &m, &n, &k) == 3) found.flops = uint64_t{2} * m * n * k / warps;
    }
    if (warps == 1) return found;
    found.access = Known::products;
    found.size = 32 * ((i.count == 1 ? m : 0) + n) / warps;  // the depth of a factor has 32 bytes
  }
  return found;
}

// All of them, each as far from those before as a step of 0.618 of the grid takes it.
std::vector<int> Counting::sample(int blocks) {
  blocks_ = blocks;
  int step = std::max(1, static_cast<int>(blocks * 0.6180339887498949));
  while (std::gcd(step, blocks) != 1) ++step;
  std::vector<int> found(blocks);
  for (int64_t k = 0; k < blocks; ++k) found[k] = static_cast<int>((blocks / 2 + k * step) % blocks);
  return found;
}

bool Counting::next_block() {
  l1_.clear();
  if (std::accumulate(kinds_, kinds_ + kKinds, uint64_t{0}) >= most_) return false;
  ++blocks_run_;
  return true;
}

// What a warp asks of global memory; a lane with no bytes asks for nothing.
void Counting::global(const Warp& w, const uint64_t* address, const int* sizes, bool loads, bool through_l1, Waste& waste) {
  std::set<uint64_t> sectors;
  std::set<std::pair<uint64_t, int>> pieces;  // lanes' addresses are multiples of their size: two are the same, or apart
  uint64_t bytes = 0;
  w.each([&](int lane) {
    const int size = sizes[lane];
    if (size && pieces.emplace(address[lane], size).second) bytes += size;
    for (int at = 0; at < size; at += kSector) sectors.insert((address[lane] + at) / kSector);
  });
  if (bytes) global(w.block.launch.memory.find(pieces.begin()->first), sectors, bytes, loads, through_l1, waste);
}

void Counting::global(const Area* area, const std::set<uint64_t>& sectors, uint64_t bytes, bool loads, bool through_l1, Waste& waste) {
  (loads ? read_ : written_).insert(area);
  Requests& all = loads ? loads_ : stores_;
  const uint64_t least = (bytes + kSector - 1) / kSector;
  ++all.requests;
  all.bytes += bytes, all.sectors += sectors.size(), all.least_sectors += least;
  all.uncoalesced += sectors.size() > least;
  waste.sectors += sectors.size() - least;
  for (const uint64_t sector : sectors) {
    if (loads && through_l1) {
      if (l1_.count(sector)) continue;
      if (l1_.size() < kL1Sectors) l1_.insert(sector);
    }
    ++l2_sectors_;
  }
}

// A box of a tensor, of each lane that copies one.
void Counting::box(const Warp& w, const Instruction& i, Waste& waste) {
  const int first = i.arrives ? 1 : 2;  // of its coordinates
  w.each([&](int lane) {
    const auto value = [&](int operand) { return w.values[size_t{i.at[operand]} * kLanes + lane]; };
    const uint64_t address = value(first - 1) + i.offset[first - 1];
    Memory& memory = w.block.launch.memory;
    const auto& map = *reinterpret_cast<const TensorMap*>(address);
    if (!memory.find(address) || map.mark != TensorMap::kMark) return;  // where it runs, that is an error
    int32_t at[5] = {};
    for (int d = 0; d < map.rank; ++d) at[d] = static_cast<int32_t>(value(first + d));
    std::set<uint64_t> sectors;
    uint64_t bytes = 0, all = 0;
    each_in_box(map, at, [&](uint64_t element) {
      all += map.item;
      if (!element) return;
      bytes += map.item;
      sectors.insert(element / kSector);
    });
    if (bytes) global(memory.find(map.base), sectors, bytes, !i.arrives, false, waste);
    shared(all, i.arrives);
  });
}

void Counting::shared(uint64_t bytes, bool loads) {
  Wavefronts& all = loads ? shared_loads_ : shared_stores_;
  const uint64_t many = (bytes + kBanks * kWord - 1) / (kBanks * kWord);
  all.phases += many, all.wavefronts += many;
}

void Counting::shared(const uint64_t* address, Lanes lanes, int size, bool loads, Waste& waste) {
  Wavefronts& all = loads ? shared_loads_ : shared_stores_;
  const int together = std::min(kLanes, kBanks * kWord / size);
  for (int first = 0; first < kLanes; first += together) {
    std::set<uint64_t> words;
    for (int lane = first; lane < first + together; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (uint64_t word = address[lane] / kWord; word <= (address[lane] + size - 1) / kWord; ++word) words.insert(word);
    }
    if (words.empty()) continue;
    uint64_t of_bank[kBanks] = {};
    for (const uint64_t word : words) ++of_bank[word % kBanks];
    const uint64_t most = *std::max_element(of_bank, of_bank + kBanks);
    ++all.phases;
    all.wavefronts += most;
    waste.wavefronts += most - 1;
  }
}

void Counting::see(const Warp& w, const Instruction& i) {
  if (!i.name) return;  // the end of the kernel
  auto at = instructions_.find(&i);
  if (at == instructions_.end()) at = instructions_.emplace(&i, known(i)).first;
  const Known& k = at->second;
  ++kinds_[static_cast<int>(k.kind)];
  if (!w.active) return;
  flops_ += k.flops;
  if (k.access == Known::none) return;
  const auto operand = [&](int n) { return w.values.data() + size_t{i.at[n]} * kLanes; };
  Waste& waste = lines_[i.line];
  ++waste.requests;
  if (k.access == Known::box) return box(w, i, waste);
  if (k.access == Known::products) return shared(k.size, true);
  uint64_t address[kLanes], source[kLanes];
  int sizes[kLanes];
  const uint64_t* base = operand(k.access == Known::load || k.access == Known::matrices ? i.count : 0);
  for (int lane = 0; lane < kLanes; ++lane) address[lane] = base[lane] + i.offset[0];
  if (k.access == Known::copy) {
    const uint64_t *from = operand(1), *given = operand(i.count - 1);
    for (int lane = 0; lane < kLanes; ++lane) {
      source[lane] = from[lane] + i.offset[1];
      sizes[lane] = static_cast<int>(static_cast<uint32_t>(given[lane]));
    }
    global(w, source, sizes, true, k.through_l1, waste);
    return shared(address, w.active, static_cast<int>(operand(2)[std::countr_zero(w.active)]), false, waste);
  }
  if (k.access == Known::matrices) {
    return shared(address, i.count == 4 ? kAll : (Lanes{1} << 8 * i.count) - 1, k.size, true, waste);
  }
  const uint64_t window = address[std::countr_zero(w.active)] & kWindows;
  if (i.space == Space::local || (i.space == Space::generic && window == kLocalWindow)) {
    local_bytes_ += static_cast<uint64_t>(k.size) * std::popcount(w.active);
  } else if (i.space == Space::shared || (i.space == Space::generic && window == kSharedWindow)) {
    shared(address, w.active, k.size, k.access == Known::load, waste);
  } else {
    std::fill_n(sizes, kLanes, k.size);
    global(w, address, sizes, k.access == Known::load, k.through_l1, waste);
  }
}

std::string Counting::text() const {
  std::ostringstream out;
  const auto requests = [&](const char* what, const Requests& r) {
    out << what << "_requests " << r.requests << "\n" << what << "_bytes " << r.bytes << "\n" << what << "_sectors " << r.sectors << "\n"
        << what << "_least_sectors " << r.least_sectors << "\n" << what << "_uncoalesced " << r.uncoalesced << "\n";
  };
  const auto wavefronts = [&](const char* what, const Wavefronts& s) {
    out << "shared_" << what << "_wavefronts " << s.wavefronts << "\nshared_" << what << "_phases " << s.phases << "\n";
  };
  const auto size = [](const std::set<const Area*>& areas) {
    return std::accumulate(areas.begin(), areas.end(), uint64_t{0}, [](uint64_t sum, const Area* area) { return sum + area->size; });
  };
  out << "blocks " << blocks_ << "\nblocks_run " << blocks_run_ << "\n";
  static const char* names[kKinds] = {"integer", "floating", "special", "memory", "tensor", "control", "move"};
  for (int k = 0; k < kKinds; ++k) out << names[k] << " " << kinds_[k] << "\n";
  requests("load", loads_), requests("store", stores_);
  wavefronts("load", shared_loads_), wavefronts("store", shared_stores_);
  out << "flops " << flops_ << "\nlocal_bytes " << local_bytes_ << "\nl2_sectors " << l2_sectors_ << "\nread " << size(read_)
      << "\nwritten " << size(written_) << "\n";
  return out.str();
}

std::string Counting::lines() const {
  std::ostringstream out;
  for (const auto& [line, waste] : lines_) {
    if (waste.sectors || waste.wavefronts) {
      out << line << " " << waste.requests << " " << waste.sectors << " " << waste.wavefronts << "\n";
    }
  }
  return out.str();
}

}  // namespace ptx

extern "C" {

ptx::Counting* ptx_counting(uint64_t most) { return new ptx::Counting(most); }
void ptx_counting_free(ptx::Counting* counting) { delete counting; }

const char* ptx_counted(const ptx::Counting* counting, int lines) {
  static std::string found;
  return (found = lines ? counting->lines() : counting->text()).c_str();
}
}
