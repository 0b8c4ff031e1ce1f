// What Python has to know of the kernels, in JSON: fastdcgan/backends/cuda_facts.py compares it with its own when the
// library is loaded.
#include "cuda/elementwise/pass.cuh"
#include "cuda/gemm/contraction_tiles.cuh"
#include "cuda/gemm_sm90/sm90_tiles.cuh"
#include "cuda/ops/facts.h"
#include "cuda/train/adam.cuh"

namespace fastdcgan::cuda {
namespace {

std::string list(std::initializer_list<int64_t> numbers) {
  std::string text;
  for (const int64_t number : numbers) text += (text.empty() ? "[" : ", ") + std::to_string(number);
  return text + "]";
}

std::string list(std::initializer_list<std::string> values) {
  std::string text;
  for (const std::string& value : values) text += (text.empty() ? "[" : ", ") + value;
  return text + "]";
}

// Columns: kM, kN, kK, warps, stages, blocks of a multiprocessor; bytes of shared memory without a second tensor, and
// of that of each factor.
template <class T, class Shape>
std::string tile() {
  using C = Contraction<Op::weight_grad, Multiplied<T>, Shape>;
  const int64_t left = sizeof(typename C::Left), right = sizeof(typename C::Right);
  return list({Shape::kM, Shape::kN, Shape::kK, Shape::kThreads / 32, Shape::kStages, Shape::kBlocks,
               static_cast<int64_t>(sizeof(typename C::Shared)), Shape::kStages * left, Shape::kStages * right});
}

// Columns: kM, kN, kK, blocks of a multiprocessor and bytes of a block's ring without a prologue and with one.
template <class Shape>
std::string sm90_tile() {
  using Plain = Sm90Contraction<Op::conv, gpu::bf16, Shape, false>;
  using Transforms = Sm90Contraction<Op::conv, gpu::bf16, Shape, true>;
  return list({Shape::kM, Shape::kN, Shape::kK, Plain::kBlocks, Plain::kRing, Transforms::kBlocks, Transforms::kRing});
}

// Ids of the activations, or of those alone that a prologue in registers has.
std::string activations(bool in_registers) {
  std::string text;
  for (int id = 0; known_activation(id); ++id)
    if (RuntimeActivation(id, 0.f).linear || !in_registers) text += (text.empty() ? "[" : ", ") + std::to_string(id);
  return text + "]";
}

}  // namespace

std::string facts_op() {
  const auto id = [](auto kind) { return static_cast<int64_t>(kind); };
  using K = EpilogueKind;
  return std::string("{") +
         "\"tiles\": " + list({tile<gpu::bf16, Tile0>(), tile<gpu::bf16, Tile1>(), tile<gpu::bf16, Tile2>(),
                               tile<gpu::bf16, Tile3>(), tile<gpu::bf16, Tile4>(), tile<float, Tile5>(),
                               tile<float, Tile6>()}) +
         ", \"sm90_tiles\": " + list({sm90_tile<Tile7>(), sm90_tile<Tile8>(), sm90_tile<Tile9>()}) +
         ", \"prologues_in_registers\": " + activations(true) +
         ", \"epilogues\": " + list({id(K::none), id(K::bias), id(K::activate), id(K::stats), id(K::grad_stats)}) +
         ", \"activations\": " + activations(false) +
         ", \"limits\": " + list({kMostPixels, kMostSplits, kMostGeometry}) +
         ", \"adam_chunk\": " + std::to_string(Adam::kChunk) + "}";
}

}  // namespace fastdcgan::cuda
