// The passes and contractions of csrc/cpu on heap blocks that are exactly as long as the tensors, for AddressSanitizer
// and UBSan. Prints the number of calls.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "common/activations.h"
#include "cpu/train/adam.h"
#include "cpu/contraction/algorithms.h"
#include "cpu/contraction/reorder_taps.h"
#include "cpu/train/images.h"
#include "cpu/train/losses.h"
#include "cpu/elementwise/passes.h"
#include "cpu/machine/rates.h"

using namespace fastdcgan::cpu;

namespace {

template <class T>
int run(const Shape& s, c10::ScalarType dtype) {
  const int64_t n = s.groups * s.group_size(), channels = s.groups * s.channels;
  const auto y = std::make_unique<T[]>(n), da = std::make_unique<T[]>(n), out = std::make_unique<T[]>(n);
  for (int64_t i = 0; i < n; ++i) {
    y[i] = static_cast<T>(std::sin(static_cast<float>(i)));
    da[i] = static_cast<T>(std::cos(static_cast<float>(i)));
  }
  const auto coef = std::make_unique<float[]>(5 * channels), sums = std::make_unique<float[]>(3 * channels),
             stats = std::make_unique<float[]>(3 * channels);
  for (int64_t i = 0; i < 5 * channels; ++i) coef[i] = .5f + static_cast<float>(i % 7);
  int calls = 0, id = 0;
  for (; fastdcgan::with_activation<float>(id, 0.f, [](const auto&) {}); ++id) {
    const Activation act{id, .2f};
    for (int64_t rows : {2, 3, 4, 5}) {
      calls += norm_act_pass(s, {y.get(), nullptr, out.get()}, dtype, coef.get(), rows, act);
      calls += norm_act_backward_pass(s, {y.get(), da.get(), out.get()}, dtype, coef.get(), rows, act);
      calls += grad_sums_pass(s, {y.get(), da.get(), nullptr}, dtype, coef.get(), rows, act, sums.get());
      calls += grad_sums_pass(s, {y.get(), da.get(), da.get()}, dtype, coef.get(), rows, act, sums.get());
    }
  }
  if (norm_act_pass(s, {y.get(), nullptr, out.get()}, dtype, coef.get(), 2, {id, 0.f})) std::abort();
  batch_stats_pass(s, {y.get(), nullptr, nullptr}, dtype, stats.get());
  return calls + 1;
}

template <class T>
int run_training(c10::ScalarType dtype) {
  int calls = 0;
  for (int64_t n : {0, 1, 31, 40000}) {
    const auto weight = std::make_unique<float[]>(n), m = std::make_unique<float[]>(n),
               v = std::make_unique<float[]>(n);
    const auto grad = std::make_unique<T[]>(n);
    const auto copy = std::make_unique<c10::BFloat16[]>(n);
    const auto half = std::make_unique<c10::Half[]>(n);
    for (double scale : {1., 8.}) {
      adam_pass({{weight.get(), grad.get(), m.get(), v.get(), nullptr, n, dtype, c10::ScalarType::Float, 1},
                 {weight.get(), grad.get(), m.get(), v.get(), copy.get(), n, dtype, c10::ScalarType::BFloat16, 2},
                 {weight.get(), grad.get(), m.get(), v.get(), half.get(), n, dtype, c10::ScalarType::Half, 3}},
                {.1, .9, .99, 1e-8, .1, scale == 1, false, scale != 1, scale});
      ++calls;
    }
  }
  for (int64_t parts : {1, 2}) {
    const float labels[] = {.9f, 0.f};
    const auto logits = std::make_unique<T[]>(parts * 5);
    const auto grad = std::make_unique<float[]>(parts * 5), out = std::make_unique<float[]>(2 * parts);
    for (float* g : {grad.get(), static_cast<float*>(nullptr)}) {
      bce_pass(logits.get(), dtype, parts, 5, labels, out.get(), out.get() + parts, g);
      ++calls;
    }
  }
  for (int64_t width : {1, 5, 70})
    for (int64_t channels : {1, 3}) {
      const int64_t n = 2 * 3 * width * channels;
      const auto pixels = std::make_unique<uint8_t[]>(n);
      const auto out = std::make_unique<T[]>(n);
      const bool flip[] = {false, true};
      images_pass({2, 3, width, channels}, pixels.get(), flip, out.get(), dtype);
      images_pass({2, 3, width, channels}, pixels.get(), nullptr, out.get(), dtype);
      calls += 2;
    }
  return calls;
}

template <class T>
std::unique_ptr<T[]> filled(int64_t n) {
  auto x = std::make_unique<T[]>(n);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<T>(std::sin(static_cast<float>(i)));
  return x;
}

// All three contractions of one geometry by every algorithm; weights as they lie in channels_last.
template <class T>
int contractions(int64_t batch, int64_t channels, int64_t out, const Axis& y, const Axis& x, c10::ScalarType dtype) {
  const int64_t gathered = batch * channels * y.in * x.in, linear = batch * out * y.out * x.out;
  const int64_t weights = channels * out * y.kernel * x.kernel, tap = x.kernel * channels;
  const auto a = filled<T>(gathered), b = filled<T>(linear), w = filled<T>(weights);
  const auto coef = std::make_unique<float[]>(2 * std::max(channels, out)), stats = std::make_unique<float[]>(6 * out);
  const Contraction conv{batch, channels, out, y, x};
  const auto bytes = static_cast<int64_t>(weights * sizeof(T));
  const c10::Storage storage(
      c10::Storage::use_byte_size_t(), bytes, c10::DataPtr(w.get(), c10::DeviceType::CPU), nullptr, false);
  const Weight weight{w.get(), 1, y.kernel * tap, tap, channels, &storage, bytes};
  Epilogue with_stats, activated{coef.get(), coef.get() + out, {3, 0.f}};
  with_stats.stats = stats.get();
  with_stats.stat_groups = batch % 2 ? 1 : 2;
  int calls = 0;
  for (const Epilogue& epilogue : {with_stats, activated})
    for (const Algorithm* algorithm : algorithms(conv, dtype, epilogue.stats != nullptr, false)) {
      algorithm->contract(conv, dtype, a.get(), weight, b.get(), epilogue);
      ++calls;
      if (!algorithm->can_contiguous) continue;
      const Weight contiguous{w.get(), y.kernel * x.kernel, y.kernel * tap, x.kernel, 1, &storage, bytes};
      algorithm->contract(conv, dtype, a.get(), contiguous, b.get(), epilogue);
      ++calls;
    }
  Axis back[2] = {y, x};
  for (Axis& axis : back) {
    std::swap(axis.in, axis.out);
    axis.transposed = true;
  }
  const Epilogue epilogue{coef.get(), coef.get() + channels, {2, .2f}};
  const Weight adjoint{w.get(), y.kernel * tap, 1, tap, channels, &storage, bytes};
  const Contraction transposed{batch, out, channels, back[0], back[1]};
  for (const Algorithm* algorithm : algorithms(transposed, dtype, false, false)) {
    algorithm->contract(transposed, dtype, b.get(), adjoint, a.get(), epilogue);
    ++calls;
    if (!algorithm->can_contiguous) continue;
    const Weight contiguous{w.get(), y.kernel * tap, y.kernel * x.kernel, x.kernel, 1, &storage, bytes};
    algorithm->contract(transposed, dtype, b.get(), contiguous, a.get(), epilogue);
    ++calls;
  }
  for (const Algorithm* algorithm : algorithms(conv, dtype, false, true)) {
    algorithm->weight_grad(conv, dtype, a.get(), b.get(), w.get());
    ++calls;
    if (!algorithm->can_contiguous || !algorithm->can_contiguous(conv, dtype)) continue;
    Contraction contiguous = conv;
    contiguous.contiguous = true;
    algorithm->weight_grad(contiguous, dtype, a.get(), b.get(), w.get());
    ++calls;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (can_reorder_taps(conv.taps())) reorder_taps(w.get(), out, conv.taps(), channels, filled<T>(weights).get());
  }
  const Algorithm* first = algorithms(conv, dtype, false, false)[0];
  first->contract(conv, dtype, a.get(), weight, b.get(), activated);  // with a weight that has changed
  return calls + 1;
}

}  // namespace

// With emulated instructions: what they are for.
#ifdef FASTDCGAN_BF16_EMULATED
constexpr bool kAmxAlone = true;
#else
constexpr bool kAmxAlone = false;

static int passes() {
  int calls = run_training<float>(c10::ScalarType::Float) + run_training<c10::BFloat16>(c10::ScalarType::BFloat16) +
              run_training<c10::Half>(c10::ScalarType::Half);
  for (int64_t groups : {1, 2})
    for (int64_t samples : {0, 3})
      for (int64_t channels : {1, 17, 70})
        for (int64_t pixels : {1, 15, 275})
          for (bool channels_last : {false, true}) {
            const Shape s{groups, samples, channels, pixels, channels_last};
            calls += run<float>(s, c10::ScalarType::Float);
            calls += run<c10::BFloat16>(s, c10::ScalarType::BFloat16);
            calls += run<c10::Half>(s, c10::ScalarType::Half);
          }
  return calls + (rates().copy > 0);
}
#endif

int main() {
  int calls = 0;
  const auto axis = [](int64_t k, int64_t s, int64_t p, int64_t d, int64_t in) {
    return Axis{k, s, p, d, in, (in + 2 * p - d * (k - 1) - 1) / s + 1, false};
  };
  const Axis axes[][2] = {{axis(4, 2, 1, 1, 8), axis(4, 2, 1, 1, 6)}, {axis(2, 1, 1, 1, 2), axis(4, 2, 2, 1, 7)},
                          {axis(4, 1, 0, 1, 4), axis(4, 1, 0, 1, 4)}, {axis(3, 1, 1, 1, 5), axis(1, 1, 0, 1, 3)},
                          {axis(3, 3, 2, 2, 7), axis(2, 3, 4, 3, 5)}, {axis(4, 2, 1, 1, 22), axis(3, 1, 1, 1, 27)},
                          {axis(3, 1, 1, 1, 7), axis(6, 2, 2, 1, 10)},  {axis(3, 1, 1, 1, 13), axis(3, 1, 1, 1, 14)}};
  for (const auto& [y, x] : axes)
    for (int64_t batch : {1, 4})
      for (int64_t channels : {1, 3, 16, 33})
        for (int64_t out : {1, 17, 32}) {
          calls += contractions<c10::BFloat16>(batch, channels, out, y, x, c10::ScalarType::BFloat16);
          calls += contractions<float>(batch, channels, out, y, x, c10::ScalarType::Float);
          if constexpr (!kAmxAlone) calls += contractions<c10::Half>(batch, channels, out, y, x, c10::ScalarType::Half);
        }
#ifndef FASTDCGAN_BF16_EMULATED
  calls += passes();
#endif
  std::printf("%d calls\n", calls);
}
