// Adam, the loss and the images' normalisation against float64.
#include <deque>
#include <memory>

#include "cuda/train/adam.cuh"
#include "cuda/train/bce.cuh"
#include "harness.h"
#include "cuda/train/images.cuh"

using namespace fastdcgan;
using namespace fastdcgan::cuda;
using gpu::bf16, gpu::fp16;
using test::Buffer, test::require;

// --- Adam ------------------------------------------------------------------------------------------------------------

struct AdamCase {
  const char* name;
  double weight_decay = 0;
  bool decoupled = false, maximize = false;
  float grad_scale = 1;
  bool lr_on_device = false;
  size_t offset = 0;  // elements before: 1 keeps an address from being a vector's
  bool masters = false;
};

// A parameter with everything that belongs to it, and the same in double.
struct Parameter {
  // Each begins at a vector, and what is used of it `off` elements later.
  template <class T>
  struct Numbers : Buffer<T> {
    Numbers(const char* name, size_t n) : Buffer<T>(name, n, test::Flush::end, 16) {}
  };

  Storage grads, copied;
  size_t offset, size;
  Numbers<float> weight, m, v;
  Buffer<float> steps;
  Numbers<float> grad32;
  Numbers<bf16> grad_bf16, copy_bf16;
  Numbers<fp16> grad_fp16, copy_fp16;
  std::vector<double> want_weight, want_m, want_v;

  Parameter(size_t n, Storage g, Storage c, size_t off)
      : grads(g), copied(c), offset(off), size(n), weight("weight", n + off), m("exp_avg", n + off),
        v("exp_avg_sq", n + off), steps("steps", n == 0 ? 1 : (n + Adam::kChunk - 1) / Adam::kChunk),
        grad32("grad", g == Storage::float32 ? n + off : 0), grad_bf16("grad", g == Storage::bfloat16 ? n + off : 0),
        copy_bf16("copy", c == Storage::bfloat16 ? n + off : 0), grad_fp16("grad", g == Storage::float16 ? n + off : 0),
        copy_fp16("copy", c == Storage::float16 ? n + off : 0), want_weight(n), want_m(n), want_v(n) {}

  double grad(size_t i) const {
    if (grads == Storage::float32) return grad32[offset + i];
    return grads == Storage::bfloat16 ? gpu::to_float(grad_bf16[offset + i]) : gpu::to_float(grad_fp16[offset + i]);
  }
  void set_grad(size_t i, float value) {
    if (grads == Storage::float32) grad32[offset + i] = value;
    if (grads == Storage::bfloat16) grad_bf16[offset + i] = gpu::from_float<bf16>(value);
    if (grads == Storage::float16) grad_fp16[offset + i] = gpu::from_float<fp16>(value);
  }
  AdamTensor tensor() {
    AdamTensor t{};
    t.weight = weight.data() + offset, t.exp_avg = m.data() + offset, t.exp_avg_sq = v.data() + offset;
    t.steps = steps.data(), t.size = static_cast<int64_t>(size), t.grads = grads, t.copied = copied;
    if (grads == Storage::float32) t.grad = grad32.data() + offset;
    if (grads == Storage::bfloat16) t.grad = grad_bf16.data() + offset;
    if (grads == Storage::float16) t.grad = grad_fp16.data() + offset;
    if (copied == Storage::bfloat16) t.copy = copy_bf16.data() + offset;
    if (copied == Storage::float16) t.copy = copy_fp16.data() + offset;
    t.vectors = gpu::aligned(t.weight) && gpu::aligned(t.grad) && gpu::aligned(t.exp_avg) &&
                gpu::aligned(t.exp_avg_sq) && gpu::aligned(t.copy);
    return t;
  }
  void start(unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < size; ++i) {
      want_weight[i] = weight[offset + i] = normal(random);
      want_m[i] = m[offset + i] = 0.1f * normal(random);
      want_v[i] = v[offset + i] = 0.1f * std::abs(normal(random));
    }
    for (size_t i = 0; i < offset; ++i) weight[i] = m[i] = v[i] = 7;  // nobody may touch them
    for (size_t i = 0; i < steps.size(); ++i) steps[i] = 3;
  }
  // The copy as a step leaves it, but that somebody has set every fifth number.
  void write_copy(float value) {
    for (size_t i = 0; i < size; ++i) {
      const bool set = i % 5 == 0;
      if (copied == Storage::bfloat16) copy_bf16[offset + i] = gpu::from_float<bf16>(set ? value : weight[offset + i]);
      if (copied == Storage::float16) copy_fp16[offset + i] = gpu::from_float<fp16>(set ? value : weight[offset + i]);
      if (set && copied != Storage::none) want_weight[i] = value;
    }
  }
  std::string bytes() const { return test::bytes(weight) + test::bytes(m) + test::bytes(v) + test::bytes(steps); }
};

void close(const std::string& what, size_t i, double got, double want, double tolerance) {
  require(std::abs(got - want) <= tolerance * (std::abs(want) + 1),
          what + "[" + std::to_string(i) + "] is " + std::to_string(got) + ", not " + std::to_string(want));
}

// Two steps over `parameters`, of which the second is not done where `found_inf` says so.
std::string adam_steps(const AdamCase& c, std::deque<Parameter>& parameters, bool infinite) {
  const double lr = 0.1, beta1 = 0.5, beta2 = 0.99, eps = 1e-3;
  Buffer<float> rate("lr", 1), scale("grad_scale", 1), found("found_inf", 1);
  rate[0] = static_cast<float>(lr), scale[0] = c.grad_scale, found[0] = 0;
  const double used = c.lr_on_device ? double(rate[0]) : lr;
  unsigned seed = 1;
  for (Parameter& p : parameters) p.start(seed++);
  for (int step = 4; step < 6; ++step) {
    const bool skipped = infinite && step == 5;
    found[0] = skipped ? 1 : 0;
    std::vector<AdamTensor> table;
    for (Parameter& p : parameters) {
      std::mt19937 random(seed++);
      std::normal_distribution<float> normal;
      if (c.masters) p.write_copy(.25f * step);
      for (size_t i = 0; i < p.size; ++i) {
        p.set_grad(i, c.grad_scale * normal(random));
        if (skipped) continue;
        double g = p.grad(i) / c.grad_scale * (c.maximize ? -1 : 1);
        double& w = p.want_weight[i];
        if (!c.decoupled) g += c.weight_decay * w;
        if (c.decoupled) w *= 1 - used * c.weight_decay;
        p.want_m[i] = beta1 * p.want_m[i] + (1 - beta1) * g;
        p.want_v[i] = beta2 * p.want_v[i] + (1 - beta2) * g * g;
        w -= used / (1 - std::pow(beta1, step)) * p.want_m[i] /
             (std::sqrt(p.want_v[i] / (1 - std::pow(beta2, step))) + eps);
      }
      table.push_back(p.tensor());
    }
    const AdamSettings settings{lr, beta1, beta2, eps, c.weight_decay, c.lr_on_device ? rate.data() : nullptr,
                                c.grad_scale != 1 ? scale.data() : nullptr, found.data(), c.decoupled, c.maximize, c.masters};
    std::vector<double> given;
    for (const Parameter& p : parameters)
      for (size_t i = 0; i < p.size; ++i) given.push_back(p.grad(i) / (skipped ? 1 : c.grad_scale));
    adam_pass(table.data(), static_cast<int64_t>(table.size()), settings, nullptr);
    size_t at = 0;
    for (const Parameter& p : parameters)
      for (size_t i = 0; i < p.size; ++i)
        close("grad", i, p.grad(i), given[at++], p.grads == Storage::float32 ? 2e-7 : 8e-3);
  }
  std::string bytes;
  for (Parameter& p : parameters) {
    for (size_t i = 0; i < p.size; ++i) {
      const double weight = p.weight[p.offset + i];
      close("weight", i, weight, p.want_weight[i], 2e-6);
      close("exp_avg", i, p.m[p.offset + i], p.want_m[i], 1e-6);
      close("exp_avg_sq", i, p.v[p.offset + i], p.want_v[i], 1e-6);
      if (p.copied == Storage::bfloat16)
        require(
            p.copy_bf16[p.offset + i].bits == gpu::from_float<bf16>(p.weight[p.offset + i]).bits,
            "the copy is another");
      if (p.copied == Storage::float16)
        require(
            p.copy_fp16[p.offset + i].bits == gpu::from_float<fp16>(p.weight[p.offset + i]).bits,
            "the copy is another");
    }
    for (size_t i = 0; i < p.offset; ++i)
      require(p.weight[i] == 7 && p.m[i] == 7 && p.v[i] == 7, "what is before changed");
    for (size_t i = 0; i < p.steps.size(); ++i) require(p.steps[i] == (infinite ? 4 : 5), "a step was miscounted");
    bytes += p.bytes();
  }
  return bytes;
}

std::string adam_case(const AdamCase& c) {
  std::deque<Parameter> parameters;
  parameters.emplace_back(2 * Adam::kChunk + 13, Storage::float32, Storage::none, c.offset);
  parameters.emplace_back(1, Storage::bfloat16, Storage::bfloat16, c.offset);
  parameters.emplace_back(0, Storage::float32, Storage::none, 0);
  parameters.emplace_back(Adam::kChunk, Storage::float16, Storage::float16, c.offset);
  parameters.emplace_back(77, Storage::float32, Storage::bfloat16, c.offset);
  parameters.emplace_back(2056, Storage::bfloat16, Storage::none, c.offset);
  return adam_steps(c, parameters, c.grad_scale != 1);
}

std::string many_tensors(size_t count) {
  std::deque<Parameter> parameters;
  for (size_t i = 0; i < count; ++i) parameters.emplace_back(i % 5 + 1, Storage::float32, Storage::none, 0);
  return adam_steps({"many"}, parameters, false);
}

// --- the loss
// ----------------------------------------------------------------------------------------------------------

template <class T>
std::string loss(int64_t parts, int64_t size, bool with_grad) {
  Buffer<T> logits("logits", parts * size);
  Buffer<float> losses("losses", parts), probabilities("probabilities", parts),
      grad("grad", with_grad ? parts * size : 0);
  test::fill(logits, 1, 0, 4);
  std::vector<double> labels;
  for (int64_t i = 0; i < parts; ++i) labels.push_back(i % 2 ? 0.0 : 0.9);
  bce_pass(logits.data(), labels.data(), parts, size, losses.data(), probabilities.data(),
           with_grad ? grad.data() : nullptr, nullptr);
  std::vector<double> want_loss(parts), want_probability(parts);
  for (int64_t i = 0; i < parts * size; ++i) {
    const double x = gpu::to_float(logits[i]), p = 1 / (1 + std::exp(-x)), y = float(labels[i / size]);
    want_loss[i / size] += (std::log1p(std::exp(-std::abs(x))) + std::max(x, 0.0) - x * y) / size;
    want_probability[i / size] += p / size;
    if (with_grad) close("grad", i, grad[i] * size, p - y, 4e-7);
  }
  test::compare("losses", losses, [&](size_t i) { return want_loss[i]; }, 4e-7);
  test::compare("probabilities", probabilities, [&](size_t i) { return want_probability[i]; }, 4e-7);
  return test::bytes(losses) + test::bytes(probabilities) + test::bytes(grad);
}

// --- images
// ------------------------------------------------------------------------------------------------------------

template <class T>
std::string normalise(const ImageShape& s, bool flips, size_t offset) {
  const size_t count = s.images * s.image();
  Buffer<uint8_t> pixels("pixels", count + offset, test::Flush::end, 16);
  Buffer<bool> flip("flip", flips ? s.images : 0);
  Buffer<T> out("out", count, test::Flush::end, 16);
  for (size_t i = 0; i < count + offset; ++i) pixels[i] = static_cast<uint8_t>(i * 37 + i / 256);
  for (size_t i = 0; i < flip.size(); ++i) flip[i] = i % 3 != 1;
  pixels.read_only(), flip.read_only();
  images_pass(s, pixels.data() + offset, flips ? flip.data() : nullptr, out.data(), nullptr);
  for (size_t i = 0; i < count; ++i) {
    const size_t c = i % s.channels, x = i / s.channels % s.width, row = i / s.row(), image = i / s.image();
    const size_t from = flips && flip[image] ? s.width - 1 - x : x;
    const float level = pixels[offset + row * s.row() + from * s.channels + c];
    require(gpu::to_float(out[i]) == gpu::to_float(gpu::from_float<T>(level / 127.5f - 1.f)),
            "value " + std::to_string(i) + " is " + std::to_string(gpu::to_float(out[i])));
  }
  return test::bytes(out);
}

template <class T>
bool all(const char* type) {
  bool ok = true;
  for (const bool with_grad : {true, false})
    for (const int64_t size : {1, 37, 1200})
      ok &= test::run(std::string("bce ") + type, [&] { return loss<T>(2, size, with_grad); });
  for (const int64_t parts : {Bce::kMostParts, Bce::kMostParts + 3})
    ok &= test::run(std::string("bce of many parts, ") + type, [&] { return loss<T>(parts, 2, true); });
  const ImageShape shapes[] = {
      {5, 8, 8, 3},
      {3, 7, 5, 3},
      {2, 64, 64, 3},
      {4, 4, 4, 1},
      {2, 3, 16, 4},
      {4, 4, 12, 2},
      {3, 7, 7, 1},
      // Images of less than a vector and of one value more; one value more than a block; none.
      {5, 2, 2, 2},
      {16, 17, 1, 1},
      {1, 257, 1, 1},
      {1, 1, 1, 1},
      {0, 4, 4, 3}};
  for (const ImageShape& s : shapes)
    for (const bool flips : {false, true})
      for (const size_t offset : {0, 1})
        ok &= test::run(std::string("images ") + type, [&] { return normalise<T>(s, flips, offset); });
  return ok;
}

int main() {
  const AdamCase cases[] = {
      {"adam"},
      {"adam with weight decay", 0.1},
      {"adamw", 0.1, true, false, 1, true},
      {"adam that maximises, misaligned", 0.1, false, true, 1, false, 1},
      {"adam of scaled gradients", 0.1, true, false, 128},
      {"adam of scaled gradients, misaligned", 0, false, false, 128, true, 3},
      {"adam of masters", 0.1, false, false, 1, false, 0, true},
      {"adam of masters, misaligned", 0.1, true, false, 1, false, 1, true},
  };
  bool ok = true;
  for (const size_t count : {1, 3})
    ok &= test::run("adam of " + std::to_string(count) + " tensors", [count] { return many_tensors(count); });
  for (const AdamCase& c : cases) ok &= test::run(c.name, [&] { return adam_case(c); });
  ok &= test::run("adam of 60 tensors", [] { return many_tensors(FewTensors::kMost); });
  ok &= test::run("adam of 61 tensors", [] { return many_tensors(FewTensors::kMost + 1); });
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // slow there, and the same kernels
  ok &= test::run("adam of two launches", [] { return many_tensors(ManyTensors::kMost + FewTensors::kMost); });
#endif
  ok &= all<bf16>("bf16");
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(ONE_STORAGE_TYPE)
  ok &= all<float>("float");
  ok &= all<fp16>("fp16");
#endif
  return ok ? 0 : 1;
}
