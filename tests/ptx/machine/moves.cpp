// Moves, packing and conversions.
#include <algorithm>
#include <type_traits>

#include "warp.h"

namespace ptx {
namespace {

void mov(Warp& w, const Instruction& i) {
  uint64_t* d = w.lanes(i.at[0]);
  const uint64_t* s = w.lanes(i.at[1]);
  w.each([&](int lane) { d[lane] = s[lane]; });
  w.taint(i.at[0], w.poison[i.at[1]]);
}

void mov_pred(Warp& w, const Instruction& i) { w.put_mask(i.at[0], w.mask(i.at[1]), w.poison[i.at[1]]); }
// A number as a predicate: every lane has it.
void set_pred(Warp& w, const Instruction& i) { w.put_mask(i.at[0], w.lanes(i.at[1])[0] ? kAll : 0, 0); }

// Joins i.count operands, each of i.mode bits, the first one lowest.
void pack(Warp& w, const Instruction& i) {
  uint64_t* d = w.lanes(i.at[0]);
  const uint64_t part = ~uint64_t{0} >> (64 - i.mode);
  Lanes tainted = 0;
  for (int k = 0; k < i.count; ++k) tainted |= w.poison[i.at[1 + k]];
  w.each([&](int lane) {
    uint64_t found = 0;
    for (int k = 0; k < i.count; ++k) found |= (w.lanes(i.at[1 + k])[lane] & part) << k * i.mode;
    d[lane] = found;
  });
  w.taint(i.at[0], tainted);
}

void unpack(Warp& w, const Instruction& i) {
  const uint64_t part = ~uint64_t{0} >> (64 - i.mode);
  const uint32_t from = i.at[i.count];
  const Lanes tainted = w.poison[from];
  w.each([&](int lane) {
    const uint64_t whole = w.lanes(from)[lane];
    for (int k = 0; k < i.count; ++k) w.lanes(i.at[k])[lane] = whole >> k * i.mode & part;
  });
  for (int k = 0; k < i.count; ++k) w.taint(i.at[k], tainted);
}

// mov.b32 {a, b}, c takes apart what mov.b32 c, {a, b} joins: which of them it is, the parser tells by n.results.
Run make_mov(Written& n, Instruction& i) {
  const std::string type = n.take_last();
  if (type == "pred") {
    n.expect(2);
    return n.operands[1].is_constant ? set_pred : mov_pred;
  }
  const int operands = static_cast<int>(n.operands.size());
  if (operands == 2) return mov;
  i.count = operands - 1;
  i.mode = 8 * size_of(type) / i.count;
  return n.results > 1 ? unpack : pack;
}

// --- cvt: by way of double, in which all but 64-bit integers are exact; of those only the nearest float is known here

template <class D, class S>
D converted(const Instruction& i, S x) {
  constexpr bool from_float = !std::is_integral_v<S>, to_float = !std::is_integral_v<D>;
  if constexpr (!from_float && !to_float) {
    if (!i.saturated) return static_cast<D>(x);
    using Most = std::numeric_limits<D>;
    return static_cast<D>(std::clamp<__int128>(x, Most::min(), Most::max()));
  } else if constexpr (!to_float) {
    double found = whole(static_cast<double>(x), i.rounding);
    if constexpr (std::is_same_v<S, float>) {
      if (i.flushed) found = whole(flushed(x), i.rounding);
    }
    using Most = std::numeric_limits<D>;
    if (std::isnan(found)) return 0;
    if (found <= static_cast<double>(Most::min())) return Most::min();
    if (found >= static_cast<double>(Most::max())) return Most::max();
    return static_cast<D>(found);
  } else {
    if constexpr (!from_float && sizeof(S) == 8 && std::is_same_v<D, float>) return static_cast<float>(x);
    double found;
    if constexpr (std::is_same_v<S, float>) found = i.flushed ? flushed(x) : x;
    else found = static_cast<double>(x);
    if (i.integral) found = whole(found, i.rounding);
    if (i.saturated) found = std::isnan(found) ? 0 : std::fmin(std::fmax(found, 0), 1);
    if (i.relu) found = std::isnan(found) ? found : std::fmax(found, 0);
    if constexpr (std::is_same_v<D, double>) return found;
    else if constexpr (std::is_same_v<D, float>) return single(found, i.rounding);
    else return D(found, i.rounding);
  }
}

template <class D, class S>
constexpr auto convert = [](const Instruction& i, S x) { return converted<D>(i, x); };
template <class T>  // the first operand is the upper half
constexpr auto convert_two = [](const Instruction& i, float high, float low) {
  return Pair<T>{converted<T>(i, low), converted<T>(i, high)};
};
constexpr auto to_tf32 = [](const Instruction& i, float x) { return rounded<8, 10>(x, i.rounding, 0x3ffff) << 13; };

template <class F>
Run for_type(const std::string& name, F f) {
  return is_float(name) ? for_float(name, f) : for_integer(name, f);
}

Run make_cvt(Written& n, Instruction& i) {
  const std::string from = n.take_last(), to = n.take_last();
  take_rounding(n, i);
  i.flushed = n.take("ftz"), i.saturated = n.take("sat"), i.relu = n.take("relu");
  if (to.ends_with("x2")) {
    n.expect(3);
    if (from != "f32") return nullptr;
    return to == "f16x2" ? lanewise_as<convert_two<Half>, Pair<Half>, float, float>
                         : lanewise_as<convert_two<BFloat>, Pair<BFloat>, float, float>;
  }
  n.expect(2);
  if (size_of(from) == 8 && !is_float(from) && is_float(to) && (to == "f16" || to == "bf16" || i.rounding != Rounding::nearest)) {
    return nullptr;
  }
  if (to == "tf32" && from == "f32") return lanewise_as<to_tf32, uint32_t, float>;
  return for_type(from, [&]<class S>(Type<S>) {
    return for_type(to, [&]<class D>(Type<D>) -> Run { return lanewise_as<convert<D, S>, D, S>; });
  });
}

// Global and constant addresses and those of parameters are generic ones; shared and local memory have windows.
template <bool to>
void cvta(Warp& w, const Instruction& i) {
  const uint64_t window = i.space == Space::shared ? kSharedWindow : i.space == Space::local ? kLocalWindow : 0;
  uint64_t* d = w.lanes(i.at[0]);
  const uint64_t* s = w.lanes(i.at[1]);
  w.each([&](int lane) { d[lane] = to ? s[lane] & ~window : s[lane] | window; });
  w.taint(i.at[0], w.poison[i.at[1]]);
}

}  // namespace

void make_moves(Makers& all) {
  all["mov"] = make_mov;
  all["cvt"] = make_cvt;
  all["cvta"] = [](Written& n, Instruction& i) -> Run {
    n.expect(2);
    i.space = take_space(n);
    const bool to = n.take("to");
    return n.take("u64") ? (to ? cvta<true> : cvta<false>) : Run{};
  };
}

}  // namespace ptx
