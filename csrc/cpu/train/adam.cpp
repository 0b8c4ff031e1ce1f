#include "cpu/train/adam.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>

#include "cpu/elementwise/vectors.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements that one thread takes at a time

struct NoCopy {};  // stands for the dtype of a copy that nobody wants

// What an element's update reads, for one tensor.
struct Coefficients {
  float take, beta2, take2;  // 1 - beta1; beta2; 1 - beta2
  float eps, l2, keep;       // keep: what decoupled weight decay leaves of a weight
  float step_size, root_scale;
  float sign, unscale;
  bool masters;

  Coefficients(const AdamSettings& s, int64_t step)
      : take(static_cast<float>(1 - s.beta1)), beta2(static_cast<float>(s.beta2)),
        take2(static_cast<float>(1 - s.beta2)), eps(static_cast<float>(s.eps)),
        l2(s.decoupled ? 0.f : static_cast<float>(s.weight_decay)),
        keep(s.decoupled ? static_cast<float>(1 - s.lr * s.weight_decay) : 1.f),
        step_size(static_cast<float>(s.lr / (1 - std::pow(s.beta1, static_cast<double>(step))))),
        root_scale(static_cast<float>(1 / std::sqrt(1 - std::pow(s.beta2, static_cast<double>(step))))),
        sign(s.maximize ? -1.f : 1.f), unscale(static_cast<float>(1 / s.grad_scale)),
        masters(s.masters) {}
};

template <class G, class C>
struct Pointers {
  float* weight;
  G* grad;
  float *exp_avg, *exp_avg_sq;
  C* copy;
};

// A copy is its master rounded. Where it isn't (a NaN never is), somebody has set it since, and that is the weight now.
template <class C>
Lanes followed(const Lanes& master, const C* copy) {
  const Lanes given = read(copy);
  const auto rounded = at::vec::convert_to_float<C>(at::vec::convert_from_float<C>(master.half[0], master.half[1]));
  return {{V::blendv(given.half[0], master.half[0], std::get<0>(rounded) == given.half[0]),
           V::blendv(given.half[1], master.half[1], std::get<1>(rounded) == given.half[1])}};
}

// `n` elements, a whole number of steps.
template <class G, class C>
void update(const Pointers<G, C>& p, const Coefficients& k, int64_t n) {
  const V take(k.take), beta2(k.beta2), take2(k.take2), eps(k.eps), l2(k.l2), keep(k.keep);
  const V step_size(k.step_size), root_scale(k.root_scale), sign(k.sign), unscale(k.unscale);
  const bool scaled = k.unscale != 1.f, decays = k.l2 != 0.f;
  for (int64_t i = 0; i < n; i += kStep) {
    Lanes weight = read(p.weight + i), grad = read(p.grad + i);
    Lanes m = read(p.exp_avg + i), v = read(p.exp_avg_sq + i);
    if constexpr (!std::is_same_v<C, NoCopy>)
      if (k.masters) weight = followed(weight, p.copy + i);
    if (scaled) {
      for (V& g : grad.half) g = g * unscale;
      write(p.grad + i, grad);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      V g = grad.half[h] * sign;
      if (decays) g = at::vec::fmadd(l2, weight.half[h], g);
      m.half[h] = at::vec::fmadd(take, g - m.half[h], m.half[h]);
      v.half[h] = at::vec::fmadd(take2 * g, g, beta2 * v.half[h]);
      const V denominator = at::vec::fmadd(v.half[h].sqrt(), root_scale, eps);
      weight.half[h] = keep * weight.half[h] - step_size * (m.half[h] / denominator);
    }
    write(p.exp_avg + i, m);
    write(p.exp_avg_sq + i, v);
    write(p.weight + i, weight);
    if constexpr (!std::is_same_v<C, NoCopy>) write(p.copy + i, weight);
  }
}

template <class T>
void move(const T* from, T* to, int64_t n) {
  if constexpr (!std::is_same_v<T, NoCopy>) std::copy_n(from, n, to);
}

// The last `n` < kStep elements, in a copy that is a whole step long.
template <class G, class C>
void update_rest(const Pointers<G, C>& p, const Coefficients& k, int64_t n) {
  alignas(64) float weight[kStep] = {}, m[kStep] = {}, v[kStep] = {};
  alignas(64) G grad[kStep] = {};
  alignas(64) C copy[kStep] = {};
  move(p.weight, weight, n), move(p.grad, grad, n), move(p.exp_avg, m, n), move(p.exp_avg_sq, v, n),
      move(p.copy, copy, n);
  update(Pointers<G, C>{weight, grad, m, v, copy}, k, kStep);
  move(weight, p.weight, n), move(m, p.exp_avg, n), move(v, p.exp_avg_sq, n), move(copy, p.copy, n);
  if (k.unscale != 1.f) move(grad, p.grad, n);
}

template <class G, class C>
void update_chunk(const AdamTensor& t, const Coefficients& k, int64_t first, int64_t n) {
  Pointers<G, C> p{
      t.weight + first, static_cast<G*>(t.grad) + first, t.exp_avg + first, t.exp_avg_sq + first, nullptr};
  if constexpr (!std::is_same_v<C, NoCopy>) p.copy = static_cast<C*>(t.copy) + first;
  const int64_t whole = n - n % kStep;
  update(p, k, whole);
  if (whole == n) return;
  Pointers<G, C> rest{p.weight + whole, p.grad + whole, p.exp_avg + whole, p.exp_avg_sq + whole, nullptr};
  if constexpr (!std::is_same_v<C, NoCopy>) rest.copy = p.copy + whole;
  update_rest(rest, k, n - whole);
}

template <class G>
void update_chunk(const AdamTensor& t, const Coefficients& k, int64_t first, int64_t n) {
  if (t.copy == nullptr) return update_chunk<G, NoCopy>(t, k, first, n);
  if (t.copy_dtype == c10::ScalarType::BFloat16) return update_chunk<G, c10::BFloat16>(t, k, first, n);
  update_chunk<G, c10::Half>(t, k, first, n);
}

void update_chunk(const AdamTensor& t, const Coefficients& k, int64_t first, int64_t n) {
  switch (t.grad_dtype) {
    case c10::ScalarType::Float: return update_chunk<float>(t, k, first, n);
    case c10::ScalarType::BFloat16: return update_chunk<c10::BFloat16>(t, k, first, n);
    case c10::ScalarType::Half: return update_chunk<c10::Half>(t, k, first, n);
    default: TORCH_INTERNAL_ASSERT(false, "dtype ", t.grad_dtype);
  }
}

}  // namespace

void adam_pass(const std::vector<AdamTensor>& tensors, const AdamSettings& settings) {
  struct Chunk {
    int64_t tensor, first;
  };
  std::vector<Chunk> chunks;
  std::vector<Coefficients> coefficients;
  for (size_t i = 0; i < tensors.size(); ++i) {
    coefficients.emplace_back(settings, tensors[i].step);
    for (int64_t first = 0; first < tensors[i].size; first += kChunk)
      chunks.push_back({static_cast<int64_t>(i), first});
  }
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const AdamTensor& t = tensors[chunks[c].tensor];
      update_chunk(t, coefficients[chunks[c].tensor], chunks[c].first, std::min(kChunk, t.size - chunks[c].first));
    }
  });
}

}  // namespace fastdcgan::cpu
