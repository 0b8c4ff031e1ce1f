// Rows of float, bfloat16 or half to floats and back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/elementwise/vectors.h"
#include "cpu/memory/pages.h"

namespace fastdcgan::cpu {

// How many elements `widen` may write beyond the last.
constexpr int64_t kSpill = kStep;

// `n` floats from `from`. Far enough from `end`, whole vectors are read, and up to kSpill more floats are written.
template <class T>
inline void widen(float* to, const T* from, int64_t n, const T* end) {
  if constexpr (std::is_same_v<T, float>) {
    if (end - from >= n + kWidth) {
      for (int64_t i = 0; i < n; i += kWidth) V::loadu(from + i).store(to + i);
    } else {
      std::copy_n(from, n, to);
    }
  } else {
    if (end - from >= n + kStep) {
      for (int64_t i = 0; i < n; i += kStep) write(to + i, read(from + i));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
    }
  }
}

// `n` elements as they are, on the same terms.
template <class T, std::enable_if_t<!std::is_same_v<T, float>, int> = 0>
inline void widen(T* to, const T* from, int64_t n, const T* end) {
  if (end - from >= n + kStep) {
    for (int64_t i = 0; i < n; i += kStep) at::vec::Vectorized<T>::loadu(from + i).store(to + i);
  } else {
    std::copy_n(from, n, to);
  }
}

// Exactly `n` elements from floats, of which there are whole steps.
template <class T>
inline void narrow(T* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) write(to + i, read(from + i));
  for (; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

// Memory that only grows: kept by each thread from call to call, because fresh pages cost more than
// most of what is done in them.
class Scratch {
 public:
  float* floats(int64_t n) {
    if (n > size_) {
      memory_.reset();
      size_ = 0;
      memory_ = allocate_pages(n * int64_t{sizeof(float)});
      size_ = n;
    }
    return static_cast<float*>(memory_.get());
  }
  template <class T>
  T* get(int64_t n) {
    return reinterpret_cast<T*>(floats((n * int64_t{sizeof(T)} + 3) / int64_t{sizeof(float)}));
  }

 private:
  Pages memory_;
  int64_t size_ = 0;
};

}  // namespace fastdcgan::cpu
