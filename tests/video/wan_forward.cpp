// wan_forward MODEL INPUT OUTPUT [--tiles] [--save FOLDER [--shard BYTES]]
// Runs a transformer of the diffusers layout on x, timestep and text of INPUT and writes out to
// OUTPUT.
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "sla2/error.h"
#include "video/weights.h"

namespace {

using namespace sla2::video;

struct Arguments {
  std::vector<std::string> files;
  std::string save;
  std::int64_t shard_bytes = std::int64_t{5} << 30;
  bool tiles = false;
};

Arguments parse(int count, char** values) {
  Arguments arguments;
  for (int i = 1; i < count; ++i) {
    const std::string value = values[i];
    const bool has_next = i + 1 < count;
    if (value == "--tiles") {
      arguments.tiles = true;
    } else if (value == "--save" && has_next) {
      arguments.save = values[++i];
    } else if (value == "--shard" && has_next) {
      arguments.shard_bytes = std::stoll(values[++i]);
    } else {
      arguments.files.push_back(value);
    }
  }
  if (arguments.files.size() != 3) {
    throw sla2::Error(
        "usage: wan_forward MODEL INPUT OUTPUT [--tiles] [--save FOLDER] [--shard BYTES]");
  }
  return arguments;
}

void run(const Arguments& arguments) {
  const torch::NoGradGuard no_grad;
  WanTransformer model = load_transformer(arguments.files[0]);
  model->eval();
  if (arguments.tiles) model->set_token_order({TokenOrderKind::kTiles, {2, 3, 2}});
  const auto inputs = load_tensors(arguments.files[1]);
  const torch::Tensor out =
      model->forward(inputs.at("x"), inputs.at("timestep"), inputs.at("text"));
  save_tensors(arguments.files[2], {{"out", out}});
  if (!arguments.save.empty()) {
    save_transformer(arguments.save, model, torch::kFloat32, arguments.shard_bytes);
  }
}

}  // namespace

int main(int count, char** values) {
  try {
    run(parse(count, values));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
