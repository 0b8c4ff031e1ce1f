// Float arithmetic, comparison of any type, and selection.
#include <type_traits>

#include "warp.h"

namespace ptx {
namespace {

// Of one format: exact in double where that is possible, else rounded to odd, then rounded once as the instruction says.
template <class T>
T finish(const Instruction& i, double x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    if (i.saturated) x = std::isnan(x) ? 0 : std::fmin(std::fmax(x, 0), 1);
    if (i.relu) x = std::isnan(x) ? x : std::fmax(x, 0);
    if constexpr (std::is_same_v<T, float>) {
      const float found = single(x, i.rounding);
      return i.flushed ? flushed(found) : found;
    } else {
      return T(x, i.rounding);
    }
  }
}
template <class T>
double value(const Instruction& i, T x) {
  if constexpr (std::is_same_v<T, float>) return i.flushed ? flushed(x) : x;
  return static_cast<double>(x);
}

constexpr auto fma_of = []<class T>(const Instruction& i, T a, T b, T c) -> T {
  if constexpr (std::is_same_v<T, double>) return std::fma(a, b, c);
  return finish<T>(i, fma_to_odd(value(i, a), value(i, b), value(i, c)));
};
constexpr auto add_of = []<class T>(const Instruction& i, T a, T b) -> T {
  if constexpr (std::is_same_v<T, double>) return a + b;
  return finish<T>(i, fma_to_odd(value(i, a), 1, value(i, b)));
};
constexpr auto sub_of = []<class T>(const Instruction& i, T a, T b) -> T {
  if constexpr (std::is_same_v<T, double>) return a - b;
  return finish<T>(i, fma_to_odd(value(i, a), 1, -value(i, b)));
};
constexpr auto mul_of = []<class T>(const Instruction& i, T a, T b) -> T { return finish<T>(i, value(i, a) * value(i, b)); };
// A quotient or root of float32 in double, rounded again, is the one that is rounded once (Figueroa, 1995).
constexpr auto div_of = []<class T>(const Instruction& i, T a, T b) -> T { return finish<T>(i, value(i, a) / value(i, b)); };
constexpr auto rcp_of = []<class T>(const Instruction& i, T a) -> T { return finish<T>(i, 1 / value(i, a)); };
constexpr auto sqrt_of = []<class T>(const Instruction& i, T a) -> T { return finish<T>(i, std::sqrt(value(i, a))); };
// What is approximate on a GPU has the nearest value here, which is within its error.
constexpr auto rsqrt_of = []<class T>(const Instruction& i, T a) -> T { return finish<T>(i, 1 / std::sqrt(value(i, a))); };
constexpr auto ex2_of = []<class T>(const Instruction& i, T a) -> T { return finish<T>(i, std::exp2(value(i, a))); };
constexpr auto lg2_of = []<class T>(const Instruction& i, T a) -> T { return finish<T>(i, std::log2(value(i, a))); };
constexpr auto tanh_of = []<class T>(const Instruction& i, T a) -> T { return finish<T>(i, std::tanh(value(i, a))); };
constexpr auto sin_of = []<class T>(const Instruction& i, T a) -> T { return finish<T>(i, std::sin(value(i, a))); };
constexpr auto cos_of = []<class T>(const Instruction& i, T a) -> T { return finish<T>(i, std::cos(value(i, a))); };
// Of a number and a NaN the number, or with .NaN the NaN; -0 is less than +0.
template <bool least>
constexpr auto extreme = []<class T>(const Instruction& i, T a, T b) -> T {
  const double x = value(i, a), y = value(i, b);
  if (std::isnan(x) && std::isnan(y)) return finish<T>(i, x);
  if (std::isnan(x) || std::isnan(y)) return finish<T>(i, (std::isnan(x) == (i.mode == 1)) ? x : y);
  if (x == y) return finish<T>(i, std::signbit(x) == least ? x : y);
  return finish<T>(i, (x < y) == least ? x : y);
};
// Signs are bits: a NaN has one too.
constexpr auto neg_of = []<class T>(const Instruction&, T a) -> T {
  if constexpr (std::is_floating_point_v<T>) return -a;
  else return a.bits ^= 0x8000, a;
};
constexpr auto abs_of = []<class T>(const Instruction&, T a) -> T {
  if constexpr (std::is_floating_point_v<T>) return std::abs(a);
  else return a.bits &= 0x7fff, a;
};
constexpr auto copysign_of = []<class T>(const Instruction&, T a, T b) -> T {
  if constexpr (std::is_floating_point_v<T>) return std::copysign(b, a);
  else return a;
};

template <auto F, class T>
Run as_is(int operands) {
  if constexpr (requires(const Instruction& i) { F(i, T{}); }) {
    return operands == 1 ? lanewise_as<F, T, T> : nullptr;
  } else if constexpr (requires(const Instruction& i) { F(i, T{}, T{}); }) {
    return operands == 2 ? lanewise_as<F, T, T, T> : nullptr;
  } else {
    return operands == 3 ? lanewise_as<F, T, T, T, T> : nullptr;
  }
}

// `quick`: the same in the processor's own float32, which is the common case. Only what has it is exact enough in double
// for .rz, .rm and .rp.
template <auto F>
Make of_floats(int operands, Run quick = nullptr) {
  return [=](Written& n, Instruction& i) -> Run {
    n.expect(operands + 1);
    const std::string type = n.take_last();
    take_rounding(n, i);
    i.flushed = n.take("ftz"), i.saturated = n.take("sat"), i.relu = n.take("relu");
    i.mode = n.take("NaN");
    n.take("approx"), n.take("full");
    if (type == "f32" && quick && i.rounding == Rounding::nearest && !i.flushed && !i.saturated) return quick;
    if (const Run run = for_pair(type, [&]<class P>(Type<P>) -> Run {
          constexpr auto f = []<class... A>(const Instruction& i, P a, A... rest) -> P {
            return {F(i, a.low, rest.low...), F(i, a.high, rest.high...)};
          };
          using T = decltype(P{}.low);
          if constexpr (requires(const Instruction& i) { F(i, T{}); }) return lanewise_as<f, P, P>;
          else if constexpr (requires(const Instruction& i) { F(i, T{}, T{}); }) return lanewise_as<f, P, P, P>;
          else return lanewise_as<f, P, P, P, P>;
        })) {
      return run;
    }
    if ((type == "f64" || !quick) && i.rounding != Rounding::nearest) return nullptr;
    return for_float(type, [&]<class T>(Type<T>) -> Run { return as_is<F, T>(operands); });
  };
}

// --- setp, selp -----------------------------------------------------------------------------------------------------

enum Compare { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan_ };
const char* kCompares[] = {"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
const std::pair<const char*, Compare> kUnsigned[] = {{"lo", lt}, {"ls", le}, {"hi", gt}, {"hs", ge}};

template <Compare how, class T>
bool holds(T a, T b) {
  if constexpr (!std::is_arithmetic_v<T>) {
    return holds<how>(static_cast<double>(a), static_cast<double>(b));
  } else {
    const bool unordered = a != a || b != b;
    switch (how) {
      case eq: return a == b && !unordered;
      case ne: return a != b && !unordered;
      case lt: return a < b;
      case le: return a <= b;
      case gt: return a > b;
      case ge: return a >= b;
      case equ: return a == b || unordered;
      case neu: return a != b || unordered;
      case ltu: return a < b || unordered;
      case leu: return a <= b || unordered;
      case gtu: return a > b || unordered;
      case geu: return a >= b || unordered;
      case num: return !unordered;
      case nan_: return unordered;
    }
    return false;
  }
}

// p|q = (a how b) op c: i.count operands are results, i.mode is the op (and, or, xor; 0: there is no c)
template <Compare how, class T>
void setp(Warp& w, const Instruction& i) {
  const uint32_t* from = i.at + i.count;
  const uint64_t *a = w.lanes(from[0]), *b = w.lanes(from[1]);
  Lanes found = 0, tainted = w.poison[from[0]] | w.poison[from[1]];
  w.each([&](int lane) { found |= Lanes{holds<how>(narrow<T>(a[lane]), narrow<T>(b[lane]))} << lane; });
  const Lanes c = i.mode ? w.mask(from[2]) : 0;
  if (i.mode) tainted |= w.poison[from[2]];
  const auto with = [&](Lanes x) { return i.mode == 1 ? x & c : i.mode == 2 ? x | c : i.mode == 3 ? x ^ c : x; };
  w.put_mask(i.at[0], with(found), tainted);
  if (i.count == 2) w.put_mask(i.at[1], with(~found), tainted);
}

template <class T, int... k>
Run setp_of(int how, std::integer_sequence<int, k...>) {
  const Run runs[] = {setp<static_cast<Compare>(k), T>...};
  return runs[how];
}

Run make_setp(Written& n, Instruction& i) {
  const std::string type = n.take_last();
  n.take("ftz");
  const char* ops[] = {"and", "or", "xor"};
  for (int k = 0; k < 3; ++k) {
    if (n.take(ops[k])) i.mode = k + 1;
  }
  i.count = static_cast<int>(n.operands.size()) - (i.mode ? 3 : 2);
  if (i.count != 1 && i.count != 2) throw Fault("the number of operands is wrong");
  int how = -1;
  for (int k = 0; k < 14; ++k) {
    if (n.take(kCompares[k])) how = k;
  }
  for (const auto& [name, as] : kUnsigned) {
    if (n.take(name)) how = as;
  }
  if (how < 0) throw Fault("the comparison isn't known");
  const auto run = [&]<class T>(Type<T>) -> Run { return setp_of<T>(how, std::make_integer_sequence<int, 14>{}); };
  return is_float(type) ? for_float(type, run) : for_integer(type, run);
}

void selp(Warp& w, const Instruction& i) {
  uint64_t* d = w.lanes(i.at[0]);
  const uint64_t *a = w.lanes(i.at[1]), *b = w.lanes(i.at[2]);
  const Lanes chosen = w.mask(i.at[3]);
  w.each([&](int lane) { d[lane] = chosen >> lane & 1 ? a[lane] : b[lane]; });
  w.taint(i.at[0], (w.poison[i.at[1]] & chosen) | (w.poison[i.at[2]] & ~chosen) | w.poison[i.at[3]]);
}

}  // namespace

void make_floats(Makers& all) {
  using F = float;
  all["add:float"] = of_floats<add_of>(2, lanewise<[](F a, F b) { return a + b; }, F, F, F>);
  all["sub:float"] = of_floats<sub_of>(2, lanewise<[](F a, F b) { return a - b; }, F, F, F>);
  all["mul:float"] = of_floats<mul_of>(2, lanewise<[](F a, F b) { return a * b; }, F, F, F>);
  const Run quick = lanewise<[](F a, F b, F c) { return std::fma(a, b, c); }, F, F, F, F>;
  all["fma:float"] = all["mad:float"] = of_floats<fma_of>(3, quick);
  all["div:float"] = of_floats<div_of>(2);
  all["rcp:float"] = of_floats<rcp_of>(1);
  all["sqrt:float"] = of_floats<sqrt_of>(1);
  all["rsqrt:float"] = of_floats<rsqrt_of>(1);
  all["ex2:float"] = of_floats<ex2_of>(1);
  all["lg2:float"] = of_floats<lg2_of>(1);
  all["tanh:float"] = of_floats<tanh_of>(1);
  all["sin:float"] = of_floats<sin_of>(1);
  all["cos:float"] = of_floats<cos_of>(1);
  all["min:float"] = of_floats<extreme<true>>(2);
  all["max:float"] = of_floats<extreme<false>>(2);
  all["neg:float"] = of_floats<neg_of>(1);
  all["abs:float"] = of_floats<abs_of>(1);
  all["copysign:float"] = of_floats<copysign_of>(2);
  all["setp"] = make_setp;
  all["selp"] = [](Written& n, Instruction&) -> Run {
    n.expect(4);
    n.take_last();
    return selp;
  };
}

}  // namespace ptx
