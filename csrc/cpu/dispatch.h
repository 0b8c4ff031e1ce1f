// From the dtype of raw memory to typed pointers.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include "passes.h"
#include "sweep.h"

namespace fastdcgan::cpu {

// Calls `f(Tensors<T>)`; the caller has checked the dtype.
template <class F>
void with_tensors(const Memory& m, F&& f) {
  const auto call = [&](auto zero) {
    using T = decltype(zero);
    f(Tensors<T>{static_cast<const T*>(m.y), static_cast<const T*>(m.da), static_cast<T*>(m.out)});
  };
  switch (m.dtype) {
    case c10::ScalarType::Float: return call(float{});
    case c10::ScalarType::BFloat16: return call(c10::BFloat16{});
    case c10::ScalarType::Half: return call(c10::Half{});
    default: TORCH_INTERNAL_ASSERT(false, "dtype ", m.dtype);
  }
}

}  // namespace fastdcgan::cpu
