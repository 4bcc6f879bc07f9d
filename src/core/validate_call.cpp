#include "core/validate_call.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/message.h"

namespace sla2 {
namespace {

using Shape = std::array<std::int64_t, 4>;

constexpr std::int64_t kMaxOffset = std::int64_t{1} << 60;

std::string text_of(const Shape& shape) {
  return message("[", shape[0], ", ", shape[1], ", ", shape[2], ", ", shape[3], "]");
}

const char* name_of(DType dtype) {
  return dtype == DType::kF32 ? "fp32" : dtype == DType::kBF16 ? "bf16" : "fp16";
}

void check_view(const Problem& problem, const char* name, const ConstView& view,
                const Shape& shape) {
  require(!view.empty(), name, " must not be null");
  require(view.dtype == problem.dtype, name, " must have the problem's type ",
          name_of(problem.dtype), ", got ", name_of(view.dtype));
  require(view.shape == shape, name, " must have shape ", text_of(shape), ", got ",
          text_of(view.shape));
  require(view.strides[3] == 1, name, " must have a last stride of 1, got strides ",
          text_of(view.strides));
  for (const std::int64_t stride : view.strides) {
    require(stride >= 0, name, " must have no negative stride, got strides ",
            text_of(view.strides));
  }
  // Kernels add up offsets in int64_t bytes.
  std::int64_t last = shape[3] - 1;
  for (std::size_t axis = 0; axis < 3; ++axis) {
    const std::int64_t steps = shape[axis] - 1;
    require(steps == 0 || view.strides[axis] <= (kMaxOffset - last) / steps, name,
            " must reach at most 2^60 elements, got strides ", text_of(view.strides));
    last += steps * view.strides[axis];
  }
  const auto address = reinterpret_cast<std::uintptr_t>(view.data);
  require(address % static_cast<std::uintptr_t>(bytes_of(view.dtype)) == 0, name,
          " must be aligned to its element of ", bytes_of(view.dtype), " bytes, got an address ",
          address % 4, " above a multiple of 4");
}

/// As check_view; two elements of an output must also not share an address, as threads write them.
/// Every axis steps over all that the axes of smaller strides reach: not the only views without
/// repeats, but all that slices, transpositions and paddings of a dense tensor give.
void check_output(const Problem& problem, const char* name, const View& view, const Shape& shape) {
  check_view(problem, name, as_const(view), shape);
  std::array<std::size_t, 3> axes{0, 1, 2};
  std::sort(axes.begin(), axes.end(),
            [&](std::size_t a, std::size_t b) { return view.strides[a] < view.strides[b]; });
  std::int64_t reach = shape[3];  // elements from the first to the last, of the axes so far
  for (const std::size_t axis : axes) {
    if (shape[axis] == 1) continue;
    require(view.strides[axis] >= reach, name,
            " is written and must not repeat elements, got strides ", text_of(view.strides));
    reach += (shape[axis] - 1) * view.strides[axis];
  }
}

/// A view and its name in messages.
struct Named {
  const char* name;
  const void* data;
};

/// What is written may not be the memory of what is read or written beside it. Views that
/// interleave in one buffer (a fused [B, N, 3, H, D]) are right, so only a common first element is
/// refused.
template <std::size_t kWritten, std::size_t kRead>
void check_apart(const std::array<Named, kWritten>& written, const std::array<Named, kRead>& read) {
  for (std::size_t at = 0; at < kWritten; ++at) {
    const auto differs_from = [&](const Named& other) {
      require(written[at].data == nullptr || written[at].data != other.data, written[at].name,
              " must not be the memory of ", other.name,
              ", got one address for both: ", other.data);
    };
    std::for_each(read.begin(), read.end(), differs_from);
    std::for_each(written.begin(), written.begin() + static_cast<std::ptrdiff_t>(at), differs_from);
  }
}

void check_optional_output(const Problem& problem, const char* name, const View& view,
                           const Shape& shape) {
  if (!view.empty()) check_output(problem, name, view, shape);
}

Shape query_shape(const Problem& p, std::int64_t features) {
  return {p.batch, p.num_heads, p.q_tokens, features};
}
Shape key_shape(const Problem& p, std::int64_t features) {
  return {p.batch, p.num_kv_heads, p.k_tokens, features};
}

/// A table from outside is not trusted: kernels index with it.
void check_blocks(const Problem& problem, const Inputs& inputs, const char* name,
                  const std::int32_t* blocks) {
  const std::int64_t width = max_routed_blocks(problem);
  const std::int64_t q_blocks = num_q_blocks(problem);
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const std::int64_t length = inputs.key_lengths ? inputs.key_lengths[b] : problem.k_tokens;
    const std::int64_t k_blocks = num_k_blocks(problem, length);
    for (std::int64_t r = 0; r < problem.num_heads * q_blocks; ++r, blocks += width) {
      std::int64_t previous = -1;
      bool ended = false;
      for (std::int64_t c = 0; c < width; ++c) {
        const std::int64_t block = blocks[c];
        const bool is_end = block == -1;
        const bool is_next = !ended && block > previous && block < k_blocks;
        if ((is_end && c > 0) || is_next) {
          ended = is_end;
          if (is_next) previous = block;
          continue;
        }
        throw Error(message(name, " must list at least one block in [0, ", k_blocks,
                            "), ascending, then -1; got ", block, " at [", b, ", ", r / q_blocks,
                            ", ", r % q_blocks, ", ", c, "]"));
      }
    }
  }
}

void check_given_routing(const Problem& problem, const Inputs& inputs, const char* name,
                         const ConstRouting& routing) {
  const bool soft = problem.config.routing == RoutingMode::kSoft;
  require(soft || routing.logits == nullptr, name, ".logits must be null with hard routing, got ",
          static_cast<const void*>(routing.logits));
  // Device memory cannot be read here; with soft routing the blocks are for display only.
  if (!soft && routing.blocks != nullptr && problem.device == Device::kCpu) {
    check_blocks(problem, inputs, name, routing.blocks);
  }
}

void check_parameters(const Problem& problem, const Parameters& parameters) {
  if (problem.config.method == Method::kSla) {
    require(parameters.proj_q == nullptr, "proj_q must be null with method sla, got ",
            static_cast<const void*>(parameters.proj_q));
    require(parameters.proj_k == nullptr, "proj_k must be null with method sla, got ",
            static_cast<const void*>(parameters.proj_k));
    require(parameters.alpha_logit == nullptr, "alpha_logit must be null with method sla, got ",
            static_cast<const void*>(parameters.alpha_logit));
  } else {
    require(parameters.proj_out == nullptr, "proj_out must be null except with method sla, got ",
            static_cast<const void*>(parameters.proj_out));
  }
}

}  // namespace

void check_inputs(const Problem& problem, const Inputs& inputs, Pass pass) {
  check_view(problem, "q", inputs.q, query_shape(problem, problem.head_dim));
  check_view(problem, "k", inputs.k, key_shape(problem, problem.head_dim));
  if (pass != Pass::kRoute) {
    check_view(problem, "v", inputs.v, key_shape(problem, problem.value_dim));
  }
  check_parameters(problem, inputs.parameters);
  if (inputs.key_lengths != nullptr && problem.device == Device::kCpu) {
    for (std::int64_t b = 0; b < problem.batch; ++b) {
      require(inputs.key_lengths[b] >= 1 && inputs.key_lengths[b] <= problem.k_tokens,
              "key_lengths must be in [1, ", problem.k_tokens, "], got ", inputs.key_lengths[b],
              " at [", b, "]");
    }
  }
  if (pass == Pass::kRoute) {
    require(inputs.routing.blocks == nullptr && inputs.routing.logits == nullptr,
            "routing must not be given to route(), which computes it; got one");
  } else {
    check_given_routing(problem, inputs, "routing", inputs.routing);
  }
}

void check_routing_output(const Problem& problem, const Routing& routing) {
  const bool soft = problem.config.routing == RoutingMode::kSoft;
  require(routing.blocks != nullptr, "routing.blocks must not be null");
  require(!soft || routing.logits != nullptr, "routing.logits must not be null with soft routing");
  require(soft || routing.logits == nullptr, "routing.logits must be null with hard routing, got ",
          static_cast<const void*>(routing.logits));
}

void check_outputs(const Problem& problem, const Inputs& inputs, const Outputs& outputs) {
  const Shape shape = query_shape(problem, problem.value_dim);
  check_output(problem, "out", outputs.out, shape);
  check_optional_output(problem, "out_sparse", outputs.out_sparse, shape);
  check_optional_output(problem, "out_linear", outputs.out_linear, shape);
  require(problem.config.routing == RoutingMode::kSoft || outputs.routing.logits == nullptr,
          "routing.logits must be null with hard routing, got ",
          static_cast<const void*>(outputs.routing.logits));
  check_apart(
      std::array{Named{"out", outputs.out.data}, Named{"out_sparse", outputs.out_sparse.data},
                 Named{"out_linear", outputs.out_linear.data}},
      std::array{Named{"q", inputs.q.data}, Named{"k", inputs.k.data}, Named{"v", inputs.v.data}});
}

void check_saved(const Problem& problem, const Inputs& inputs, const Saved& saved,
                 ConstView d_out) {
  const Shape shape = query_shape(problem, problem.value_dim);
  check_view(problem, "saved.out_sparse", saved.out_sparse, shape);
  check_view(problem, "saved.out_linear", saved.out_linear, shape);
  check_view(problem, "d_out", d_out, shape);
  require(saved.lse != nullptr, "saved.lse must not be null");
  require(saved.k_mean != nullptr, "saved.k_mean must not be null");
  if (problem.config.routing == RoutingMode::kSoft) {
    require(saved.routing.logits != nullptr,
            "saved.routing.logits must not be null with soft routing");
  } else {
    require(saved.routing.blocks != nullptr,
            "saved.routing.blocks must not be null with hard routing");
  }
  check_given_routing(problem, inputs, "saved.routing", saved.routing);
}

void check_gradients(const Problem& problem, const Inputs& inputs, const Saved& saved,
                     ConstView d_out, const Gradients& gradients) {
  check_optional_output(problem, "d_q", gradients.d_q, query_shape(problem, problem.head_dim));
  check_optional_output(problem, "d_k", gradients.d_k, key_shape(problem, problem.head_dim));
  check_optional_output(problem, "d_v", gradients.d_v, key_shape(problem, problem.value_dim));
  const bool sla = problem.config.method == Method::kSla;
  const bool learns_router = !sla && problem.config.routing == RoutingMode::kSoft;
  require(learns_router || gradients.d_proj_q == nullptr,
          "d_proj_q must be null except with method sla2 and soft routing");
  require(learns_router || gradients.d_proj_k == nullptr,
          "d_proj_k must be null except with method sla2 and soft routing");
  require(!sla || gradients.d_alpha_logit == nullptr, "d_alpha_logit must be null with method sla");
  require(sla || gradients.d_proj_out == nullptr, "d_proj_out must be null except with method sla");
  check_apart(
      std::array{Named{"d_q", gradients.d_q.data}, Named{"d_k", gradients.d_k.data},
                 Named{"d_v", gradients.d_v.data}},
      std::array{Named{"q", inputs.q.data}, Named{"k", inputs.k.data}, Named{"v", inputs.v.data},
                 Named{"d_out", d_out.data}, Named{"saved.out_sparse", saved.out_sparse.data},
                 Named{"saved.out_linear", saved.out_linear.data}});
}

}  // namespace sla2
