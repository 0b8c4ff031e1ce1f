// `conv` and `conv_transpose` by Winograd's algorithm: a block of tiles is transformed, multiplied at each of its
// points and transformed back while it stays in the second-level cache.
#include "cpu/winograd/winograd.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/contraction/block_stats.h"
#include "cpu/contraction/epilogue.h"
#include "cpu/contraction/packed_weights.h"
#include "cpu/contraction/round_weight.h"
#include "cpu/elementwise/pass_rows.h"
#include "cpu/winograd/winograd_tiles.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kBlockFloats = 1 << 18;  // inputs and products of a block
constexpr int64_t kMaxTiles = 8 * kKernelRows;
// So few tiles are one block, which transforms the weight panel by panel, in the second-level cache: that costs less
// than a transformed weight's way through memory. It does so where inputs and products of that block are no more than
// so many floats, or the weight is of so many. (Threads must not count, since the order of sums depends on it.)
constexpr int64_t kFewTiles = 132, kFewFloats = 1 << 19, kLargeWeight = 1 << 20;
constexpr int64_t kFewDepth = kDepth / 2;  // there: so that inputs and panels stay in that cache

// A contraction of few taps of all of `sets`: outputs of one place add up over `terms`.
struct Term {
  Phase y, x;
};

struct Set {
  std::vector<Term> terms;
};

std::vector<Set> sets(const Contraction& c) {
  std::vector<Set> found;
  for (const Phase& y : phases(c.y))
    for (const Phase& x : phases(c.x)) {
      if (c.y.transposed || found.empty()) found.emplace_back();
      found.back().terms.push_back({y, x});
    }
  return found;
}

// Tiles of one set, of samples that share statistics.
struct Block {
  int64_t set, first, tiles, stat_group;
  int64_t rows;  // outputs
};

template <class T, class F>
class Winograd {
  static constexpr int kSide = F::kSide, kPoints = kSide * kSide, kTaps = F::kTaps * F::kTaps;
  static constexpr int64_t kOutputs = F::kOutputs, kRowStride = F::kDepth + kPanel;

 public:
  Winograd(const Contraction& c, const T* in, T* out, const Epilogue& epilogue)
      : c_(c),
        in_(in, c.batch, c.y.in, c.x.in, c.in_channels),
        out_(out),
        epilogue_(epilogue),
        row_epilogue_(epilogue, c.out_channels),
        panels_(c.out_channels),
        sets_(sets(c)),
        terms_(static_cast<int64_t>(sets_[0].terms.size())),
        few_(are_few(most_tiles() * epilogue.stat_groups)),
        chunks_(c.in_channels, (few_ ? kFewDepth : F::kDepth) / terms_) {}

  // Whether each block transforms the weight for itself, unless it is given.
  bool few_tiles() const { return few_; }

  // Sets the order of the transformed weight apart from others.
  int64_t layout() const { return kPoints * (few_ ? kFewDepth : F::kDepth); }

  // Floats of the transformed weight, which is [set][chunk][point][panel][term][input channel][column].
  int64_t weight_size() const {
    return static_cast<int64_t>(sets_.size()) * terms_ * kPoints * panels_.width * c_.in_channels;
  }

  // Unless a transposed contraction has so few outputs that some phase has none.
  bool has_all_phases() const {
    return static_cast<int64_t>(sets_.size()) * terms_ == c_.y.stride * c_.x.stride;
  }

  void pack(const Weight& weight, float* to) const {
    const int64_t all = static_cast<int64_t>(sets_.size()) * chunks_.count * panels_.count;
    at::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i % panels_.count, chunk = i / panels_.count % chunks_.count;
        const int64_t set = i / panels_.count / chunks_.count;
        pack(weight, set, chunk, panel, to + place(set, chunk, 0, panel), terms_ * chunks_.size(chunk) * panels_.width);
      }
    });
  }

  // `packed`: the transformed weight, or null.
  void run(const Weight& weight, const float* packed) {
    const std::vector<Block> blocks = this->blocks();
    std::vector<float> partial(epilogue_.stats ? blocks.size() * 2 * panels_.width : 0);
    const int64_t cuts = balanced_cuts(static_cast<int64_t>(blocks.size()), panels_.count);
    at::parallel_for(0, static_cast<int64_t>(blocks.size()) * cuts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t cut = i % cuts;
        float* moments = epilogue_.stats ? partial.data() + i / cuts * 2 * panels_.width : nullptr;
        block(blocks[i / cuts], weight, packed, panels_.count * cut / cuts, panels_.count * (cut + 1) / cuts, moments);
      }
    });
    if (epilogue_.stats) combine(blocks, partial.data(), panels_.width, c_.out_channels, epilogue_);
  }

 private:
  // Floats of inputs and products.
  int64_t tile_size() const { return kPoints * (kRowStride + panels_.width); }

  bool are_few(int64_t tiles) const {
    return tiles <= kFewTiles && (tiles * tile_size() <= kFewFloats || weight_size() >= kLargeWeight);
  }

  // Of a sample.
  static int64_t tiles(const Set& set) {
    return set.terms[0].y.tiles(kOutputs) * set.terms[0].x.tiles(kOutputs);
  }

  static int64_t outputs(const Set& set, int64_t first, int64_t tiles) {
    const Phase &y = set.terms[0].y, &x = set.terms[0].x;
    if (y.count % kOutputs == 0 && x.count % kOutputs == 0) return tiles * kOutputs * kOutputs;
    int64_t rows = 0;
    for (TilePlace t(y.tiles(kOutputs), x.tiles(kOutputs), first); tiles > 0; --tiles, t.next())
      rows += std::min(kOutputs, y.count - t.y * kOutputs) * std::min(kOutputs, x.count - t.x * kOutputs);
    return rows;
  }

  int64_t most_tiles() const {
    int64_t all = 0;
    for (const Set& set : sets_) all = std::max(all, c_.batch / epilogue_.stat_groups * tiles(set));
    return all;
  }

  std::vector<Block> blocks() const {
    const int64_t fit = kBlockFloats / tile_size() / kKernelRows * kKernelRows;
    const int64_t most = few_ ? kFewTiles : std::clamp<int64_t>(fit, kKernelRows, kMaxTiles);
    std::vector<Block> found;
    const int64_t all = most_tiles(), count = (all + most - 1) / most;
    // One block of one panel would be one thread's. Two transform the weight twice, which takes as long as the products
    // of 15 tiles or so.
    const bool halves = panels_.count == 1 && sets_.size() == 1 && all >= 4 * kKernelRows;
    const int64_t few = halves ? (all + 1) / 2 : all;
    const int64_t step = few_ ? few : std::min(most, (all / count + kKernelRows - 1) / kKernelRows * kKernelRows);
    for (int64_t g = 0; g < epilogue_.stat_groups; ++g)
      for (int64_t i = 0; i < all; i += step)
        for (size_t s = 0; s < sets_.size(); ++s) {  // they read the same inputs
          const int64_t tiles = c_.batch / epilogue_.stat_groups * this->tiles(sets_[s]);
          const int64_t size = std::min(step, tiles - i);
          if (size <= 0) continue;
          found.push_back({static_cast<int64_t>(s), g * tiles + i, size, g, outputs(sets_[s], g * tiles + i, size)});
        }
    return found;
  }

  // Where a panel of the transformed weight begins.
  int64_t place(int64_t set, int64_t chunk, int64_t point, int64_t panel) const {
    const int64_t rows = terms_ * chunks_.size(chunk);
    const int64_t before = terms_ * (set * c_.in_channels + chunks_.begin(chunk));
    return (kPoints * before + point * rows) * panels_.width + panel * rows * kPanel;
  }

  // One panel of the transformed weight, whose points are `step` apart.
  void pack(const Weight& w, int64_t set, int64_t chunk, int64_t panel, float* to, int64_t step) const {
    const int64_t low = chunks_.begin(chunk), size = chunks_.size(chunk), column = panel * kPanel;
    const int64_t width = panels_.vectors(panel) * kWidth, columns = std::min(width, c_.out_channels - column);
    for (int64_t f = 0; f < terms_; ++f) {
      const Term& t = sets_[set].terms[f];
      const T *first = static_cast<const T*>(w.data) + column * w.n + low * w.k, *taps[kTaps];
      for (int i = 0; i < kTaps; ++i)
        taps[i] = first + t.y.taps[i / F::kTaps] * w.y + t.x.taps[i % F::kTaps] * w.x;
      transform_weights<F>(taps, w.k, size, w.n, columns, width, to + f * size * width, step);
    }
  }

  // Columns of panels [first, last) of a block.
  void block(
      const Block& b, const Weight& weight, const float* packed, int64_t first, int64_t last, float* partial) const {
    const int64_t begin = first * kPanel, width = std::min(panels_.width, last * kPanel) - begin;
    const int64_t a_point = b.tiles * kRowStride + kPanel, c_point = b.tiles * width + kPanel;
    const int64_t b_point = (kFewDepth + 1) * kPanel;  // of a panel that is transformed here
    static thread_local Scratch scratch;
    float* a = scratch.floats(kPoints * (a_point + c_point + (packed ? 0 : b_point)));
    float *sums = a + kPoints * a_point, *own = sums + kPoints * c_point;
    const Set& set = sets_[b.set];
    const Tiles tiles(b.tiles);
    for (int64_t i = 0; i < chunks_.count; ++i) {
      const int64_t low = chunks_.begin(i), size = chunks_.size(i), run = (size + kStep - 1) / kStep * kStep;
      Piece pieces[4];
      for (int64_t f = 0; f < terms_; ++f) {
        pieces[f] = {f * run, f * size, size};
        const Term& term = set.terms[f];
        TilePlace place(term.y.tiles(kOutputs), term.x.tiles(kOutputs), b.first);
        float* row = a + f * run;
        for (int64_t t = 0; t < b.tiles; ++t, place.next(), row += kRowStride)
          transform_input<F>(
              in_, term.y, term.x, place, low, low + size, [&](int64_t channel) { return row + channel; }, a_point);
      }
      // The next panel is fetched meanwhile: `ahead` floats further.
      const auto multiply_panel = [&](int64_t point, int64_t p, const float* panel, int64_t ahead) {
        float* c = sums + point * c_point + p * kPanel - begin;
        const int64_t step = ahead ? kPanel / tiles.count : 0;
        for (int64_t t = 0; t < tiles.count; ++t)
          multiply<kRowStride>(
              tiles.height(t), panels_.vectors(p),
              {a + point * a_point + tiles.begin(t) * kRowStride, 1, panel, c + tiles.begin(t) * width, width, pieces,
               terms_, i > 0, ahead ? panel + ahead + t * step * terms_ * size : nullptr, step});
      };
      if (packed) {
        for (int64_t point = 0; point < kPoints; ++point)
          for (int64_t p = first; p < last; ++p)
            multiply_panel(point, p, packed + place(b.set, i, point, p), terms_ * size * kPanel);
      } else {
        for (int64_t p = first; p < last; ++p) {
          pack(weight, b.set, i, p, own, b_point);
          for (int64_t point = 0; point < kPoints; ++point) multiply_panel(point, p, own + point * b_point, 0);
        }
      }
    }
    store_outputs(b, set.terms[0], sums, c_point, begin, width, partial);
  }

  void store_outputs(
      const Block& b, const Term& term, float* sums, int64_t c_point, int64_t begin, int64_t width,
      float* partial) const {
    const Phase &y = term.y, &x = term.x;
    const int64_t columns = std::min(width, c_.out_channels - begin);
    const auto store_row = [&](float* row, int64_t to) {
      row_epilogue_.run(row, begin, width);
      narrow(out_ + to * c_.out_channels + begin, row, columns);
    };
    std::vector<std::pair<float*, int64_t>> rows;
    if (partial) rows.reserve(b.rows);
    TilePlace place(y.tiles(kOutputs), x.tiles(kOutputs), b.first);
    for (int64_t t = 0; t < b.tiles; ++t, place.next()) {
      float* tile = sums + t * width;
      for (int64_t n = 0; n < width; n += kWidth) transform_in_place<F::output, kSide, kOutputs>(tile + n, c_point);
      for (int64_t i = 0; i < kOutputs * kOutputs; ++i) {
        const int64_t oy = place.y * kOutputs + i / kOutputs, ox = place.x * kOutputs + i % kOutputs;
        if (oy >= y.count || ox >= x.count) continue;
        const int64_t pixel = (place.n * c_.y.out + y.first + oy * y.out_step) * c_.x.out + x.first + ox * x.out_step;
        if (partial) {
          rows.emplace_back(tile + i * c_point, pixel);
        } else {
          store_row(tile + i * c_point, pixel);
        }
      }
    }
    if (!partial) return;
    const auto row = [&](int64_t r) { return rows[r].first; };
    round_and_sum<T>(row, b.rows, width, partial + begin, partial + panels_.width + begin);
    for (const auto& [from, to] : rows) store_row(from, to);
  }

  const Contraction& c_;
  TileImage<T> in_;
  T* out_;
  const Epilogue& epilogue_;
  RowEpilogue row_epilogue_;
  Panels panels_;
  std::vector<Set> sets_;
  int64_t terms_;
  bool few_;
  Chunks chunks_;  // of input channels
};

template <class T, class F>
void contract(
    const Contraction& c, c10::ScalarType dtype, const void* in, const Weight& weight, void* out,
    const Epilogue& epilogue) {
  Winograd<T, F> winograd(c, static_cast<const T*>(in), static_cast<T*>(out), epilogue);
  const int64_t size = winograd.weight_size();
  const auto pack = [&](void* to) { winograd.pack(Rounded(weight, dtype).get(), static_cast<float*>(to)); };
  std::shared_ptr<const PackedWeight> cached;
  if (winograd.has_all_phases())  // which there are otherwise depends on the padding, and cached weights don't
    cached = packed_weight(c, dtype, weight, winograd.layout(), size * int64_t{sizeof(float)}, pack);
  if (cached) {
    winograd.run(weight, static_cast<const float*>(cached->data()));
  } else if (winograd.few_tiles()) {
    winograd.run(Rounded(weight, dtype).get(), nullptr);
  } else {
    static thread_local Scratch scratch;
    float* packed = scratch.floats(size);
    pack(packed);
    winograd.run(weight, packed);
  }
}

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b > 0); }

}  // namespace

std::vector<Phase> phases(const Axis& axis) {
  std::vector<Phase> found;
  const int64_t s = axis.stride, count = axis.kernel / s;
  for (int64_t f = 0; f < s; ++f) {
    std::array<int64_t, kMostTaps> taps{};
    for (int64_t i = 0; i < count; ++i) taps[i] = f + s * (axis.transposed ? count - 1 - i : i);
    if (!axis.transposed) {
      found.push_back({taps, 0, 1, axis.out, f - axis.padding, s});
      continue;
    }
    // Output o = s*q + f - padding reads q through tap f, q - 1 through tap f + s, and so on.
    const int64_t q = divide_up(axis.padding - f, s), first = s * q + f - axis.padding;
    if (first < axis.out) found.push_back({taps, first, s, divide_up(axis.out - first, s), q - count + 1, 1});
  }
  return found;
}

template <int kOutputs>
bool can_winograd(const Contraction& c) {
  const auto covers = [](const Axis& a, int64_t taps) {
    return a.kernel == taps * a.stride && a.stride <= 2 && a.dilation == 1;
  };
  return (covers(c.y, 2) && covers(c.x, 2)) || (kOutputs == 4 && covers(c.y, 3) && covers(c.x, 3));
}

template <int kOutputs>
void winograd_contract(
    const Contraction& c, c10::ScalarType dtype, const void* in, const Weight& weight, void* out,
    const Epilogue& epilogue) {
  with_type(dtype, [&](auto zero) {
    with_filter<kOutputs>(
        c, [&](auto filter) { contract<decltype(zero), decltype(filter)>(c, dtype, in, weight, out, epilogue); });
  });
}

template bool can_winograd<2>(const Contraction&);
template bool can_winograd<4>(const Contraction&);
template void winograd_contract<2>(
    const Contraction&, c10::ScalarType, const void*, const Weight&, void*, const Epilogue&);
template void winograd_contract<4>(
    const Contraction&, c10::ScalarType, const void*, const Weight&, void*, const Epilogue&);

}  // namespace fastdcgan::cpu
