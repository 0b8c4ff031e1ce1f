// A kernel argument's memory on the CPU: between fences, or on the heap where a sanitizer watches it.
#pragma once

#include <cstdlib>

#include "guarded_memory.h"

namespace cuda_on_cpu {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)

class BufferMemory {
 public:
  BufferMemory(const char*, size_t bytes, Flush, size_t) {
    if (posix_memalign(&memory_, 64, bytes ? bytes : 1)) throw std::bad_alloc();
    std::memset(memory_, 0xFF, bytes);
  }
  BufferMemory(const BufferMemory&) = delete;
  ~BufferMemory() { std::free(memory_); }
  char* data() const { return static_cast<char*>(memory_); }
  void read_only() {}

 private:
  void* memory_ = nullptr;
};

#else

using BufferMemory = GuardedMemory;

#endif

template <class T>
class GuardedBuffer {
 public:
  // With an `align` above that of T, up to that many bytes before the fence go unseen (but for a sanitizer).
  GuardedBuffer(const char* name, size_t count, Flush flush = Flush::end, size_t align = alignof(T))
      : memory_(name, count * sizeof(T), flush, align), count_(count) {}
  T* data() { return reinterpret_cast<T*>(memory_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(memory_.data()); }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }
  size_t size() const { return count_; }
  void read_only() { memory_.read_only(); }

 private:
  BufferMemory memory_;
  size_t count_;
};

}  // namespace cuda_on_cpu
