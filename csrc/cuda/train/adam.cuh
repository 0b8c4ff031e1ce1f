// One Adam step over a list of tensors in one launch (Kingma and Ba, "Adam: A Method for Stochastic Optimization",
// 2015, algorithm 1), with the arithmetic of torch.optim.Adam: coefficients in double, elements in float.
//
// The list travels in the kernel's own parameters: nothing is copied to the GPU beside, so a step can be captured
// wherever its tensors lie. A block updates one chunk of one tensor, and counts the steps of that chunk itself: a
// counter that several blocks share would be read by one while another advances it.
#pragma once

#include <type_traits>

#include "cuda/device/floats.h"

namespace fastdcgan::cuda {

struct Adam {
  static constexpr int kThreads = 256;
  static constexpr int kVector = 8;   // elements of a thread and turn: 16 bytes of 16-bit ones
  static constexpr int kChunk = 4096; // fastdcgan/optim.py has as many step counters as this makes chunks
};

enum class Storage : int { none, float32, bfloat16, float16 };

// A parameter: all of it dense and in one order.
struct AdamTensor {
  float* weight;
  void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  void* copy;    // the new weight goes here as well, in `copied`
  float* steps;  // one for each chunk
  int64_t size;
  int first_chunk;  // the block that begins with it
  Storage grads : 8, copied : 8;
  bool vectors : 8;  // all addresses are multiples of 16 bytes
};

// As many tensors as fit into 4 KiB of parameters, the limit of every driver, and into the 32 KiB from CUDA 12.1 on.
template <int kMost_>
struct AdamTable {
  static constexpr int kMost = kMost_;
  AdamTensor tensor[kMost];
  int count;
};
using FewTensors = AdamTable<60>;
using ManyTensors = AdamTable<480>;

struct AdamSettings {
  double lr, beta1, beta2, eps, weight_decay;
  const float* lr_on_device;  // takes the place of lr, where it is not null
  const float* grad_scale;    // gradients are divided by it, also where they lie
  const float* found_inf;     // where it is not 0, nothing is done
  bool decoupled;             // weight decay shrinks the weight (AdamW), else it is added to the gradient
  bool maximize;
  bool masters;  // weights are masters of their copies: a copy that is another number was set, and is the weight
};

// What an element's update reads.
struct AdamCoefficients {
  float take, beta2, take2;  // 1 - beta1; beta2; 1 - beta2
  float eps, l2, keep;       // keep: what decoupled weight decay leaves of a weight
  float step_size, root_scale;
  float sign, unscale;
  bool masters;

  GPU_INLINE void set(const AdamSettings& s, double step) {
    const double lr = s.lr_on_device != nullptr ? static_cast<double>(*s.lr_on_device) : s.lr;
    take = static_cast<float>(1 - s.beta1);
    beta2 = static_cast<float>(s.beta2);
    take2 = static_cast<float>(1 - s.beta2);
    eps = static_cast<float>(s.eps);
    l2 = s.decoupled ? 0.f : static_cast<float>(s.weight_decay);
    keep = s.decoupled ? static_cast<float>(1 - lr * s.weight_decay) : 1.f;
    step_size = static_cast<float>(lr / (1 - pow(s.beta1, step)));
    root_scale = static_cast<float>(1 / sqrt(1 - pow(s.beta2, step)));
    sign = s.maximize ? -1.f : 1.f;
    unscale = s.grad_scale != nullptr ? static_cast<float>(1 / static_cast<double>(*s.grad_scale)) : 1.f;
    masters = s.masters;
  }
};

namespace adam_detail {

struct NoCopy {};  // stands for the type of a copy that nobody wants

// A copy is its master rounded. Where it isn't (a NaN never is), somebody has set it since, and that is the weight now.
template <int N, class C>
GPU_INLINE void follow(const C* copy, float (&master)[N]) {
  float given[N];
  gpu::read_floats(copy, given);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (gpu::to_float(gpu::from_float<C>(master[i])) != given[i]) master[i] = given[i];
}

// N elements from `at` on.
template <int N, class G, class C>
GPU_INLINE void update(const AdamTensor& t, const AdamCoefficients& k, int64_t at) {
  float weight[N], grad[N], m[N], v[N];
  G* grads = static_cast<G*>(t.grad) + at;
  gpu::read_floats(t.weight + at, weight), gpu::read_floats(grads, grad);
  gpu::read_floats(t.exp_avg + at, m), gpu::read_floats(t.exp_avg_sq + at, v);
  if constexpr (!std::is_same_v<C, NoCopy>)
    if (k.masters) follow(static_cast<const C*>(t.copy) + at, weight);
  if (k.unscale != 1.f) {
#pragma unroll
    for (int i = 0; i < N; ++i) grad[i] *= k.unscale;
    gpu::write_floats(grads, grad);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float g = grad[i] * k.sign;
    if (k.l2 != 0.f) g = fmaf(k.l2, weight[i], g);
    m[i] = fmaf(k.take, g - m[i], m[i]);
    v[i] = fmaf(k.take2 * g, g, k.beta2 * v[i]);
    const float denominator = fmaf(sqrtf(v[i]), k.root_scale, k.eps);
    weight[i] = fmaf(-k.step_size, m[i] / denominator, k.keep * weight[i]);
  }
  gpu::write_floats(t.exp_avg + at, m), gpu::write_floats(t.exp_avg_sq + at, v);
  gpu::write_floats(t.weight + at, weight);
  if constexpr (!std::is_same_v<C, NoCopy>) gpu::write_floats(static_cast<C*>(t.copy) + at, weight);
}

template <class G, class C>
GPU_INLINE void update_chunk(const AdamTensor& t, const AdamCoefficients& k, int64_t begin, int64_t end) {
  const int64_t whole = t.vectors ? begin + (end - begin) / Adam::kVector * Adam::kVector : begin;
  for (int64_t at = begin + threadIdx.x * Adam::kVector; at < whole; at += Adam::kThreads * Adam::kVector)
    update<Adam::kVector, G, C>(t, k, at);
  for (int64_t at = whole + threadIdx.x; at < end; at += Adam::kThreads) update<1, G, C>(t, k, at);
}

template <class G>
GPU_INLINE void update_chunk(const AdamTensor& t, const AdamCoefficients& k, int64_t begin, int64_t end) {
  switch (t.copied) {
    case Storage::bfloat16: return update_chunk<G, gpu::bf16>(t, k, begin, end);
    case Storage::float16: return update_chunk<G, gpu::fp16>(t, k, begin, end);
    default: return update_chunk<G, NoCopy>(t, k, begin, end);
  }
}

}  // namespace adam_detail

// One block for each chunk of each tensor.
template <class Table>
__global__ void __launch_bounds__(Adam::kThreads)
    adam(const __grid_constant__ Table table, const __grid_constant__ AdamSettings settings) {
  auto& k = gpu::shared_memory<AdamCoefficients>();
  gpu::await_kernels_before();
  if (settings.found_inf != nullptr && *settings.found_inf != 0) return;  // all threads alike
  const int block = static_cast<int>(blockIdx.x);
  int at = 0, end = table.count;  // the last tensor that begins at this block or before it
  while (end - at > 1) {
    const int middle = (at + end) / 2;
    (table.tensor[middle].first_chunk <= block ? at : end) = middle;
  }
  const AdamTensor& t = table.tensor[at];
  const int chunk = block - t.first_chunk;
  if (threadIdx.x == 0) {
    const float step = t.steps[chunk] + 1;
    t.steps[chunk] = step;
    k.set(settings, step);
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(chunk) * Adam::kChunk;
  const int64_t last = first + Adam::kChunk < t.size ? first + Adam::kChunk : t.size;
  switch (t.grads) {
    case Storage::bfloat16: return adam_detail::update_chunk<gpu::bf16>(t, k, first, last);
    case Storage::float16: return adam_detail::update_chunk<gpu::fp16>(t, k, first, last);
    default: return adam_detail::update_chunk<float>(t, k, first, last);
  }
}

// --- callers: the same code on a GPU and on a CPU --------------------------------------------------------------------

inline int64_t adam_chunks(int64_t size) { return size > 0 ? (size + Adam::kChunk - 1) / Adam::kChunk : 1; }

template <class Table>
void launch_adam(const AdamTensor* tensors, int count, const AdamSettings& settings, gpu::Stream stream) {
  Table table;
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    table.tensor[i] = tensors[i];
    table.tensor[i].first_chunk = static_cast<int>(blocks);
    blocks += adam_chunks(tensors[i].size);
  }
  table.count = count;
  const dim3 grid(static_cast<unsigned>(blocks));
  gpu::launch_early(adam<Table>, {"adam", grid, Adam::kThreads, sizeof(AdamCoefficients), stream}, table, settings);
}

// In one launch, up to 480 tensors; `first_chunk` is set here. A template: what doesn't call it compiles no kernel.
template <class = void>
void adam_pass(const AdamTensor* tensors, int64_t count, const AdamSettings& settings, gpu::Stream stream) {
  while (count > 0) {
    const int now = static_cast<int>(count < ManyTensors::kMost ? count : ManyTensors::kMost);
    if (now <= FewTensors::kMost) {
      launch_adam<FewTensors>(tensors, now, settings, stream);
    } else {
      launch_adam<ManyTensors>(tensors, now, settings, stream);
    }
    tensors += now, count -= now;
  }
}

}  // namespace fastdcgan::cuda
