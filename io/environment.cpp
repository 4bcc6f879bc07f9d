#include "io/environment.h"

#include <algorithm>
#include <cstdlib>
#include <link.h>
#include <string_view>
#include <system_error>

namespace sla2::io {
namespace fs = std::filesystem;
namespace {

using Paths = std::vector<fs::path>;

void add(const fs::path& folder, Paths& found) {
  if (std::find(found.begin(), found.end(), folder) == found.end()) found.push_back(folder);
}

// <environment>/lib/python3*/site-packages, the last version first.
void add_environment(const fs::path& environment, Paths& found) {
  Paths pythons;
  std::error_code error;
  for (fs::directory_iterator python(environment / "lib", error), end; !error && python != end;
       python.increment(error)) {
    const fs::path folder = python->path() / "site-packages";
    std::error_code missing;
    const bool named = python->path().filename().string().starts_with("python3");
    if (named && fs::is_directory(folder, missing)) pythons.push_back(folder);
  }
  std::sort(pythons.rbegin(), pythons.rend());
  for (const fs::path& folder : pythons) add(folder, found);
}

int add_library(dl_phdr_info* info, std::size_t /*size*/, void* found) {
  constexpr std::string_view kFolder = "/site-packages/";
  const std::string_view path = info->dlpi_name;
  const auto at = path.find(kFolder);
  if (at != std::string_view::npos) {
    add(fs::path(path.substr(0, at + kFolder.size() - 1)), *static_cast<Paths*>(found));
  }
  return 0;
}

}  // namespace

std::vector<fs::path> site_packages() {
  Paths found;
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  for (fs::path folder = program.parent_path(); folder.has_relative_path();
       folder = folder.parent_path()) {
    add_environment(folder / ".venv", found);
    add_environment(folder, found);
  }
  dl_iterate_phdr(add_library, &found);
  if (const char* active = std::getenv("VIRTUAL_ENV"); active != nullptr && *active != '\0') {
    add_environment(active, found);
  }
  const fs::path current = fs::current_path(error);
  if (!error) add_environment(current / ".venv", found);
  return found;
}

}  // namespace sla2::io
