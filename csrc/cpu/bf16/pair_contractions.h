// The contractions of bfloat16 with Products that take pairs of it.
#pragma once

#include "cpu/bf16/pack_pairs.h"
#include "cpu/bf16/pair_pixels.h"
#include "cpu/contraction/pack.h"
#include "cpu/contraction/packed_weights.h"
#include "cpu/contraction/round_weight.h"
#include "cpu/gemm/col2im_gemm.h"
#include "cpu/gemm/implicit_gemm.h"

namespace fastdcgan::cpu {

template <class Products>
void contract_pairs(const Contraction& c, const void* in, const Weight& weight, void* out, const Epilogue& epilogue) {
  using Element = typename Products::Element;
  constexpr c10::ScalarType kElement = c10::CppTypeToScalarType<Element>::value;
  static thread_local Scratch scratch;
  const int64_t size = packed_size<Products>(c);
  const auto pack_to = [&](void* to) {
    pack_pairs(c, Rounded(weight, kElement).get(), Products::kDepthUnit, static_cast<Element*>(to));
  };
  const auto cached =
      packed_weight(c, kElement, weight, Products::kDepthUnit, size * int64_t{sizeof(Element)}, pack_to);
  Element* packed = cached ? static_cast<Element*>(cached->data()) : scratch.get<Element>(size);
  if (!cached) pack_to(packed);
  ImplicitGemm<Element, Products>(
      c, static_cast<const Element*>(in), packed, static_cast<Element*>(out), epilogue).run();
}

template <class Products>
void grad_of_pairs(const Contraction& c, const void* gathered, const void* linear, void* out) {
  using Element = typename Products::Element;
  WeightGrad<Element, PairPixels<Element, Products>>(
      c, static_cast<const Element*>(gathered), static_cast<const Element*>(linear), static_cast<Element*>(out)).run();
}

}  // namespace fastdcgan::cpu
