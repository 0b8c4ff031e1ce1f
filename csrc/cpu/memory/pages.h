// Memory of kernels' own: on whole cache lines, and in huge pages where Linux has them for the asking. Kernels read
// megabytes of it in many places at a time, more pages than the processor translates at once.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastdcgan::cpu {

constexpr int64_t kHugePage = int64_t{1} << 21;

struct FreePages {
  std::align_val_t alignment;
  void operator()(void* p) const { ::operator delete(p, alignment); }
};
using Pages = std::unique_ptr<void, FreePages>;

// At least `bytes`, uninitialised.
inline Pages allocate_pages(int64_t bytes) {
  const bool huge = bytes >= kHugePage;
  const std::align_val_t alignment{huge ? static_cast<size_t>(kHugePage) : size_t{64}};
  if (huge) bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  Pages memory(::operator new(bytes, alignment), FreePages{alignment});
#ifdef MADV_HUGEPAGE
  if (huge) madvise(memory.get(), bytes, MADV_HUGEPAGE);  // a wish: small pages do, too
#endif
  return memory;
}

}  // namespace fastdcgan::cpu
