// Plain CUDA whose accesses are known by hand: what the machine counts of them is checked (test_counting.py).
extern __shared__ float4 bytes[];

template <int kPitch>
__device__ void transposed(const float* from, float* to) {
  __shared__ float tile[32 * kPitch];
  for (int row = 0; row < 32; ++row) tile[row * kPitch + threadIdx.x] = from[row * 32 + threadIdx.x];
  __syncthreads();
  for (int row = 0; row < 32; ++row) to[row * 32 + threadIdx.x] = tile[threadIdx.x * kPitch + row];
}

// Each thread a vector of its own, `step` of them apart
__device__ float sum(float2 v) { return v.x + v.y; }
__device__ float sum(float4 v) { return v.x + v.y + v.z + v.w; }
template <class T>
__device__ void vectors(int step, float* to) {
  T* at = reinterpret_cast<T*>(bytes) + threadIdx.x * step;
  *at = T{};
  __syncthreads();
  to[threadIdx.x] = sum(*at);
}

extern "C" {

__global__ void copy(const float* from, float* to) { to[threadIdx.x + blockIdx.x * blockDim.x] = from[threadIdx.x + blockIdx.x * blockDim.x]; }

__global__ void copy_vectors(const float4* from, float4* to) {
  to[threadIdx.x + blockIdx.x * blockDim.x] = from[threadIdx.x + blockIdx.x * blockDim.x];
}

__global__ void strided(const float* from, float* to) { to[threadIdx.x] = from[2 * threadIdx.x]; }

__global__ void twice(const volatile float* through, const float* from, float* to) {
  float sum = 0;
#pragma unroll 1
  for (int k = 0; k < 4; ++k) sum += __ldca(from + threadIdx.x) + through[threadIdx.x];
  to[threadIdx.x] = sum;
}

__global__ void half_of_a_warp(const float* from, float* to) {
  if (threadIdx.x < 16) to[threadIdx.x] = from[threadIdx.x + 1];  // 64 bytes in three sectors
}

__global__ void transpose(const float* from, float* to) { transposed<32>(from, to); }
__global__ void transpose_padded(const float* from, float* to) { transposed<33>(from, to); }

__global__ void vectors_of_8(int step, float* to) { vectors<float2>(step, to); }
__global__ void vectors_of_16(int step, float* to) { vectors<float4>(step, to); }

__global__ void broadcast(float* to) {
  __shared__ float x[64];
  x[threadIdx.x] = threadIdx.x, x[threadIdx.x + 32] = 1;
  __syncthreads();
  to[threadIdx.x] = x[0] + x[threadIdx.x / 16 * 32];  // one word; then two words of one bank
}

// Four matrices of eight rows of 16 bytes, whose rows are `pitch` bytes apart; of a row of 64 bytes a matrix takes the
// 16 that `swizzled` puts elsewhere in each row.
__global__ void matrices(int pitch, int swizzled, unsigned* to) {
  const auto begin = static_cast<unsigned>(__cvta_generic_to_shared(bytes));
  for (int k = threadIdx.x; k < pitch * 8 / 16; k += 32) bytes[k] = float4{};
  __syncthreads();
  const int row = threadIdx.x % 8, column = threadIdx.x / 8 ^ (swizzled ? row % 8 : 0);
  unsigned a, b, c, d;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(begin + row * pitch + column * 16) : "memory");
  to[threadIdx.x] = a + b + c + d;
}

__global__ void products(int many, float* to) {
  float d[4] = {};
#pragma unroll 1
  for (int k = 0; k < many; ++k) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(0));
  }
  to[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}

__global__ void async_copies(const float4* from, float* to, int bytes) {
  __shared__ float4 tile[64];
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(tile + threadIdx.x));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from + threadIdx.x), "r"(threadIdx.x < 16 ? bytes : 0) : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  to[threadIdx.x] = tile[threadIdx.x].x;
}

// Of each thread: one integer operation more, one of floats, one exponential
__global__ void classes(const float* from, float* to) {
  float x = from[threadIdx.x];
  asm volatile("ex2.approx.f32 %0, %0;" : "+f"(x));
  asm volatile("add.f32 %0, %0, %0;" : "+f"(x));
  to[threadIdx.x] = x;
}
}
