// The packed-weight cache: what packing a weight gave is used again at the next calls.
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

class PackedWeight {
 public:
  explicit PackedWeight(int64_t bytes) : bytes_(bytes), memory_(allocate_pages(bytes)) {}
  void* data() const { return memory_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
  Pages memory_;
};

// The packed form of a weight: one from the cache that still holds, or one that `pack` makes now. Null where caching would
// not pay: many pixels are multiplied with it, or it changes all the time. `layout` sets one packing of a contraction apart
// from others. A packed weight leaves the cache with the storage of its weight, at the next call of this function.
std::shared_ptr<const PackedWeight> packed_weight(
    const Contraction&, c10::ScalarType, const Weight&, int64_t layout, int64_t bytes, c10::function_ref<void(void*)> pack);

// How many are in the cache now, and their bytes.
struct PackedWeights {
  int64_t count, bytes;
};
PackedWeights packed_weights();

}  // namespace fastdcgan::cpu
