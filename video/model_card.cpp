#include <cmath>

#include <fmt/format.h>

#include "io/config_json.h"
#include "io/files.h"
#include "sla2/error.h"
#include "video/weights.h"

namespace sla2::video {
namespace {

namespace fs = std::filesystem;

constexpr const char* kCard = "model_card.json";
constexpr const char* kCaptions = "captions.safetensors";
constexpr const char* kTable = "caption_table";

void check(const ModelCard& card, const std::string& where) {
  const auto positive = [&where](const char* name, std::int64_t value) {
    if (value < 1 || value > 1 << 16) {
      throw Error(fmt::format("{}: {} must be from 1 to 65536, got {}", where, name, value));
    }
  };
  positive("frames", card.frames);
  positive("height", card.height);
  positive("width", card.width);
  if (!(card.fps > 0) || !std::isfinite(card.fps)) {
    throw Error(fmt::format("{}: fps must be positive, got {}", where, card.fps));
  }
  if (!(card.shift > 0) || !std::isfinite(card.shift)) {
    throw Error(fmt::format("{}: shift must be positive, got {}", where, card.shift));
  }
  if (card.prediction != "x" && card.prediction != "velocity") {
    throw Error(fmt::format("{}: prediction must be \"x\" or \"velocity\", got \"{}\"", where,
                            card.prediction));
  }
  if (!card.caption_table.defined() && card.captions.empty()) return;
  const auto rows = static_cast<std::int64_t>(card.captions.size()) + 1;
  if (!card.caption_table.defined() || card.caption_table.dim() != 3 ||
      card.caption_table.size(0) != rows || !card.caption_table.is_floating_point()) {
    throw Error(
        fmt::format("{}: {} must be floats [{}, length, text_dim] (a row for each caption "
                    "and one for none), got {}",
                    where, kTable, rows,
                    card.caption_table.defined()
                        ? fmt::format("{} dimensions, {} rows", card.caption_table.dim(),
                                      card.caption_table.dim() > 0 ? card.caption_table.size(0) : 0)
                        : std::string("none")));
  }
}

}  // namespace

bool has_model_card(const std::filesystem::path& folder) { return fs::exists(folder / kCard); }

ModelCard load_model_card(const std::filesystem::path& folder) {
  const fs::path path = folder / kCard;
  const nlohmann::json json = io::read_json(path);
  ModelCard card;
  io::JsonObject object(json, path.string());
  object.required("frames", card.frames)
      .required("height", card.height)
      .required("width", card.width)
      .required("fps", card.fps)
      .required("prediction", card.prediction)
      .optional("shift", card.shift)
      .optional("captions", card.captions)
      .finish();
  if (!card.captions.empty() || fs::exists(folder / kCaptions)) {
    std::map<std::string, torch::Tensor> tensors = load_tensors(folder / kCaptions);
    if (tensors.size() != 1 || !tensors.contains(kTable)) {
      throw Error(fmt::format("{} must hold the tensor {} alone, got {} tensors",
                              (folder / kCaptions).string(), kTable, tensors.size()));
    }
    card.caption_table = tensors.at(kTable);
  }
  check(card, path.string());
  if (card.caption_table.defined()) card.caption_table = card.caption_table.to(torch::kFloat32);
  return card;
}

void save_model_card(const std::filesystem::path& folder, const ModelCard& card) {
  check(card, (folder / kCard).string());
  io::make_output_folder(folder);
  if (card.caption_table.defined()) {
    save_tensors(folder / kCaptions, {{kTable, card.caption_table.to(torch::kFloat32)}},
                 {{"format", "pt"}});
  }
  const nlohmann::json json{{"frames", card.frames},         {"height", card.height},
                            {"width", card.width},           {"fps", card.fps},
                            {"prediction", card.prediction}, {"shift", card.shift},
                            {"captions", card.captions}};
  io::write_file(folder / kCard, json.dump(2) + "\n");
}

}  // namespace sla2::video
