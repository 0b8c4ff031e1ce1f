// torch.classes.fastdcgan_cpu.Tape: a sequence of operators that runs with no Python in between: what fastdcgan/engine/tape.py has recorded.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

namespace fastdcgan::cpu {
namespace {

using at::Tensor;
using c10::IValue;
using Slots = std::vector<IValue>;  // tensors, or None

// What an operator gets or gives. The numbers are those of tape.py.
enum Kind : int64_t {
  kNone, kSlot, kInt, kFloat, kBool, kString, kInts, kFloats, kBools, kSlots, kIntTensor, kFloatTensor
};

// A number in a tensor's place: it decides on no dtype.
Tensor number(const c10::Scalar& value) {
  Tensor found = at::scalar_tensor(value, value.type());
  found.unsafeGetTensorImpl()->set_wrapped_number(true);
  return found;
}

struct Value {
  IValue constant;
  std::vector<int64_t> slots;
  Kind kind;
};

struct Instruction {
  c10::OperatorHandle op;
  std::vector<Value> arguments, results;
  std::vector<int64_t> dead;  // slots that nothing reads any more
};

// Reads the numbers that a tape is made of.
class Reader {
 public:
  Reader(const std::vector<int64_t>& code, const std::vector<double>& floats, const std::vector<std::string>& strings)
      : code_(code), floats_(floats), strings_(strings) {}

  bool done() const { return at_ == code_.size(); }
  int64_t next() { return code_.at(at_++); }

  std::vector<int64_t> numbers() {
    std::vector<int64_t> found(next());
    std::generate(found.begin(), found.end(), [this] { return next(); });
    return found;
  }

  Value value() {
    const Kind kind = static_cast<Kind>(next());
    switch (kind) {
      case kNone: return {IValue(), {}, kind};
      case kSlot: return {IValue(), {next()}, kind};
      case kInt: return {IValue(next()), {}, kind};
      case kFloat: return {IValue(floats_.at(next())), {}, kind};
      case kBool: return {IValue(next() != 0), {}, kind};
      case kString: return {IValue(strings_.at(next())), {}, kind};
      case kInts: return {IValue(numbers()), {}, kind};
      case kFloats: return {list<double>([this](int64_t i) { return floats_.at(i); }), {}, kind};
      case kBools: return {list<bool>([](int64_t i) { return i != 0; }), {}, kind};
      case kSlots: return {IValue(), numbers(), kind};
      case kIntTensor: return {IValue(number(next())), {}, kind};
      case kFloatTensor: return {IValue(number(floats_.at(next()))), {}, kind};
    }
    TORCH_CHECK_VALUE(false, "no kind ", kind, " of value");
  }

  std::vector<Value> values() {
    std::vector<Value> found;
    for (int64_t n = next(); n > 0; --n) found.push_back(value());
    return found;
  }

 private:
  template <class T, class F>
  IValue list(const F& of) {
    c10::List<T> found;
    for (int64_t i : numbers()) found.push_back(of(i));
    return IValue(found);
  }

  const std::vector<int64_t>& code_;
  const std::vector<double>& floats_;
  const std::vector<std::string>& strings_;
  size_t at_ = 0;
};

class Tape : public torch::CustomClassHolder {
 public:
  // `operators`: names and overloads, in turns. `code`: for each instruction its operator, arguments, results and dead
  // slots. The first slots are those of the inputs and the `constants`.
  Tape(
      const std::vector<std::string>& operators, const std::vector<int64_t>& code, const std::vector<double>& floats,
      const std::vector<std::string>& strings, std::vector<Tensor> constants, int64_t slots,
      std::vector<int64_t> outputs)
      : constants_(std::move(constants)), slots_(slots), outputs_(std::move(outputs)) {
    std::vector<c10::OperatorHandle> found;
    for (size_t i = 0; i + 1 < operators.size(); i += 2)
      found.push_back(c10::Dispatcher::singleton().findSchemaOrThrow(operators[i].c_str(), operators[i + 1].c_str()));
    for (Reader reader(code, floats, strings); !reader.done();) {
      const c10::OperatorHandle op = found.at(reader.next());
      std::vector<Value> arguments = reader.values(), results = reader.values();
      instructions_.push_back({op, std::move(arguments), std::move(results), reader.numbers()});
    }
  }

  c10::List<std::optional<Tensor>> run(const c10::List<std::optional<Tensor>>& inputs) const {
    Slots slots;
    slots.reserve(slots_);
    for (const std::optional<Tensor>& t : inputs.vec()) slots.push_back(t ? IValue(*t) : IValue());
    slots.insert(slots.end(), constants_.begin(), constants_.end());
    slots.resize(slots_);
    torch::jit::Stack stack;
    for (const Instruction& i : instructions_) {
      for (const Value& v : i.arguments) stack.push_back(argument(v, slots));
      i.op.callBoxed(stack);
      for (size_t k = 0; k < i.results.size(); ++k) store(i.results[k], stack.at(k), slots);
      stack.clear();
      for (int64_t slot : i.dead) slots[slot] = IValue();
    }
    c10::List<std::optional<Tensor>> found;
    found.reserve(outputs_.size());
    for (int64_t slot : outputs_)
      found.push_back(slot < 0 || slots[slot].isNone() ? std::nullopt : std::optional<Tensor>(slots[slot].toTensor()));
    return found;
  }

 private:
  static IValue argument(const Value& v, const Slots& slots) {
    if (v.kind == kSlot) return slots[v.slots[0]];
    if (v.kind != kSlots) return v.constant;
    c10::List<Tensor> found;
    found.reserve(v.slots.size());
    for (int64_t slot : v.slots) found.push_back(slots[slot].toTensor());
    return found;
  }

  static void store(const Value& v, const IValue& result, Slots& slots) {
    if (v.kind == kSlot) slots[v.slots[0]] = result;
    if (v.kind != kSlots) return;
    const c10::List<Tensor> found = result.toTensorList();
    for (size_t i = 0; i < v.slots.size(); ++i) slots[v.slots[i]] = IValue(found.get(i));
  }

  std::vector<Tensor> constants_;
  int64_t slots_;
  std::vector<int64_t> outputs_;
  std::vector<Instruction> instructions_;
};

}  // namespace
}  // namespace fastdcgan::cpu

TORCH_LIBRARY_FRAGMENT(fastdcgan_cpu, m) {
  using fastdcgan::cpu::Tape;
  m.class_<Tape>("Tape")
      .def(torch::init<
           const std::vector<std::string>&, const std::vector<int64_t>&, const std::vector<double>&,
           const std::vector<std::string>&, std::vector<at::Tensor>, int64_t, std::vector<int64_t>>())
      .def("run", &Tape::run);
}
