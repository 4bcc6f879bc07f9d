#include "tests/io/mutate.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <iostream>

namespace sla2::io::test {
namespace {

constexpr std::array kNumbers{"0",
                              "-1",
                              "-0",
                              "1e999",
                              "2.0",
                              "0.5",
                              "1e-320",
                              "2147483648",
                              "9223372036854775807",
                              "64",
                              "-9223372036854775808",
                              "18446744073709551615",
                              "1",
                              "18446744073709551616",
                              "4611686018427387904"};
constexpr std::array kWords{"null",   "true",    "{}",  "[]",          "\"\"",        "\"x\"",
                            "[[[[[[", "{\"a\":", "NaN", "\"\\ud800\"", "\"\\u0000\"", "\xff\xfe",
                            ",",      "]",       "}",   "\"keep\":1,"};
constexpr std::size_t kMaxGrowth = 64;

}  // namespace

std::uint64_t fuzz_seed() {
  const char* variable = std::getenv("SLA2_FUZZ_SEED");
  const std::uint64_t seed =
      variable == nullptr ? 20260212675 : std::strtoull(variable, nullptr, 10);
  std::cout << "SLA2_FUZZ_SEED=" << seed << std::endl;
  return seed;
}

void Mutator::change_bytes(std::string& text) {
  if (text.empty()) text.push_back('x');
  const std::size_t at = below(text.size());
  const std::size_t length = 1 + below(std::min(kMaxGrowth, text.size() - at));
  switch (below(6)) {
    case 0:
      text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
      break;
    case 1:
      text[at] = "\0\1\x7f\x80\xff{\"9"[below(8)];
      break;
    case 2:
      text.erase(at, length);
      break;
    case 3:
      text.insert(below(text.size()), std::string(text, at, length));
      break;
    case 4:
      std::swap(text[at], text[below(text.size())]);
      break;
    default:
      if (below(4) == 0) text.resize(at);  // rarely: little is left to find
      break;
  }
}

void Mutator::change_json(std::string& text) {
  const std::size_t from = below(text.size() + 1);
  switch (below(4)) {
    case 0:
    case 1: {
      const std::size_t begin = text.find_first_of("0123456789", from);
      if (begin == std::string::npos) return;
      const std::size_t end =
          std::min(text.find_first_not_of("0123456789.e+-", begin), text.size());
      text.replace(begin, end - begin, kNumbers[below(kNumbers.size())]);
      break;
    }
    case 2: {
      const std::size_t begin = text.find_first_of(":[,", from);
      const std::size_t end = text.find_first_of(",]}", begin == std::string::npos ? 0 : begin + 1);
      if (begin == std::string::npos || end == std::string::npos || end < begin) return;
      text.replace(begin + 1, end - begin - 1, kWords[below(kWords.size())]);
      break;
    }
    default:
      text.insert(from, kWords[below(kWords.size())]);
      break;
  }
}

std::string Mutator::bytes(std::string text) {
  for (std::size_t changes = 1 + below(4); changes > 0; --changes) change_bytes(text);
  return text;
}

std::string Mutator::json(std::string text) {
  for (std::size_t changes = 1 + below(4); changes > 0; --changes) {
    if (below(3) == 0) {
      change_bytes(text);
    } else {
      change_json(text);
    }
  }
  return text;
}

}  // namespace sla2::io::test
