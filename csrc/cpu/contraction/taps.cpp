#include "cpu/contraction/taps.h"

#include <algorithm>
#include <map>

namespace fastdcgan::cpu {
namespace {

// The remainder is never negative.
int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }

}  // namespace

std::vector<Read> reads(const Axis& axis, int64_t output, bool padded) {
  std::vector<Read> found;
  for (int64_t k = 0; k < axis.kernel; ++k) {
    int64_t input = output * axis.stride - axis.padding + k * axis.dilation;
    if (axis.transposed) {
      const int64_t shifted = output + axis.padding - k * axis.dilation;
      if (modulo(shifted, axis.stride)) continue;
      input = shifted / axis.stride;
    }
    if (padded || (input >= 0 && input < axis.in)) found.push_back({input, k});
  }
  std::sort(found.begin(), found.end());
  return found;
}

std::vector<AxisClass> axis_classes(const Axis& axis, bool padded) {
  std::vector<AxisClass> classes;
  std::map<std::vector<int64_t>, size_t> known;
  for (int64_t o = 0; o < axis.out; ++o) {
    const std::vector<Read> found = reads(axis, o, padded);
    std::vector<int64_t> taps;
    for (const Read& r : found) taps.push_back(r.tap);
    const auto [place, is_new] = known.try_emplace(taps, classes.size());
    if (is_new) classes.push_back({taps, {}, {}, found.size() > 1 ? found[1].input - found[0].input : 1});
    classes[place->second].outputs.push_back(o);
    classes[place->second].first.push_back(found.empty() ? 0 : found[0].input);
  }
  return classes;
}

TapOrder::TapOrder(const Axis& axis) : phase_(axis.kernel), within_(axis.kernel) {
  const int64_t phases = axis.transposed ? axis.stride : 1;
  for (int64_t p = 0; p < phases; ++p) {
    int64_t count = 0;
    for (int64_t i = 0; i < axis.kernel; ++i) {
      const int64_t k = axis.transposed ? axis.kernel - 1 - i : i;
      if (modulo(k * axis.dilation, phases) != p) continue;
      phase_[k] = p;
      within_[k] = count++;
    }
    count_.push_back(count);
  }
}

DepthOrder::DepthOrder(const Axis& y, const Axis& x, int64_t channels, int64_t unit)
    : y_(y), x_(x), channels_(channels), first_{0} {
  for (int64_t py = 0; py < y_.phases(); ++py)
    for (int64_t px = 0; px < x_.phases(); ++px) {
      const int64_t rows = y_.count(py) * x_.count(px) * channels;
      first_.push_back(first_.back() + (rows + unit - 1) / unit * unit);
    }
}

}  // namespace fastdcgan::cpu
