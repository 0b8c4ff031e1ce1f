#include "cpu/amx/amx_contractions.h"

#ifdef FASTDCGAN_AMX

#include "cpu/amx/tile_pixels.h"
#include "cpu/amx/tiles.h"
#include "cpu/amx/vnni_pairs.h"
#include "cpu/contraction/pack.h"
#include "cpu/contraction/packed_weights.h"
#include "cpu/contraction/round_weight.h"
#include "cpu/gemm/col2im.h"
#include "cpu/gemm/col2im_gemm.h"
#include "cpu/gemm/implicit_gemm.h"

namespace fastdcgan::cpu {
namespace {

using Element = TileProducts::Element;
constexpr c10::ScalarType kElement = c10::CppTypeToScalarType<Element>::value;

constexpr int64_t kBlock = 64;  // input channels that are packed together: all taps of them pass through the cache once
constexpr int64_t kGrain = 1 << 15;  // elements of a thread's share, at the least

// Channels [first, last) of one tap for some columns. `to`: of the panel; `row`: of `first` in the packed weight.
void pack_tap(
    const Element* from, const Weight& w, int64_t first, int64_t last, int64_t columns, int64_t width, Element* to,
    int64_t row) {
  int64_t k = first;
  if (row % 2 == 0 && w.n == 1) {
    for (; k + 2 <= last; k += 2) {
      const Element* pair = from + k * w.k;
      interleave(pair, columns, pair + w.k, columns, width, to + TileProducts::place(row + k - first, 0, width));
    }
  } else if (row % 2 == 0 && w.k == 1) {
    for (; k + 2 <= last; k += 2 * amx::kRows) {
      const int64_t pairs = std::min(amx::kRows, (last - k) / 2);
      for (int64_t n = 0; n < columns; n += kWidth)
        transpose_vnni_pairs(
            from + n * w.n + k, w.n, to + TileProducts::place(row + k - first, n, width), 2 * width,
            std::min(kWidth, columns - n), pairs);
    }
    k = std::min(k, last - (last - first) % 2);
  }
  for (; k < last; ++k)
    for (int64_t n = 0; n < columns; ++n)
      to[TileProducts::place(row + k - first, n, width)] = from[k * w.k + n * w.n];
}

// Panels of columns, [panel][term][row of DepthOrder][column]: the `term`-th of `terms` that a float is split into.
void pack(const Contraction& c, const Weight& w, Element* to, int64_t term = 0, int64_t terms = 1) {
  const Panels panels(c.out_channels);
  const DepthOrder order(c.y, c.x, c.in_channels, TileProducts::kDepthUnit);
  const int64_t blocks = (c.in_channels + kBlock - 1) / kBlock, depth = order.rows();
  if (term == 0 && (c.in_channels % TileProducts::kDepthUnit || c.out_channels % kWidth))
    std::fill_n(to, terms * panels.width * depth, Element(0.f));
  at::parallel_for(0, panels.count * blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i / blocks * kPanel, width = panels.vectors(i / blocks) * kWidth;
      const int64_t first = i % blocks * kBlock, last = std::min(first + kBlock, c.in_channels);
      for (int64_t ky = 0; ky < c.y.kernel; ++ky)
        for (int64_t kx = 0; kx < c.x.kernel; ++kx)
          pack_tap(
              static_cast<const Element*>(w.data) + column * w.n + ky * w.y + kx * w.x, w, first, last,
              std::min(width, c.out_channels - column), width, to + (terms * column + term * width) * depth,
              order.row(ky, kx) + first);
    }
  });
}

// Both terms of a weight of floats.
void pack_split(const Contraction& c, const Weight& w, Element* to) {
  static thread_local Scratch scratch;
  const int64_t count = w.bytes / int64_t{sizeof(float)};
  Element *high = scratch.get<Element>(2 * count), *low = high + count;
  const auto* from = static_cast<const float*>(w.data);
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    split(from + begin, end - begin, high + begin, low + begin);
  });
  Weight part = w;
  for (int64_t h = 0; h < SplitProducts::kTerms; ++h) {
    part.data = h == 0 ? high : low;
    pack(c, part, to, h, SplitProducts::kTerms);
  }
}

}  // namespace

void amx_contract(
    const Contraction& c, c10::ScalarType, const void* in, const Weight& weight, void* out, const Epilogue& epilogue) {
  static thread_local Scratch scratch;
  const int64_t size = packed_size<TileProducts>(c);
  const auto pack_to = [&](void* to) { pack(c, Rounded(weight, kElement).get(), static_cast<Element*>(to)); };
  const auto cached = packed_weight(
      c, kElement, weight, TileProducts::kDepthUnit, size * int64_t{sizeof(Element)}, pack_to);
  Element* packed = cached ? static_cast<Element*>(cached->data()) : scratch.get<Element>(size);
  if (!cached) pack_to(packed);
  ImplicitGemm<Element, TileProducts>(
      c, static_cast<const Element*>(in), packed, static_cast<Element*>(out), epilogue).run();
}

void amx_col2im(
    const Contraction& c, c10::ScalarType, const void* in, const Weight& weight, void* out, const Epilogue& epilogue) {
  col2im_with<Element, TileProducts>(c, in, weight, out, epilogue);
}

void amx_weight_grad(
    const Contraction& c, c10::ScalarType, const void* gathered, const void* linear, void* out) {
  WeightGrad<Element, TilePixels<Element, TileProducts>>(
      c, static_cast<const Element*>(gathered), static_cast<const Element*>(linear), static_cast<Element*>(out)).run();
}

bool split_bf16_contract(const Contraction& c, const void* in, const Weight& weight, void* out, const Epilogue& epilogue) {
  if (!epilogue.stats && can_col2im(c)) return col2im_with<float, SplitProducts>(c, in, weight, out, epilogue);
  static thread_local Scratch scratch;
  const int64_t size = packed_size<SplitProducts>(c);
  const auto pack_to = [&](void* to) { pack_split(c, weight, static_cast<Element*>(to)); };
  const auto cached = packed_weight(
      c, c10::ScalarType::Float, weight, SplitProducts::kTerms * SplitProducts::kDepthUnit,
      size * int64_t{sizeof(Element)}, pack_to);
  Element* packed = cached ? static_cast<Element*>(cached->data()) : scratch.get<Element>(size);
  if (!cached) pack_to(packed);
  return ImplicitGemm<float, SplitProducts>(
      c, static_cast<const float*>(in), packed, static_cast<float*>(out), epilogue).run();
}

bool split_bf16_weight_grad(const Contraction& c, const void* gathered, const void* linear, void* out) {
  return WeightGrad<float, TilePixels<float, SplitProducts>>(
      c, static_cast<const float*>(gathered), static_cast<const float*>(linear), static_cast<float*>(out)).run();
}

}  // namespace fastdcgan::cpu

#endif
