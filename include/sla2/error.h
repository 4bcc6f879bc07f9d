// The one exception type that the library throws.
#pragma once

#include <stdexcept>
#include <string>

namespace sla2 {

/// What went wrong, so that a caller can map it (Python: kInvalidArgument is ValueError).
enum class ErrorKind {
  kInvalidArgument,  ///< the caller passed something that breaks a rule
  kUnsupported,      ///< valid, but no implementation on this machine takes it
  kRuntime,          ///< the machine failed: memory, device, file
};

/// The message names the argument, the rule and the value received:
/// "head_dim must be a multiple of 16 up to 256, got 72".
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  explicit Error(const std::string& message) : Error(ErrorKind::kInvalidArgument, message) {}
  [[nodiscard]] ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace sla2
