#include "attention.h"

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "../torch_ops/operators.h"
#include "../torch_ops/packing.h"
#include "sla2/error.h"
#include "sla2/problem.h"

namespace sla2::nn {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;
using OptionalTensor = std::optional<Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

using RouteSchema = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                               const OptionalTensor&, const OptionalTensor&,
                                               at::IntArrayRef, at::ArrayRef<double>);
using ForwardSchema = Seven(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                            at::IntArrayRef, at::ArrayRef<double>, bool);
using BackwardSchema = Seven(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                             const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, const Tensor&,
                             const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                             const OptionalTensor&, at::IntArrayRef, at::ArrayRef<double>,
                             std::int64_t);

template <typename Schema>
c10::TypedOperatorHandle<Schema> find_operator(const char* name) {
  sla2_torch_version();  // keeps the operators' library linked in
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

/// An operator's exception is text; a sla2::Error gets its type back (torch_ops/operators.h). An
/// error of torch's own passes as it is.
template <typename Body>
auto with_errors(const Body& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    const std::string text = error.what();
    const std::pair<const char*, ErrorKind> kinds[] = {
        {torch_ops::kInvalidArgument, ErrorKind::kInvalidArgument},
        {torch_ops::kUnsupported, ErrorKind::kUnsupported},
        {torch_ops::kRuntime, ErrorKind::kRuntime}};
    for (const auto& [prefix, kind] : kinds) {
      const std::size_t at = text.find(prefix);
      if (at == std::string::npos) continue;
      const std::size_t begin = at + std::string(prefix).size();
      throw Error(kind, text.substr(begin, text.find('\n', begin) - begin));
    }
    throw;
  }
}

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

/// One call's tensors in the order of sla2::forward, and its packed options.
struct Call {
  Tensor q, k, v;
  Tensor proj_q, proj_k, alpha_logit, proj_out;  // undefined: the start values
  Tensor key_lengths, blocks, logits;            // not differentiable
  torch_ops::Packed packed;
};

Seven run_forward(const Call& call, bool save) {
  static const auto op = find_operator<ForwardSchema>("sla2::forward");
  return with_errors([&] {
    return op.call(call.q, call.k, call.v, optional(call.proj_q), optional(call.proj_k),
                   optional(call.alpha_logit), optional(call.proj_out), optional(call.key_lengths),
                   optional(call.blocks), optional(call.logits), call.packed.options,
                   call.packed.numbers, save);
  });
}

// Saved: the inputs, o_s, o_l, lse, the mean, and the routing (blocks, or logits when soft).
class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v,
                        const OptionalTensor& proj_q, const OptionalTensor& proj_k,
                        const OptionalTensor& alpha_logit, const OptionalTensor& proj_out,
                        const Call& call) {
    at::AutoDispatchBelowAutograd below;
    const auto [out, out_sparse, out_linear, lse, k_mean, used_blocks, used_logits] =
        run_forward(call, /*save=*/true);
    const bool soft = call.packed.options[4] == static_cast<std::int64_t>(RoutingMode::kSoft);
    const Tensor blocks = soft ? Tensor() : (call.blocks.defined() ? call.blocks : used_blocks);
    const Tensor logits = soft ? (call.logits.defined() ? call.logits : used_logits) : Tensor();
    const auto undefined_or = [](const OptionalTensor& tensor) {
      return tensor.value_or(Tensor());
    };
    context->save_for_backward({q, k, v, undefined_or(proj_q), undefined_or(proj_k),
                                undefined_or(alpha_logit), undefined_or(proj_out), call.key_lengths,
                                out_sparse, out_linear, lse, k_mean, blocks, logits});
    context->saved_data["options"] = call.packed.options;
    context->saved_data["numbers"] = call.packed.numbers;
    // A given routing is data: no gradient leads to the router, even if projections came along.
    context->saved_data["learns_router"] = soft && !call.logits.defined();
    return out;
  }

  static tensor_list backward(AutogradContext* context, const tensor_list& grad_outputs) {
    static const auto op = find_operator<BackwardSchema>("sla2::backward");
    const auto saved = context->get_saved_variables();
    const bool learns_router = context->saved_data["learns_router"].toBool();
    const std::vector<std::int64_t> options = context->saved_data["options"].toIntVector();
    const std::vector<double> numbers = context->saved_data["numbers"].toDoubleVector();

    // Inputs 0 to 6 are q, k, v, proj_q, proj_k, alpha_logit, proj_out; an absent optional one
    // counts neither as an input nor as wanted.
    constexpr std::array bits = {torch_ops::kWantQ,      torch_ops::kWantK,
                                 torch_ops::kWantV,      torch_ops::kWantProjQ,
                                 torch_ops::kWantProjK,  torch_ops::kWantAlphaLogit,
                                 torch_ops::kWantProjOut};
    std::int64_t wanted = 0;
    for (std::size_t i = 0; i < bits.size(); ++i) {
      const bool router = i == 3 || i == 4;
      if (saved[i].defined() && saved[i].requires_grad() && (!router || learns_router)) {
        wanted |= bits[i];
      }
    }
    at::AutoDispatchBelowAutograd below;
    const auto [d_q, d_k, d_v, d_alpha_logit, d_proj_q, d_proj_k, d_proj_out] = with_errors([&] {
      return op.call(grad_outputs[0], saved[0], saved[1], saved[2], optional(saved[3]),
                     optional(saved[4]), optional(saved[5]), optional(saved[6]), optional(saved[7]),
                     saved[8], saved[9], saved[10], saved[11], optional(saved[12]),
                     optional(saved[13]), options, numbers, wanted);
    });
    const tensor_list gradients = {d_q, d_k, d_v, d_proj_q, d_proj_k, d_alpha_logit, d_proj_out};
    tensor_list result(8);  // the eighth is the Call, which is no tensor
    for (std::size_t i = 0; i < bits.size(); ++i) {
      if ((wanted & bits[i]) != 0) result[i] = gradients[i].to(saved[i].scalar_type());
    }
    return result;
  }
};

/// As torch's own attention does under autocast.
Tensor autocast(const Tensor& tensor) {
  const auto device = tensor.device().type();
  if (!at::autocast::is_autocast_enabled(device) || !tensor.is_floating_point() ||
      tensor.scalar_type() == torch::kFloat64) {
    return tensor;
  }
  return tensor.to(at::autocast::get_autocast_dtype(device));
}

std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (const std::int64_t size : tensor.sizes()) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

/// alpha_logit [H, M'] on M blocks: linear along the blocks, half-pixel centres.
Tensor resample_alpha(const Tensor& alpha_logit, std::int64_t num_blocks) {
  if (!alpha_logit.defined() || alpha_logit.dim() != 2 || alpha_logit.size(1) == 1 ||
      alpha_logit.size(1) == num_blocks) {
    return alpha_logit;
  }
  namespace F = torch::nn::functional;
  const auto options = F::InterpolateFuncOptions()
                           .size(std::vector<std::int64_t>{num_blocks})
                           .mode(torch::kLinear)
                           .align_corners(false);
  return F::interpolate(alpha_logit.to(torch::kFloat32).unsqueeze(0), options).squeeze(0);
}

/// proj_q and proj_k reach the operators in one form, [D, D] or [H, D, D].
void unify_routers(Tensor& proj_q, Tensor& proj_k, std::int64_t num_heads) {
  for (const auto& [one, other] : {std::pair{&proj_q, &proj_k}, std::pair{&proj_k, &proj_q}}) {
    if (one->defined() && other->defined() && one->dim() == 2 && other->dim() == 3) {
      *one = one->expand({num_heads, one->size(0), one->size(1)});
    }
  }
}

Call make_call(const Tensor& q, const Tensor& k, const Tensor& v,
               const AttentionArguments& arguments, const Config& config) {
  if (q.dim() != 4) throw Error("q must have shape [B, H, Nq, D], got " + shape_text(q));
  validate(config);
  Call call;
  call.q = autocast(q);
  call.k = autocast(k);
  if (v.defined()) call.v = autocast(v);
  call.proj_q = arguments.proj_q;
  call.proj_k = arguments.proj_k;
  unify_routers(call.proj_q, call.proj_k, q.size(1));
  call.alpha_logit =
      resample_alpha(arguments.alpha_logit, (q.size(2) + config.block_q - 1) / config.block_q);
  call.proj_out = arguments.proj_out;
  call.key_lengths = arguments.key_lengths;
  if (config.routing == RoutingMode::kSoft) {
    if (arguments.given_weights.defined()) {
      call.logits = torch::logit(arguments.given_weights.detach().to(torch::kFloat32));
    }
  } else {
    call.blocks = arguments.given_blocks;
  }
  TokenRange range;
  if (arguments.protected_keys) {
    range = {(*arguments.protected_keys)[0], (*arguments.protected_keys)[1]};
  }
  call.packed = torch_ops::pack(config, range);
  return call;
}

bool wants_gradient(const Call& call) {
  if (!torch::GradMode::is_enabled()) return false;
  for (const Tensor* tensor :
       {&call.q, &call.k, &call.v, &call.proj_q, &call.proj_k, &call.alpha_logit, &call.proj_out}) {
    if (tensor->defined() && tensor->requires_grad()) return true;
  }
  return false;
}

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v,
                 const AttentionArguments& arguments, const Config& config) {
  const Call call = make_call(q, k, v, arguments, config);
  if (!wants_gradient(call)) return std::get<0>(run_forward(call, /*save=*/false));
  return AttentionFunction::apply(call.q, call.k, call.v, optional(call.proj_q),
                                  optional(call.proj_k), optional(call.alpha_logit),
                                  optional(call.proj_out), call);
}

AttentionParts attention_parts(const Tensor& q, const Tensor& k, const Tensor& v,
                               const AttentionArguments& arguments, const Config& config) {
  const torch::NoGradGuard no_grad;
  const Call call = make_call(q, k, v, arguments, config);
  const auto [out, out_sparse, out_linear, lse, k_mean, used_blocks, used_logits] =
      run_forward(call, /*save=*/true);
  return {out, out_sparse, out_linear, lse,
          arguments.given_blocks.defined() ? arguments.given_blocks : used_blocks};
}

RoutingTensors route(const Tensor& q, const Tensor& k, const AttentionArguments& arguments,
                     const Config& config) {
  static const auto op = find_operator<RouteSchema>("sla2::route");
  const torch::NoGradGuard no_grad;
  const Call call = make_call(q, k, Tensor(), arguments, config);
  const auto [blocks, logits] = with_errors([&] {
    return op.call(call.q, call.k, optional(call.proj_q), optional(call.proj_k),
                   optional(call.key_lengths), call.packed.options, call.packed.numbers);
  });
  const bool soft = config.routing == RoutingMode::kSoft;
  return {blocks, soft ? torch::sigmoid(logits) : Tensor()};
}

AttentionImpl::AttentionImpl(const AttentionOptions& wanted) : options(wanted) {
  validate(options.config);
  const std::int64_t heads = options.num_heads;
  const std::int64_t d = options.head_dim;
  if (heads < 1) throw Error("num_heads must be at least 1, got " + std::to_string(heads));
  if (options.seq_len < 1) {
    throw Error("seq_len must be at least 1, got " + std::to_string(options.seq_len));
  }
  if (d < 16 || d > 256 || d % 16 != 0) {
    throw Error("head_dim must be a multiple of 16 up to 256, got " + std::to_string(d));
  }
  if (options.config.method == Method::kSla) {
    proj_out = register_parameter("proj_out", torch::zeros({d, d}));
    return;
  }
  Tensor identity = torch::eye(d);
  if (options.router == RouterShape::kHead) identity = identity.expand({heads, d, d});
  proj_q = register_parameter("proj_q", identity.clone(at::MemoryFormat::Contiguous));
  proj_k = register_parameter("proj_k", identity.clone(at::MemoryFormat::Contiguous));
  const std::int64_t block_q = options.config.block_q;
  const std::int64_t columns =
      options.alpha == AlphaShape::kBlock ? (options.seq_len + block_q - 1) / block_q : 1;
  alpha_logit = register_parameter("alpha_logit", torch::zeros({heads, columns}));
}

Tensor AttentionImpl::forward(const Tensor& q, const Tensor& k, const Tensor& v) {
  AttentionArguments arguments;
  arguments.proj_q = proj_q;
  arguments.proj_k = proj_k;
  arguments.alpha_logit = alpha_logit;
  arguments.proj_out = proj_out;
  return attention(q, k, v, arguments, options.config);
}

}  // namespace sla2::nn
