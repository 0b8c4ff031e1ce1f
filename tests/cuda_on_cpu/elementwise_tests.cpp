// Elementwise passes and reductions against float64: layouts, ragged sizes, groups, addresses that allow no vectors.
#include <memory>
#include <type_traits>

#include "cuda/elementwise/batch_stats.cuh"
#include "cuda/elementwise/coefficients.cuh"
#include "cuda/elementwise/grad_sums.cuh"
#include "harness.h"
#include "cuda/elementwise/norm_act.cuh"

using namespace fastdcgan;
using namespace fastdcgan::cuda;
using test::Buffer, test::require;

// What kernels get and give, with `offset` elements before: 1 keeps an address from being a vector's.
template <class T>
struct Values {
  Buffer<T> all;
  size_t offset;

  Values(const char* name, int64_t count, size_t off)
      : all(name, count + off, test::Flush::end, test::alignment<T>(off)), offset(off) {}
  T* data() { return all.data() + offset; }
  double operator[](size_t i) const { return gpu::to_float(all[offset + i]); }
};

struct Case {
  Shape shape;
  size_t offset;
  int multiprocessors;

  std::string name() const {
    return std::to_string(shape.groups) + "x" + std::to_string(shape.batch) + "x" + std::to_string(shape.channels) +
           "x" + std::to_string(shape.pixels) + (shape.channels_last ? " channels_last" : " contiguous") +
           (offset ? " misaligned" : "");
  }
  // The channel vector's element of element `i`.
  size_t vector_index(size_t i) const {
    const size_t image = shape.channels * shape.pixels, group = i / (shape.batch * image);
    const size_t channel = shape.channels_last ? i % shape.channels : i / shape.pixels % shape.channels;
    return group * shape.channels + channel;
  }
  size_t vectors() const { return shape.groups * shape.channels; }
  double count() const { return double(shape.batch) * shape.pixels; }
};

// Memory for partial results, as torch would give it: gone with this object.
class Scratch {
 public:
  float* operator()(int64_t size) {
    buffer_ = std::make_unique<Buffer<float>>("partials", size);
    return buffer_->data();
  }

 private:
  std::unique_ptr<Buffer<float>> buffer_;
};

template <class T>
constexpr double kRounding = sizeof(T) == 4 ? 1.2e-7 : std::is_same_v<T, gpu::bf16> ? 0x1p-8 : 0x1p-11;

template <class T>
void compare(const char* name, Values<T>& got, const Case& c, const std::function<double(size_t)>& want) {
  for (size_t i = 0; i < size_t(c.shape.size()); ++i) {
    const double g = got[i], w = want(i);
    require(std::abs(g - w) <= kRounding<T> * std::abs(w) + 2e-6 * (1 + std::abs(w)),
            std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(g) + ", not " + std::to_string(w));
  }
}

const LeakyReLU<float> kLeaky(0.2f);

// Calls `f` with LeakyReLU, or with the slopes that are the last of an odd number of rows.
template <class F>
void with_slopes(int rows, F&& f) {
  rows % 2 ? f(LearnedSlope{rows - 1}) : f(kLeaky);
}

template <class T>
std::string elementwise(const Case& c) {
  Values<T> y("y", c.shape.size(), c.offset), da("da", c.shape.size(), c.offset);
  Values<T> out("out", c.shape.size(), c.offset), dy("dy", c.shape.size(), c.offset);
  Buffer<float> coef("coef", 5 * c.vectors());
  test::fill(y.all, 1), test::fill(da.all, 2), test::fill(coef, 3);
  const auto row = [&](int r, size_t i) { return double(coef[r * c.vectors() + c.vector_index(i)]); };
  const auto z = [&](size_t i) { return row(0, i) * y[i] + row(1, i); };
  std::string bytes;

  for (const int rows : {4, 2, 5, 3}) {
    const auto derivative = [&](size_t i) { return z(i) > 0 ? 1 : rows % 2 ? row(rows - 1, i) : double(0.2f); };
    with_slopes(rows, [&](auto act) { norm_act_pass(c.shape, y.data(), coef.data(), act, out.data(), nullptr); });
    compare("out", out, c, [&](size_t i) { return derivative(i) * z(i); });
    with_slopes(rows, [&](auto act) {
      norm_act_backward_pass(c.shape, da.data(), y.data(), coef.data(), rows, act, dy.data(), nullptr);
    });
    compare("dy", dy, c, [&](size_t i) {
      const double g = row(0, i) * derivative(i) * da[i];
      return rows >= 4 ? g + row(2, i) * y[i] + row(3, i) : g;
    });
    bytes += test::bytes(out.all) + test::bytes(dy.all);
  }
  return bytes;
}

template <class T>
std::string gradient_sums(const Case& c) {
  Values<T> y("y", c.shape.size(), c.offset), da("da", c.shape.size(), c.offset);
  Buffer<float> coef("coef", 5 * c.vectors());
  test::fill(y.all, 1), test::fill(da.all, 2), test::fill(coef, 3);
  const auto row = [&](int r, size_t i) { return double(coef[r * c.vectors() + c.vector_index(i)]); };
  const auto z = [&](size_t i) { return row(0, i) * y[i] + row(1, i); };

  std::string bytes;
  for (const int rows : {4, 2, 5, 3})
    for (const bool stored : {false, true}) {
      Scratch scratch;
      Buffer<float> sums("sums", (rows + 1) / 2 * c.vectors());
      const auto g_of = [&](size_t i) { return (z(i) > 0 ? 1 : rows % 2 ? row(rows - 1, i) : double(0.2f)) * da[i]; };
      Values<T> g("g", c.shape.size(), c.offset);
      with_slopes(rows, [&](auto act) {
        grad_sums_pass(c.shape, da.data(), y.data(), coef.data(), rows, act, stored ? g.data() : nullptr,
                       std::ref(scratch), sums.data(), nullptr);
      });
      if (stored) compare("g", g, c, g_of);
      std::vector<double> want(3 * c.vectors()), size(3 * c.vectors(), 1e-30);
      for (size_t i = 0; i < size_t(c.shape.size()); ++i) {
        const double summed = stored ? double(g[i]) : g_of(i), with_xhat = summed * (y[i] - row(2, i)) * row(3, i);
        const size_t at = c.vector_index(i);
        const auto add = [&](int sum, double term, double rounded) {
          want[sum * c.vectors() + at] += term, size[sum * c.vectors() + at] += std::abs(rounded);
        };
        add(0, summed, summed);
        if (rows >= 4) add(1, with_xhat, with_xhat);
        const double terms_of_z = std::abs(row(0, i) * y[i]) + std::abs(row(1, i));
        if (rows % 2) add(rows / 2, std::min(z(i), 0.) * da[i], terms_of_z * da[i]);
      }
      for (size_t i = 0; i < sums.size(); ++i)
        require(std::abs(sums[i] - want[i]) <= 2e-6 * size[i],
                "sum " + std::to_string(i) + " is " + std::to_string(sums[i]) + ", not " + std::to_string(want[i]));
      bytes += test::bytes(sums) + (stored ? test::bytes(g.all) : "");
    }
  return bytes;
}

template <class T>
std::string statistics(const Case& c) {
  Values<T> y("y", c.shape.size(), c.offset);
  test::fill(y.all, 1, 100, 0.5f);  // a mean of 200 deviations
  std::vector<double> mean(c.vectors()), m2(c.vectors());
  for (size_t i = 0; i < size_t(c.shape.size()); ++i) mean[c.vector_index(i)] += y[i] / c.count();
  for (size_t i = 0; i < size_t(c.shape.size()); ++i)
    m2[c.vector_index(i)] += std::pow(y[i] - mean[c.vector_index(i)], 2);

  Scratch scratch;
  Buffer<float> stats("stats", 3 * c.vectors());
  batch_stats_pass(c.shape, y.data(), std::ref(scratch), stats.data(), nullptr);
  for (size_t i = 0; i < c.vectors(); ++i) {
    const double want[] = {mean[i], m2[i] / c.count(), m2[i] / (c.count() - 1)};
    for (int row = 0; row < 3; ++row) {
      const double got = stats[row * c.vectors() + i];
      if (c.count() == 1 && row == 2) {
        require(got != got, "the unbiased variance of one value is not NaN");
        continue;
      }
      require(std::abs(got - want[row]) <= (row ? 4e-5 : 3e-7) * std::abs(want[row]) + 1e-12,
              "statistic " + std::to_string(row) + " of " + std::to_string(i) + " is " + std::to_string(got) +
                  ", not " + std::to_string(want[row]));
    }
  }
  return test::bytes(stats);
}

// --- the pass --------------------------------------------------------------------------------------------------------

// What a pass through bf16 tensors is on a device with 100 multiprocessors and 4 blocks on each.
struct PassCase {
  Shape shape;
  bool aligned;
  int vector, fold, width;
  unsigned items, x, y, z;
};

std::string passes() {
  const PassCase cases[] = {
      // The device is as full with 64 channels as with 512, with one group as with two.
      {{1, 128, 64, 1024, true}, true, 8, 1, 8, 131072, 1, 400, 1},
      {{1, 128, 512, 16, true}, true, 8, 1, 32, 2048, 2, 200, 1},
      {{2, 64, 64, 1024, true}, true, 8, 1, 8, 65536, 1, 200, 2},
      // No more blocks than there are rows for, and no more than run at once.
      {{1, 2, 64, 20, true}, true, 8, 1, 8, 40, 1, 2, 1},
      {{1, 128, 1280, 1024, true}, true, 8, 1, 32, 131072, 5, 80, 1},
      {{1, 128, 1536, 1024, true}, true, 8, 1, 32, 131072, 6, 66, 1},
      // Pixels side by side where that makes vectors; one value at a time where nothing does.
      {{1, 8, 65, 1024, true}, true, 8, 8, 32, 1024, 3, 128, 1},
      {{1, 8, 3, 1024, true}, true, 8, 8, 4, 1024, 1, 16, 1},
      {{1, 8, 12, 1024, true}, true, 8, 2, 4, 4096, 1, 64, 1},
      {{1, 1, 65, 9, true}, true, 1, 1, 32, 9, 3, 2, 1},
      {{1, 8, 64, 1024, true}, false, 1, 1, 32, 8192, 2, 200, 1},
      // Planes: a channel to a block, or several blocks to a channel.
      {{1, 8, 64, 4096, false}, true, 8, 1, 1, 4096, 64, 6, 1},
      {{2, 4, 1000, 64, false}, true, 8, 1, 1, 32, 1000, 1, 2},
      {{1, 8, 64, 9, false}, true, 1, 1, 1, 72, 64, 1, 1},
      {{1, 8, 64, 4096, false}, false, 1, 1, 1, 32768, 64, 6, 1},
      // A block at the least for each column; columns of one vector.
      {{1, 8, 1000, 4096, false}, true, 8, 1, 1, 4096, 1000, 1, 1},
      {{1, 8, 8, 1024, true}, true, 8, 1, 1, 8192, 1, 32, 1},
  };
  cuda_on_cpu::options.multiprocessors = 100;
  alignas(16) static char memory[32];
  for (const PassCase& c : cases) {
    const void* at = memory + (c.aligned ? 0 : 2);
    const Pass w = make_pass<gpu::bf16>(c.shape, 4, memory, at);
    const bool same = w.vector == c.vector && w.fold == c.fold && w.width == c.width && w.items == c.items &&
                      w.grid.x == c.x && w.grid.y == c.y && w.grid.z == c.z;
    require(same, "the pass through " + Case{c.shape, 0, 100}.name() + ": vector " + std::to_string(w.vector) +
                      ", fold " + std::to_string(w.fold) + ", width " + std::to_string(w.width) + ", items " +
                      std::to_string(w.items) + ", grid " + std::to_string(w.grid.x) + "x" +
                      std::to_string(w.grid.y) + "x" + std::to_string(w.grid.z));
  }
  return {};
}

// The functor chosen while a kernel runs is that of the id, for every id and for no other.
std::string activations() {
  require(!known_activation(-1) && !known_activation(14), "ids that no activation has");
  for (int id = 0; id < 14; ++id) {
    require(known_activation(id), "id " + std::to_string(id));
    const Activation act{id, 0.3f};
    for (const float z : {-2.f, -0.5f, 0.f, 0.25f, 3.f}) {
      const auto same = [&](const auto& functor) {
        require(static_cast<int>(functor.id) == id, "the functor of " + std::to_string(id));
        float any[2] = {z, -z}, own[2] = {z, -z};
        activate(act.any(), any), activate(functor, own);
        require(any[0] == own[0] && any[1] == own[1], "forward of " + std::to_string(id));
        any[0] = own[0] = z, any[1] = own[1] = -z;
        differentiate(act.any(), any), differentiate(functor, own);
        require(any[0] == own[0] && any[1] == own[1], "derivative of " + std::to_string(id));
      };
      require(with_activation<float>(id, 0.3f, same), "an activation");
      with_functor(act, same);
    }
  }
  return {};
}

// --- vectors per channel ---------------------------------------------------------------------------------------------

std::string vectors_per_channel(int64_t groups, int64_t channels, bool given) {
  const int64_t row = groups * channels;
  Buffer<float> mean("mean", row), var("var", row), weight("weight", channels), bias("bias", channels),
      shift("shift", channels), coef("coef", 4 * row), sums("sums", 2 * row), grad_coef("grad_coef", 4 * row);
  test::fill(mean, 1), test::fill(var, 2, 1, 0.05f), test::fill(weight, 3), test::fill(bias, 4), test::fill(shift, 5);
  test::fill(sums, 6);
  const float *w = given ? weight.data() : nullptr, *b = given ? bias.data() : nullptr;
  const float* moved = given ? shift.data() : nullptr;
  const double eps = 1e-2, count = 37;

  gpu::launch(coefficients<>, {"coefficients", vector_grid(row), kVectorThreads}, mean.data(), var.data(), w, b, moved,
              eps, groups, channels, coef.data());
  test::compare("coef", coef, [&](size_t i) {
    const size_t at = i % row, c = at % channels;
    const double m = mean[at] - (given ? double(shift[c]) : 0), r = 1 / std::sqrt(var[at] + eps);
    const double s = (given ? double(weight[c]) : 1) * r, t = (given ? double(bias[c]) : 0) - m * s;
    return (double[]){s, t, m, r}[i / row];
  }, 1.2e-7);

  gpu::launch(grad_coefficients<>, {"grad_coefficients", vector_grid(row), kVectorThreads}, sums.data(), coef.data(),
              count, row, grad_coef.data());
  test::compare("grad_coef", grad_coef, [&](size_t i) {
    const size_t at = i % row;
    const double s = coef[at], p = -s * coef[3 * row + at] * sums[row + at] / count;
    return (double[]){s, coef[row + at], p, -s * sums[at] / count - p * coef[2 * row + at]}[i / row];
  }, 1.2e-7);
  return test::bytes(coef) + test::bytes(grad_coef);
}

// running = w*batch + (1 - w)*running, group after group; `weights`: a factor for each group, or the momentum for all.
std::string running(int64_t groups, int64_t channels, bool weights, bool shifted) {
  Buffer<float> mean("mean", channels), var("var", channels), stats("stats", 3 * groups * channels),
      shift("shift", channels), factor("factor", groups);
  std::vector<double> want_mean(channels), want_var(channels);
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = 0.25f * c, var[c] = 1 + 0.5f * c;
    want_mean[c] = mean[c], want_var[c] = var[c];
  }
  test::fill(stats, 1), test::fill(shift, 2), test::fill(factor, 3, 0.4f, 0.1f);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < channels; ++c) {
      const double w = weights ? factor[g] : 0.1f;
      want_mean[c] = w * (stats[g * channels + c] + (shifted ? shift[c] : 0.f)) + (1 - w) * want_mean[c];
      want_var[c] = w * stats[(2 * groups + g) * channels + c] + (1 - w) * want_var[c];
    }
  gpu::launch(
      update_running<>, {"update_running", vector_grid(channels), kVectorThreads}, mean.data(), var.data(),
      stats.data(), shifted ? shift.data() : nullptr, weights ? factor.data() : nullptr, 0.1f, groups, channels);
  test::compare("running mean", mean, [&](size_t c) { return want_mean[c]; }, 4e-7);
  test::compare("running variance", var, [&](size_t c) { return want_var[c]; }, 4e-7);
  return test::bytes(mean) + test::bytes(var);
}

// ---------------------------------------------------------------------------------------------------------------------

template <class T>
bool all(const char* type, const Case& c) {
  cuda_on_cpu::options.multiprocessors = c.multiprocessors;
  const std::string name = std::string(type) + " " + c.name();
  bool ok = test::run("norm_act " + name, [&] { return elementwise<T>(c); });
  ok &= test::run("grad_sums " + name, [&] { return gradient_sums<T>(c); });
  ok &= test::run("batch_stats " + name, [&] { return statistics<T>(c); });
  return ok;
}

int main() {
  const Case cases[] = {
      // Whole vectors; one row of columns and two; many turns of one block.
      {{1, 3, 64, 20, true}, 0, 1},
      {{2, 1, 520, 6, true}, 0, 1},
      {{1, 30, 8, 300, true}, 0, 1},
      // Columns that are no power of two of vectors; pixels folded into rows.
      {{2, 2, 24, 35, true}, 0, 1},
      {{1, 4, 3, 94, true}, 0, 2},
      {{2, 2, 3, 16, true}, 0, 2},
      // More partial results of a channel than the threads that join them load at once.
      {{1, 4, 3, 2200, true}, 0, 5},
      {{1, 8, 65, 9, true}, 0, 1},
      // One value at a time: rows that don't fold, an address between vectors.
      {{1, 3, 3, 7, true}, 0, 2},
      {{3, 1, 37, 11, true}, 0, 1},
      {{1, 2, 16, 50, true}, 1, 1},
      {{1, 1, 5, 1, true}, 0, 1},
      // Planes of many vectors, of one, and of none.
      {{2, 3, 5, 64, false}, 0, 1},
      {{1, 2, 2, 4096, false}, 0, 2},
      {{1, 70, 3, 16, false}, 0, 1},
      {{2, 2, 3, 35, false}, 0, 1},
      {{1, 3, 5, 4, false}, 0, 1},
      {{1, 2, 2, 24, false}, 1, 1},
  };
  bool ok = test::run("passes", passes);
  ok &= test::run("activations", activations);
  for (const Case& c : cases) {
    ok &= all<gpu::bf16>("bf16", c);
    // The same code of another vector size.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(ONE_STORAGE_TYPE)
    ok &= all<float>("float", c);
#endif
  }
  for (const bool given : {false, true}) {
    ok &= test::run("vectors per channel", [&] { return vectors_per_channel(2, 133, given); });
    for (const bool weights : {false, true})
      ok &= test::run("running statistics", [&] { return running(3, 133, weights, given); });
  }
  return ok ? 0 : 1;
}
