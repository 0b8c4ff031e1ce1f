// The image-side layers against float64, from the definition of a convolution.
#include <memory>
#include <optional>

#include "harness.h"
#include "cuda/image/image_side_conv.cuh"
#include "cuda/image/image_side_transpose.cuh"
#include "cuda/image/image_side_weight_grad.cuh"

using namespace fastdcgan;
using namespace fastdcgan::cuda;
using test::Buffer, test::require;

enum class Prologue { none, activate, gradient, bn_backward };

struct Case {
  int batch, image_channels, wide, height, width;  // of the image
  ImageSideGeometry g;
  Prologue prologue = Prologue::none;  // of the wide operand; the image has the next
  bool image_last = true;              // channels of the image lie together
  size_t offset = 0;                   // 1 keeps the wide tensor from being read in vectors
  int groups = 1;
  bool infinite = false;  // one value of what is read: in the middle of an image, or where no tap comes to

  int small_height() const { return (height + 2 * g.padding_y - g.kernel_y) / g.stride_y + 1; }
  int small_width() const { return (width + 2 * g.padding_x - g.kernel_x) / g.stride_x + 1; }
  std::string name() const {
    const auto text = [](int i) { return std::to_string(i); };
    return text(batch) + "x" + text(image_channels) + "x" + text(height) + "x" + text(width) + " and " + text(wide) +
           " channels, k" + text(g.kernel_y) + text(g.kernel_x) + " s" + text(g.stride_y) + text(g.stride_x) + " p" +
           text(g.padding_y) + text(g.padding_x) + ", prologue " + text(static_cast<int>(prologue)) +
           (image_last ? "" : ", planes") + (offset ? ", misaligned" : "") + (infinite ? ", an infinite value" : "");
  }
};

template <class T>
constexpr double kRounding = sizeof(T) == 4 ? 1.2e-7 : std::is_same_v<T, gpu::bf16> ? 0x1p-8 : 0x1p-11;

// A tensor [batch, channels, height, width] with a prologue, as kernels read it and as doubles.
template <class T>
struct Tensor {
  int batch, channels, height, width, groups;
  bool last;
  size_t offset;
  Buffer<T> x, y;
  Buffer<float> coef;
  ImageSideOperand<T> operand{};

  // `infinite`: the pixel of image 0 whose channel 0 is, or none.
  Tensor(
      const char* name, int n, int c, int h, int w, bool last_, size_t off, Prologue prologue, int groups_,
      unsigned seed, std::optional<std::pair<int, int>> infinite = std::nullopt)
      : batch(n),
        channels(c),
        height(h),
        width(w),
        groups(groups_),
        last(last_),
        offset(off),
        x(name, size_t(n) * c * h * w + off, test::Flush::end, test::alignment<T>(off)),
        y("y", has_y(prologue) ? x.size() : 0, test::Flush::end, test::alignment<T>(off)),
        coef("coef", prologue == Prologue::none ? 0 : size_t(rows(prologue)) * groups_ * c) {
    Buffer<T> finite("finite", x.size());
    test::fill(finite, seed), test::fill(y, seed + 1), test::fill(coef, seed + 2);
    for (size_t i = 0; i < x.size(); ++i) x[i] = finite[i];
    if (infinite)
      x[off + (infinite->first * w + infinite->second) * (last ? c : 1)] = gpu::from_float<T>(HUGE_VALF);
    x.read_only();
    operand = {x.data() + off, has_y(prologue) ? y.data() + off : nullptr, coef.size() ? coef.data() : nullptr,
              int64_t{c} * h * w, last ? int64_t{w} * c : w, last ? c : 1, last ? 1 : int64_t{h} * w, n, c, h, w,
              rows(prologue), groups, {static_cast<int>(ActId::leaky_relu), 0.2f},
              last && c % gpu::kVec<T> == 0 && gpu::aligned(x.data() + off) && gpu::aligned(coef.data())};
  }
  static bool has_y(Prologue p) { return p == Prologue::gradient || p == Prologue::bn_backward; }
  static int rows(Prologue p) { return p == Prologue::none ? 0 : p == Prologue::bn_backward ? 4 : 2; }

  double operator()(int n, int c, int i, int j) const {
    if (i < 0 || i >= height || j < 0 || j >= width) return 0;
    const size_t at = offset + n * operand.step_n + c * operand.step_c + i * operand.step_h + j * operand.step_w;
    const double value = gpu::to_float(x[at]), other = y.size() ? gpu::to_float(y[at]) : 0;
    if (!coef.size()) return value;
    const size_t row = size_t(groups) * channels, k = size_t(n / (batch / groups)) * channels + c;
    const double z = coef[k] * (y.size() ? other : value) + coef[row + k], slope = z > 0 ? 1 : double(0.2f);
    if (!y.size()) return rounded(slope * z);
    return rounded(coef[k] * slope * value + (operand.rows == 4 ? coef[2 * row + k] * other + coef[3 * row + k] : 0));
  }
  // As tensor cores take it.
  static double rounded(double value) {
    return sizeof(T) == 4 ? value : gpu::to_float(gpu::from_float<T>(static_cast<float>(value)));
  }
  // Of a value, which now and then is rounded the other way.
  double error() const { return sizeof(T) == 2 && coef.size() ? kRounding<T> / 2 : 1e-6; }
};

// `got` may err by a rounding, and by the sum of its terms' sizes times `error`.
template <class T>
void close(const char* what, size_t i, T got, double want, double size, double error) {
  const double g = gpu::to_float(got);
  require(std::isfinite(want) || g == want, std::string(what) + "[" + std::to_string(i) + "] is finite");
  require(!std::isfinite(want) || std::abs(g - want) <= kRounding<T> * std::abs(want) + error * size + 1e-6,
          std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(g) + ", not " + std::to_string(want));
}

// The epilogues: nothing, a bias, an activation with the coefficients of each statistics group.
struct Epilogues {
  int channels, groups;
  Buffer<float> bias, coef;

  Epilogues(int c, int g) : channels(c), groups(g), bias("bias", c), coef("e_coef", size_t(2) * g * c) {
    test::fill(bias, 11), test::fill(coef, 12);
  }
  ImageSideEpilogue operator[](int kind) {
    return {static_cast<ImageSideEpilogue::Kind>(kind), kind == 0 ? nullptr : kind == 1 ? bias.data() : coef.data(),
            kind == 2 ? groups : 1, {static_cast<int>(ActId::tanh), 0.f}};
  }
  double apply(int kind, double sum, int group, int c) const {
    if (kind == 0) return sum;
    if (kind == 1) return sum + bias[c];
    return std::tanh(coef[size_t(group) * channels + c] * sum + coef[size_t(groups + group) * channels + c]);
  }
};

// Weights [wide, image_channels, ky, kx], channels_last.
template <class T>
struct WeightValues {
  const Case& c;
  Buffer<T> w;

  explicit WeightValues(const Case& c_) : c(c_), w("weight", size_t(c_.wide) * c_.image_channels * c_.g.taps()) {
    test::fill(w, 5, 0, 0.3f);
  }
  Weights<T> kernel() {
    return {
        w.data(), int64_t{c.g.taps()} * c.image_channels, 1, int64_t{c.g.kernel_x} * c.image_channels,
        c.image_channels};
  }
  double operator()(int a, int b, int ky, int kx) const {
    return gpu::to_float(w[(size_t(a) * c.g.taps() + ky * c.g.kernel_x + kx) * c.image_channels + b]);
  }
};

template <class T>
std::string conv(const Case& c) {
  const int h = c.small_height(), w = c.small_width();
  const Prologue prologue = static_cast<Prologue>((static_cast<int>(c.prologue) + 1) % 4);
  const auto infinite = c.infinite ? std::optional(std::pair(c.height / 2, c.width / 2)) : std::nullopt;
  Tensor<T> x("x", c.batch, c.image_channels, c.height, c.width, c.image_last, 0, prologue, c.groups, 1, infinite);
  WeightValues<T> weight(c);
  Epilogues epilogues(c.wide, c.groups);
  const bool vectors = c.wide % gpu::kVec<T> == 0 && c.offset == 0;
  std::string bytes;
  for (const int kind : {0, 1, 2}) {
    Buffer<T> out("out", size_t(c.batch) * h * w * c.wide + c.offset);
    launch_image_side_conv(
        x.operand, weight.kernel(), c.g, epilogues[kind], out.data() + c.offset, h, w, c.wide, vectors, nullptr);
    for (size_t i = 0; i < out.size() - c.offset; ++i) {
      const int o = i % c.wide, ox = i / c.wide % w, oy = i / c.wide / w % h, n = i / c.wide / w / h;
      double sum = 0, size = 0;
      for (int ky = 0; ky < c.g.kernel_y; ++ky)
        for (int kx = 0; kx < c.g.kernel_x; ++kx)
          for (int ci = 0; ci < c.image_channels; ++ci) {
            const double term =
                x(n, ci, oy * c.g.stride_y - c.g.padding_y + ky, ox * c.g.stride_x - c.g.padding_x + kx) *
                weight(o, ci, ky, kx);
            sum += term, size += std::abs(term);
          }
      close("out", i, out[c.offset + i], epilogues.apply(kind, sum, n / (c.batch / c.groups), o), size, x.error());
    }
    bytes += test::bytes(out);
  }
  return bytes;
}

template <class T>
std::string transpose(const Case& c) {
  const int h = c.small_height(), w = c.small_width();
  const auto infinite = c.infinite ? std::optional(std::pair(h / 2, w / 2)) : std::nullopt;
  Tensor<T> x("x", c.batch, c.wide, h, w, true, c.offset, c.prologue, c.groups, 1, infinite);
  WeightValues<T> weight(c);
  Epilogues epilogues(c.image_channels, c.groups);
  const size_t image = size_t(c.image_channels) * c.height * c.width;
  std::vector<double> sum(c.batch * image), size(c.batch * image);  // NCHW
  for (int n = 0; n < c.batch; ++n)
    for (int iy = 0; iy < h; ++iy)
      for (int ix = 0; ix < w; ++ix)
        for (int ci = 0; ci < c.wide; ++ci) {
          const double value = x(n, ci, iy, ix);
          for (int ky = 0; ky < c.g.kernel_y; ++ky)
            for (int kx = 0; kx < c.g.kernel_x; ++kx) {
              const int oy = iy * c.g.stride_y - c.g.padding_y + ky, ox = ix * c.g.stride_x - c.g.padding_x + kx;
              if (oy < 0 || oy >= c.height || ox < 0 || ox >= c.width) continue;
              for (int o = 0; o < c.image_channels; ++o) {
                const size_t at = ((size_t(n) * c.image_channels + o) * c.height + oy) * c.width + ox;
                const double term = value * weight(ci, o, ky, kx);
                sum[at] += term, size[at] += std::abs(term);
              }
            }
        }
  std::string bytes;
  for (const int kind : {0, 1, 2}) {
    Buffer<T> out("out", c.batch * image);
    const int64_t last[4] = {int64_t(image), int64_t{c.width} * c.image_channels, c.image_channels, 1};
    const int64_t planes[4] = {int64_t(image), c.width, 1, int64_t{c.height} * c.width};
    const auto launch = [&](auto co) {
      launch_image_side_transpose<T, decltype(co)::value>(
          x.operand, weight.kernel(), c.g, epilogues[kind], out.data(), c.height, c.width, c.image_last ? last : planes,
          nullptr);
    };
    if (c.image_channels == 1) launch(std::integral_constant<int, 1>{});
    if (c.image_channels == 2) launch(std::integral_constant<int, 2>{});
    if (c.image_channels == 3) launch(std::integral_constant<int, 3>{});
    if (c.image_channels == 4) launch(std::integral_constant<int, 4>{});
    for (size_t i = 0; i < out.size(); ++i) {
      const int n = i / image, o = i % image / (c.height * c.width), pixel = i % (c.height * c.width);
      const size_t at = c.image_last ? n * image + size_t(pixel) * c.image_channels + o : i;
      close("out", i, out[at], epilogues.apply(kind, sum[i], n / (c.batch / c.groups), o), size[i], x.error());
    }
    bytes += test::bytes(out);
  }
  return bytes;
}

template <class T>
std::string weight_grad(const Case& c) {
  const int h = c.small_height(), w = c.small_width();
  const Prologue prologue = static_cast<Prologue>((static_cast<int>(c.prologue) + 1) % 4);
  const auto infinite = c.infinite ? std::optional(std::pair(c.height - 1, c.width - 1)) : std::nullopt;
  Tensor<T> x("x", c.batch, c.image_channels, c.height, c.width, c.image_last, 0, prologue, c.groups, 1, infinite);
  Tensor<T> linear("linear", c.batch, c.wide, h, w, true, c.offset, c.prologue, c.groups, 4);
  Buffer<T> dw("dw", size_t(c.wide) * c.image_channels * c.g.taps());
  const int64_t steps[4] = {int64_t{c.image_channels} * c.g.taps(), c.g.taps(), c.g.kernel_x, 1};
  std::unique_ptr<Buffer<float>> partials;
  const auto allocate = [&](int64_t count) {
    partials = std::make_unique<Buffer<float>>("partials", count);
    return partials->data();
  };
  image_side_weight_grad_pass(x.operand, linear.operand, c.g, allocate, dw.data(), steps, nullptr);
  std::vector<double> sum(dw.size()), size(dw.size());
  for (int n = 0; n < c.batch; ++n)
    for (int iy = 0; iy < h; ++iy)
      for (int ix = 0; ix < w; ++ix)
        for (int ci = 0; ci < c.image_channels; ++ci)
          for (int ky = 0; ky < c.g.kernel_y; ++ky)
            for (int kx = 0; kx < c.g.kernel_x; ++kx) {
              const double value =
                  x(n, ci, iy * c.g.stride_y - c.g.padding_y + ky, ix * c.g.stride_x - c.g.padding_x + kx);
              for (int a = 0; a < c.wide; ++a) {
                const size_t at = a * steps[0] + ci * steps[1] + ky * steps[2] + kx;
                const double term = value * linear(n, a, iy, ix);
                sum[at] += term, size[at] += std::abs(term);
              }
            }
  for (size_t i = 0; i < dw.size(); ++i) close("dw", i, dw[i], sum[i], size[i], x.error() + linear.error());
  return test::bytes(dw);
}

template <class T>
bool all(const char* type, const Case& c) {
  const std::string name = std::string(type) + " " + c.name();
  bool ok = test::run("conv " + name, [&] { return conv<T>(c); });
  ok &= test::run("conv_transpose " + name, [&] { return transpose<T>(c); });
  ok &= test::run("weight_grad " + name, [&] { return weight_grad<T>(c); });
  return ok;
}

int main() {
  const Case cases[] = {
      {2, 3, 64, 8, 10, {4, 4, 2, 2, 1, 1}, Prologue::gradient},
      {1, 1, 16, 7, 5, {3, 3, 1, 1, 1, 1}, Prologue::none, false},
      {2, 4, 24, 9, 9, {5, 5, 2, 2, 2, 2}, Prologue::bn_backward, true, 1, 2},
      {1, 2, 70, 6, 11, {3, 4, 2, 1, 0, 2}, Prologue::activate, false},
      {1, 4, 17, 37, 6, {5, 4, 1, 2, 4, 0}, Prologue::none},
      {3, 3, 8, 5, 70, {4, 4, 2, 2, 1, 1}, Prologue::none, true, 0, 3},
      {1, 2, 8, 3, 3, {1, 1, 1, 1, 0, 0}, Prologue::gradient},
      {1, 3, 9, 20, 6, {2, 3, 2, 2, 3, 1}, Prologue::activate, true, 1},
      {1, 3, 16, 17, 65, {4, 4, 2, 2, 1, 1}, Prologue::bn_backward},
      {2, 1, 72, 34, 6, {3, 3, 2, 2, 1, 1}, Prologue::gradient, true, 0, 2},
      {1, 2, 16, 8, 8, {3, 2, 2, 2, 0, 0}, Prologue::bn_backward, true, 0, 1, true},
      {1, 1, 129, 17, 9, {1, 1, 1, 1, 0, 0}},
      {1, 4, 12, 5, 67, {5, 5, 2, 2, 2, 2}, Prologue::none, false},
      {4, 1, 8, 6, 6, {5, 5, 1, 1, 2, 2}, Prologue::activate, true, 0, 2},
  };
  bool ok = true;
  cuda_on_cpu::options.multiprocessors = 1;
  for (const Case& c : cases) {
    ok &= all<gpu::bf16>("bf16", c);
    ok &= all<float>("float", c);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(ONE_STORAGE_TYPE)
    ok &= all<gpu::fp16>("fp16", c);
#endif
  }
  // A GPU whose blocks have more.
  cuda_on_cpu::options.shared_bytes = 227 << 10;
  ok &= all<gpu::bf16>("bf16 in 227 KiB", {1, 3, 72, 34, 10, {4, 4, 2, 2, 1, 1}, Prologue::activate});
  const Case lowest{1, 4, 72, 40, 9, {5, 5, 1, 1, 2, 2}};  // no tile fits what is wanted
  ok &= all<gpu::bf16>("bf16 in 227 KiB", lowest) && all<float>("float in 227 KiB", lowest);
  return ok ? 0 : 1;
}
