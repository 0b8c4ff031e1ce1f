#include "cpu/contraction/packed_weights.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <vector>

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kMostPixels = 2048;             // beyond that, packing takes less than 5 % of the time
constexpr int64_t kMostBytes = int64_t{1} << 28;  // of all packed weights
constexpr int kMostChanges = 10;                  // in a row; 2^n calls are left out after n

// --- digests ---

typedef uint64_t Words __attribute__((vector_size(64), may_alias));
typedef uint64_t UnalignedWords __attribute__((vector_size(64), aligned(1), may_alias));

constexpr int kStates = 8;
constexpr int64_t kStep = kStates * sizeof(Words), kPart = 256 * 1024;

struct Digest {
  Words state[kStates];
  bool operator==(const Digest& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
};

// One step can be undone, so that a change can only be hidden by another one in the same lane.
inline void mix(Digest& d, const char* from) {
#pragma GCC unroll 8
  for (int i = 0; i < kStates; ++i) {
    const Words x = (d.state[i] ^ reinterpret_cast<const UnalignedWords*>(from)[i]) * 0x9E3779B97F4A7C15u;
    d.state[i] = (x << 29) | (x >> 35);
  }
}

Digest digest_of_part(const char* from, int64_t bytes) {
  Digest d;
  for (int i = 0; i < kStates; ++i) d.state[i] = Words{} + static_cast<uint64_t>(i + 1);
  for (; bytes >= kStep; from += kStep, bytes -= kStep) mix(d, from);
  char last[kStep] = {};
  std::memcpy(last, from, bytes);
  mix(d, last);
  return d;
}

using Digests = std::vector<Digest>;

Digests digests(const void* data, int64_t bytes) {
  Digests found((bytes + kPart - 1) / kPart);
  at::parallel_for(0, static_cast<int64_t>(found.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      found[i] = digest_of_part(static_cast<const char*>(data) + i * kPart, std::min(kPart, bytes - i * kPart));
  });
  return found;
}

// --- the cache ---

using Key = std::array<int64_t, 20>;

struct Entry {
  Key key;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  Digests digests;
  std::shared_ptr<PackedWeight> packed;
  int changes = 0;      // without a use of what was packed
  int64_t left_out = 0;  // calls still to be
};

class Store {
 public:
  std::shared_ptr<const PackedWeight> get(
      const Key& key, const Weight& w, int64_t bytes, c10::function_ref<void(void*)> pack) {
    Digests before;
    std::shared_ptr<PackedWeight> packed;
    {
      const std::lock_guard lock(mutex_);
      Entry& entry = find(key, w, bytes);
      if (entry.left_out > 0) {
        --entry.left_out;
        return nullptr;
      }
      before = std::move(entry.digests);  // both come back: another thread finds nothing until then
      packed = std::move(entry.packed);
      entry.digests.clear();
    }
    Digests now = digests(w.data, w.bytes);
    const bool changed = packed && !before.empty(), holds = changed && before == now;
    bool keep = true;
    if (changed && !holds) {
      const std::lock_guard lock(mutex_);
      Entry& entry = find(key, w, bytes);
      if (++entry.changes > 1) {
        entry.changes = std::min(entry.changes, kMostChanges);
        entry.left_out = int64_t{1} << entry.changes;
        keep = false;
      }
    }
    if (!keep) return nullptr;
    if (!holds) {
      // What another thread still multiplies with is left to it.
      if (!packed || packed.use_count() > 1) packed = std::make_shared<PackedWeight>(bytes);
      pack(packed->data());
    }
    const std::lock_guard lock(mutex_);
    Entry& entry = find(key, w, bytes);
    if (holds) entry.changes = 0;
    entry.digests = std::move(now);
    entry.packed = packed;
    return packed;
  }

  PackedWeights count() {
    const std::lock_guard lock(mutex_);
    drop_expired();
    PackedWeights found{0, 0};
    for (const Entry& e : entries_)
      if (e.packed) found = {found.count + 1, found.bytes + e.packed->bytes()};
    return found;
  }

 private:
  // The entry of a key, at the end: the last ones are those that were used last.
  Entry& find(const Key& key, const Weight& w, int64_t bytes) {
    const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.key == key; });
    if (found == entries_.end()) {
      entries_.push_back({key, w.storage->getWeakStorageImpl(), {}, drop_expired(bytes)});
    } else {
      // Memory of the same address may be that of another tensor: its digests say whether it holds the same.
      found->storage = w.storage->getWeakStorageImpl();
      std::rotate(found, found + 1, entries_.end());
    }
    int64_t total = 0;
    for (auto e = entries_.rbegin(); e != entries_.rend(); ++e) {
      total += e->packed ? e->packed->bytes() : 0;
      if (total > kMostBytes && e != entries_.rbegin()) {
        e->packed.reset();
        e->digests.clear();
      }
    }
    return entries_.back();
  }

  // Memory of the size wanted among what is dropped: fresh pages cost more than packing into them.
  std::shared_ptr<PackedWeight> drop_expired(int64_t bytes = 0) {
    std::shared_ptr<PackedWeight> spare;
    for (Entry& e : entries_)
      if (e.storage.expired() && e.packed && e.packed->bytes() == bytes) spare = std::move(e.packed);
    entries_.erase(
        std::remove_if(entries_.begin(), entries_.end(), [](const Entry& e) { return e.storage.expired(); }),
        entries_.end());
    return spare;
  }

  std::mutex mutex_;
  std::vector<Entry> entries_;
};

Store& store() {
  static Store& all = *new Store;  // lives as long as the process: threads may outlast static objects
  return all;
}

}  // namespace

std::shared_ptr<const PackedWeight> packed_weight(
    const Contraction& c, c10::ScalarType dtype, const Weight& w, int64_t layout, int64_t bytes,
    c10::function_ref<void(void*)> pack) {
  const int64_t pixels = c.y.transposed ? c.y.in * c.x.in : c.y.out * c.x.out;
  if (!w.storage || c.batch * pixels > kMostPixels) return nullptr;
  const Key key{
      reinterpret_cast<int64_t>(w.data), w.bytes, layout, static_cast<int64_t>(dtype), c.in_channels, c.out_channels,
      c.y.kernel, c.x.kernel, c.y.stride, c.x.stride, c.y.dilation, c.x.dilation, c.y.transposed, w.k, w.n, w.y, w.x};
  return store().get(key, w, bytes, pack);
}

PackedWeights packed_weights() { return store().count(); }

}  // namespace fastdcgan::cpu
