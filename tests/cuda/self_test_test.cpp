// The self-test of an accelerator, on emulated threads.
#include "sla2/self_test.h"

#include <string>
#include <utility>

#include <gtest/gtest.h>

#include "cuda/cuda.h"
#include "sla2/error.h"
#include "temporary_folder.h"

namespace sla2::test {
namespace {

TEST(SelfTest, PassesAndIsRemembered) {
  const TemporaryCache cache;
  const SelfTest first = self_test(emulated::kImplementation, true);
  EXPECT_EQ(first.implementation, "emulated");
  EXPECT_EQ(first.checks, 20);  // ten problems, forward and backward
  EXPECT_FALSE(first.cached);
  EXPECT_TRUE(self_test(emulated::kImplementation, true).cached);
  const SelfTest again = self_test(emulated::kImplementation, false);
  EXPECT_EQ(again.checks, 20);
  EXPECT_FALSE(again.cached);
}

TEST(SelfTest, AWrongKernelIsNamedAndNotRemembered) {
  const TemporaryCache cache;
  Implementation broken = emulated::kImplementation;
  broken.backward = [](const Problem& problem, const Inputs& inputs, const Saved& saved,
                       ConstView d_out, const Gradients& gradients, const Context& context) {
    Gradients swapped = gradients;
    std::swap(swapped.d_k, swapped.d_v);
    emulated::kImplementation.backward(problem, inputs, saved, d_out, swapped, context);
  };
  for (int attempt = 0; attempt < 2; ++attempt) {
    std::string text;
    try {
      static_cast<void>(self_test(broken, true));
    } catch (const sla2::Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kRuntime);
      text = error.what();
    }
    EXPECT_NE(text.find("emulated backward (int8, bf16, head size 128) gives a wrong d_k on "
                        "emulated threads, driver none"),
              std::string::npos)
        << text;
  }
}

TEST(SelfTest, NeedsAMachine) {
  const Implementation& reference = *implementations().back();
  EXPECT_THROW(static_cast<void>(self_test(reference, false)), sla2::Error);
}

}  // namespace
}  // namespace sla2::test
