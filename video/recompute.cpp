#include "video/recompute.h"

#include <array>
#include <utility>

#include <ATen/autocast_mode.h>

namespace sla2::video {
namespace {

constexpr std::array kDevices{at::kCPU, at::kCUDA};

struct AutocastSettings {
  std::array<bool, kDevices.size()> enabled{};
  std::array<at::ScalarType, kDevices.size()> dtype{};
  bool cache = true;

  static AutocastSettings current() {
    AutocastSettings settings;
    for (std::size_t i = 0; i < kDevices.size(); ++i) {
      settings.enabled[i] = at::autocast::is_autocast_enabled(kDevices[i]);
      settings.dtype[i] = at::autocast::get_autocast_dtype(kDevices[i]);
    }
    settings.cache = at::autocast::is_autocast_cache_enabled();
    return settings;
  }
  void set() const {
    for (std::size_t i = 0; i < kDevices.size(); ++i) {
      at::autocast::set_autocast_enabled(kDevices[i], enabled[i]);
      at::autocast::set_autocast_dtype(kDevices[i], dtype[i]);
    }
    at::autocast::set_autocast_cache_enabled(cache);
  }
};

/// `settings` without the cache of cast weights: a cast made here without a graph would be found
/// there by the second run, whose weights would then get no gradient.
class AutocastScope {
 public:
  explicit AutocastScope(AutocastSettings settings) : outer_(AutocastSettings::current()) {
    settings.cache = false;
    settings.set();
  }
  ~AutocastScope() { outer_.set(); }
  AutocastScope(const AutocastScope&) = delete;
  AutocastScope& operator=(const AutocastScope&) = delete;

 private:
  AutocastSettings outer_;
};

struct Recomputed : torch::CustomClassHolder {
  RecomputedBody body;
  std::size_t num_inputs = 0;
  std::vector<torch::Tensor> parameters;
  AutocastSettings autocast;
};

class Recompute : public torch::autograd::Function<Recompute> {
 public:
  static torch::Tensor forward(torch::autograd::AutogradContext* context,
                               const c10::intrusive_ptr<Recomputed>& call, at::TensorList tensors) {
    const std::vector<torch::Tensor> inputs(
        tensors.begin(), tensors.begin() + static_cast<std::ptrdiff_t>(call->num_inputs));
    // Parameters are saved for the check of their versions alone: they must not change before the
    // body runs again.
    context->save_for_backward(tensors.vec());
    context->saved_data["call"] = c10::IValue::make_capsule(call);
    const AutocastScope scope(call->autocast);
    return call->body(inputs, false);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list d_out) {
    const auto call =
        c10::static_intrusive_pointer_cast<Recomputed>(context->saved_data["call"].toCapsule());
    const torch::autograd::variable_list saved = context->get_saved_variables();
    const at::AutoGradMode with_graph(true);
    const AutocastScope scope(call->autocast);

    std::vector<torch::Tensor> inputs;
    torch::autograd::variable_list sources;
    std::vector<std::size_t> slots;  // of the sources among the arguments of apply()
    for (std::size_t i = 0; i < saved.size(); ++i) {
      torch::Tensor source = saved[i];
      const bool wanted = source.defined() && source.requires_grad();
      if (i < call->num_inputs) {
        if (source.defined()) source = source.detach().set_requires_grad(wanted);
        inputs.push_back(source);
      } else {
        source = call->parameters[i - call->num_inputs];
      }
      if (wanted) {
        sources.push_back(source);
        slots.push_back(i + 1);
      }
    }
    torch::autograd::variable_list gradients(saved.size() + 1);
    const torch::Tensor out = call->body(inputs, true);
    const auto computed = torch::autograd::grad({out}, sources, {d_out[0]}, std::nullopt,
                                                /*create_graph=*/false, /*allow_unused=*/true);
    for (std::size_t i = 0; i < slots.size(); ++i) gradients[slots[i]] = computed[i];
    return gradients;
  }
};

}  // namespace

torch::Tensor recompute_in_backward(RecomputedBody body, std::vector<torch::Tensor> inputs,
                                    std::vector<torch::Tensor> parameters) {
  auto call = c10::make_intrusive<Recomputed>();
  call->body = std::move(body);
  call->num_inputs = inputs.size();
  call->autocast = AutocastSettings::current();
  std::vector<torch::Tensor> tensors = std::move(inputs);
  tensors.insert(tensors.end(), parameters.begin(), parameters.end());
  call->parameters = std::move(parameters);
  return Recompute::apply(call, at::TensorList(tensors));
}

}  // namespace sla2::video
