// Plain CUDA with known answers: what nvcc makes of it, the machine has to run right (test_machine.py).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

extern "C" {

__global__ void integers(const int* a, const int* b, long long* out, int n) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k >= n) return;
  const int x = a[k], y = b[k];
  const unsigned u = x, v = y;
  const long long values[] = {
      x / y, x % y, u / v, u % v, x * 1LL * y, __mulhi(x, y), __umulhi(u, v), x >> (y & 31), u << (v & 31), u >> (v & 31),
      __clz(x), __popc(u), __brev(u), __byte_perm(u, v, 0x3715), __funnelshift_l(u, v, y & 31), (x & y) | (~x ^ y),
      x * 1LL * x / (y | 1), (x * 1LL * y) % 1000003, abs(x), min(x, y), max(u, v), short(x) * short(y), (signed char)(x),
      x / 7, u / 10, u % 12, __ffs(x), (x * 1LL * y) >> (v & 63), static_cast<long long>(__brevll(u)), -x};
  constexpr int count = sizeof(values) / sizeof(values[0]);
  for (int i = 0; i < count; ++i) out[k * count + i] = values[i];
}

__global__ void floats(const float* a, const float* b, float* out, int n) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k >= n) return;
  const float x = a[k], y = b[k];
  const float values[] = {x + y, __fmul_rn(x, y), fmaf(x, y, x), x / y, sqrtf(fabsf(x)), fminf(x, y), fmaxf(x, y), rintf(x), truncf(x),
                          floorf(y), static_cast<float>(static_cast<int>(x)), __fadd_rz(x, y), __fadd_ru(x, y),
                          __fmaf_rd(x, y, x), __frcp_rn(y), copysignf(x, y), __saturatef(x), exp2f(y), logf(fabsf(x)),
                          static_cast<float>(double(x) * y + 1 / double(y)), tanhf(x), sinf(x), rsqrtf(fabsf(y))};
  constexpr int count = sizeof(values) / sizeof(values[0]);
  for (int i = 0; i < count; ++i) out[k * count + i] = values[i];
}

__global__ void halves(const __half2* a, const __half2* b, __half2* out, const __nv_bfloat162* c, const __nv_bfloat162* d,
                       __nv_bfloat162* out2) {
  const int k = threadIdx.x;
  out[4 * k] = __hadd2(a[k], b[k]), out[4 * k + 1] = __hmul2(a[k], b[k]), out[4 * k + 2] = __hfma2(a[k], b[k], a[k]);
  out[4 * k + 3] = __floats2half2_rn(__low2float(a[k]) * 3, __high2float(b[k]) / 3);
  out2[4 * k] = __hadd2(c[k], d[k]), out2[4 * k + 1] = __hmul2(c[k], d[k]), out2[4 * k + 2] = __hfma2(c[k], d[k], c[k]);
  out2[4 * k + 3] = __hmax2(c[k], d[k]);
}

// How many steps of Collatz lead to 1: each lane leaves the loop at another time.
__global__ void collatz(int* out) {
  unsigned n = blockIdx.x * blockDim.x + threadIdx.x + 1;
  int steps = 0;
  while (n != 1) {
    if (n & 1) {
      n = 3 * n + 1;
      if (n > 1000000) break;
    } else {
      n /= 2;
    }
    ++steps;
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = steps;
}

__global__ void shuffles(const int* in, int* out) {
  const int k = threadIdx.x, x = in[k];
  int* to = out + k * 10;
  to[0] = __shfl_xor_sync(~0u, x, 5);
  to[1] = __shfl_up_sync(~0u, x, 3);
  to[2] = __shfl_down_sync(~0u, x, 9);
  to[3] = __shfl_sync(~0u, x, (k * 7) & 31);
  to[4] = __shfl_down_sync(~0u, x, 2, 8);
  to[5] = __shfl_sync(~0u, x, 3, 16);
  to[6] = __ballot_sync(~0u, x & 1);
  to[7] = __any_sync(~0u, x == 3) + 2 * __all_sync(~0u, x > -100);
  to[8] = __match_any_sync(~0u, x & 3);
  to[9] = __reduce_add_sync(~0u, x);
}

// Half of a warp shuffles by itself, each half elsewhere.
__global__ void apart(const int* in, int* out) {
  const int k = threadIdx.x;
  int x = in[k];
  if (k & 1) {
    for (int by = 2; by < 32; by *= 2) x += __shfl_xor_sync(0xaaaaaaaa, x, by);
  } else {
    x = __shfl_sync(0x55555555, x, 6);
  }
  __syncwarp();
  out[k] = x;
}

__global__ void transpose(const float* in, float* out, int rows, int columns) {
  __shared__ float tile[32][33];
  const int row = blockIdx.y * 32, column = blockIdx.x * 32;
  for (int r = threadIdx.y; r < 32; r += blockDim.y) {
    const bool is = row + r < rows && column + threadIdx.x < columns;
    tile[r][threadIdx.x] = is ? in[(row + r) * columns + column + threadIdx.x] : 0;
  }
  __syncthreads();
  for (int r = threadIdx.y; r < 32; r += blockDim.y) {
    if (column + r < columns && row + threadIdx.x < rows) out[(column + r) * rows + row + threadIdx.x] = tile[threadIdx.x][r];
  }
}

// Sums of each block, by a tree in shared memory of a size that the launch says.
__global__ void sums(const float* in, float* out, int n) {
  extern __shared__ float partial[];
  float sum = 0;
  for (int k = blockIdx.x * blockDim.x + threadIdx.x; k < n; k += gridDim.x * blockDim.x) sum += in[k];
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int half = blockDim.x / 2; half; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0];
}

// An array that is indexed at run time lies in local memory.
__global__ void sorted(const int* in, int* out, int n) {
  int values[16];
  for (int k = 0; k < n; ++k) values[k] = in[threadIdx.x * n + k];
  for (int k = 1; k < n; ++k) {
    const int x = values[k];
    int at = k;
    for (; at > 0 && values[at - 1] > x; --at) values[at] = values[at - 1];
    values[at] = x;
  }
  for (int k = 0; k < n; ++k) out[threadIdx.x * n + k] = values[k];
}

__constant__ int primes[8] = {2, 3, 5, 7, 11, 13, 17, 19};

// A table of branches.
__global__ void choices(const int* in, int* out) {
  const int k = threadIdx.x, x = in[k];
  int* to = out + 2 * k;
  switch (x & 15) {
    case 0: to[0] = x * 3; break;
    case 1: to[1] = x ^ 0x55; break;
    case 2: to[0] = x + primes[k & 7]; break;
    case 3: for (int j = 0; j < k; ++j) to[0] += j ^ x; break;
    case 4: to[1] = x * x; to[0] = 1;  // goes on
    case 5: to[1] += ~x; break;
    case 6: to[0] = x << 3; break;
    case 7: to[1] = x / 3; break;
    case 8: to[0] = primes[x >> 4 & 7]; break;
    default: to[1] = -1;
  }
}

// A function that stays one, with a return on the way.
__device__ __noinline__ int bounded(int x, int most) {
  if (x > most) return most;
  return x < -most ? -most : x;
}
__global__ void calls(const int* in, int* out) {
  const int x = in[threadIdx.x];
  out[threadIdx.x] = bounded(x, 100) + 1000 * bounded(x, 7);
}

// Through pointers of which it isn't known where they point.
__global__ void generic(const int* in, int* out, int which) {
  __shared__ int near[64];
  near[threadIdx.x] = 2 * in[threadIdx.x];
  __syncthreads();
  const int* from = (threadIdx.x + which) & 1 ? near : in;
  out[threadIdx.x] = from[63 - threadIdx.x];
}

// Two stages of asynchronous copies.
__global__ void pipeline(const float4* in, float4* out, int steps) {
  __shared__ float4 stage[2][64];
  const int k = threadIdx.x;
  __pipeline_memcpy_async(&stage[0][k], &in[k], 16);
  __pipeline_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) __pipeline_memcpy_async(&stage[(step + 1) & 1][k], &in[(step + 1) * 64 + k], 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    float4 x = stage[step & 1][63 - k];
    x.x *= 2, x.w += 1;
    out[step * 64 + k] = x;
    __syncthreads();
  }
}

__global__ void places(int* out) {
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * threads + thread] = block * 1000 + thread;
}

// Within a warp: with and without a barrier of its own between writing and reading.
__global__ void neighbours(const int* in, int* out) {
  __shared__ int words[32];
  words[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = words[(threadIdx.x + 1) & 31];
}
}
