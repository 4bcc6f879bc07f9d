#include <fmt/format.h>

#include "io/config_json.h"
#include "io/files.h"
#include "io/model_files.h"
#include "sla2/error.h"
#include "video/weights.h"

namespace sla2::video {
namespace {

namespace fs = std::filesystem;

constexpr const char* kCard = "model_card.json";
constexpr const char* kCaptions = "captions.safetensors";
constexpr const char* kTable = "caption_table";

void check(const ModelCard& card, const std::string& where) {
  io::validate(io::CardText{card.frames, card.height, card.width, card.fps, card.prediction,
                            card.shift, card.captions},
               where);
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
  const io::CardText text = io::card_from_json(io::read_json(path), path.string());
  ModelCard card{.frames = text.frames,
                 .height = text.height,
                 .width = text.width,
                 .fps = text.fps,
                 .prediction = text.prediction,
                 .shift = text.shift,
                 .captions = text.captions,
                 .caption_table = {}};
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
