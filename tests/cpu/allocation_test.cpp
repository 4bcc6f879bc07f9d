// The backend takes all its memory from the workspace: none from the heap. (Validation makes some
// short strings before it.)
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <vector>

#include <gtest/gtest.h>

#include "core/problems.h"
#include "cpu/parity.h"

namespace {
std::atomic<int> allocations{0};
}  // namespace

// The process's own: every new of this program is counted.
// Not inline: gcc takes a malloc and a free that it sees for a mismatch.
[[gnu::noinline]] void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace sla2::test {
namespace {

class Allocation : public testing::TestWithParam<const char*> {};

TEST_P(Allocation, NoneInACall) {
  for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
    Problem p = small_problem(150, 300, 32, 48);
    p.config.routing = mode;
    p.implementation = GetParam();
    SLA2_SKIP_IF_REFUSED(p, Pass::kBackward);
    Call call(p, 3);
    const auto pool = make_thread_pool(3);
    call.run_forward(*pool);
    call.run_backward(*pool);
    const Workspace workspace(
        std::max(workspace_bytes(p, Pass::kForward, 3), workspace_bytes(p, Pass::kBackward, 3)));
    const Context context{*pool, workspace.span()};
    const Inputs inputs = call.inputs();
    const Outputs outputs = call.outputs();
    const Saved saved = call.saved();
    const Gradients gradients = call.gradients();
    const ConstView d_out = call.d_out.const_view();
    const Implementation& backend = *find_implementation(GetParam());
    const int before = allocations;
    backend.forward(p, inputs, outputs, context);
    EXPECT_EQ(allocations - before, 0) << "forward";
    const int between = allocations;
    backend.backward(p, inputs, saved, d_out, gradients, context);
    EXPECT_EQ(allocations - between, 0) << "backward";
  }
}

INSTANTIATE_TEST_SUITE_P(All, Allocation, testing::ValuesIn(kCpuImplementations));

}  // namespace
}  // namespace sla2::test
