#include "video/demo.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>

#include <fmt/format.h>

#include "io/config_json.h"
#include "io/files.h"
#include "io/video_file.h"
#include "sla2/error.h"
#include "video/calibrate.h"
#include "video/compare.h"
#include "video/data.h"
#include "video/demo_inputs.h"
#include "video/denoiser.h"
#include "video/evaluate.h"
#include "video/generate.h"
#include "video/pretrain.h"
#include "video/report/report.h"
#include "video/tune.h"

namespace sla2::video {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr std::size_t kMaxResultBytes = std::size_t{16} << 20;

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%d", &parts);
  return text;
}

/// The losses of steps [begin, end) as [[step, loss], ...].
json curve(const std::vector<double>& losses) {
  json points = json::array();
  for (std::size_t i = 0; i < losses.size(); ++i) points.push_back({i, losses[i]});
  return points;
}

class Demo {
 public:
  Demo(const DemoOptions& options, Run& run)
      : options_(options), run_(run), model_(options.model) {}
  json run();

 private:
  /// Runs a stage in its own folder, or returns what an earlier run of it left.
  json stage(const std::string& name, const json& identity,
             const std::function<json(const fs::path& folder, bool resume)>& body);
  void train_model(const ModelCard& card);
  json calibrate_stage();
  json tune_stage(const std::string& name, Method method, std::int64_t steps);
  std::vector<Variant> variants() const;
  std::vector<ComparedClip> clips(const Denoiser& denoiser) const;
  std::vector<StepTime> times();
  json report(const Comparison& comparison, const std::vector<StepTime>& times);

  json data_identity() const {
    json identity = json::array();
    for (const fs::path& path : options_.train_inputs) identity.push_back(identity_of_file(path));
    return identity;
  }
  Denoiser load(const std::optional<fs::path>& sla2 = std::nullopt) const {
    return load_denoiser(model_, run_.device, sla2, &run_.progress);
  }
  Config config(Method method, double keep) const {
    Config config;
    config.method = method;
    config.keep = keep;
    config.block_q = options_.block_q;
    config.block_k = options_.block_k;
    return config;
  }
  double main_keep() const { return options_.keeps.front(); }
  /// As many in all as SLA2.
  std::int64_t sla_steps() const { return options_.stage1_steps + options_.stage2_steps; }
  Sla2Weights calibrated(double keep) const {
    Sla2Weights weights = load_sla2(options_.out / "stage1");
    weights.config.keep = keep;
    return weights;
  }
  template <typename Body>
  auto timed(const std::string& name, const Body& body) {
    const auto start = std::chrono::steady_clock::now();
    auto result = body();
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    stages_.push_back({{"name", name}, {"seconds", spent.count()}});
    return result;
  }

  const DemoOptions& options_;
  Run& run_;
  fs::path model_;  // options_.model, or what was trained from it
  std::unique_ptr<Dataset> dataset_;
  FlowOptions flow_;
  json base_, stage1_, stage2_, sla_;
  json stages_ = json::array();
  bool resumed_ = false;  // an earlier run did part of it: the times are not of the whole
};

json Demo::stage(const std::string& name, const json& identity,
                 const std::function<json(const fs::path&, bool)>& body) {
  const fs::path folder = options_.out / name;
  const fs::path done = folder / "done.json", started = folder / "started.json";
  const auto same = [&](const fs::path& path) {
    if (!fs::exists(path)) return false;
    const json saved = io::parse_json(io::read_file(path, kMaxResultBytes), path.string());
    return saved.is_object() && saved.value("identity", json()) == identity;
  };
  if (same(done)) {
    resumed_ = true;
    run_.progress.note(fmt::format("{}: done already", name));
    return io::parse_json(io::read_file(done, kMaxResultBytes), done.string());
  }
  const bool resume = same(started);
  resumed_ |= resume;
  std::error_code ignored;
  fs::remove(done, ignored);
  if (!resume) fs::remove(folder / "checkpoint.safetensors", ignored);
  io::make_output_folder(folder);
  io::write_file(started, json{{"identity", identity}}.dump(1));
  const auto start = std::chrono::steady_clock::now();
  json result = body(folder, resume);
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
  result["identity"] = identity;
  result["seconds"] = spent.count();
  io::write_file(done, result.dump(1));
  fs::remove(folder / "checkpoint.safetensors", ignored);
  return result;
}

/// A model of another size than the one given, trained from that one's weights.
void Demo::train_model(const ModelCard& card) {
  PretrainOptions options;
  options.from = options_.model;
  options.data.inputs = options_.train_inputs;
  std::tie(options.data.frames, options.data.height, options.data.width) =
      std::tuple_cat(options_.size);
  options.data.fps = card.fps;
  options.flow.prediction = prediction_from(card.prediction);
  options.flow.shift = card.shift;
  options.batch = options_.model_batch;
  options.train.steps = options_.model_steps;
  options.train.lr = options_.model_lr;
  options.train.final_lr = 0.02;
  options.train.warmup = std::min<std::int64_t>(20, options_.model_steps);
  options.train.ema_decay = 0.99;
  const json identity = {{"program", identity_of_program()},
                         {"model", identity_of_model(options_.model)},
                         {"data", data_identity()},
                         {"size", options_.size},
                         {"steps", options.train.steps},
                         {"batch", options.batch},
                         {"lr", options.train.lr},
                         {"device", run_.device.str()},
                         {"seed", run_.seed}};
  const json result = stage("model", identity, [&](const fs::path& folder, bool resume) {
    options.resume = resume && fs::exists(folder / "checkpoint.safetensors");
    return json{{"losses", pretrain(options, folder, identity, run_).losses}};
  });
  stages_.push_back({{"name", "model at this size"}, {"seconds", result.at("seconds")}});
  model_ = options_.out / "model";
}

json Demo::calibrate_stage() {
  CalibrateOptions options;
  options.keeps = options_.keeps;
  options.steps = options_.stage1_steps;
  options.batch = options_.stage1_batch;
  options.schedule = options_.keeps_in_turns ? KeepSchedule::kTurns : KeepSchedule::kAll;
  options.flow = flow_;
  json identity = base_;
  identity["steps"] = options.steps;
  identity["batch"] = options.batch;
  identity["turns"] = options_.keeps_in_turns;
  identity["lr"] = {options.router_lr, options.alpha_lr, options.final_lr};
  return stage("stage1", identity, [&](const fs::path& folder, bool resume) {
    Denoiser denoiser = load();
    const Sla2Weights start =
        start_weights(denoiser, config(Method::kSla2, main_keep()), TokenOrder{});
    const CalibrateResult result =
        calibrate(denoiser, *dataset_, start, options, run_, folder, resume);
    save_sla2(folder, result.weights);
    return json{{"errors", to_json(result.errors)},
                {"losses", result.losses},
                {"step_keeps", result.step_keeps}};
  });
}

json Demo::tune_stage(const std::string& name, Method method, std::int64_t steps) {
  const bool sla2 = method == Method::kSla2;
  TuneOptions options;
  options.batch = options_.stage2_batch;
  options.flow = flow_;
  options.train.steps = steps;
  options.train.lr = sla2 ? options_.sla2_lr : options_.sla_lr;
  options.train.final_lr = sla2 ? options_.sla2_final_lr : options_.sla_final_lr;
  options.alpha_lr_scale = options_.sla2_alpha_lr / options.train.lr;
  options.proj_out_lr_scale = options_.sla_proj_out_lr / options.train.lr;
  options.train.warmup = std::min<std::int64_t>(5, steps);
  options.train.ema_decay = 0;
  options.train.checkpoint_every = 20;
  json identity = base_;
  identity["method"] = name;
  identity["steps"] = steps;
  identity["batch"] = options.batch;
  identity["lr"] = {options.train.lr, options.train.final_lr, options.alpha_lr_scale,
                    options.proj_out_lr_scale};
  if (sla2) identity["stage1"] = stage1_.at("identity");
  return stage(name, identity, [&](const fs::path& folder, bool resume) {
    Denoiser denoiser = load();
    const Sla2Weights weights =
        sla2 ? calibrated(main_keep())
             : start_weights(denoiser, config(Method::kSla, main_keep()), TokenOrder{});
    const std::string task = sla2 ? "stage 2: SLA2" : "stage 2: SLA";
    const TuneResult result =
        tune(denoiser, *dataset_, weights, options, run_, folder, identity, resume, task);
    return json{{"losses", result.losses}};
  });
}

std::vector<Variant> Demo::variants() const {
  std::vector<Variant> list;
  const auto add = [&](const std::string& method, const std::string& stage, double keep,
                       std::int64_t steps, std::int64_t seeds, const json& after,
                       std::function<Denoiser()> load) {
    const std::string id =
        method == "full" ? "full" : fmt::format("{}_{}_{:g}", method, stage, 100 * keep);
    json identity = base_;
    identity["id"] = id;
    identity["after"] = after;
    list.push_back({id, method, stage, keep, steps, "", std::move(load), identity, seeds});
  };
  const auto with = [this](const Sla2Weights& weights) {
    Denoiser denoiser = load();
    apply_sla2(denoiser.transformer, weights);
    denoiser.transformer->to(run_.device);
    return denoiser;
  };
  const auto fresh = [this, with](Method method, double keep) {
    return with(start_weights(load(), config(method, keep), TokenOrder{}));
  };
  const double keep = main_keep();
  const json& one = stage1_.at("identity");
  const std::int64_t seeds = options_.seeds;
  add("full", "before", 1, 0, seeds, nullptr, [this] { return load(); });
  add("sla2", "before", keep, 0, 0, nullptr, [=] { return fresh(Method::kSla2, keep); });
  add("sla2", "calibrated", keep, options_.stage1_steps, 1, one,
      [=, this] { return with(calibrated(keep)); });
  add("sla2", "tuned", keep, sla_steps(), seeds, stage2_.at("identity"),
      [this] { return load(options_.out / "stage2_sla2"); });
  add("sla", "before", keep, 0, 0, nullptr, [=] { return fresh(Method::kSla, keep); });
  add("sla", "tuned", keep, sla_steps(), seeds, sla_.at("identity"),
      [this] { return load(options_.out / "stage2_sla"); });
  for (std::size_t i = 1; i < options_.keeps.size(); ++i) {
    const double less = options_.keeps[i];
    add("sla2", "calibrated", less, options_.stage1_steps, 1, one,
        [=, this] { return with(calibrated(less)); });
  }
  return list;
}

std::vector<ComparedClip> Demo::clips(const Denoiser& denoiser) const {
  const ModelCard& card = denoiser.card;
  std::vector<ComparedClip> list;
  const auto known = [&](const std::string& name) {
    return std::find(card.captions.begin(), card.captions.end(), name) != card.captions.end();
  };
  for (const fs::path& path : options_.own_inputs) {
    if (std::ssize(list) >= options_.clips) break;
    const std::string name = path.stem().string();
    try {
      list.push_back({fmt::format("own{}", list.size() + 1), name, known(name) ? name : "",
                      run_.seed + 1, load_source(path, card)});
    } catch (const Error& error) {
      if (options_.own_inputs.size() == 1) throw;
      run_.progress.note(error.what());
    }
  }
  if (!options_.own_inputs.empty()) {
    if (list.empty()) throw Error("--data: none of the files can be used");
    return list;
  }
  for (std::int64_t i = 0; i < std::ssize(dataset_->names()); ++i) {
    if (std::ssize(list) >= options_.clips) break;
    const std::string& name = dataset_->names()[static_cast<std::size_t>(i)];
    if (!known(name)) continue;
    const Credit* credit = credit_of(name);
    list.push_back({name, credit != nullptr ? credit->title : name, name, run_.seed + 1,
                    to_model_input(dataset_->first_window(i), torch::kCPU)[0]});
  }
  if (list.empty()) {
    throw Error(fmt::format("none of the clips is a caption of the model {}", model_.string()));
  }
  return list;
}

std::vector<StepTime> Demo::times() {
  Denoiser denoiser = load();
  denoiser.transformer->set_token_order(TokenOrder{});
  std::vector<TimedMethod> methods{{"full", 1, {}}};
  for (const double keep : options_.keeps) methods.push_back({"sla2", keep, calibrated(keep)});
  methods.push_back({"sla", main_keep(),
                     start_weights(denoiser, config(Method::kSla, main_keep()), TokenOrder{})});
  return time_methods(denoiser, methods, denoiser.text_of_rows({denoiser.no_caption_row()}),
                      options_.repeats, run_);
}

json Demo::report(const Comparison& comparison, const std::vector<StepTime>& times) {
  const Denoiser denoiser = load();
  const WanConfig& wan = denoiser.transformer->config();
  const ModelCard& card = denoiser.card;
  const auto grid = denoiser.transformer->grid(card.frames, card.height, card.width);
  std::int64_t weights = 0;
  for (const torch::Tensor& parameter : denoiser.transformer->parameters()) {
    weights += parameter.numel();
  }
  json result = {{"schema", 1},
                 {"created", today()},
                 {"preset", options_.preset},
                 {"mode", options_.own_inputs.empty() ? "clips" : "video_to_video"},
                 {"command", options_.command},
                 {"machine", describe_machine(run_.device)},
                 {"versions", describe_versions()},
                 {"clips", comparison.clips},
                 {"sheet", comparison.sheet},
                 {"methods", comparison.methods},
                 {"layers", stage1_.at("errors")}};
  result["model"] = {{"parameters", weights},
                     {"layers", wan.num_layers},
                     {"heads", wan.num_attention_heads},
                     {"head_dim", wan.attention_head_dim},
                     {"tokens", grid[0] * grid[1] * grid[2]},
                     {"grid", grid},
                     {"frames", card.frames},
                     {"height", card.height},
                     {"width", card.width},
                     {"fps", card.fps}};
  result["settings"] = {
      {"model_steps", options_.model_steps},
      {"main_keep", main_keep()},
      {"block_q", options_.block_q},
      {"block_k", options_.block_k},
      {"tile", TokenOrder{}.tile},
      {"precision", io::to_json(config(Method::kSla2, main_keep())).at("precision")},
      {"from_t", options_.from_t},
      {"sampling_steps", options_.sampling_steps},
      {"seed", run_.seed},
      {"stage1", {{"steps", options_.stage1_steps}, {"batch", options_.stage1_batch}}},
      {"stage2",
       {{"steps", options_.stage2_steps},
        {"batch", options_.stage2_batch},
        {"lr", options_.sla2_lr},
        {"sla_lr", options_.sla_lr},
        {"sla_steps", sla_steps()}}}};
  add_times(result["methods"], times);
  result["timing"] = timing_json(times, main_keep(), options_.repeats);
  result["timing"]["stages"] = stages_;
  double total = 0;
  for (const json& stage : stages_) total += stage.at("seconds").get<double>();
  result["timing"]["total_s"] = total;
  result["timing"]["resumed"] = resumed_;
  json one = json::array();
  const auto& losses = stage1_.at("losses");
  if (options_.keeps_in_turns) {
    for (const double keep : options_.keeps) {
      json points = json::array();
      for (std::size_t i = 0; i < losses.size(); ++i) {
        if (stage1_.at("step_keeps")[i] == keep) points.push_back({i, losses[i]});
      }
      one.push_back({{"name", fmt::format("{:g}% kept", 100 * keep)}, {"points", points}});
    }
  } else {
    one.push_back(
        {{"name", "mean of all keeps"}, {"points", curve(losses.get<std::vector<double>>())}});
  }
  result["losses"] = {
      {"stage1", one},
      {"stage2",
       {{{"method", "sla2"}, {"points", curve(stage2_.at("losses").get<std::vector<double>>())}},
        {{"method", "sla"}, {"points", curve(sla_.at("losses").get<std::vector<double>>())}}}}};
  result["credits"] = json::array();
  for (const std::string& name : dataset_->names()) {
    const Credit* credit = credit_of(name);
    result["credits"].push_back(
        {{"name", credit != nullptr ? credit->title : name},
         {"text", credit != nullptr ? credit->text : "a file given by the user"}});
  }
  return result;
}

json Demo::run() {
  if (options_.keeps.empty()) throw Error("keeps must hold at least one value, got none");
  io::make_output_folder(options_.out);
  if (options_.model_steps > 0) {
    const Denoiser given = load();
    if (given.has_card) train_model(given.card);
  }
  const Denoiser denoiser = load();
  if (!denoiser.has_card) {
    throw Error(
        fmt::format("{}: has no model_card.json: the demo needs a pixel-space model of "
                    "`sla2 pretrain`",
                    model_.string()));
  }
  DataOptions data;
  data.inputs = options_.train_inputs;
  data.frames = denoiser.card.frames;
  data.height = denoiser.card.height;
  data.width = denoiser.card.width;
  data.fps = denoiser.card.fps;
  dataset_ = open_dataset(data, run_);
  const std::vector<ComparedClip> rows = clips(denoiser);
  flow_.prediction = denoiser.prediction();
  base_ = {{"program", identity_of_program()},
           {"model", identity_of_model(model_)},
           {"data", data_identity()},
           {"keeps", options_.keeps},
           {"block_q", options_.block_q},
           {"block_k", options_.block_k},
           {"clips", dataset_->names()},
           {"device", run_.device.str()},
           {"seed", run_.seed}};
  stage1_ = calibrate_stage();
  stages_.push_back({{"name", "stage 1"}, {"seconds", stage1_.at("seconds")}});
  stage2_ = tune_stage("stage2_sla2", Method::kSla2, options_.stage2_steps);
  stages_.push_back({{"name", "stage 2, SLA2"}, {"seconds", stage2_.at("seconds")}});
  sla_ = tune_stage("stage2_sla", Method::kSla, sla_steps());
  stages_.push_back({{"name", "stage 2, SLA"}, {"seconds", sla_.at("seconds")}});
  CompareOptions options;
  options.flow = flow_;
  options.validation_samples = options_.validation_samples;
  options.sampler.steps = options_.sampling_steps;
  options.sampler.shift = denoiser.card.shift;
  options.fps = denoiser.card.fps;
  options.sampler.from_t = options_.own_inputs.empty() ? 1.0 : options_.from_t;
  const Comparison comparison = timed("videos and validation", [&] {
    return compare(variants(), rows, *dataset_, options, run_, options_.out);
  });
  const std::vector<StepTime> measured = timed("timing", [&] { return times(); });
  Denoiser tuned = load(options_.out / "stage2_sla2");
  const json map =
      timed("routing map", [&] { return routing_map(tuned, *dataset_, 0, 0.3, run_); });
  const json result = report(comparison, measured);
  write_report(result, map, options_.out);
  return result;
}

}  // namespace

DemoOptions demo_preset(const std::string& name) {
  DemoOptions options;
  options.preset = name;
  if (name == "small") return options;
  if (name != "large") {
    throw Error(fmt::format("preset must be one of small, large, got \"{}\"", name));
  }
  // 24 x 24 x 24 tokens, more than three times the small preset's: fewer have to be kept.
  options.size = {24, 192, 192};
  options.model_steps = 800;
  options.keeps = {0.05, 0.10, 0.03};
  options.stage1_steps = 60;
  options.keeps_in_turns = false;
  options.stage2_steps = 150;
  options.stage2_batch = 8;
  options.sampling_steps = 24;
  options.validation_samples = 32;
  options.repeats = 15;
  return options;
}

fs::path default_model() {
  const fs::path name = fs::path("models") / "pixel-video-7m";
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  std::vector<fs::path> tried;
  for (fs::path folder = program.parent_path(); !error && folder != folder.root_path();
       folder = folder.parent_path()) {
    for (const fs::path& path : {folder / name, folder / "share" / "sla2" / name}) {
      std::error_code missing;
      if (fs::exists(path / "config.json", missing)) return path;
      tried.push_back(path);
    }
  }
  if (fs::exists(name / "config.json", error)) return name;
  throw Error(
      fmt::format("no model: {} was found in none of the folders above {}; give one with "
                  "--model",
                  name.string(), program.string()));
}

json run_demo(const DemoOptions& options, Run& run) {
  Demo demo(options, run);
  return demo.run();
}

}  // namespace sla2::video
