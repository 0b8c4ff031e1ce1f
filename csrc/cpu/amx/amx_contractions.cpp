#include "cpu/amx/amx_contractions.h"

#ifdef FASTDCGAN_AMX

#include "cpu/amx/tiles.h"
#include "cpu/bf16/pair_contractions.h"
#include "cpu/gemm/col2im.h"

namespace fastdcgan::cpu {
namespace {

using Element = TileProducts::Element;

constexpr int64_t kGrain = 1 << 15;  // elements of a thread's share, at the least

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
    pack_pairs(c, part, SplitProducts::kDepthUnit, to, h, SplitProducts::kTerms);
  }
}

}  // namespace

void amx_contract(
    const Contraction& c, c10::ScalarType, const void* in, const Weight& weight, void* out, const Epilogue& epilogue) {
  contract_pairs<TileProducts>(c, in, weight, out, epilogue);
}

void amx_col2im(
    const Contraction& c, c10::ScalarType, const void* in, const Weight& weight, void* out, const Epilogue& epilogue) {
  col2im_with<Element, TileProducts>(c, in, weight, out, epilogue);
}

void amx_weight_grad(
    const Contraction& c, c10::ScalarType, const void* gathered, const void* linear, void* out) {
  grad_of_pairs<TileProducts>(c, gathered, linear, out);
}

bool split_bf16_contract(
    const Contraction& c, const void* in, const Weight& weight, void* out, const Epilogue& epilogue) {
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
  return WeightGrad<float, PairPixels<float, SplitProducts>>(
      c, static_cast<const float*>(gathered), static_cast<const float*>(linear), static_cast<float*>(out)).run();
}

}  // namespace fastdcgan::cpu

#endif
