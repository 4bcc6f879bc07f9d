// The operators' tensors, and what links a program to this library.
#pragma once

/// The library's version, "1.2.3". A C++ program that only looks the operators up by name calls it
/// once, so that the linker keeps the library and its static registration runs.
extern "C" __attribute__((visibility("default"))) const char* sla2_torch_version();

namespace sla2::torch_ops {

/// What an operator's exception says before the message of a sla2::Error. Only the text of an
/// exception crosses torch's boundary; callers turn it back into their own type by this prefix.
inline constexpr const char* kInvalidArgument = "sla2: invalid argument: ";
inline constexpr const char* kUnsupported = "sla2: unsupported: ";
inline constexpr const char* kRuntime = "sla2: runtime: ";

}  // namespace sla2::torch_ops
