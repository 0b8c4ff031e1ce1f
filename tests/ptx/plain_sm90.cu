// Plain CUDA with inline PTX of sm_90a, with known answers: apart from the wrappers of csrc/cuda, and laid out otherwise.
#include <cuda.h>
#include <cuda_fp16.h>

#include <cstdint>

__device__ unsigned near(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(near(barrier)) : "memory");
}
__device__ void await(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
      ::"r"(near(barrier)), "r"(parity) : "memory");
}

// out [64][8] = a [64][16] * b [16][8], which threads lay out as wgmma reads them without a swizzle: 8 rows of 16 bytes
// lie together, along the depth (across = 0) or across it.
template <int kAcross>
__device__ void product(const __half* a, const __half* b, float* out) {
  __shared__ alignas(128) __half left[64 * 16], right[16 * 8];
  for (int i = threadIdx.x; i < 64 * 16; i += 128) {
    const int m = i / 16, k = i % 16;
    // Units of 64 halves: of m / 8 and k / 8.
    const int unit = m / 8 * 2 + k / 8, within = kAcross ? k % 8 * 8 + m % 8 : m % 8 * 8 + k % 8;
    left[unit * 64 + within] = a[i];
  }
  for (int i = threadIdx.x; i < 16 * 8; i += 128) {
    const int k = i / 8, n = i % 8;
    right[k / 8 * 64 + (kAcross ? k % 8 * 8 + n : n * 8 + k % 8)] = b[i];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  // From unit to unit: 128 bytes along the depth, 256 along m. (Of the right factor there is one along n.)
  const auto descriptor = [](unsigned at, uint64_t depth, uint64_t side) {
    const uint64_t leading = depth, stride = side;
    return uint64_t{at >> 4} | leading / 16 << 16 | stride / 16 << 32;
  };
  float d[4] = {1, 2, 3, 4};
  const uint64_t da = descriptor(near(left), 128, 256), db = descriptor(near(right), 128, 256);
  asm volatile("" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])::"memory");  // written before the fence
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, %7, %7;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(da), "l"(db), "r"(1), "n"(kAcross));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  asm volatile("" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])::"memory");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) out[(warp * 16 + i / 2 * 8 + lane / 4) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

extern "C" {

// Halves [rows][columns] in tiles of 16 rows of 64, copied by a warp of its own to two places in turn; 128 threads undo the
// swizzle: the 16 bytes numbered c of row r lie where those numbered c ^ r % 8 would. Beyond the tensor there are zeros.
__global__ void __launch_bounds__(160) tiles(const __grid_constant__ CUtensorMap map, __half* out, int steps, int across) {
  __shared__ alignas(1024) uint4 stage[2][16][8];
  __shared__ uint64_t full[2], empty[2];
  if (threadIdx.x == 0) {
    for (int k = 0; k < 2; ++k) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(near(&full[k])) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 128;" ::"r"(near(&empty[k])) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x == 128) {
    for (int i = 0; i < steps; ++i) {
      if (i > 1) await(&empty[i & 1], (i / 2 + 1) & 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 2048;" ::"r"(near(&full[i & 1])) : "memory");
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
              near(stage[i & 1])), "l"(&map), "r"(near(&full[i & 1])), "r"(i % across * 64 - 8), "r"(i / across * 16 - 3)
          : "memory");
    }
  } else if (threadIdx.x < 128) {
    const int row = threadIdx.x / 8, c = threadIdx.x % 8;
    for (int i = 0; i < steps; ++i) {
      await(&full[i & 1], i / 2 & 1);
      reinterpret_cast<uint4*>(out)[(i * 16 + row) * 8 + c] = stage[i & 1][row][c ^ row % 8];
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      arrive(&empty[i & 1]);
    }
  }
}

__global__ void along(const __half* a, const __half* b, float* out) { product<0>(a, b, out); }
__global__ void across(const __half* a, const __half* b, float* out) { product<1>(a, b, out); }

// Two warps write halves of what the other one reads, and only an mbarrier is between.
__global__ void meeting(const int* in, int* out) {
  __shared__ int words[64];
  __shared__ uint64_t barrier;
  const int k = threadIdx.x;
  if (k == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" ::"r"(near(&barrier)) : "memory");
  __syncthreads();
  words[k] = in[k];
  __syncwarp();
  if (k % 32 == 0) arrive(&barrier);
  await(&barrier, 0);
  out[k] = words[63 - k];
}
}
