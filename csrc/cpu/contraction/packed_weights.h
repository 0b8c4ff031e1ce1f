// Packed weights that are kept from call to call.
//
// A weight can change without a trace: `weight.data.copy_()`, a view of a flat buffer, another library. So every call reads
// the whole weight and compares digests: that costs a tenth of packing it. A change of one element is always seen; one of
// several is missed once in 2^64 times.
#pragma once

#include <c10/util/FunctionRef.h>

#include <memory>

#include "cpu/contraction/contraction.h"
#include "cpu/memory/pages.h"

namespace fastdcgan::cpu {

class KeptWeight {
 public:
  explicit KeptWeight(int64_t bytes) : bytes_(bytes), memory_(allocate_pages(bytes)) {}
  void* data() const { return memory_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
  Pages memory_;
};

// The packed form of a weight: one that is kept and still holds, or one that `pack` makes now. Null where keeping it would
// not pay: many pixels are multiplied with it, or it changes all the time. `way`: sets one packing of a contraction apart
// from others. Kept forms go with the storage of their weight, at the next call of this function.
std::shared_ptr<const KeptWeight> kept_weight(
    const Contraction&, c10::ScalarType, const Weight&, int64_t way, int64_t bytes, c10::function_ref<void(void*)> pack);

// How many are kept now, and their bytes.
struct KeptWeights {
  int64_t count, bytes;
};
KeptWeights kept_weights();

}  // namespace fastdcgan::cpu
