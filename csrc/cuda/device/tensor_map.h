// Tensor maps (sm_90): the host describes a tensor and the size of a tile of it; a single thread then has such tiles
// copied to shared memory, swizzled, with zeros for what lies beyond the tensor. Rows of a tile have 128 bytes, and
// their chunks of 16 lie in the order that MatrixTile gives rows of 8 chunks.
#pragma once

#include "cuda/device/barriers.h"
#ifdef __CUDACC__
#include <cudaTypedefs.h>
#endif

namespace fastdcgan::gpu {

constexpr int kMostDimensions = 5;

// Dimensions of a tensor, the innermost first, whose numbers are adjacent.
struct TensorView {
  int rank = 0;
  uint64_t size[kMostDimensions] = {};
  uint64_t stride[kMostDimensions] = {};  // in numbers
  uint32_t tile[kMostDimensions] = {};

  void add(int64_t size_, int64_t stride_, int tile_) {
    size[rank] = static_cast<uint64_t>(size_), stride[rank] = static_cast<uint64_t>(stride_);
    tile[rank++] = static_cast<uint32_t>(tile_);
  }
};

#ifdef __CUDACC__

using TensorMap = CUtensorMap;

// Throws std::runtime_error where the driver refuses. A host function: allowed while a stream is captured.
template <class T>
TensorMap tensor_map(const T* base, const TensorView& view) {
  static_assert(sizeof(T) == 2);
  // The function is taken from the driver that is loaded, so that nothing has to be linked with it.
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status),
          "cuTensorMapEncodeTiled");
    if (status != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  constexpr bool kHalf = std::is_same_v<T, fp16>;
  cuuint64_t size[kMostDimensions], bytes[kMostDimensions];
  cuuint32_t tile[kMostDimensions], ones[kMostDimensions];
  for (int i = 0; i < view.rank; ++i) size[i] = view.size[i], tile[i] = view.tile[i], ones[i] = 1;
  for (int i = 1; i < view.rank; ++i) bytes[i - 1] = view.stride[i] * sizeof(T);
  TensorMap map;
  const CUresult result = encode(
      &map, kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      static_cast<cuuint32_t>(view.rank), const_cast<T*>(base), size, bytes, tile, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  return map;
}

// Has a map that is a parameter of the kernel fetched, before its first copy.
GPU_INLINE void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Begins to copy the tile that starts at `at` to a multiple of 1024 bytes; all its bytes arrive at the barrier.
GPU_INLINE void copy_tma_tile(void* to, const TensorMap& map, Mbarrier* barrier, const int (&at)[3]) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2])
      : "memory");
}
GPU_INLINE void copy_tma_tile(void* to, const TensorMap& map, Mbarrier* barrier, const int (&at)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
      : "memory");
}

#else

using TensorMap = cuda_on_cpu::TensorTiles;

// With the conditions of cuTensorMapEncodeTiled.
template <class T>
TensorMap tensor_map(const T* base, const TensorView& view) {
  const auto require = [](bool ok, const char* what) {
    if (!ok) throw cuda_on_cpu::KernelError(std::string("cuTensorMapEncodeTiled: ") + what);
  };
  TensorMap map;
  map.base = reinterpret_cast<const char*>(base), map.rank = view.rank, map.item = sizeof(T);
  require(aligned(base), "the tensor does not begin at a multiple of 16 bytes");
  require(view.rank > 0 && view.rank <= kMostDimensions && view.stride[0] == 1, "the dimensions");
  require(view.tile[0] * sizeof(T) == 128, "a row of a tile has not 128 bytes");
  for (int i = 0; i < view.rank; ++i) {
    map.size[i] = view.size[i], map.stride[i] = view.stride[i] * sizeof(T), map.tile[i] = view.tile[i];
    require(view.size[i] > 0 && view.size[i] <= uint64_t{1} << 32, "a size");
    require(view.tile[i] > 0 && view.tile[i] <= 256, "a side of a tile");
    require(i == 0 || (map.stride[i] % 16 == 0 && map.stride[i] < uint64_t{1} << 40), "a stride");
  }
  return map;
}

inline void prefetch_tensor_map(const TensorMap&) {}

template <int N>
inline void copy_tma_tile(void* to, const TensorMap& map, Mbarrier* barrier, const int (&at)[N]) {
  if (N != map.rank) cuda_on_cpu::engine.fail("a tile of other dimensions than the tensor's");
  cuda_on_cpu::copy_tma_tile(static_cast<char*>(to), map, at, barrier);
}

#endif

}  // namespace fastdcgan::gpu
