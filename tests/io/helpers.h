// What the tests of io share: a folder of their own, and the message of an expected error.
#pragma once

#include <functional>
#include <string>

#include <gtest/gtest.h>

#include "sla2/error.h"
#include "tests/temporary_folder.h"

namespace sla2::io::test {

using sla2::test::TemporaryFolder;

/// The message of the sla2::Error that `call` throws; a failure and "" if it throws none.
inline std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "expected sla2::Error";
  return {};
}

inline void expect_in(const std::string& part, const std::string& message) {
  EXPECT_NE(message.find(part), std::string::npos) << '"' << part << "\" is not in: " << message;
}

inline void expect_error(const std::function<void()>& call, const std::string& part) {
  expect_in(part, error_of(call));
}

}  // namespace sla2::io::test
