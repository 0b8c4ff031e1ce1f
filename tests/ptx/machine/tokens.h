// The words and signs of a text of PTX.
#pragma once

#include <algorithm>
#include <cctype>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

struct Token {
  std::string text;
  int line;
};

inline bool in_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }

inline std::vector<Token> tokens_of(std::string_view text) {
  std::vector<Token> found;
  int line = 1;
  for (size_t i = 0; i < text.size();) {
    const char c = text[i];
    size_t end = i + 1;
    if (c == '\n') ++line;
    if (std::isspace(static_cast<unsigned char>(c))) {
      i = end;
      continue;
    }
    if (text.substr(i, 2) == "//") {
      i = std::min(text.find('\n', i), text.size());
      continue;
    }
    if (text.substr(i, 2) == "/*") {
      end = std::min(text.find("*/", i), text.size() - 2) + 2;
      line += static_cast<int>(std::count(text.begin() + i, text.begin() + end, '\n'));
      i = end;
      continue;
    }
    if (c == '"') {
      end = std::min(text.find('"', i + 1), text.size() - 1) + 1;
    } else if (in_word(c)) {
      while (end < text.size() && (in_word(text[end]) || text.substr(end, 2) == "::" || text.substr(end - 1, 2) == "::")) {
        ++end;
      }
    }
    found.push_back({std::string(text.substr(i, end - i)), line});
    i = end;
  }
  return found;
}

// .func (.param .b64 result) name (.param .b64 first, .param .b64 second) { ... }
struct Called {
  std::vector<std::string> names;  // of the result and the parameters
  size_t body;                     // its first token
};

inline std::map<std::string, Called> functions_in(const std::vector<Token>& tokens) {
  std::map<std::string, Called> found;
  for (size_t k = 0; k < tokens.size(); ++k) {
    if (tokens[k].text != ".func") continue;
    Called called{};
    std::string name;
    for (++k; k + 1 < tokens.size() && tokens[k].text != "{" && tokens[k].text != ";"; ++k) {
      const std::string& text = tokens[k].text;
      if (!in_word(text[0]) || text[0] == '.' || std::isdigit(static_cast<unsigned char>(text[0]))) continue;
      if (tokens[k + 1].text == "(") name = text;
      else called.names.push_back(text);
    }
    called.body = k + 1;
    if (tokens[k].text == "{") found[name] = called;  // else it is only declared
  }
  return found;
}

}  // namespace ptx
