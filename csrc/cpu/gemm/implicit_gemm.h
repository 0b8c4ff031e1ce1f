// `conv` and `conv_transpose` on rows that are gathered: outputs that read through the same taps are the rows of a
// dense product, with nothing multiplied by padding or by zeros between pixels. `Products` says how rows are
// multiplied.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/contraction/block_stats.h"
#include "cpu/contraction/epilogue.h"
#include "cpu/gemm/gather.h"
#include "cpu/gemm/plan.h"
#include "cpu/gemm/split_bf16.h"

namespace fastdcgan::cpu {

// `conv` and `conv_transpose`, and `weight_grad`, of any dtype with products of floats.
void gemm_contract(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Epilogue&);
void gemm_weight_grad(const Contraction&, c10::ScalarType, const void* gathered, const void* linear, void* out);

template <class T, class Products>
class ImplicitGemm {
  using Element = typename Products::Element;

 public:
  ImplicitGemm(const Contraction& c, const T* in, const Element* weight, T* out, const Epilogue& epilogue)
      : c_(c), in_{in, c.y.in, c.x.in, c.in_channels, in + c.batch * c.y.in * c.x.in * c.in_channels}, weight_(weight),
        out_(out), epilogue_(epilogue), row_epilogue_(epilogue, c.out_channels), panels_(c.out_channels),
        depth_(Products::kTerms * DepthOrder(c.y, c.x, c.in_channels, Products::kDepthUnit).rows()) {}

  // False if a sum of split floats is not finite: then `out` is not the result.
  bool run() {
    const Plan plan(c_, Products::kDepthUnit, Products::kTerms);
    const std::vector<Block> blocks = plan.blocks(c_.batch, epilogue_.stat_groups, Products::kBlockRows);
    std::vector<float> partial(epilogue_.stats ? blocks.size() * 2 * panels_.width : 0);
    // Where there are fewer blocks than threads, each is cut into ranges of panels.
    const int64_t many = static_cast<int64_t>(blocks.size()), threads = at::get_num_threads();
    const int64_t cuts = std::clamp<int64_t>((threads + many - 1) / std::max<int64_t>(many, 1), 1, panels_.count);
    at::parallel_for(0, many * cuts, 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const typename Products::Session session;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t cut = i % cuts;
        float* moments = epilogue_.stats ? partial.data() + i / cuts * 2 * panels_.width : nullptr;
        block(blocks[i / cuts], panels_.count * cut / cuts, panels_.count * (cut + 1) / cuts, moments);
      }
    });
    if (epilogue_.stats) combine(blocks, partial.data(), panels_.width, c_.out_channels, epilogue_);
    return finite_;
  }

 private:
  // Columns of one row of A.
  void fill(Element* row, const RowClass& rows, const Place& place, const Chunk& chunk) const {
    if constexpr (Products::kTerms == 2) {
      alignas(64) float wide[kDepth + kSpill];
      gather_row(wide, in_, rows, place, chunk.parts);
      std::fill_n(wide + chunk.columns, chunk.filling, 0.f);
      split(wide, chunk.columns + chunk.filling, row, row + kDepth);
    } else {
      gather_row(row, in_, rows, place, chunk.parts);
      std::fill_n(row + chunk.columns, chunk.filling, Element(0.f));
    }
  }

  // Columns of panels [first, last) of a block.
  void block(const Block& b, int64_t first, int64_t last, float* partial) const {
    static thread_local Scratch scratch;
    const int64_t begin = first * kPanel, width = std::min(panels_.width, last * kPanel) - begin;
    const int64_t stride = Products::sum_stride(width);
    const int64_t c_size = Products::kBlockRows * Products::sum_stride(panels_.width);
    float* c = scratch.floats(c_size + rows_size<Products>());
    auto* a = reinterpret_cast<Element*>(c + c_size);
    const RowClass& rows = b.group->rows;
    clear_rows<Products>(a, b.rows);
    bool add = false;
    for (const Chunk& chunk : b.group->chunks) {
      Place place(rows, b.first);
      for (int64_t r = 0; r < b.rows; ++r, place.next(rows)) fill(a + r * Products::kRowStride, rows, place, chunk);
      for (int64_t p = first; p < last; ++p)
        Products::multiply(
            a, b.rows, weight_ + p * kPanel * depth_, panels_.vectors(p), c + p * kPanel - begin, stride, chunk.pieces,
            add);
      add = true;
    }
    if (!add) std::fill_n(c, b.rows * stride, 0.f);
    if constexpr (Products::kTerms == 2)
      for (int64_t r = 0; r < b.rows && finite_; ++r)
        if (!all_finite(c + r * stride, width)) finite_ = false;
    if (partial) {
      const auto sums = [&](int64_t r) { return c + r * stride; };
      round_and_sum<T>(sums, b.rows, width, partial + begin, partial + panels_.width + begin);
    }
    const int64_t channels = std::min(width, c_.out_channels - begin);
    Place place(rows, b.first);
    for (int64_t r = 0; r < b.rows; ++r, place.next(rows)) {
      float* sums = c + r * stride;
      row_epilogue_.run(sums, begin, width);
      const int64_t oy = rows.y->outputs[place.y], ox = rows.x->outputs[place.x];
      narrow(out_ + ((place.n * c_.y.out + oy) * c_.x.out + ox) * c_.out_channels + begin, sums, channels);
    }
  }

  const Contraction& c_;
  Image<T> in_;
  const Element* weight_;
  T* out_;
  const Epilogue& epilogue_;
  RowEpilogue row_epilogue_;
  Panels panels_;
  int64_t depth_;  // rows of the packed weight
  mutable std::atomic<bool> finite_{true};
};

}  // namespace fastdcgan::cpu
