// Which inputs each output of a contraction reads, and through which taps of the weight.
#pragma once

#include <cstdint>
#include <vector>

namespace fastdcgan::cpu {

// One axis of a convolution (output o reads inputs o*stride - padding + tap*dilation) or of its adjoint (input i adds
// to outputs i*stride - padding + tap*dilation).
struct Axis {
  int64_t kernel, stride, padding, dilation, in, out;
  bool transposed;
};

struct Read {
  int64_t input, tap;

  bool operator<(const Read& other) const { return input < other.input; }
};

// What an output reads, in the order of the inputs; `padded`: outside the input too.
std::vector<Read> reads(const Axis&, int64_t output, bool padded);

// Outputs along an axis that read through the same taps.
struct AxisClass {
  std::vector<int64_t> taps;     // in the order of the inputs that they read
  std::vector<int64_t> outputs;
  std::vector<int64_t> first;    // for each output, the input that taps[0] reads
  int64_t step = 1;              // from the input of one tap to that of the next
};

// All outputs, by class. `padded`: taps that read outside the input belong to a class all the same (`first` is then
// negative, or too large), so that there are fewer classes.
std::vector<AxisClass> axis_classes(const Axis&, bool padded);

// The taps of an axis sorted by phase, within a phase by the inputs that they read: those of one class are neighbours.
class TapOrder {
 public:
  explicit TapOrder(const Axis&);
  int64_t phases() const { return static_cast<int64_t>(count_.size()); }
  int64_t phase(int64_t tap) const { return phase_[tap]; }
  int64_t count(int64_t phase) const { return count_[phase]; }  // of its taps
  int64_t within(int64_t tap) const { return within_[tap]; }

 private:
  std::vector<int64_t> phase_, within_, count_;
};

// The order of a weight's rows when it is packed: by phase along y, phase along x, tap, input channel. The rows of a
// phase are filled up to a multiple of `unit`.
class DepthOrder {
 public:
  DepthOrder(const Axis& y, const Axis& x, int64_t channels, int64_t unit);
  int64_t rows() const { return first_.back(); }
  // The row of the first channel of a tap.
  int64_t row(int64_t ky, int64_t kx) const {
    const int64_t py = y_.phase(ky), px = x_.phase(kx);
    return first_[py * x_.phases() + px] + (y_.within(ky) * x_.count(px) + x_.within(kx)) * channels_;
  }

 private:
  TapOrder y_, x_;
  int64_t channels_;
  std::vector<int64_t> first_;
};

}  // namespace fastdcgan::cpu
