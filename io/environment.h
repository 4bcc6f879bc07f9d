// Where the Python packages lie that this program takes files from (FFmpeg, sample clips).
#pragma once

#include <filesystem>
#include <vector>

namespace sla2::io {

/// The site-packages folders of the environments that belong to this program, the nearest first: in
/// or above its folder (.venv/bin/sla2, build/release/bin/sla2), of the torch that it runs with (an
/// installed program), of VIRTUAL_ENV, below the current folder. Each once; none may exist.
[[nodiscard]] std::vector<std::filesystem::path> site_packages();

}  // namespace sla2::io
