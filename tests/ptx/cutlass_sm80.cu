// GEMMs of CUTLASS for sm_80: cp.async in several stages, swizzled shared memory, ldmatrix, mma.sync.
#include <cutlass/gemm/device/gemm.h>

namespace {

using BF16 = cutlass::bfloat16_t;
using cutlass::gemm::GemmShape;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;

template <class LayoutA, class LayoutB, class D>
int gemm(const void* a, const void* b, void* d, int m, int n, int k) {
  constexpr int kVector = 16 / sizeof(D);
  using Gemm = cutlass::gemm::device::Gemm<
      BF16, LayoutA, BF16, LayoutB, D, Row, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
      GemmShape<128, 64, 32>, GemmShape<64, 32, 32>, GemmShape<16, 8, 16>,
      cutlass::epilogue::thread::LinearCombination<D, kVector, float, float>,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 3>;
  const int a_stride = std::is_same_v<LayoutA, Row> ? k : m, b_stride = std::is_same_v<LayoutB, Row> ? n : k;
  const cutlass::TensorRef<D, Row> out{static_cast<D*>(d), n};
  return static_cast<int>(Gemm{}({{m, n, k}, {static_cast<const BF16*>(a), a_stride},
                                  {static_cast<const BF16*>(b), b_stride}, out, out, {1, 0}}));
}

}  // namespace

// d [m][n] in row-major order. K-major: a [m][k], b [n][k]; MN-major: a [k][m], b [k][n]. Returns a cutlass::Status.
extern "C" {
int k_major(const void* a, const void* b, void* d, int m, int n, int k) { return gemm<Row, Column, BF16>(a, b, d, m, n, k); }
int mn_major(const void* a, const void* b, void* d, int m, int n, int k) { return gemm<Column, Row, float>(a, b, d, m, n, k); }
}
