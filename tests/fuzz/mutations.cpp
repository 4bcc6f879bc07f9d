#include "fuzz/mutations.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace sla2::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kLeast = std::numeric_limits<std::int64_t>::min();

template <typename Enum>
Enum unnamed_value(Random& random) {
  return static_cast<Enum>(random.one_of({4, 17, 255}));
}

/// One of the views that this pass takes.
ConstView* a_view(Arguments& a, Random& random) {
  switch (random.between(0, 4)) {
    case 0:
      return &a.inputs.q;
    case 1:
      return &a.inputs.k;
    case 2:
      return a.pass == Pass::kRoute ? nullptr : &a.inputs.v;
    case 3:
      return a.pass == Pass::kBackward ? &a.d_out : nullptr;
    default:
      return a.pass == Pass::kBackward ? random.one_of({&a.saved.out_sparse, &a.saved.out_linear})
                                       : nullptr;
  }
}

View* an_output(Arguments& a, Random& random) {
  if (a.pass == Pass::kForward) {
    return random.one_of({&a.outputs.out, &a.outputs.out_sparse, &a.outputs.out_linear});
  }
  if (a.pass != Pass::kBackward) return nullptr;
  return random.one_of({&a.gradients.d_q, &a.gradients.d_k, &a.gradients.d_v});
}

template <typename Pointer>
bool break_view(BasicView<Pointer>* view, Random& random) {
  if (view == nullptr) return false;
  const std::size_t axis = static_cast<std::size_t>(random.between(0, 3));
  switch (random.between(0, 4)) {
    case 0:
      view->dtype = view->dtype == DType::kF32 ? DType::kBF16 : DType::kF32;
      break;
    case 1:
      view->shape[axis] += random.one_of({-1, 1});
      break;
    case 2:
      view->shape[axis] = random.one_of({std::int64_t{0}, std::int64_t{-3}, kMost, kLeast});
      break;
    case 3:
      view->strides[3] = random.one_of({0, 2, -1});
      break;
    default:
      view->strides[static_cast<std::size_t>(random.between(0, 2))] = -1;
  }
  return true;
}

bool make_logits_with_hard_routing(Arguments& a) {
  if (a.pass == Pass::kRoute || a.problem.config.routing == RoutingMode::kSoft) return false;
  a.numbers.assign(16, 0);
  a.inputs.routing.logits = a.numbers.data();
  return true;
}

/// A given block table, one of its entries wrong.
bool break_blocks(Arguments& a, Random& random) {
  const Problem& p = a.problem;
  if (a.pass == Pass::kRoute || p.config.routing == RoutingMode::kSoft) return false;
  const std::int64_t width = max_routed_blocks(p);
  const std::int64_t rows = p.batch * p.num_heads * num_q_blocks(p);
  a.blocks.assign(static_cast<std::size_t>(rows * width), -1);
  for (std::int64_t r = 0; r < rows; ++r) a.blocks[r * width] = 0;
  const std::int64_t row = random.between(0, rows - 1) * width;
  const auto columns = static_cast<std::int32_t>(num_k_blocks(p, p.k_tokens));
  switch (random.between(0, width > 1 ? 3 : 1)) {
    case 0:
      a.blocks[row] = random.one_of({columns, columns + 1, std::int32_t{0x7fffffff}});
      break;
    case 1:
      a.blocks[row] = random.one_of({-1, -2, std::numeric_limits<std::int32_t>::min()});
      break;
    case 2:
      a.blocks[row + 1] = 0;  // twice
      break;
    default:
      if (width < 3) return false;
      a.blocks[row + 2] = 1;  // behind the end
  }
  if (a.pass == Pass::kBackward && random.chance(0.5)) {
    a.saved.routing.blocks = a.blocks.data();
  } else {
    a.inputs.routing.blocks = a.blocks.data();
  }
  return true;
}

bool break_key_lengths(Arguments& a, Random& random) {
  a.key_lengths.assign(static_cast<std::size_t>(a.problem.batch), 1);
  a.key_lengths.back() =
      random.one_of({std::int64_t{0}, std::int64_t{-1}, a.problem.k_tokens + 1, kMost, kLeast});
  a.inputs.key_lengths = a.key_lengths.data();
  return true;
}

bool give_parameter_of_the_other_method(Arguments& a, Random& random) {
  a.numbers.assign(16, 0);
  Parameters& p = a.inputs.parameters;
  if (a.problem.config.method == Method::kSla2) {
    p.proj_out = a.numbers.data();
  } else {
    *random.one_of({&p.proj_q, &p.proj_k, &p.alpha_logit}) = a.numbers.data();
  }
  return true;
}

bool ask_for_a_gradient_there_is_not(Arguments& a, Random&) {
  if (a.pass != Pass::kBackward) return false;
  a.numbers.assign(16, 0);
  if (a.problem.config.method == Method::kSla2) {
    a.gradients.d_proj_out = a.numbers.data();
  } else {
    a.gradients.d_alpha_logit = a.numbers.data();
  }
  return true;
}

bool drop_what_is_needed(Arguments& a, Random& random) {
  if (a.pass == Pass::kRoute) {
    a.outputs.routing.blocks = nullptr;
  } else if (a.pass == Pass::kForward) {
    a.outputs.out.data = nullptr;
  } else if (random.chance(0.5)) {
    *random.one_of({&a.saved.lse, &a.saved.k_mean}) = nullptr;
  } else {
    a.saved.routing = {};
  }
  return true;
}

constexpr Mutation kMutations[] = {
    {"keep",
     [](Arguments& a, Random& r) {
       a.problem.config.keep = r.one_of({0.0, -0.1, 1.0000001, kNaN, kInf, -kInf});
       return true;
     }},
    {"block size",
     [](Arguments& a, Random& r) {
       std::int64_t& size = *r.one_of({&a.problem.config.block_q, &a.problem.config.block_k});
       size = r.one_of<std::int64_t>({0, -32, 1, 33, 512, kMost, kLeast});
       return true;
     }},
    {"scale",
     [](Arguments& a, Random& r) {
       a.problem.config.scale = r.one_of({0.0, -1.0, kNaN, kInf});
       return true;
     }},
    {"tau",
     [](Arguments& a, Random& r) {
       a.problem.config.tau = r.one_of({0.0, -1.0, kNaN, kInf});
       return true;
     }},
    {"an enumeration",
     [](Arguments& a, Random& r) {
       Config& c = a.problem.config;
       switch (r.between(0, 8)) {
         case 0:
           c.feature_map = unnamed_value<FeatureMap>(r);
           break;
         case 1:
           c.precision = unnamed_value<Precision>(r);
           break;
         case 2:
           c.routing = unnamed_value<RoutingMode>(r);
           break;
         case 3:
           c.score_norm = unnamed_value<ScoreNorm>(r);
           break;
         case 4:
           c.linear_keys = unnamed_value<LinearKeys>(r);
           break;
         case 5:
           c.linear_scope = unnamed_value<LinearScope>(r);
           break;
         case 6:
           c.backward = unnamed_value<BackwardMode>(r);
           break;
         case 7:
           c.method = unnamed_value<Method>(r);
           break;
         default:
           a.problem.dtype = unnamed_value<DType>(r);
       }
       return true;
     }},
    {"a count",
     [](Arguments& a, Random& r) {
       Problem& p = a.problem;
       *r.one_of({&p.batch, &p.num_heads, &p.num_kv_heads, &p.q_tokens, &p.k_tokens}) =
           r.one_of<std::int64_t>({0, -1, kLeast, kMost, std::int64_t{1} << 31});
       return true;
     }},
    {"a head size",
     [](Arguments& a, Random& r) {
       *r.one_of({&a.problem.head_dim, &a.problem.value_dim}) =
           r.one_of<std::int64_t>({0, -16, 1, 72, 272, kMost, kLeast});
       return true;
     }},
    {"more elements than 2^48",
     [](Arguments& a, Random& r) {
       const std::int64_t huge = (std::int64_t{1} << 31) - 1;
       a.problem.batch = huge;
       *r.one_of({&a.problem.q_tokens, &a.problem.k_tokens}) = huge;
       return true;
     }},
    {"kv heads that do not divide",
     [](Arguments& a, Random&) {
       a.problem.num_kv_heads = a.problem.num_heads + 1;
       return true;
     }},
    {"routers",
     [](Arguments& a, Random& r) {
       a.problem.num_routers = r.one_of<std::int64_t>({0, -1, a.problem.num_heads + 1, kMost});
       return true;
     }},
    {"alpha blocks",
     [](Arguments& a, Random& r) {
       a.problem.alpha_blocks =
           r.one_of<std::int64_t>({0, -1, num_q_blocks(a.problem) + 1, kMost});
       return true;
     }},
    {"protected keys",
     [](Arguments& a, Random& r) {
       const std::int64_t n = a.problem.k_tokens;
       a.problem.protected_keys =
           r.one_of<TokenRange>({{-1, 1}, {1, 0}, {0, n + 1}, {n + 1, n + 2}, {kLeast, kMost}});
       return true;
     }},
    {"implementation",
     [](Arguments& a, Random&) {
       a.problem.implementation = "cpu_of_next_year";
       return true;
     }},
    {"an input view", [](Arguments& a, Random& r) { return break_view(a_view(a, r), r); }},
    {"an output view", [](Arguments& a, Random& r) { return break_view(an_output(a, r), r); }},
    {"a null input",
     [](Arguments& a, Random& r) {
       ConstView* view = a_view(a, r);
       if (view != nullptr) view->data = nullptr;
       return view != nullptr;
     }},
    {"an address between two elements",
     [](Arguments& a, Random& r) {
       ConstView* view = a_view(a, r);
       if (view != nullptr) view->data = static_cast<const std::byte*>(view->data) + 1;
       return view != nullptr;
     }},
    {"an output that repeats elements",
     [](Arguments& a, Random& r) {
       View* view = an_output(a, r);
       if (view == nullptr || view->shape[2] == 1) return false;
       view->strides[2] = 0;
       return true;
     }},
    {"key lengths", break_key_lengths},
    {"given blocks", break_blocks},
    {"logits with hard routing",
     [](Arguments& a, Random&) { return make_logits_with_hard_routing(a); }},
    {"a parameter of the other method", give_parameter_of_the_other_method},
    {"a gradient that there is not", ask_for_a_gradient_there_is_not},
    {"something missing", drop_what_is_needed},
    {"a workspace one byte short",
     [](Arguments& a, Random&) {
       if (a.workspace.empty()) return false;
       a.workspace = a.workspace.first(a.workspace.size() - 1);
       return true;
     }},
    {"no workspace",
     [](Arguments& a, Random&) {
       if (a.workspace.empty()) return false;
       a.workspace = {};
       return true;
     }},
};

}  // namespace

void Arguments::run(Executor& executor) const {
  const Context context{executor, workspace};
  if (pass == Pass::kRoute) {
    route(problem, inputs, outputs.routing, context);
  } else if (pass == Pass::kForward) {
    forward(problem, inputs, outputs, context);
  } else {
    backward(problem, inputs, saved, d_out, gradients, context);
  }
}

std::span<const Mutation> mutations() { return kMutations; }

}  // namespace sla2::test
