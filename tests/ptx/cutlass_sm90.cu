// GEMMs of CUTLASS for sm_90a: bulk copies of tensors with a swizzle of 128 bytes, a warpgroup that copies and others that
// multiply, in turn (pingpong) or together (cooperative).
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

namespace {

using BF16 = cutlass::bfloat16_t;
using cute::_1, cute::_64, cute::_128, cute::Shape;
using cutlass::arch::OpClassTensorOp, cutlass::arch::Sm90;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;

// Between the rows, where they lie in row-major order, or the columns.
template <class Stride>
Stride packed(int rows, int columns) {
  constexpr bool row_major = cute::is_static<cute::tuple_element_t<1, Stride>>::value;
  Stride found{};
  cute::get<row_major ? 0 : 1>(found) = row_major ? columns : rows;
  return found;
}

template <class LayoutA, class LayoutB, class D, class Tile, class Schedule, class EpilogueSchedule>
int gemm(const void* a, const void* b, void* d, int m, int n, int k) {
  using Cluster = Shape<_1, _1, _1>;
  constexpr int kVector = 16 / sizeof(D);
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Sm90, OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row,
      kVector, D, Row, kVector, EpilogueSchedule>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      Sm90, OpClassTensorOp, BF16, LayoutA, 8, BF16, LayoutB, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCount<3>, Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  const auto d_stride = packed<typename Kernel::StrideD>(m, n);
  const cutlass::KernelHardwareInfo one_processor{0, 1};  // whose blocks compute several tiles
  return static_cast<int>(Gemm{}({cutlass::gemm::GemmUniversalMode::kGemm,
                                  {m, n, k, 1},
                                  {static_cast<const BF16*>(a), packed<typename Kernel::StrideA>(m, k),
                                   static_cast<const BF16*>(b), packed<typename Kernel::StrideB>(n, k)},
                                  {{1, 0}, nullptr, d_stride, static_cast<D*>(d), d_stride},
                                  one_processor}));
}

}  // namespace

// d [m][n] in row-major order. K-major: a [m][k], b [n][k]; MN-major: a [k][m], b [k][n]. Returns a cutlass::Status.
extern "C" {
int k_major(const void* a, const void* b, void* d, int m, int n, int k) {
  return gemm<Row, Column, BF16, Shape<_64, _128, _64>, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
              cutlass::epilogue::TmaWarpSpecialized>(a, b, d, m, n, k);
}
int mn_major(const void* a, const void* b, void* d, int m, int n, int k) {
  return gemm<Column, Row, float, Shape<_128, _128, _64>, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
              cutlass::epilogue::TmaWarpSpecializedCooperative>(a, b, d, m, n, k);
}
}
