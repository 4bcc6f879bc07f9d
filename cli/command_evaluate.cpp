// sla2 evaluate: a table of methods, keeps and ablations for one model and its SLA2 weights.
#include <algorithm>

#include <fmt/format.h>

#include "cli/command.h"
#include "cli/stage_options.h"
#include "io/files.h"
#include "sla2/error.h"
#include "video/compare.h"
#include "video/demo_inputs.h"
#include "video/report/report.h"

namespace sla2::cli {

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

class Evaluate final : public Command {
 public:
  const char* name() const override { return "evaluate"; }
  const char* summary() const override {
    return "Compare full attention, SLA2 and ablations: losses, PSNR, time, a page";
  }

  void declare(Options& options) override {
    inputs_.declare(options);
    options.add("--sla2", sla2_, "folder of SLA2 weights (of calibrate or tune)").required();
    options.add("--out", out_, "folder of the report").required().no_effect();
    options.add("--keeps", keeps_, "fractions of key blocks (default: the one in sla2.json)")
        .above(0, 1);
    options
        .add("--ablations", ablations_,
             "variants of the first keep: linear_keys, linear_scope, elu, relu, fp32")
        .one_of({"linear_keys", "linear_scope", "elu", "relu", "fp32"});
    options.add("--sampling-steps", sampler_.steps, "steps of the sampler").range(1, 1000);
    options
        .add("--guidance", sampler_.guidance,
             "classifier-free guidance, 1: none (all that latents allow)")
        .range(0, 100);
    options.add("--shift", shift_, "of the timesteps (default: the model's)").above(0, 100);
    options.add("--clips", clips_, "captions (of latents: files) to sample").range(1, 100);
    options.add("--samples", samples_, "of the validation loss").range(1, 1e6);
    options.add("--repeats", repeats_, "rounds of the timing").range(1, 1000);
  }

  void run(Session& session) override {
    inputs_.settle({}, session.run.progress);
    video::Denoiser denoiser = inputs_.load(session.run);
    if (!denoiser.has_card && sampler_.guidance != 1) {
      throw UsageError(
          fmt::format("--guidance must be 1 for a model of latents, whose data holds no "
                      "negative text, got {}",
                      sampler_.guidance));
    }
    const video::Sla2Weights weights = video::load_sla2(sla2_);
    if (keeps_.empty()) keeps_ = {weights.config.keep};
    if (!shift_) shift_ = denoiser.card.shift;
    sampler_.shift = *shift_;
    const auto dataset = inputs_.open(denoiser, session.run);
    io::make_output_folder(out_);
    session.save_options(out_);
    video::CompareOptions options;
    options.sampler = sampler_;
    if (denoiser.has_card) options.fps = denoiser.card.fps;
    options.flow.prediction = denoiser.prediction();
    options.validation_samples = samples_;
    const auto compared = rows(denoiser, *dataset, session.run.seed);
    const video::Comparison comparison = video::compare(
        variants(session, weights, denoiser.card), compared, *dataset, options, session.run, out_);
    std::vector<video::TimedMethod> timed{{"full", 1, {}}};
    for (const double keep : keeps_) {
      timed.push_back({method_of(weights), keep, with_keep(weights, keep)});
    }
    denoiser.transformer->set_token_order(weights.order);
    const torch::Tensor text = denoiser.has_card
                                   ? denoiser.text_of_rows({denoiser.no_caption_row()})
                                   : compared.front().text.unsqueeze(0).to(session.run.device);
    const auto times = video::time_methods(denoiser, timed, text, repeats_, session.run);
    write(session, denoiser, weights, comparison, times);
  }

 private:
  static std::string method_of(const video::Sla2Weights& weights) {
    return weights.config.method == Method::kSla ? "sla" : "sla2";
  }
  static video::Sla2Weights with_keep(video::Sla2Weights weights, double keep) {
    weights.config.keep = keep;
    return weights;
  }

  static Config ablate(Config config, const std::string& name) {
    if (name == "linear_keys") config.linear_keys = LinearKeys::kRaw;
    if (name == "linear_scope") config.linear_scope = LinearScope::kAll;
    if (name == "elu") config.feature_map = FeatureMap::kElu;
    if (name == "relu") config.feature_map = FeatureMap::kRelu;
    if (name == "fp32") config.precision = Precision::kFp32;
    return config;
  }

  /// A model without a card samples latents of the data's size.
  video::Denoiser load_sized(const video::Run& run, const video::ModelCard& size,
                             const std::optional<fs::path>& sla2 = std::nullopt) const {
    video::Denoiser denoiser = inputs_.load(run, sla2);
    denoiser.card.frames = size.frames;
    denoiser.card.height = size.height;
    denoiser.card.width = size.width;
    return denoiser;
  }

  std::vector<video::Variant> variants(const Session& session, const video::Sla2Weights& weights,
                                       const video::ModelCard& size) const {
    const bool tuned = fs::exists(sla2_ / "transformer" / "config.json");
    const std::string stage = tuned ? "tuned" : "calibrated", method = method_of(weights);
    const video::Run& run = session.run;
    const json identity = {{"program", video::identity_of_program()},
                           {"model", video::contents_of_model(inputs_.model)},
                           {"data", video::contents_of_data(inputs_.data)},
                           {"sla2", video::contents_of_sla2(sla2_)}};
    std::vector<video::Variant> list;
    list.push_back({"full", "full", "before", 1, std::nullopt, "",
                    [this, &run, size] { return load_sized(run, size); }, identity});
    const auto add = [&](const std::string& id, double keep, const std::string& note,
                         const Config& config, bool trained) {
      video::Sla2Weights applied = weights;
      applied.config = config;
      if (!trained) applied.tensors.clear();
      json own = identity;
      own["config"] = io::to_json(config);
      own["trained"] = trained;
      const auto load = [this, &run, size, applied, trained] {
        video::Denoiser denoiser = trained ? load_sized(run, size, sla2_) : load_sized(run, size);
        video::apply_sla2(denoiser.transformer, applied);
        denoiser.transformer->to(run.device);
        return denoiser;
      };
      list.push_back({id, method, trained ? stage : "before", keep, std::nullopt, note, load, own});
    };
    for (const double keep : keeps_) {
      const Config config = with_keep(weights, keep).config;
      add(fmt::format("{}_before_{:g}", method, 100 * keep), keep, "", config, false);
      add(fmt::format("{}_{}_{:g}", method, stage, 100 * keep), keep, "", config, true);
    }
    for (const std::string& name : ablations_) {
      const Config config = ablate(with_keep(weights, keeps_.front()).config, name);
      add(fmt::format("{}_{}", method, name), keeps_.front(), name, config, true);
    }
    return list;
  }

  std::vector<video::ComparedClip> rows(const video::Denoiser& denoiser,
                                        const video::Dataset& dataset, std::int64_t seed) const {
    std::vector<video::ComparedClip> list;
    const auto& captions = denoiser.card.captions;
    for (std::int64_t i = 0; i < std::ssize(dataset.names()); ++i) {
      const std::string& name = dataset.names()[static_cast<std::size_t>(i)];
      if (std::ssize(list) >= clips_) break;
      if (!denoiser.has_card) {
        const video::Batch sample = dataset.first_window(i);
        list.push_back({name, name, "", seed + 1, sample.latents[0], sample.text[0]});
        continue;
      }
      if (std::find(captions.begin(), captions.end(), name) == captions.end()) continue;
      list.push_back({name, name, name, seed + 1,
                      video::to_model_input(dataset.first_window(i), torch::kCPU)[0]});
    }
    if (list.empty()) throw Error("--data: none of the clips is a caption of the model");
    return list;
  }

  void write(const Session& session, const video::Denoiser& denoiser,
             const video::Sla2Weights& weights, const video::Comparison& comparison,
             const std::vector<video::StepTime>& times) const {
    const video::ModelCard& card = denoiser.card;
    std::int64_t parameters = 0;
    for (const auto& parameter : denoiser.transformer->parameters())
      parameters += parameter.numel();
    json report = {{"schema", 1},
                   {"preset", "evaluate"},
                   {"mode", denoiser.has_card ? "clips" : "latents"},
                   {"command", session.command_line},
                   {"machine", video::describe_machine(session.run.device)},
                   {"versions", video::describe_versions()},
                   {"methods", comparison.methods},
                   {"clips", comparison.clips},
                   {"sheet", comparison.sheet},
                   {"layers", json::array()},
                   {"losses", json::object()}};
    const auto grid = denoiser.transformer->grid(card.frames, card.height, card.width);
    report["model"] = {{"parameters", parameters},
                       {"tokens", grid[0] * grid[1] * grid[2]},
                       {"grid", grid},
                       {"frames", card.frames},
                       {"height", card.height},
                       {"width", card.width},
                       {"fps", denoiser.has_card ? json(card.fps) : json()}};
    report["settings"] = {{"main_keep", keeps_.front()},       {"block_q", weights.config.block_q},
                          {"block_k", weights.config.block_k}, {"tile", weights.order.tile},
                          {"sampling_steps", sampler_.steps},  {"shift", sampler_.shift},
                          {"guidance", sampler_.guidance},     {"seed", session.run.seed}};
    video::add_times(report["methods"], times);
    report["timing"] = video::timing_json(times, keeps_.front(), repeats_);
    video::write_report(report, nullptr, out_);
    for (const json& row : report["methods"]) {
      fmt::print("{:5} {:10} keep {:<5g} loss {:.4f}  PSNR {}  step {} ms {}\n",
                 row["method"].get<std::string>(), row["stage"].get<std::string>(),
                 row["keep"].get<double>(), row["val_loss"].get<double>(),
                 row["psnr_to_full_db"].dump(), row["step_ms"].dump(), row.value("note", ""));
    }
    fmt::print("report: {}\n", fs::absolute(out_ / "report.html").string());
  }

  StageInputs inputs_;
  fs::path sla2_, out_;
  std::vector<double> keeps_;
  std::vector<std::string> ablations_;
  video::SamplerOptions sampler_;
  std::optional<double> shift_;
  std::int64_t clips_ = 3, samples_ = 8, repeats_ = 5;
};

}  // namespace

std::unique_ptr<Command> make_evaluate() { return std::make_unique<Evaluate>(); }

}  // namespace sla2::cli
