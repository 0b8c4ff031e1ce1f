// From the text to a Program. What isn't known is an error with its line.
#include <algorithm>
#include <cctype>
#include <optional>
#include <set>
#include <sstream>
#include <tuple>
#include <utility>

#include "memory.h"
#include "tokens.h"

namespace ptx {
namespace {

uint64_t bytes_of(const std::string& type) {  // .b32: 4
  const uint64_t bits = std::strtoull(type.c_str() + type.find_first_of("0123456789"), nullptr, 10);
  return bits / 8;
}

class Parser {
 public:
  explicit Parser(const std::string& text)
      : tokens_(tokens_of(text)), program_(std::make_unique<Program>()), called_(functions_in(tokens_)) {
    std::istringstream stream(text);
    for (std::string line; std::getline(stream, line);) program_->lines.push_back(line);
    tokens_.push_back({"", tokens_.empty() ? 1 : tokens_.back().line});
  }

  std::unique_ptr<Program> run() {
    try {
      while (!at("")) top();
    } catch (const Fault& fault) {
      const int line = error_line_ ? error_line_ : tokens_[std::min(next_, tokens_.size() - 1)].line;
      throw Fault("line " + std::to_string(line) + ": " + fault.what() + "\n    " + program_->lines[line - 1]);
    }
    return std::move(program_);
  }

 private:
  struct Scope {
    std::string path;  // of labels: "2/5/" is the fifth of the braces within the second
    std::map<std::string, uint32_t> names;
    std::map<std::string, std::pair<uint32_t, uint32_t>> families;  // %r<9>: first register and how many
  };

  std::vector<Token> tokens_;
  size_t next_ = 0;
  int error_line_ = 0;
  std::unique_ptr<Program> program_;
  std::map<std::string, Called> called_;   // functions besides kernels
  std::map<std::string, Symbol> symbols_;  // of the module
  // Of the function that is being read:
  Function* function_ = nullptr;
  std::vector<Scope> scopes_;
  std::map<std::string, Symbol> locals_;
  std::map<std::string, int> labels_, table_names_;
  std::vector<std::vector<std::string>> tables_;
  std::vector<std::tuple<int, std::string, std::string>> jumps_;  // instruction, path, label
  size_t braces_ = 0;
  std::vector<size_t> firsts_;                      // of each instruction's operands
  std::map<uint64_t, uint32_t> constants_;
  std::set<uint32_t> results_;  // registers that some instruction writes
  int calls_ = 0;               // within which this is
  std::vector<size_t> packs_;   // the instructions that are mov c, {a, b} or prmt c, a, b, ...

  bool at(const std::string& text) const { return tokens_[next_].text == text; }
  bool take(const std::string& text) { return at(text) ? (++next_, true) : false; }
  std::string word() { return tokens_[next_++].text; }
  void expect(const std::string& text) {
    if (!take(text)) throw Fault("'" + text + "' expected, not '" + tokens_[next_].text + "'");
  }
  int64_t integer() {
    const bool minus = take("-");
    const std::string text = word();
    char* end;
    const uint64_t value = std::strtoull(text.c_str(), &end, 0);
    if (text.empty() || (*end && std::string(end) != "U")) throw Fault("a number expected, not '" + text + "'");
    return static_cast<int64_t>(minus ? -value : value);
  }

  bool skipped() {  // what says nothing about what is computed
    static const std::set<std::string> of_a_line{".loc", ".file", ".version", ".target", ".address_size"};
    const int line = tokens_[next_].line;
    if (of_a_line.count(tokens_[next_].text)) {
      while (!at("") && tokens_[next_].line == line) ++next_;
    } else if (take(".pragma")) {
      while (!take(";")) ++next_;
    } else if (take(".section")) {
      while (!take("}")) ++next_;
    } else {
      return false;
    }
    return true;
  }

  void top() {
    if (skipped()) return;
    while (at(".visible") || at(".weak") || at(".extern")) ++next_;
    if (take(".entry")) return entry();
    if (at(".func")) return pass_function();
    if (!variable(symbols_)) throw Fault("'" + tokens_[next_].text + "' isn't known here");
  }

  void pass_function() {
    while (!at("{") && !at(";") && !at("")) ++next_;
    int depth = 0;
    do {
      depth += at("{"), depth -= at("}");
      if (at("")) throw Fault("the text ends within a function");
      ++next_;
    } while (depth);
  }

  // call (result), name, (first, second); the function's body stands in its place.
  void call() {
    std::vector<std::string> given;
    const auto names = [&] {
      expect("(");
      while (!take(")")) given.push_back(word()), take(",");
    };
    if (at("(")) names(), expect(",");
    const auto called = called_.find(word());
    if (called == called_.end()) throw Fault("this function isn't known");
    if (take(",")) names();
    expect(";");
    if (given.size() != called->second.names.size()) throw Fault("the function has other parameters");
    for (size_t k = 0; k < given.size(); ++k) locals_[called->second.names[k]] = locals_.at(given[k]);
    const size_t after = std::exchange(next_, called->second.body);
    scopes_.push_back({scopes_.back().path + std::to_string(++braces_) + "/", {}, {}});
    const std::string end = scopes_.back().path + kReturn;
    ++calls_, statements(), --calls_;
    scopes_.pop_back();
    labels_[end] = static_cast<int>(function_->code.size());
    next_ = after;
  }
  static constexpr const char* kReturn = "(return)";

  // .shared .align 16 .b8 name[64];
  bool variable(std::map<std::string, Symbol>& symbols) {
    static const std::map<std::string, Space> spaces{
        {".shared", Space::shared}, {".global", Space::global}, {".const", Space::constant}, {".local", Space::local},
        {".param", Space::param}};  // of a call
    const auto found = spaces.find(tokens_[next_].text);
    if (found == spaces.end()) return false;
    ++next_;
    uint64_t align = 0;
    if (take(".align")) align = integer();
    const uint64_t size = bytes_of(word());
    align = std::max(align, size);
    const std::string name = word();
    uint64_t count = 1;
    bool dynamic = false;
    while (take("[")) {
      if ((dynamic = at("]"))) count = 0;
      else count *= integer();
      expect("]");
    }
    std::vector<uint8_t> bytes(size * count);
    if (take("=")) initial(bytes, size);
    expect(";");
    Symbol symbol{found->second, 0, bytes.size()};
    const auto placed = [&](uint64_t& end) {
      symbol.begin = (end + align - 1) / align * align;
      end = symbol.begin + symbol.bytes;
    };
    if (symbol.space == Space::shared && dynamic) {
      symbol.bytes = kDynamic;
    } else if (symbol.space == Space::shared) {
      placed(program_->shared_bytes);
    } else if (symbol.space == Space::local) {
      placed(function_->local_bytes);
    } else if (symbol.space == Space::param) {
      placed(function_->local_bytes);
      symbol.begin |= kLocalWindow;
    } else {
      auto variable = std::make_unique<Variable>(Variable{name, std::move(bytes), symbol.space == Space::constant});
      symbol.begin = reinterpret_cast<uint64_t>(variable->bytes.data());
      program_->variables.push_back(std::move(variable));
    }
    symbols[name] = symbol;
    return true;
  }
  static constexpr uint64_t kDynamic = ~uint64_t{0};

  void initial(std::vector<uint8_t>& bytes, uint64_t size) {
    const bool braces = take("{");
    for (size_t i = 0; i == 0 || take(","); ++i) {
      const uint64_t value = number();
      if ((i + 1) * size > bytes.size()) throw Fault("more values than the variable has");
      for (uint64_t b = 0; b < size; ++b) bytes[i * size + b] = static_cast<uint8_t>(value >> 8 * b);
    }
    if (braces) expect("}");
  }

  // The bits of 12, -0x1, 0f3F800000 or 0d3FF0000000000000
  uint64_t number() {
    const std::string& text = tokens_[next_].text;
    if (text.size() > 2 && text[0] == '0' && std::string("fFdD").find(text[1]) != std::string::npos) {
      return std::strtoull(word().c_str() + 2, nullptr, 16);
    }
    return static_cast<uint64_t>(integer());
  }

  void entry() {
    auto owned = std::make_unique<Function>();
    function_ = owned.get();
    function_->name = word();
    scopes_.assign(1, {});
    locals_.clear(), labels_.clear(), table_names_.clear(), tables_.clear(), jumps_.clear(), firsts_.clear();
    constants_.clear(), results_.clear(), packs_.clear();
    std::vector<std::pair<std::string, Symbol>> parameters;
    uint64_t end = 0;
    if (take("(") && !take(")")) {
      do {
        parameters.push_back(parameter(end));
      } while (take(","));
      expect(")");
    }
    function_->parameters.resize(end / sizeof(Line) + 1);
    function_->parameter_bytes = end;
    for (auto& [name, symbol] : parameters) {
      function_->fields.emplace_back(symbol.begin, symbol.bytes);
      symbol.begin += reinterpret_cast<uint64_t>(function_->parameters.data());
      locals_[name] = symbol;
    }
    while (!take("{")) {
      const std::string directive = word();
      if (directive != ".reqntid" && directive != ".maxntid" && directive != ".minnctapersm" && directive != ".maxnreg") {
        throw Fault("'" + directive + "' isn't known here");
      }
      int values[3] = {1, 1, 1};
      for (int i = 0; i == 0 || take(","); ++i) values[std::min(i, 2)] = static_cast<int>(integer());
      int* kept = directive == ".reqntid" ? function_->required : directive == ".maxntid" ? function_->most : nullptr;
      if (kept) std::copy(values, values + 3, kept);
    }
    body();
    program_->functions[owned->name] = std::move(owned);
  }

  // .param .u64 .ptr .global .align 1 name    or    .param .align 8 .b8 name[272]
  std::pair<std::string, Symbol> parameter(uint64_t& end) {
    expect(".param");
    uint64_t align = 1, size = 0, count = 1;
    while (tokens_[next_].text[0] == '.') {
      const std::string part = word();
      if (part == ".align") {
        const uint64_t given = integer();
        align = size ? align : given;  // after the type it is what a pointer points to
      } else if (part != ".ptr" && part != ".global") {
        size = bytes_of(part);
        align = std::max(align, size);
      }
    }
    const std::string name = word();
    if (take("[")) count = integer(), expect("]");
    const uint64_t begin = (end + align - 1) / align * align;
    end = begin + size * count;
    return {name, {Space::param, begin, size * count}};
  }

  void statements() {  // until the end of these braces
    for (size_t depth = 1; depth;) {
      if (at("")) throw Fault("the text ends within a kernel");
      if (skipped() || variable(locals_)) continue;
      if (take("{")) {
        scopes_.push_back({scopes_.back().path + std::to_string(++braces_) + "/", {}, {}}), ++depth;
      } else if (take("}")) {
        --depth;
        if (depth) scopes_.pop_back();
      } else if (take(".reg")) {
        declare();
      } else if (tokens_[next_ + 1].text == ":") {
        label();
      } else {
        error_line_ = tokens_[next_].line;
        instruction();
        error_line_ = 0;
      }
    }
  }

  void body() {
    statements();
    // LLVM joins a half or a byte with one that nothing in the kernel writes where only the first is used: any will do.
    for (const size_t index : packs_) {
      for (int k = 1; k <= std::max(2, function_->code[index].count); ++k) {
        uint32_t& from = function_->operands[firsts_[index] + k];
        if (!results_.count(from) && !is_given(from)) from = constant(0xcbcbcbcbcbcbcbcb);
      }
    }
    // A kernel whose last instruction is a branch or ret needs none here; one that runs off its end returns.
    function_->code.emplace_back().control = Control::exit;
    firsts_.push_back(function_->operands.size());
    for (size_t i = 0; i < function_->code.size(); ++i) function_->code[i].at = function_->operands.data() + firsts_[i];
    for (const auto& [index, path, name] : jumps_) {
      Instruction& jump = function_->code[index];
      error_line_ = jump.line;
      jump.target = find(jump.control == Control::table ? table_names_ : labels_, path, name);
    }
    for (const auto& names : tables_) {
      auto& table = function_->tables.emplace_back();
      for (const auto& name : names) table.push_back(find(labels_, "", name));
    }
    error_line_ = 0;
  }

  // The label of these braces, or of the nearest around them.
  static int find(const std::map<std::string, int>& names, std::string path, const std::string& name) {
    for (;; path.resize(path.find_last_of('/', path.size() - 2) + 1)) {
      const auto found = names.find(path + name);
      if (found != names.end()) return found->second;
      if (path.empty()) throw Fault("there is no label " + name);
    }
  }

  void declare() {  // .reg .b32 %r<9>;    or    .reg .pred p, q;
    word();         // the type: a register has 64 bits here
    do {
      const std::string name = word();
      uint32_t count = 1;
      if (take("<")) {
        count = static_cast<uint32_t>(integer());
        expect(">");
        scopes_.back().families[name] = {function_->registers, count};
      } else {
        scopes_.back().names[name] = function_->registers;
      }
      function_->registers += count;
    } while (take(","));
    expect(";");
  }

  void label() {
    const std::string name = word();
    expect(":");
    if (take(".branchtargets")) {
      table_names_[scopes_.back().path + name] = static_cast<int>(tables_.size());
      auto& targets = tables_.emplace_back();
      do {
        targets.push_back(word());
      } while (take(","));
      expect(";");
    } else {
      labels_[scopes_.back().path + name] = static_cast<int>(function_->code.size());
    }
  }

  std::optional<uint32_t> register_of(const std::string& name) const {
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->names.find(name); found != scope->names.end()) return found->second;
      const auto family = scope->families.find(name.substr(0, digits));
      if (family == scope->families.end() || digits == name.size()) continue;
      const unsigned long index = std::stoul(name.substr(digits));
      if (index < family->second.second) return family->second.first + static_cast<uint32_t>(index);
    }
    return std::nullopt;
  }

  uint32_t constant(uint64_t value) {
    const auto [found, is_new] = constants_.try_emplace(value, function_->registers);
    if (is_new) function_->constants.emplace_back(function_->registers++, value);
    return found->second;
  }

  bool is_given(uint32_t at) const {  // a number, an address, or a register such as %tid.x
    const auto is = [&](const auto& each) { return each.at == at; };
    return std::any_of(constants_.begin(), constants_.end(), [&](const auto& each) { return each.second == at; }) ||
           std::any_of(function_->specials.begin(), function_->specials.end(), is);
  }

  uint32_t special(const std::string& name) {
    for (const Special& known : function_->specials) {
      if (known.name == name) return known.at;
    }
    function_->specials.push_back({name, function_->registers});
    return function_->registers++;
  }

  uint32_t value() {  // a register, a symbol's address, a number
    const std::string text = tokens_[next_].text;
    if (text == "_") return ++next_, function_->registers++;
    if (const auto found = register_of(text)) return ++next_, *found;
    for (const auto* symbols : {&locals_, &symbols_}) {
      const auto found = symbols->find(text);
      if (found == symbols->end()) continue;
      ++next_;
      if (found->second.bytes == kDynamic) return special("dynamic shared memory");
      return constant(found->second.begin);
    }
    if (text[0] == '%') return ++next_, special(text);
    return constant(number());
  }

  Operand plain() {
    const bool number = std::isdigit(static_cast<unsigned char>(tokens_[next_].text[0])) || at("-");
    if (!number) return {value()};
    const uint64_t found = this->number();
    return {constant(found), static_cast<int64_t>(found), false, true};
  }

  void operand(std::vector<Operand>& found) {
    if (take("{")) {
      do {
        found.push_back(plain());
      } while (take(","));
      expect("}");
    } else if (take("[")) {
      Operand address{value(), 0, true};
      if (take("+")) address.offset = integer();
      found.push_back(address);
      if (take(",")) operand(found);  // coordinates in a tensor
      expect("]");
    } else {
      do {
        found.push_back(plain());
      } while (take("|"));
    }
  }

  void instruction() {
    Instruction made;
    made.line = tokens_[next_].line;
    if (take("@")) {
      made.negated = take("!");
      const auto guard = register_of(word());
      if (!guard) throw Fault("the guard isn't a register");
      made.guard = static_cast<int>(*guard);
    }
    const std::string name = word();
    const auto named = program_->names.try_emplace(name).first;
    ++named->second;
    made.name = &named->first;
    Written written;
    std::istringstream parts(name);
    std::getline(parts, written.base, '.');
    for (std::string part; std::getline(parts, part, '.');) written.parts.push_back(part);
    if (written.base == "call" && made.guard < 0) return call();
    const bool returns = calls_ && written.base == "ret";  // from a function, to the end of its body
    if (returns) written.base = "bra";
    auto make = makers().end();
    if (!written.parts.empty() && is_float(written.parts.back())) make = makers().find(written.base + ":float");
    if (make == makers().end()) make = makers().find(written.base);
    if (make == makers().end()) throw Fault("the instruction " + name + " isn't known");
    const bool branch = written.base == "bra", table = written.base == "brx";
    if (!branch && !at(";")) {
      operand(written.operands);
      written.results = written.operands.size();
      while (take(",")) {
        if (table) break;
        operand(written.operands);
      }
    }
    if (branch || table) jumps_.emplace_back(function_->code.size(), scopes_.back().path, returns ? kReturn : word());
    expect(";");
    for (size_t k = 0; k < written.results; ++k) {
      if (written.operands[k].is_address) continue;
      results_.insert(written.operands[k].at);
      made.results = static_cast<int>(k) + 1;
    }
    made.run = make->second(written, made);
    if (!written.parts.empty()) throw Fault("." + written.parts[0] + " of " + name + " isn't known");
    if (!made.run && made.control == Control::none) throw Fault(name + " isn't known for this type");
    firsts_.push_back(function_->operands.size());
    function_->has_products |= written.base == "wgmma";
    const bool joins = written.base == "prmt" || (written.base == "mov" && written.operands.size() > 2);
    if (joins && written.results == 1) packs_.push_back(function_->code.size());
    int addresses = 0;
    for (const Operand& each : written.operands) {
      function_->operands.push_back(each.at);
      if (each.is_address && addresses < 3) made.offset[addresses++] = each.offset;
    }
    function_->code.push_back(made);
  }
};

}  // namespace

const Makers& makers() {
  static const Makers all = [] {
    Makers found;
    make_integers(found), make_floats(found), make_moves(found);
    make_accesses(found), make_collectives(found), make_controls(found);
    make_mbarriers(found), make_products(found);
    return found;
  }();
  return all;
}

std::unique_ptr<Program> parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptx
