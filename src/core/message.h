// Building the text of an error.
#pragma once

#include <sstream>
#include <string>

#include "sla2/error.h"

namespace sla2 {

template <typename... Parts>
[[nodiscard]] std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

/// Throws Error{kInvalidArgument} with the parts as its message unless `rule` holds.
template <typename... Parts>
void require(bool rule, const Parts&... parts) {
  if (!rule) throw Error(message(parts...));
}

}  // namespace sla2
