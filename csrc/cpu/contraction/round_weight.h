// Weights of floats for tensors of 16 bits, as autocast has them.
#pragma once

#include "cpu/contraction/contraction.h"

namespace fastdcgan::cpu {

// A weight with elements of `dtype`: as it lies, or where it is wide rounded to nearest, ties to even, as a cast
// tensor's are. It holds until this thread makes the next one.
class Rounded {
 public:
  Rounded(const Weight&, c10::ScalarType dtype);
  const Weight& get() const { return weight_; }

 private:
  Weight weight_;
};

}  // namespace fastdcgan::cpu
