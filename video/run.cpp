#include "video/run.h"

#include "sla2/error.h"

namespace sla2::video {

void Run::check_stop(const std::string& what) const {
  if (stop_requested()) throw Interrupted("interrupted while " + what);
}

namespace {

std::uint64_t splitmix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

std::uint64_t mix(std::int64_t seed, std::int64_t a, std::int64_t b, std::int64_t c) {
  std::uint64_t state = splitmix(static_cast<std::uint64_t>(seed));
  for (const std::int64_t part : {a, b, c}) {
    state = splitmix(state ^ static_cast<std::uint64_t>(part));
  }
  return state;
}

at::Generator make_generator(const torch::Device& device, std::int64_t seed, std::int64_t stream,
                             std::int64_t step) {
  at::Generator generator = at::globalContext().defaultGenerator(device).clone();
  generator.set_current_seed(mix(seed, stream, step));
  return generator;
}

}  // namespace sla2::video
