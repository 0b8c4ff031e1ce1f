// Operators on contraction.cuh.
#include <algorithm>

#include "cuda/elementwise/batch_stats.cuh"
#include "cuda/elementwise/grad_sums.cuh"
#include "cuda/gemm/contraction_tiles.cuh"
#include "cuda/gemm_sm90/sm90_tiles.cuh"
#include "cuda/ops/contraction_ops.h"
#include "cuda/ops/tensors.h"

namespace fastdcgan::cuda {
namespace {

RuntimeActivation runtime_activation(int64_t act, double slope) {
  STD_TORCH_CHECK(known_activation(act), "unknown activation id ", act);
  return {static_cast<int>(act), static_cast<float>(slope)};
}

void check_size(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && t.numel() > 0 && t.numel() / t.size(1) < kMostPixels && t.size(1) < kMostPixels,
                  "expected a tensor [N, C, H, W] of 1 to ", kMostPixels - 1, " pixels, got ", shape_text(t));
}

void check_groups(const optional<Tensor>& coef, int64_t groups) {
  STD_TORCH_CHECK(!coef.has_value() || coef->size(1) == groups || coef->size(1) == 1, "expected coefficients of ",
                  groups, " statistics groups or one, got ", coef.has_value() ? shape_text(*coef) : "");
}

// An operand in channels_last, and the tensors that it takes.
struct OperandTensors {
  Tensor x;
  optional<Tensor> y, coef;
  RuntimeActivation act;

  OperandTensors(const Tensor& x_, const optional<Tensor>& y_, const optional<Tensor>& coef_, int64_t act_,
                 double slope, int64_t groups)
      : x(laid_out(x_, true)), act(runtime_activation(act_, slope)) {
    check_size(x);
    STD_TORCH_CHECK(groups > 0 && x.size(0) % groups == 0, "a batch of ", x.size(0), " can't have ", groups,
                    " statistics groups");
    STD_TORCH_CHECK(coef_.has_value() || !y_.has_value(), "expected coefficients where there is a second tensor");
    if (y_.has_value()) {
      check_grad(*y_, x);
      y = laid_out(*y_, true);
    }
    if (coef_.has_value()) coef = checked_coef(*coef_, x);
    check_groups(coef, groups);
  }

  template <class T>
  Operand<T> operand() const {
    Operand<T> o;
    o.x = data<T>(x), o.y = y.has_value() ? data<T>(*y) : nullptr, o.coef = data_or_null(coef);
    o.groups = coef.has_value() ? static_cast<int>(coef->size(1)) : 1;
    o.channels = static_cast<int>(x.size(1));
    o.prologue = y.has_value() ? Prologue::bn_backward : coef.has_value() ? Prologue::activate : Prologue::none;
    o.act = act, o.affine = y.has_value() && coef->size(0) == 4;
    return o;
  }
};

// Stride, padding and dilation of both axes; the sizes are still to be set.
template <class T>
void set_geometry(Problem<T>& p, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  for (const auto* pair : {&kernel, &stride, &padding, &dilation})
    STD_TORCH_CHECK(pair->size() == 2, "expected a pair, got ", pair->size(), " numbers");
  Axis* axes[] = {&p.rows, &p.columns};
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0 &&
                        std::max({kernel[i] * dilation[i], stride[i], padding[i]}) < kMostGeometry,
                    "no such geometry: kernel ", kernel[i], ", stride ", stride[i], ", padding ", padding[i],
                    ", dilation ", dilation[i]);
    axes[i]->kernel = static_cast<int>(kernel[i]), axes[i]->stride = static_cast<int>(stride[i]);
    axes[i]->padding = static_cast<int>(padding[i]), axes[i]->dilation = static_cast<int>(dilation[i]);
  }
}

template <class T>
void set_sizes(Problem<T>& p, const Tensor& gathered, int64_t height, int64_t width, int64_t groups, int64_t splits) {
  STD_TORCH_CHECK(splits > 0 && splits <= kMostSplits, "expected 1 to ", kMostSplits, " parts, got ", splits);
  p.rows.size = static_cast<int>(gathered.size(2)), p.columns.size = static_cast<int>(gathered.size(3));
  p.rows.pixels = static_cast<int>(height), p.columns.pixels = static_cast<int>(width);
  p.groups = static_cast<int>(groups), p.batch = static_cast<int>(gathered.size(0) / groups);
  p.splits = static_cast<int>(splits);
}

// Floats of the stream's, none where `size` is 0.
class Floats {
 public:
  Floats(const Tensor& like, int64_t size) {
    if (size > 0) floats_ = torch::stable::new_empty(like, {size}, ScalarType::Float);
  }
  float* data() const { return floats_.has_value() ? mutable_data<float>(*floats_) : nullptr; }

 private:
  optional<Tensor> floats_;
};

// [n, c, h, w] in channels_last.
Tensor new_output(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  return torch::stable::transpose(torch::stable::transpose(torch::stable::new_empty(like, {n, h, w, c}), 2, 3), 1, 2);
}

template <class T>
Tensor combined(const Epilogue<T>& f, const Tensor& like, int64_t slots, int64_t groups, int64_t stat_groups,
                int64_t fold, gpu::Stream stream) {
  const int64_t rows = f.rows(), channels = f.channels / fold;
  if (rows == 0) return torch::stable::new_empty(like, {0}, ScalarType::Float);
  const Tensor out = new_vectors(like, rows, stat_groups, channels);
  const Slots all{static_cast<int>(slots * groups / stat_groups * fold), static_cast<int>(fold),
                  static_cast<int>(channels), static_cast<int>(stat_groups)};
  float* to = mutable_data<float>(out);
  if (f.kind == EpilogueKind::stats)
    launch_combine<StatsPart>("combine_stats", f.partials, all, to, stream);
  else if (rows == 2)
    launch_combine<SumsPart<2>>("combine_sums", f.partials, all, to, stream);
  else
    launch_combine<SumsPart<1>>("combine_sums", f.partials, all, to, stream);
  return out;
}

// Slots of a group's partials with that tile, which is of either kind.
template <Op op, class T>
int64_t tile_slots(const Problem<T>& p, int number) {
  if (sizeof(T) == 2 && is_sm90_tile(number)) return sm90_slots<op>(p);
  return with_tile<T>(number, [&](auto shape) { return partial_slots<op>(p, decltype(shape)::kM); });
}

template <Op op, class T>
void run_any_tile(const Problem<T>& p, int number, bool exact, float* workspace, gpu::Stream stream) {
  if constexpr (sizeof(T) == 2)
    if (is_sm90_tile(number)) return run_sm90_tile<op>(p, number, workspace, stream);
  run_tile<op, T>(p, number, exact, workspace, stream);
}

}  // namespace

std::tuple<Tensor, Tensor> contract_op(
    const Tensor& x_, const optional<Tensor>& y, const optional<Tensor>& coef, int64_t act, double slope,
    const Tensor& weight_, bool transposed, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, std::vector<int64_t> output_size, int64_t e_kind, const optional<Tensor>& e_y_,
    const optional<Tensor>& e_coef_, int64_t e_act, double e_slope, int64_t groups, int64_t stat_groups, int64_t fold,
    int64_t tile, int64_t splits, bool exact) {
  const OnDevice on(x_);
  const OperandTensors x(x_, y, coef, act, slope, groups);
  STD_TORCH_CHECK(weight_.dim() == 4 && weight_.scalar_type() == x.x.scalar_type() &&
                      weight_.size(transposed ? 0 : 1) == x.x.size(1),
                  "expected a weight of ", x.x.size(1), " input channels in the input's dtype, got ",
                  shape_text(weight_));
  STD_TORCH_CHECK(output_size.size() == 2 && output_size[0] > 0 && output_size[1] > 0, "expected an output size");
  const Tensor weight = laid_out(weight_, true);
  const int64_t channels = weight.size(transposed ? 1 : 0), n = x.x.size(0);
  const Tensor out = new_output(x.x, n, channels, output_size[0], output_size[1]);
  check_size(out);
  STD_TORCH_CHECK(fold > 0 && channels % fold == 0 && stat_groups > 0 && groups % stat_groups == 0, "expected ",
                  "statistics of a divisor of ", groups, " groups and ", channels, " channels");

  const auto kind = static_cast<EpilogueKind>(e_kind);
  STD_TORCH_CHECK(e_kind >= 0 && e_kind <= 4, "unknown epilogue ", e_kind);
  const bool with_coef = kind == EpilogueKind::activate || kind == EpilogueKind::grad_stats;
  STD_TORCH_CHECK((with_coef || kind == EpilogueKind::bias) == e_coef_.has_value() &&
                      (kind == EpilogueKind::grad_stats) == e_y_.has_value(),
                  "epilogue ", e_kind, " takes other tensors");
  optional<Tensor> e_coef, e_y;
  if (kind == EpilogueKind::bias) e_coef = as_float(e_coef_, channels);
  if (with_coef) e_coef = checked_coef(*e_coef_, out), check_groups(e_coef, groups);
  if (e_y_.has_value()) check_grad(*e_y_, out), e_y = laid_out(*e_y_, true);

  Tensor vectors = out;
  with_dtype(x.x, [&](auto type) {
    using T = decltype(type);
    Problem<T> p;
    set_geometry(p, {weight.size(2), weight.size(3)}, stride, padding, dilation);
    set_sizes(p, x.x, output_size[0], output_size[1], groups, splits);
    p.gathered = x.operand<T>(), p.other.x = data<T>(weight);
    Epilogue<T>& f = p.epilogue;
    f.out = mutable_data<T>(out), f.y = e_y.has_value() ? data<T>(*e_y) : nullptr, f.coef = data_or_null(e_coef);
    f.kind = kind, f.act = runtime_activation(e_act, e_slope), f.channels = static_cast<int>(channels);
    if (with_coef) f.coef_rows = static_cast<int>(e_coef->size(0)), f.coef_groups = static_cast<int>(e_coef->size(1));
    const auto run = [&](auto op) {
      constexpr Op kOp = decltype(op)::value;
      const int number = static_cast<int>(tile);
      const int64_t slots = tile_slots<kOp>(p, number);
      const Floats partials(x.x, groups * slots * f.rows() * channels), workspace(x.x, workspace_size<kOp>(p));
      f.partials = partials.data();
      run_any_tile<kOp>(p, number, exact, workspace.data(), on.stream);
      vectors = combined(f, x.x, slots, groups, stat_groups, fold, on.stream);
    };
    if (transposed)
      run(std::integral_constant<Op, Op::conv_transpose>{});
    else
      run(std::integral_constant<Op, Op::conv>{});
  });
  return {out, vectors};
}

Tensor contract_weight_grad_op(
    const Tensor& x_, const optional<Tensor>& x_y, const optional<Tensor>& x_coef, int64_t x_act, double x_slope,
    const Tensor& linear_, const optional<Tensor>& linear_y, const optional<Tensor>& linear_coef, int64_t linear_act,
    double linear_slope, std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, int64_t groups, int64_t tile, int64_t splits, bool exact) {
  const OnDevice on(x_);
  const OperandTensors x(x_, x_y, x_coef, x_act, x_slope, groups);
  const OperandTensors linear(linear_, linear_y, linear_coef, linear_act, linear_slope, groups);
  STD_TORCH_CHECK(x.x.size(0) == linear.x.size(0) && x.x.scalar_type() == linear.x.scalar_type(),
                  "expected two batches of one size and dtype, got ", shape_text(x.x), " and ", shape_text(linear.x));
  STD_TORCH_CHECK(kernel.size() == 2 && kernel[0] > 0 && kernel[1] > 0, "expected a kernel of two sizes");
  const Tensor out = new_output(x.x, linear.x.size(1), x.x.size(1), kernel[0], kernel[1]);
  check_size(out);
  with_dtype(x.x, [&](auto type) {
    using T = decltype(type);
    Problem<T> p;
    set_geometry(p, kernel, stride, padding, dilation);
    set_sizes(p, x.x, linear.x.size(2), linear.x.size(3), groups, splits);
    p.gathered = x.operand<T>(), p.other = linear.operand<T>();
    p.epilogue.out = mutable_data<T>(out), p.epilogue.channels = static_cast<int>(x.x.size(1));
    const Floats workspace(x.x, workspace_size<Op::weight_grad>(p));
    run_any_tile<Op::weight_grad>(p, static_cast<int>(tile), exact, workspace.data(), on.stream);
  });
  return out;
}

}  // namespace fastdcgan::cuda
