// Runs contractions on the CPU and compares them with float64. A case is a line of key=value words:
//
//   op=conv|conv_transpose|weight_grad  type=bf16|fp16|tf32|fp32  tile=NUMBER
//   n h w ci co                        of the input; weight_grad: of the gathered operand, and `co` of the linear one
//   kh kw sh sw ph pw dh dw oh ow      geometry, output padding
//   groups                             of statistics and of coefficients
//   left=none|activate|bn_backward     prologue of the gathered operand; `right` that of weight_grad's linear one
//   epilogue=none|bias|activate|stats|grad_stats  act=ID  slope=FLOAT  rows=2|4  splits=COUNT
#pragma once

#include <map>
#include <sstream>
#include <stdexcept>

#include "cuda/gemm/contraction_tiles.cuh"
#include "harness.h"

namespace test {

namespace cuda = fastdcgan::cuda;
namespace gpu = fastdcgan::gpu;
using cuda::Op, cuda::Prologue, cuda::EpilogueKind, cuda::Problem, cuda::Multiplied;
using gpu::bf16, gpu::fp16, gpu::from_float, gpu::to_float;

class Case {
 public:
  explicit Case(const std::string& line) : text(line) {
    std::istringstream words(line);
    for (std::string word; words >> word;) {
      const size_t equals = word.find('=');
      require(equals != std::string::npos, "no key=value: " + word);
      words_[word.substr(0, equals)] = word.substr(equals + 1);
    }
  }
  std::string word(const std::string& key, const std::string& other = "none") const {
    const auto found = words_.find(key);
    return found == words_.end() ? other : found->second;
  }
  int number(const std::string& key, int other) const { return std::stoi(word(key, std::to_string(other))); }
  int one_of(const std::string& key, const std::vector<std::string>& names) const {
    const auto found = std::find(names.begin(), names.end(), word(key));
    require(found != names.end(), key + "=" + word(key) + " is none of them");
    return static_cast<int>(found - names.begin());
  }
  const std::string text;

 private:
  std::map<std::string, std::string> words_;
};

// Forward and derivative in double, from the float64 functors of the common table.
inline double act(int id, double slope, double z, bool derivative) {
  const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
  const auto clamp = [=](double low, double high) {
    return derivative ? z > low && z < high : std::min(std::max(z, low), high);
  };
  const double cdf = .5 * (1 + std::erf(z / std::sqrt(2.))), a = sigmoid(z), u = std::tanh(std::log1p(std::exp(z)));
  switch (id) {
    case 0: return derivative ? 1 : z;
    case 1: return derivative ? z > 0 : std::max(z, 0.);
    case 2: return z > 0 ? (derivative ? 1 : z) : (derivative ? slope : slope * z);
    case 3: return derivative ? 1 - std::tanh(z) * std::tanh(z) : std::tanh(z);
    case 4: return derivative ? a * (1 - a) : a;
    case 5: return derivative ? a * (1 + z * (1 - a)) : z * a;
    case 6: return derivative ? cdf + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI) : z * cdf;
    case 7: return z > 0 ? (derivative ? 1 : z) : slope * (derivative ? std::exp(z) : std::expm1(z));
    case 8: return clamp(0, 6);
    case 9: return clamp(-1, 1);
    case 10: return std::abs(z) >= 3 ? (derivative ? z > 0 : std::max(z, 0.)) : derivative ? z / 3 + .5 : z * (z + 3) / 6;
    case 11: return derivative ? u + z * a * (1 - u * u) : z * u;
    case 12: return derivative ? a : std::log1p(std::exp(z));
    case 13: return derivative ? sigmoid(-z) : -std::log1p(std::exp(-z));
    default: throw std::invalid_argument("no activation has the id " + std::to_string(id));
  }
}

// A tensor [groups*batch, pixels, channels] with its prologue: the buffers, and what it stands for.
template <class T>
struct Input {
  Buffer<T> x, y;
  Buffer<float> coef;
  cuda::Operand<T> operand;
  std::vector<double> value;

  Input(const char* name, unsigned seed, Prologue prologue, const Case& c, int groups, int64_t images, int pixels,
        int channels)
      : x(name, images * pixels * channels), y("y", prologue == Prologue::bn_backward ? x.size() : 0),
        coef("coef", coef_rows(prologue, c) * groups * channels) {
    fill(x, seed), fill(y, seed + 1), fill(coef, seed + 2, .2f, .7f);
    operand.x = x.data(), operand.channels = channels, operand.prologue = prologue, operand.groups = groups;
    operand.act = cuda::RuntimeActivation(c.number("act", 0), std::stof(c.word("slope", "0")));
    operand.affine = prologue == Prologue::bn_backward && c.number("rows", 4) == 4;
    if (y.size() > 0) operand.y = y.data();
    if (coef.size() > 0) operand.coef = coef.data();
    value.resize(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const size_t group = i / (images / groups * pixels * channels);
      const auto row = [&](int r) { return double(coef[(r * groups + group) * channels + i % channels]); };
      const double v = to_float(x[i]);
      double result = v;
      if (prologue == Prologue::activate) {
        result = act(operand.act.id, operand.act.slope, row(0) * v + row(1), false);
      } else if (prologue == Prologue::bn_backward) {
        const double raw = to_float(y[i]);
        result = row(0) * act(operand.act.id, operand.act.slope, row(0) * raw + row(1), true) * v;
        if (operand.affine) result += row(2) * raw + row(3);
      }
      value[i] = prologue == Prologue::none ? v : to_float(from_float<T>(static_cast<float>(result)));
    }
  }

  // No more than are used, so that nothing is read beyond them.
  static int coef_rows(Prologue prologue, const Case& c) {
    return prologue == Prologue::none ? 0 : prologue == Prologue::activate ? 2 : c.number("rows", 4);
  }
};

// The float64 sums of every output, and the sums of the sizes of their terms.
struct Exact {
  std::vector<double> sum, size;
  explicit Exact(size_t n) : sum(n), size(n) {}
  void add(size_t i, double term) { sum[i] += term, size[i] += std::abs(term); }
};

// A contraction with a tile; those for sm_90a have one of their own.
template <Op op, class T, class Math, class Shape>
struct Runner {
  using C = cuda::Contraction<op, Math, Shape>;
  static int64_t slots(const Problem<T>& p) { return cuda::partial_slots<op>(p, C::kM); }
  static void run(const Problem<T>& p, float* workspace) { cuda::run_contraction<C>(p, workspace, nullptr); }
};

template <Op op, class Math, class Shape>
class ContractionTest {
 public:
  using T = typename Math::T;
  using Run = Runner<op, T, Math, Shape>;

  explicit ContractionTest(const Case& c) : c_(c) {
    const auto axis = [&](const char* size, const char* k, const char* s, const char* p, const char* d, const char* o) {
      cuda::Axis a;
      a.size = c.number(size, 1), a.kernel = c.number(k, 1), a.stride = c.number(s, 1), a.padding = c.number(p, 0);
      a.dilation = c.number(d, 1);
      const int reach = a.dilation * (a.kernel - 1) + 1;
      a.pixels = op == Op::conv_transpose ? (a.size - 1) * a.stride - 2 * a.padding + reach + c.number(o, 0)
                                          : (a.size + 2 * a.padding - reach) / a.stride + 1;
      require(a.pixels > 0, "no output");
      return a;
    };
    p_.rows = axis("h", "kh", "sh", "ph", "dh", "oh"), p_.columns = axis("w", "kw", "sw", "pw", "dw", "ow");
    p_.groups = c.number("groups", 1), p_.batch = c.number("n", 1) / p_.groups, p_.splits = c.number("splits", 1);
    ci_ = c.number("ci", 8), co_ = c.number("co", 8), images_ = p_.groups * p_.batch;
    out_pixels_ = p_.rows.pixels * p_.columns.pixels, taps_ = p_.rows.kernel * p_.columns.kernel;
  }

  std::string operator()() {
    const std::vector<std::string> prologues = {"none", "activate", "bn_backward"};
    Input<T> gathered("gathered", 1, static_cast<Prologue>(c_.one_of("left", prologues)), c_, p_.groups, images_,
                      p_.rows.size * p_.columns.size, ci_);
    p_.gathered = gathered.operand;
    return op == Op::weight_grad ? weight_grad(gathered, prologues) : convolution(gathered);
  }

 private:
  // What rounding may do: of the output, of an operand that a prologue rounds the other way, of the sums.
  double allowed(double want, double size) const {
    const double unit = std::is_same_v<T, bf16> ? 0x1p-8 : std::is_same_v<T, fp16> ? 0x1p-11 : 0x1p-23;
    const bool prologue = c_.word("left") != "none" || c_.word("right") != "none";
    const double inner = sizeof(T) == 2 ? (prologue ? unit / 2 : 0x1p-18) : Math::kExact ? 0x1p-19 : 0x1p-10;
    return unit * std::abs(want) + inner * size + 1e-7;
  }

  void check(const char* name, size_t i, double got, double want, double tolerance) const {
    require(std::abs(got - want) <= tolerance, std::string(name) + "[" + std::to_string(i) + "] is " +
                                                   std::to_string(got) + ", not " + std::to_string(want) + " within " +
                                                   std::to_string(tolerance));
  }

  std::string weight_grad(const Input<T>& gathered, const std::vector<std::string>& prologues) {
    Input<T> linear("linear", 11, static_cast<Prologue>(c_.one_of("right", prologues)), c_, p_.groups, images_,
                    out_pixels_, co_);
    p_.other = linear.operand;
    Buffer<T> out("out", size_t(co_) * taps_ * ci_);
    Buffer<float> workspace("workspace", (p_.epilogue.channels = ci_, cuda::workspace_size<op>(p_)), Flush::end, 16);
    p_.epilogue.out = out.data();
    Run::run(p_, p_.splits > 1 ? workspace.data() : nullptr);
    Exact exact(out.size());
    each_pair([&](int64_t from, int64_t to, int tap) {
      for (int o = 0; o < co_; ++o)
        for (int i = 0; i < ci_; ++i)
          exact.add((size_t(o) * taps_ + tap) * ci_ + i, gathered.value[from * ci_ + i] * linear.value[to * co_ + o]);
    });
    for (size_t i = 0; i < out.size(); ++i)
      check("dw", i, to_float(out[i]), exact.sum[i], allowed(exact.sum[i], exact.size[i]));
    return bytes(out);
  }

  // Calls f(pixel of the gathered operand, pixel of the other grid, tap) for every pair that a tap joins.
  template <class F>
  void each_pair(F f) const {
    const cuda::Axis &r = p_.rows, &s = p_.columns;
    const bool transposed = op == Op::conv_transpose;  // the strided grid is then the gathered one
    const int grid_h = transposed ? r.size : r.pixels, grid_w = transposed ? s.size : s.pixels;
    const int image_h = transposed ? r.pixels : r.size, image_w = transposed ? s.pixels : s.size;
    for (int n = 0; n < images_; ++n)
      for (int q = 0; q < grid_h; ++q)
        for (int t = 0; t < grid_w; ++t)
          for (int tap = 0; tap < taps_; ++tap) {
            const int y = q * r.stride - r.padding + tap / s.kernel * r.dilation;
            const int x = t * s.stride - s.padding + tap % s.kernel * s.dilation;
            if (y < 0 || y >= image_h || x < 0 || x >= image_w) continue;
            const int64_t of_image = (int64_t(n) * image_h + y) * image_w + x;
            const int64_t of_grid = (int64_t(n) * grid_h + q) * grid_w + t;
            transposed ? f(of_grid, of_image, tap) : f(of_image, of_grid, tap);
          }
  }

  std::string convolution(const Input<T>& gathered) {
    constexpr bool kTransposed = op == Op::conv_transpose;
    const int epilogue = c_.one_of("epilogue", {"none", "bias", "activate", "stats", "grad_stats"});
    const EpilogueKind kind = static_cast<EpilogueKind>(epilogue);
    const int rows = kind == EpilogueKind::activate ? 2 : c_.number("rows", 4), groups = p_.groups;
    const size_t values = size_t(images_) * out_pixels_ * co_;
    Buffer<T> weight("weight", size_t(co_) * taps_ * ci_), out("out", values);
    Buffer<T> y("e_y", kind == EpilogueKind::grad_stats ? values : 0);
    const bool with_coef = kind == EpilogueKind::activate || kind == EpilogueKind::grad_stats;
    Buffer<float> coef("e_coef", kind == EpilogueKind::bias ? co_ : with_coef ? rows * groups * co_ : 0);
    fill(weight, 21, 0, 1 / std::sqrt(float(taps_ * ci_))), fill(y, 22), fill(coef, 23, .2f, .7f);
    p_.other.x = weight.data();
    cuda::Epilogue<T>& f = p_.epilogue;
    f = {};
    f.out = out.data(), f.kind = kind, f.channels = co_, f.coef_rows = rows, f.coef_groups = groups;
    f.act = cuda::RuntimeActivation(c_.number("act", 0), std::stof(c_.word("slope", "0")));
    if (y.size() > 0) f.y = y.data();
    if (coef.size() > 0) f.coef = coef.data();
    const int64_t slots = Run::slots(p_);
    Buffer<float> partials("partials", groups * slots * f.rows() * co_);
    f.partials = partials.data();
    Buffer<float> workspace("workspace", cuda::workspace_size<op>(p_), Flush::end, 16);
    Run::run(p_, p_.splits > 1 ? workspace.data() : nullptr);

    Exact exact(values);
    each_pair([&](int64_t from, int64_t to, int tap) {
      for (int o = 0; o < co_; ++o)
        for (int i = 0; i < ci_; ++i) {
          const size_t at = kTransposed ? (size_t(i) * taps_ + tap) * co_ + o : (size_t(o) * taps_ + tap) * ci_ + i;
          exact.add(to * co_ + o, gathered.value[from * ci_ + i] * to_float(weight[at]));
        }
    });
    const int64_t group_values = int64_t(p_.batch) * out_pixels_ * co_;
    const auto coefficient = [&](int row, size_t i) {
      return double(coef[(row * groups + i / group_values) * co_ + i % co_]);
    };
    // Per group and channel: the expected partials' sums, of what is stored, and the sizes of their terms.
    std::vector<std::vector<double>> want(3, std::vector<double>(groups * co_)), size = want;
    for (size_t i = 0; i < values; ++i) {
      double v = exact.sum[i], spread = exact.size[i], raw = y.size() > 0 ? to_float(y[i]) : 0;
      const int id = f.act.id;
      const size_t at = i / group_values * co_ + i % co_;
      if (kind == EpilogueKind::bias) v += coef[i % co_];
      if (kind == EpilogueKind::activate) {
        spread *= std::abs(coefficient(0, i)) * 1.5, v = coefficient(0, i) * v + coefficient(1, i);
        spread += std::abs(v) / 64, v = act(id, f.act.slope, v, false);
      }
      if (kind == EpilogueKind::grad_stats) {
        const double slope = act(id, f.act.slope, coefficient(0, i) * raw + coefficient(1, i), true);
        v *= slope, spread *= std::abs(slope);
      }
      const double stored = to_float(out[i]);
      check("out", i, stored, v, allowed(v, spread));
      const double xhat = rows == 4 && y.size() > 0 ? (raw - coefficient(2, i)) * coefficient(3, i) : 0;
      const double second = stored * (kind == EpilogueKind::stats ? stored : xhat);
      want[0][at] += stored, size[0][at] += std::abs(stored);
      want[1][at] += second, size[1][at] += std::abs(second);
    }
    if (f.rows() > 0) check_partials(f, partials, slots, want, size);
    return bytes(out) + bytes(partials);
  }

  void check_partials(
      const cuda::Epilogue<T>& f, const Buffer<float>& partials, int64_t slots,
      const std::vector<std::vector<double>>& want, const std::vector<std::vector<double>>& size) const {
    const double count = double(p_.batch) * out_pixels_, inner = 0x1p-19;  // of sums of floats
    for (int group = 0; group < p_.groups; ++group)
      for (int channel = 0; channel < co_; ++channel) {
        double got[3] = {};
        fastdcgan::Moments<double> all;
        for (int64_t slot = 0; slot < slots; ++slot) {
          const auto row = [&](int r) {
            return double(partials[((group * slots + slot) * f.rows() + r) * co_ + channel]);
          };
          for (int r = 0; r < f.rows(); ++r) got[r] += row(r);
          if (f.kind == EpilogueKind::stats) all.merge({row(0), row(1), row(2)});
        }
        const size_t at = group * co_ + channel;
        if (f.kind == EpilogueKind::stats) {
          const double mean = want[0][at] / count, m2 = want[1][at] - want[0][at] * mean;
          const double slack = inner * size[0][at] / count + 1e-6;
          check("count", at, all.count, count, 0);
          check("mean", at, all.mean, mean, slack);
          check("M2", at, all.m2, m2, slack * 8 * std::sqrt(count * (m2 + 1)) + 1e-6 * m2);
        } else {
          for (int r = 0; r < f.rows(); ++r)
            check(r == 0 ? "sum(g)" : "sum(g*xhat)", at, got[r], want[r][at], inner * size[r][at] + 1e-5);
        }
      }
  }

  const Case& c_;
  Problem<T> p_;
  int ci_, co_, images_, out_pixels_, taps_;
};

// Runs a case of one of `ops`.
template <class Math, class Shape, Op... ops>
bool run_case(const Case& c) {
  const Op op = static_cast<Op>(c.one_of("op", {"conv", "conv_transpose", "weight_grad"}));
  bool ok = false;
  const auto once = [&](auto test) { return ok = run(c.text, [&] { return test(); }), true; };
  const bool known = ((op == ops && once(ContractionTest<ops, Math, Shape>(c))) || ...);
  require(known, "not compiled: " + c.text);
  return ok;
}

template <class Math, class Shape>
bool run_any_case(const Case& c) {
  return run_case<Math, Shape, Op::conv, Op::conv_transpose, Op::weight_grad>(c);
}

// Runs the cases that the arguments are; `once(case)` runs one. The exit code of main.
template <class Once>
int run_arguments(int argc, char** argv, Once once) {
  bool ok = argc > 1;
  for (int i = 1; i < argc; ++i) ok &= once(Case(argv[i]));
  return ok ? 0 : 1;
}

}  // namespace test
