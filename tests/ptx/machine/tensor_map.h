// A tensor map: the 128 bytes in which the host tells the copy engine of a tensor and of the box of it that one copy
// moves. The driver's own bits aren't public: these are the machine's.
#pragma once

#include <cstdint>
#include <cstring>

namespace ptx {

struct TensorMap {
  static constexpr uint32_t kMark = 0x70616d74;
  uint32_t mark;
  uint8_t rank, item, swizzle, nan;  // item: bytes; swizzle: log2 of its span of 16 bytes' pieces, 0 to 3
  uint64_t base;
  uint64_t size[5], stride[5];  // the innermost dimension first; strides in bytes
  uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= 128);

// As cuTensorMapEncodeTiled (CUDA Driver API, "Tensor Map Object Management"): null, or what the driver would refuse.
inline const char* encode(void* to, int type, uint32_t rank, const void* base, const uint64_t* sizes,
                          const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave, int swizzle,
                          int fill) {
  static const uint8_t items[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // of CUtensorMapDataType
  if (type < 0 || type >= static_cast<int>(sizeof items)) return "no such type";
  if (rank < 1 || rank > 5) return "1 to 5 dimensions";
  if (interleave) return "interleaved layouts aren't known here";
  if (swizzle < 0 || swizzle > 3) return "this swizzle isn't known here";
  if (reinterpret_cast<uint64_t>(base) % 16) return "the tensor does not begin at a multiple of 16 bytes";
  TensorMap map{};
  map.mark = TensorMap::kMark, map.rank = static_cast<uint8_t>(rank), map.item = items[type];
  map.swizzle = static_cast<uint8_t>(swizzle), map.base = reinterpret_cast<uint64_t>(base);
  const bool is_float = type == 6 || type >= 7;
  if (fill && !is_float) return "NaNs beyond a tensor of integers";
  map.nan = fill != 0;
  for (uint32_t d = 0; d < rank; ++d) {
    if (sizes[d] < 1 || sizes[d] > uint64_t{1} << 32) return "a size is not 1 to 2^32";
    if (box[d] < 1 || box[d] > 256) return "a side of the box is not 1 to 256";
    if (steps[d] != 1) return "steps of more than one element aren't known here";
    map.size[d] = sizes[d], map.box[d] = static_cast<uint16_t>(box[d]), map.stride[d] = d ? strides[d - 1] : map.item;
    if (d && (map.stride[d] % 16 || map.stride[d] >= uint64_t{1} << 40)) return "a stride is no multiple of 16 bytes below 2^40";
  }
  const uint32_t row = box[0] * map.item;
  if (row % 16) return "a row of the box is no multiple of 16 bytes";
  if (swizzle && row > 16u << swizzle) return "a row of the box is longer than the swizzle's span";
  if (swizzle && row < 16u << swizzle) return "a row of the box that is shorter than the swizzle's span isn't known here";
  std::memset(to, 0, 128);
  std::memcpy(to, &map, sizeof map);
  return nullptr;
}

// f(the address of each element of the box that begins at `at`, or 0 beyond the tensor), the innermost dimension first.
template <class F>
void each_in_box(const TensorMap& map, const int32_t* at, F f) {
  uint64_t all = 1;
  for (int d = 0; d < map.rank; ++d) all *= map.box[d];
  for (uint64_t i = 0; i < all; ++i) {
    uint64_t rest = i, address = map.base;
    bool inside = true;
    for (int d = 0; d < map.rank; ++d) {
      const int64_t index = at[d] + static_cast<int64_t>(rest % map.box[d]);
      rest /= map.box[d];
      inside &= index >= 0 && static_cast<uint64_t>(index) < map.size[d];
      address += index * map.stride[d];
    }
    f(inside ? address : 0);
  }
}

// Where the 16 bytes at an address of shared memory lie: their number in a span is exchanged by that of the row of 128.
inline uint64_t swizzled(uint64_t address, int swizzle) {
  return address ^ ((address >> 7 & ((1u << swizzle) - 1)) << 4);
}

}  // namespace ptx
