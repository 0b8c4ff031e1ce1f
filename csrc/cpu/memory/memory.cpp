#include "cpu/memory/memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/accumulate.h>

#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "cpu/memory/pages.h"

namespace fastdcgan::cpu {
namespace {

constexpr size_t kLeastBytes = size_t{1} << 18;
constexpr size_t kSlack = 8;     // a block is taken for as little as 8/9 of its size
constexpr size_t kHugeBytes = size_t{1} << 22;
constexpr int64_t kIdle = 512;  // blocks that lay free for so many allocations are given back: several steps of training

// Fresh memory. Large blocks are on huge pages, as `Pages` are, but take no more than their bytes and go back whole: they
// are the user's tensors, of any size.
c10::DataPtr fresh(size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= kHugeBytes) {
    constexpr auto page = static_cast<size_t>(kHugePage);
    struct Mapping {
      void* first;
      size_t bytes;
    };
    const size_t all = bytes + page;
    void* first = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (first != MAP_FAILED) {
      void* data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(first) + page - 1) / page * page);
      // Only a hint: without huge pages it is memory like any other.
      madvise(data, bytes, MADV_HUGEPAGE);
      const auto unmap = [](void* context) {
        const std::unique_ptr<Mapping> mapping(static_cast<Mapping*>(context));
        munmap(mapping->first, mapping->bytes);
      };
      return {data, new Mapping{first, all}, unmap, c10::Device(c10::kCPU)};
    }
  }
#endif
  return c10::GetCPUAllocator()->allocate(bytes);
}

class Pool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    std::list<Block> old, taken;  // `old` is given back when the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    ++now_;
    while (!free_.empty() && now_ - free_.front().since > kIdle) old.splice(old.end(), free_, free_.begin());
    // Of the smallest blocks that do, the one that was used last.
    auto best = free_.end();
    for (auto i = free_.begin(); i != free_.end(); ++i)
      if (i->bytes >= bytes && i->bytes - bytes <= bytes / kSlack && (best == free_.end() || i->bytes <= best->bytes))
        best = i;
    if (best == free_.end()) {
      taken.push_back({fresh(bytes), bytes, 0});
    } else {
      taken.splice(taken.end(), free_, best);
    }
    void* data = taken.front().data.get();
    used_.emplace(data, std::move(taken.front()));
    return {data, data, give_back, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  MemoryCache cached() {
    const std::lock_guard<std::mutex> lock(mutex_);
    MemoryCache found{static_cast<int64_t>(free_.size()), 0};
    for (const Block& block : free_) found.bytes += static_cast<int64_t>(block.bytes);
    return found;
  }
  void release() {
    std::list<Block> old;
    const std::lock_guard<std::mutex> lock(mutex_);
    old.swap(free_);
  }

  // Lives on until the last tensor is gone, whatever the order in which a process ends.
  static Pool& instance() {
    static Pool* const pool = new Pool;
    return *pool;
  }

 private:
  struct Block {
    c10::DataPtr data;
    size_t bytes;
    int64_t since;  // it is free
  };

  static void give_back(void* data) { instance().put(data); }
  void put(void* data) {
    if (!data) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(data);
    found->second.since = now_;
    free_.push_back(std::move(found->second));
    used_.erase(found);
  }

  std::mutex mutex_;
  std::list<Block> free_;  // in the order in which they became free
  std::unordered_map<void*, Block> used_;
  int64_t now_ = 0;  // how many allocations there were
};

// A sanitizer is to see the bounds and the end of every tensor.
bool is_large(at::IntArrayRef sizes, at::ScalarType dtype) {
#ifdef __SANITIZE_ADDRESS__
  return false;
#else
  return static_cast<size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype) >= kLeastBytes;
#endif
}

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CPU);

}  // namespace

at::Tensor new_tensor(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format) {
  if (!is_large(sizes, dtype)) return at::empty(sizes, at::TensorOptions(dtype).memory_format(format));
  return at::Tensor(at::detail::empty_generic(sizes, &Pool::instance(), kKeys, dtype, format));
}

at::Tensor new_tensor_like(const at::Tensor& x) {
  if (!x.is_non_overlapping_and_dense() || !is_large(x.sizes(), x.scalar_type())) return at::empty_like(x);
  return at::Tensor(
      at::detail::empty_strided_generic(x.sizes(), x.strides(), &Pool::instance(), kKeys, x.scalar_type()));
}

MemoryCache cached_memory() { return Pool::instance().cached(); }

void release_memory() { Pool::instance().release(); }

}  // namespace fastdcgan::cpu
