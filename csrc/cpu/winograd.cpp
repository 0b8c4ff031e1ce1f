// `conv` and `conv_transpose` by minimal filtering: a block of tiles is transformed, multiplied at each of the nine points
// and transformed back while it stays in the second-level cache.
#include "winograd.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "block_stats.h"
#include "finish.h"
#include "kept.h"
#include "round_weight.h"
#include "sweep.h"
#include "winograd_tiles.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kBlockFloats = 1 << 19;  // inputs and products of a block
constexpr int64_t kMaxTiles = 8 * kKernelRows;

// A two-tap contraction of all of `sets`: outputs of one place add up over `terms`.
struct Term {
  TwoTaps y, x;
};

struct Set {
  std::vector<Term> terms;

  int64_t tiles() const { return terms[0].y.tiles() * terms[0].x.tiles(); }  // of a sample
};

std::vector<Set> sets(const Contraction& c) {
  std::vector<Set> found;
  for (const TwoTaps& y : two_taps(c.y))
    for (const TwoTaps& x : two_taps(c.x)) {
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

int64_t outputs(const Set& set, int64_t first, int64_t tiles) {
  const TwoTaps &y = set.terms[0].y, &x = set.terms[0].x;
  if (y.count % kOutputs == 0 && x.count % kOutputs == 0) return tiles * kOutputs * kOutputs;
  int64_t rows = 0;
  for (TilePlace t(y.tiles(), x.tiles(), first); tiles > 0; --tiles, t.next())
    rows += std::min(kOutputs, y.count - t.y * kOutputs) * std::min(kOutputs, x.count - t.x * kOutputs);
  return rows;
}

template <class T>
class Filter {
 public:
  Filter(const Contraction& c, const T* in, T* out, const Finish& finish, const Finisher& finisher)
      : c_(c), in_(in, c.batch, c.y.in, c.x.in, c.in_channels), out_(out), finish_(finish), finisher_(finisher),
        panels_(c.out_channels), sets_(sets(c)), terms_(static_cast<int64_t>(sets_[0].terms.size())) {
    const int64_t most = kDepth / terms_;  // channels that are multiplied between two visits of the sums
    chunks_ = (c.in_channels + most - 1) / most;
  }

  // Of the transformed weight: [set][point][panel][term][input channel][column].
  int64_t weight_size() const { return static_cast<int64_t>(sets_.size()) * set_size(); }

  // Unless a transposed contraction has so few outputs that some phase has none.
  bool has_all_phases() const {
    return static_cast<int64_t>(sets_.size()) * terms_ == c_.y.stride * c_.x.stride;
  }

  void pack(const Weight& w, float* to) const {
    const int64_t blocks = (c_.in_channels + kWidth - 1) / kWidth, all = static_cast<int64_t>(sets_.size()) * terms_;
    at::parallel_for(0, all * panels_.count * blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = i % blocks * kWidth, panel = i / blocks % panels_.count, term = i / blocks / panels_.count;
        pack(w, to, term / terms_, term % terms_, panel, k, std::min(k + kWidth, c_.in_channels));
      }
    });
  }

  void run(const float* weight) {
    weight_ = weight;
    const std::vector<Block> blocks = this->blocks();
    std::vector<float> partial(finish_.stats ? blocks.size() * 2 * panels_.width : 0);
    // Where there are fewer blocks than threads, each is cut into ranges of panels.
    const int64_t many = static_cast<int64_t>(blocks.size()), threads = at::get_num_threads();
    const int64_t cuts = std::clamp<int64_t>((threads + many - 1) / std::max<int64_t>(many, 1), 1, panels_.count);
    at::parallel_for(0, many * cuts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t cut = i % cuts;
        float* moments = finish_.stats ? partial.data() + i / cuts * 2 * panels_.width : nullptr;
        block(blocks[i / cuts], panels_.count * cut / cuts, panels_.count * (cut + 1) / cuts, moments);
      }
    });
    if (finish_.stats) combine(blocks, partial.data(), panels_.width, c_.out_channels, finish_);
  }

 private:
  int64_t depth() const { return terms_ * c_.in_channels; }
  int64_t set_size() const { return kPoints * panels_.width * depth(); }

  std::vector<Block> blocks() const {
    const int64_t fit = kBlockFloats / (kPoints * (kDepthStride + panels_.width)) / kKernelRows * kKernelRows;
    const int64_t most = std::clamp<int64_t>(fit, kKernelRows, kMaxTiles);
    std::vector<Block> found;
    int64_t all = 0;
    for (const Set& set : sets_) all = std::max(all, c_.batch / finish_.groups * set.tiles());
    const int64_t count = (all + most - 1) / most;
    const int64_t step = std::min(most, (all / count + kKernelRows - 1) / kKernelRows * kKernelRows);
    for (int64_t g = 0; g < finish_.groups; ++g)
      for (int64_t i = 0; i < all; i += step)
        for (size_t s = 0; s < sets_.size(); ++s) {  // they read the same inputs
          const int64_t tiles = c_.batch / finish_.groups * sets_[s].tiles(), size = std::min(step, tiles - i);
          if (size <= 0) continue;
          found.push_back({static_cast<int64_t>(s), g * tiles + i, size, g, outputs(sets_[s], g * tiles + i, size)});
        }
    return found;
  }

  // Input channels [low, high) of one term and one panel.
  void pack(const Weight& w, float* to, int64_t set, int64_t term, int64_t panel, int64_t low, int64_t high) const {
    const Term& t = sets_[set].terms[term];
    const int64_t width = panels_.vectors(panel) * kWidth, column = panel * kPanel;
    const int64_t columns = std::min(width, c_.out_channels - column);
    alignas(64) float taps[4][kWidth * kPanel] = {};
    for (int i = 0; i < 4; ++i) {
      const T* from =
          static_cast<const T*>(w.data) + t.y.taps[i / 2] * w.y + t.x.taps[i % 2] * w.x + column * w.n + low * w.k;
      for (int64_t n = 0; n < columns; ++n)
        for (int64_t k = 0; k < high - low; ++k) taps[i][k * width + n] = static_cast<float>(from[n * w.n + k * w.k]);
    }
    const int64_t point = panels_.width * depth();
    float* row = to + set * set_size() + column * depth() + (term * c_.in_channels + low) * width;
    for (int64_t i = 0; i < (high - low) * width; i += kWidth)
      transform_weight(load(taps[0] + i), load(taps[1] + i), load(taps[2] + i), load(taps[3] + i), row + i, point);
  }

  // Columns of panels [first, last) of a block.
  void block(const Block& b, int64_t first, int64_t last, float* partial) const {
    const int64_t begin = first * kPanel, width = std::min(panels_.width, last * kPanel) - begin;
    const int64_t a_point = b.tiles * kDepthStride + kPanel, c_point = b.tiles * width + kPanel;
    static thread_local Scratch scratch;
    float *a = scratch.floats(kPoints * (a_point + c_point)), *sums = a + kPoints * a_point;
    const Set& set = sets_[b.set];
    const Tiles tiles(b.tiles);
    const float* weight = weight_ + b.set * set_size();
    for (int64_t i = 0; i < chunks_; ++i) {
      const int64_t low = c_.in_channels * i / chunks_, high = c_.in_channels * (i + 1) / chunks_;
      const int64_t run = (high - low + kStep - 1) / kStep * kStep;
      Piece pieces[4];
      for (int64_t f = 0; f < terms_; ++f) {
        pieces[f] = {f * run, f * c_.in_channels + low, high - low};
        const Term& term = set.terms[f];
        TilePlace place(term.y.tiles(), term.x.tiles(), b.first);
        float* row = a + f * run;
        for (int64_t t = 0; t < b.tiles; ++t, place.next(), row += kDepthStride)
          transform_input(in_, term.y, term.x, place, low, high, [&](int64_t channel) { return row + channel; }, a_point);
      }
      for (int64_t point = 0; point < kPoints; ++point)
        for (int64_t p = first; p < last; ++p) {
          const float* panel = weight + point * panels_.width * depth() + p * kPanel * depth();
          float* c = sums + point * c_point + p * kPanel - begin;
          for (int64_t t = 0; t < tiles.count; ++t)
            multiply<kDepthStride>(
                tiles.height(t), panels_.vectors(p),
                {a + point * a_point + tiles.begin(t) * kDepthStride, 1, panel, c + tiles.begin(t) * width, width, pieces,
                 terms_, i > 0});
        }
    }
    store_outputs(b, set.terms[0], sums, c_point, begin, width, partial);
  }

  void store_outputs(
      const Block& b, const Term& term, float* sums, int64_t c_point, int64_t begin, int64_t width, float* partial) const {
    const TwoTaps &y = term.y, &x = term.x;
    const int64_t columns = std::min(width, c_.out_channels - begin);
    const auto store_row = [&](float* row, int64_t to) {
      finisher_.run(row, begin, width);
      narrow(out_ + to * c_.out_channels + begin, row, columns);
    };
    std::vector<std::pair<float*, int64_t>> rows;
    if (partial) rows.reserve(b.rows);
    TilePlace place(y.tiles(), x.tiles(), b.first);
    for (int64_t t = 0; t < b.tiles; ++t, place.next()) {
      float* tile = sums + t * width;
      for (int64_t n = 0; n < width; n += kWidth) transform_output(tile + n, c_point);
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
    moments(row, b.rows, width, partial + begin, partial + panels_.width + begin);
    for (const auto& [from, to] : rows) store_row(from, to);
  }

  const Contraction& c_;
  TileImage<T> in_;
  T* out_;
  const Finish& finish_;
  const Finisher& finisher_;
  Panels panels_;
  std::vector<Set> sets_;
  int64_t terms_, chunks_;
  const float* weight_ = nullptr;
};

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b > 0); }

}  // namespace

std::vector<TwoTaps> two_taps(const Axis& axis) {
  std::vector<TwoTaps> found;
  const int64_t s = axis.stride;
  for (int64_t f = 0; f < s; ++f) {
    if (!axis.transposed) {
      found.push_back({{f, f + s}, 0, 1, axis.out, f - axis.padding, s});
      continue;
    }
    // Output o = s*q + f - padding reads q - 1 through tap f + s, and q through tap f.
    const int64_t q = divide_up(axis.padding - f, s), first = s * q + f - axis.padding;
    if (first < axis.out) found.push_back({{f + s, f}, first, s, divide_up(axis.out - first, s), q - 1, 1});
  }
  return found;
}

bool winograd_covers(const Contraction& c) {
  const auto covers = [](const Axis& a) {
    return a.kernel == 2 * a.stride && a.stride <= 2 && a.dilation == 1;
  };
  return covers(c.y) && covers(c.x);
}

bool winograd_contract(
    const Contraction& c, c10::ScalarType dtype, const void* in, const Weight& weight, void* out, const Finish& finish) {
  const Finisher finisher(finish, c.out_channels);
  if (!finisher.known()) return false;
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    Filter<T> filter(c, static_cast<const T*>(in), static_cast<T*>(out), finish, finisher);
    static thread_local Scratch scratch;
    const int64_t size = filter.weight_size();
    const auto pack = [&](void* to) { filter.pack(Rounded(weight, dtype).get(), static_cast<float*>(to)); };
    std::shared_ptr<const KeptWeight> kept;
    if (filter.has_all_phases())  // which there are otherwise depends on the padding, and kept weights don't
      kept = kept_weight(c, dtype, weight, /*way=*/kPoints, size * int64_t{sizeof(float)}, pack);
    float* packed = kept ? static_cast<float*>(kept->data()) : scratch.floats(size);
    if (!kept) pack(packed);
    filter.run(packed);
  });
  return true;
}

}  // namespace fastdcgan::cpu
