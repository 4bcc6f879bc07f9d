// Every rule at the public boundary, with the message that a user reads.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <limits>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "core/problems.h"

namespace sla2::test {
namespace {

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

struct ProblemRule {
  std::string name;
  std::function<void(Problem&)> change;
  std::string message;
};
void PrintTo(const ProblemRule& rule, std::ostream* out) { *out << rule.name; }

class ProblemRules : public testing::TestWithParam<ProblemRule> {};

TEST_P(ProblemRules, AreNamedInTheError) {
  Problem problem = small_problem(70, 150, 16, 32);
  problem.num_heads = 4;
  GetParam().change(problem);
  EXPECT_EQ(message_of([&] { validate(problem); }), GetParam().message);
  EXPECT_EQ(message_of([&] { static_cast<void>(workspace_bytes(problem, Pass::kForward, 1)); }),
            GetParam().message);
}

const std::vector<ProblemRule> kProblemRules = {
    {"keep_zero", [](Problem& p) { p.config.keep = 0; }, "keep must be in (0, 1], got 0"},
    {"keep_above", [](Problem& p) { p.config.keep = 1.5; }, "keep must be in (0, 1], got 1.5"},
    {"keep_nan", [](Problem& p) { p.config.keep = std::nan(""); },
     "keep must be in (0, 1], got nan"},
    {"block_q", [](Problem& p) { p.config.block_q = 48; },
     "block_q must be 32, 64, 128 or 256, got 48"},
    {"block_k", [](Problem& p) { p.config.block_k = 0; },
     "block_k must be 32, 64, 128 or 256, got 0"},
    {"scale", [](Problem& p) { p.config.scale = -1; }, "scale must be positive and finite, got -1"},
    {"scale_inf", [](Problem& p) { p.config.scale = std::numeric_limits<double>::infinity(); },
     "scale must be positive and finite, got inf"},
    {"tau", [](Problem& p) { p.config.tau = 0; }, "tau must be positive and finite, got 0"},
    {"precision", [](Problem& p) { p.config.precision = static_cast<Precision>(9); },
     "precision must be one of its named values (0 to 3), got 9"},
    {"feature_map", [](Problem& p) { p.config.feature_map = static_cast<FeatureMap>(3); },
     "feature_map must be one of its named values (0 to 2), got 3"},
    {"routing", [](Problem& p) { p.config.routing = static_cast<RoutingMode>(2); },
     "routing must be one of its named values (0 to 1), got 2"},
    {"score_norm", [](Problem& p) { p.config.score_norm = static_cast<ScoreNorm>(2); },
     "score_norm must be one of its named values (0 to 1), got 2"},
    {"linear_keys", [](Problem& p) { p.config.linear_keys = static_cast<LinearKeys>(2); },
     "linear_keys must be one of its named values (0 to 1), got 2"},
    {"linear_scope", [](Problem& p) { p.config.linear_scope = static_cast<LinearScope>(2); },
     "linear_scope must be one of its named values (0 to 1), got 2"},
    {"backward", [](Problem& p) { p.config.backward = static_cast<BackwardMode>(2); },
     "backward must be one of its named values (0 to 1), got 2"},
    {"method", [](Problem& p) { p.config.method = static_cast<Method>(2); },
     "method must be one of its named values (0 to 1), got 2"},
    {"batch", [](Problem& p) { p.batch = 0; }, "batch must be in [1, 2147483647], got 0"},
    {"q_tokens", [](Problem& p) { p.q_tokens = -1; },
     "q_tokens must be in [1, 2147483647], got -1"},
    {"k_tokens", [](Problem& p) { p.k_tokens = std::int64_t{1} << 40; },
     "k_tokens must be in [1, 2147483647], got 1099511627776"},
    {"num_heads", [](Problem& p) { p.num_heads = 0; },
     "num_heads must be in [1, 2147483647], got 0"},
    {"num_kv_heads", [](Problem& p) { p.num_kv_heads = 3; },
     "num_kv_heads must divide num_heads (4), got 3"},
    {"head_dim", [](Problem& p) { p.head_dim = 72; },
     "head_dim must be a multiple of 16 up to 256, got 72"},
    {"value_dim", [](Problem& p) { p.value_dim = 272; },
     "value_dim must be a multiple of 16 up to 256, got 272"},
    {"dtype", [](Problem& p) { p.dtype = static_cast<DType>(7); },
     "dtype must be one of its named values (0 to 2), got 7"},
    {"num_routers", [](Problem& p) { p.num_routers = 2; },
     "num_routers must be 1 or num_heads (4), got 2"},
    {"alpha_blocks", [](Problem& p) { p.alpha_blocks = 2; },
     "alpha_blocks must be 1 or the number of query blocks (3), got 2"},
    {"protected_behind",
     [](Problem& p) {
       p.protected_keys = {100, 151};
     },
     "protected_keys must satisfy 0 <= begin <= end <= k_tokens (150), got [100, 151)"},
    {"protected_reversed",
     [](Problem& p) {
       p.protected_keys = {9, 3};
     },
     "protected_keys must satisfy 0 <= begin <= end <= k_tokens (150), got [9, 3)"},
    {"overflow",
     [](Problem& p) {
       p.batch = p.num_heads = p.num_kv_heads = 1 << 20;
       p.q_tokens = 1 << 30;
     },
     "q must have at most 2^48 elements, got [1048576, 1048576, 1073741824, 16]"},
    {"overflow_routing",
     [](Problem& p) {
       p.config.routing = RoutingMode::kSoft;
       p.num_heads = p.num_kv_heads = 64;
       p.q_tokens = p.k_tokens = std::int64_t{1} << 30;
     },
     "routing must have at most 2^48 elements, got [1, 64, 33554432, 33554432]"},
};
INSTANTIATE_TEST_SUITE_P(All, ProblemRules, testing::ValuesIn(kProblemRules),
                         [](const auto& info) { return info.param.name; });

/// What a call passes; each rule changes one thing and runs the forward and the backward.
struct CallArguments {
  Inputs inputs;
  Outputs outputs;
  Saved saved;
  ConstView d_out;
  Gradients gradients;
};
struct CallRule {
  std::string name;
  std::function<void(Problem&)> problem;
  std::function<void(CallArguments&)> change;
  Pass pass;
  std::string message;
};
void PrintTo(const CallRule& rule, std::ostream* out) { *out << rule.name; }

class CallRules : public testing::TestWithParam<CallRule> {};

TEST_P(CallRules, AreNamedInTheError) {
  Problem problem = small_problem(70, 150, 16, 32);
  problem.batch = 2;
  GetParam().problem(problem);
  Call call(problem);
  SerialExecutor serial;
  call.run_forward(serial);
  CallArguments arguments{call.inputs(), call.outputs(), call.saved(), call.d_out.const_view(),
                          call.gradients()};
  GetParam().change(arguments);
  std::vector<std::byte> scratch(1 << 24);
  const Context context{serial, scratch};
  const std::string received = message_of([&] {
    switch (GetParam().pass) {
      case Pass::kRoute:
        return route(problem, arguments.inputs, arguments.outputs.routing, context);
      case Pass::kForward:
        return forward(problem, arguments.inputs, arguments.outputs, context);
      case Pass::kBackward:
        return backward(problem, arguments.inputs, arguments.saved, arguments.d_out,
                        arguments.gradients, context);
    }
  });
  // Addresses differ from run to run: a message may go on behind the expected text.
  EXPECT_EQ(received.substr(0, GetParam().message.size()), GetParam().message) << received;
  EXPECT_TRUE(call.guards_intact());
}

void plain(Problem&) {}
void soft(Problem& p) { p.config.routing = RoutingMode::kSoft; }
void sla(Problem& p) { p.config.method = Method::kSla; }

const float kNumber = 0;
float written = 0;
const std::int64_t kLengths[] = {150, 0};
const std::int64_t kLongLengths[] = {151, 1};
// Five key blocks, three query blocks, two columns, two batch elements.
const std::vector<std::int32_t> kBehind = {0, 1, 0, 5, 0, 1, 0, 1, 0, 1, 0, 1};
const std::vector<std::int32_t> kFalling = {0, 1, 0, 1, 3, 2, 0, 1, 0, 1, 0, 1};
const std::vector<std::int32_t> kNegative = {0, -2, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1};
const std::vector<std::int32_t> kNone = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, -1, -1};

const std::vector<CallRule> kCallRules = {
    {"null", plain, [](CallArguments& a) { a.inputs.q.data = nullptr; }, Pass::kForward,
     "q must not be null"},
    {"type", plain, [](CallArguments& a) { a.inputs.k.dtype = DType::kF16; }, Pass::kForward,
     "k must have the problem's type fp32, got fp16"},
    {"shape", plain, [](CallArguments& a) { a.inputs.v.shape[2] = 149; }, Pass::kForward,
     "v must have shape [2, 1, 150, 32], got [2, 1, 149, 32]"},
    {"last_stride", plain, [](CallArguments& a) { a.inputs.q.strides[3] = 2; }, Pass::kForward,
     "q must have a last stride of 1, got strides [1120, 1120, 16, 2]"},
    {"negative_stride", plain, [](CallArguments& a) { a.inputs.q.strides[2] = -16; },
     Pass::kForward, "q must have no negative stride, got strides [1120, 1120, -16, 1]"},
    {"misaligned", plain,
     [](CallArguments& a) { a.inputs.q.data = static_cast<const char*>(a.inputs.q.data) + 1; },
     Pass::kForward, "q must be aligned to its element of 4 bytes, got an address 1 above"},
    {"out_repeats", plain, [](CallArguments& a) { a.outputs.out.strides[0] = 0; }, Pass::kForward,
     "out is written and must not repeat elements, got strides [0, 2240, 32, 1]"},
    // Rows that overlap, heads inside each other's rows, rows one element short of apart.
    {"out_rows_overlap", plain, [](CallArguments& a) { a.outputs.out.strides[2] = 1; },
     Pass::kForward, "out is written and must not repeat elements, got strides [2240, 2240, 1, 1]"},
    {"out_rows_short", plain, [](CallArguments& a) { a.outputs.out.strides[2] = 31; },
     Pass::kForward,
     "out is written and must not repeat elements, got strides [2240, 2240, 31, 1]"},
    {"out_batches_overlap", plain, [](CallArguments& a) { a.outputs.out.strides[0] = 2239; },
     Pass::kForward,
     "out is written and must not repeat elements, got strides [2239, 2240, 32, 1]"},
    {"reach", plain, [](CallArguments& a) { a.inputs.k.strides[2] = std::int64_t{1} << 59; },
     Pass::kForward,
     "k must reach at most 2^60 elements, got strides [2400, 2400, 576460752303423488, 1]"},
    {"out_linear_is_out_sparse", plain,
     [](CallArguments& a) { a.outputs.out_linear.data = a.outputs.out_sparse.data; },
     Pass::kForward, "out_linear must not be the memory of out_sparse, got one address for both"},
    {"d_v_is_v", plain,
     [](CallArguments& a) { a.gradients.d_v.data = const_cast<void*>(a.inputs.v.data); },
     Pass::kBackward, "d_v must not be the memory of v, got one address for both"},
    {"out_null", plain, [](CallArguments& a) { a.outputs.out = {}; }, Pass::kForward,
     "out must not be null"},
    {"out_sparse_shape", plain, [](CallArguments& a) { a.outputs.out_sparse.shape[3] = 16; },
     Pass::kForward, "out_sparse must have shape [2, 1, 70, 32], got [2, 1, 70, 16]"},
    {"length_zero", plain, [](CallArguments& a) { a.inputs.key_lengths = kLengths; },
     Pass::kForward, "key_lengths must be in [1, 150], got 0 at [1]"},
    {"length_long", plain, [](CallArguments& a) { a.inputs.key_lengths = kLongLengths; },
     Pass::kForward, "key_lengths must be in [1, 150], got 151 at [0]"},
    {"blocks_behind", plain, [](CallArguments& a) { a.inputs.routing.blocks = kBehind.data(); },
     Pass::kForward,
     "routing must list at least one block in [0, 5), ascending, then -1; got 5 at [0, 0, 1, 1]"},
    {"blocks_falling", plain, [](CallArguments& a) { a.inputs.routing.blocks = kFalling.data(); },
     Pass::kForward,
     "routing must list at least one block in [0, 5), ascending, then -1; got 2 at [0, 0, 2, 1]"},
    {"blocks_negative", plain, [](CallArguments& a) { a.inputs.routing.blocks = kNegative.data(); },
     Pass::kForward,
     "routing must list at least one block in [0, 5), ascending, then -1; got -2 at [0, 0, 0, 1]"},
    {"blocks_none", plain, [](CallArguments& a) { a.saved.routing.blocks = kNone.data(); },
     Pass::kBackward,
     "saved.routing must list at least one block in [0, 5), ascending, then -1; got -1 at [1, 0, "
     "2, 0]"},
    {"logits_hard", plain, [](CallArguments& a) { a.inputs.routing.logits = &kNumber; },
     Pass::kForward, "routing.logits must be null with hard routing, got "},
    {"route_given", plain, [](CallArguments& a) { a.inputs.routing.blocks = kNone.data(); },
     Pass::kRoute, "routing must not be given to route(), which computes it"},
    {"route_blocks", plain, [](CallArguments& a) { a.outputs.routing.blocks = nullptr; },
     Pass::kRoute, "routing.blocks must not be null"},
    {"route_logits", soft, [](CallArguments& a) { a.outputs.routing.logits = nullptr; },
     Pass::kRoute, "routing.logits must not be null with soft routing"},
    {"sla_alpha", sla, [](CallArguments& a) { a.inputs.parameters.alpha_logit = &kNumber; },
     Pass::kForward, "alpha_logit must be null with method sla, got "},
    {"sla_router", sla, [](CallArguments& a) { a.inputs.parameters.proj_k = &kNumber; },
     Pass::kForward, "proj_k must be null with method sla, got "},
    {"sla2_proj_out", plain, [](CallArguments& a) { a.inputs.parameters.proj_out = &kNumber; },
     Pass::kForward, "proj_out must be null except with method sla, got "},
    {"saved_lse", plain, [](CallArguments& a) { a.saved.lse = nullptr; }, Pass::kBackward,
     "saved.lse must not be null"},
    {"saved_mean", plain, [](CallArguments& a) { a.saved.k_mean = nullptr; }, Pass::kBackward,
     "saved.k_mean must not be null"},
    {"saved_sparse", plain, [](CallArguments& a) { a.saved.out_sparse = {}; }, Pass::kBackward,
     "saved.out_sparse must not be null"},
    {"saved_blocks", plain, [](CallArguments& a) { a.saved.routing = {}; }, Pass::kBackward,
     "saved.routing.blocks must not be null with hard routing"},
    {"saved_logits", soft, [](CallArguments& a) { a.saved.routing = {}; }, Pass::kBackward,
     "saved.routing.logits must not be null with soft routing"},
    {"d_out", plain, [](CallArguments& a) { a.d_out.shape[1] = 2; }, Pass::kBackward,
     "d_out must have shape [2, 1, 70, 32], got [2, 2, 70, 32]"},
    {"d_k", plain, [](CallArguments& a) { a.gradients.d_k.strides[2] = 0; }, Pass::kBackward,
     "d_k is written and must not repeat elements, got strides [2400, 2400, 0, 1]"},
    {"d_proj_hard", plain, [](CallArguments& a) { a.gradients.d_proj_q = &written; },
     Pass::kBackward, "d_proj_q must be null except with method sla2 and soft routing"},
    {"d_alpha_sla", sla, [](CallArguments& a) { a.gradients.d_alpha_logit = &written; },
     Pass::kBackward, "d_alpha_logit must be null with method sla"},
    {"d_proj_out", plain, [](CallArguments& a) { a.gradients.d_proj_out = &written; },
     Pass::kBackward, "d_proj_out must be null except with method sla"},
};
INSTANTIATE_TEST_SUITE_P(All, CallRules, testing::ValuesIn(kCallRules),
                         [](const auto& info) { return info.param.name; });

/// Sets an environment variable for one test.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Environment() { unsetenv(name_); }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
};

TEST(Selection, TheReferenceIsLastAndTakesEverythingOnTheCpu) {
  EXPECT_STREQ(implementations().back()->name, "reference");
  Problem problem = small_problem(70, 150, 16, 32);
  problem.implementation = "reference";
  EXPECT_STREQ(select_implementation(problem, Pass::kBackward).name, "reference");
}

TEST(Selection, FollowsTheEnvironmentUnlessTheProblemNamesOne) {
  const Environment variable("SLA2_IMPLEMENTATION", "reference");
  Problem problem = small_problem(70, 150, 16, 32);
  EXPECT_STREQ(select_implementation(problem, Pass::kForward).name, "reference");
  problem.implementation = "abacus";
  const std::string text =
      message_of([&] { static_cast<void>(select_implementation(problem, Pass::kForward)); });
  EXPECT_TRUE(text.starts_with("implementation must be one of ") && text.ends_with("got abacus"))
      << text;
}

TEST(Selection, GivesEveryReasonWhenNothingFits) {
  Problem problem = small_problem(70, 150, 16, 32);
  problem.device = Device::kCuda;
  problem.implementation = "reference";
  try {
    static_cast<void>(select_implementation(problem, Pass::kForward));
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kUnsupported);
    const std::string text = error.what();
    EXPECT_NE(text.find("reference: runs on cpu, the problem is on cuda"), std::string::npos);
    for (const Implementation* implementation : implementations()) {
      EXPECT_NE(text.find(implementation->name), std::string::npos) << text;
    }
  }
}

TEST(Selection, VerbosePrintsTheChoice) {
  const Environment variable("SLA2_VERBOSE", "dispatch");
  Problem problem = small_problem(70, 150, 16, 32);
  problem.implementation = "reference";
  testing::internal::CaptureStderr();
  static_cast<void>(select_implementation(problem, Pass::kForward));
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_NE(text.find("sla2: forward runs on reference\n"), std::string::npos) << text;
}

/// Runs fp8 twice on the CPU, which has no kernel for it, and ends the process.
void run_fp8_twice(const char* implementation) {
  Problem problem = small_problem(33, 65, 16, 32);
  problem.config.precision = Precision::kFp8;
  problem.implementation = implementation;
  static_cast<void>(select_implementation(problem, Pass::kForward));
  static_cast<void>(select_implementation(problem, Pass::kForward));
  std::cerr << "end\n";
  std::exit(0);
}

/// In processes of their own: a line a process.
TEST(Dispatch, SaysOnceThatItFellBackToTheReference) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(run_fp8_twice(nullptr), testing::ExitedWithCode(0),
              "^sla2: forward runs on the reference, which is very slow: .*fp8[^\n]*\nend\n$");
  EXPECT_EXIT(run_fp8_twice("reference"), testing::ExitedWithCode(0), "^end\n$");
}

TEST(Workspace, IsCheckedAgainstWhatWasAskedFor) {
  EXPECT_EQ(message_of([] {
              static_cast<void>(workspace_bytes(small_problem(70, 150, 16, 32), Pass::kForward, 0));
            }),
            "num_threads must be in [1, 1024], got 0");
}

TEST(Workspace, IsAlignedGrowsAndMoves) {
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{100}, (std::size_t{4} << 20) + 3}) {
    const Workspace one(bytes);
    ASSERT_EQ(one.size(), bytes);
    EXPECT_EQ(one.span().size(), bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(one.span().data()) % 64, 0U);
    std::fill(one.span().begin(), one.span().end(), std::byte{1});
  }
  Workspace kept;
  EXPECT_EQ(kept.size(), 0U);
  kept.reserve(1000);
  const std::byte* first = kept.span().data();
  kept.reserve(10);  // has more already
  EXPECT_EQ(kept.size(), 1000U);
  EXPECT_EQ(kept.span().data(), first);
  Workspace other = std::move(kept);
  EXPECT_EQ(other.span().data(), first);
  kept = Workspace(5);
  EXPECT_EQ(kept.size(), 5U);
  EXPECT_EQ(message_of([] { Workspace(std::numeric_limits<std::size_t>::max()); }),
            "no memory for a workspace of 18446744073709551615 bytes");
}

/// Every implementation of this machine, every pass, hard and soft routing.
TEST(Workspace, OneByteShortIsRefused) {
  int refused = 0;
  for (const Implementation* const one : implementations()) {
    for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
      Problem problem = small_problem(70, 150, 16, 32);
      problem.config.routing = mode;
      problem.implementation = one->name;
      if (one->device != Device::kCpu || !one->refusal(problem, Pass::kForward).empty()) continue;
      Call call(problem);
      const auto executor = make_thread_pool(3);
      call.run_forward(*executor);
      for (const Pass pass : {Pass::kRoute, Pass::kForward, Pass::kBackward}) {
        const std::size_t wanted = workspace_bytes(problem, pass, 3);
        if (wanted == 0) continue;  // the reference needs none
        std::vector<std::byte> scratch(wanted - 1);
        const Context context{*executor, scratch};
        EXPECT_EQ(message_of([&] {
                    if (pass == Pass::kRoute) {
                      route(problem, call.inputs(), call.routing(), context);
                    } else if (pass == Pass::kForward) {
                      forward(problem, call.inputs(), call.outputs(), context);
                    } else {
                      backward(problem, call.inputs(), call.saved(), call.d_out.const_view(),
                               call.gradients(), context);
                    }
                  }),
                  "workspace must hold at least " + std::to_string(wanted) + " bytes, got " +
                      std::to_string(wanted - 1))
            << one->name;
        ++refused;
      }
    }
  }
  EXPECT_GE(refused, 6);  // at least the baseline's
}

}  // namespace
}  // namespace sla2::test
