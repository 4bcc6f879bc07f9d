// The executor's contract, on the serial one and on the pool.
#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "sla2/sla2.h"

namespace sla2::test {
namespace {

class PoolTest : public testing::TestWithParam<std::int64_t> {
 protected:
  std::unique_ptr<Executor> pool_ = make_thread_pool(GetParam());
};

TEST_P(PoolTest, RunsEveryIndexOnceWithOneTaskAWorker) {
  EXPECT_EQ(pool_->num_threads(), GetParam());
  for (const std::int64_t n : {0, 1, 2, 7, 1000}) {
    std::vector<std::atomic<int>> runs(n);
    std::vector<std::atomic<int>> active(GetParam());
    std::atomic<bool> right = true;
    pool_->parallel_for(n, [&](std::int64_t i, std::int64_t worker) {
      if (worker < 0 || worker >= GetParam() || active[worker].fetch_add(1) != 0) right = false;
      ++runs[i];
      --active[worker];
    });
    EXPECT_TRUE(right);
    for (const auto& count : runs) EXPECT_EQ(count, 1);
  }
  bool ran = false;
  pool_->parallel_for(-3, [&](std::int64_t, std::int64_t) { ran = true; });
  EXPECT_FALSE(ran);
}

TEST_P(PoolTest, RethrowsAndStaysUsable) {
  for (int round = 0; round < 50; ++round) {
    try {
      pool_->parallel_for(100, [](std::int64_t i, std::int64_t) {
        if (i % 10 == 3) throw std::runtime_error("task");
      });
      FAIL();
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "task");
    }
    std::atomic<std::int64_t> sum = 0;
    pool_->parallel_for(10, [&](std::int64_t i, std::int64_t) { sum += i; });
    EXPECT_EQ(sum, 45);
  }
}

TEST_P(PoolTest, ServesSeveralCallers) {
  std::atomic<std::int64_t> sum = 0;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 100; ++round) {
        pool_->parallel_for(9, [&](std::int64_t i, std::int64_t) { sum += i; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sum, 4 * 100 * 36);
}

TEST_P(PoolTest, RefusesALoopInsideItsOwnLoop) {
  try {
    pool_->parallel_for(4, [&](std::int64_t, std::int64_t) {
      pool_->parallel_for(4, [](std::int64_t, std::int64_t) {});
    });
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "parallel_for must not be called from a task of the same pool");
  }
  const auto other = make_thread_pool(2);  // another pool is fine
  std::atomic<int> count = 0;
  pool_->parallel_for(3, [&](std::int64_t, std::int64_t) {
    other->parallel_for(2, [&](std::int64_t, std::int64_t) { ++count; });
  });
  EXPECT_EQ(count, 6);
}

INSTANTIATE_TEST_SUITE_P(Threads, PoolTest, testing::Values(1, 2, 5));

TEST(Pool, RefusesThreadCountsOutOfRange) {
  for (const std::int64_t threads : {-1, 0, 1025}) {
    try {
      make_thread_pool(threads);
      FAIL();
    } catch (const Error& error) {
      EXPECT_EQ(error.what(), "num_threads must be in [1, 1024], got " + std::to_string(threads));
    }
  }
}

TEST(Serial, RunsInOrder) {
  SerialExecutor serial;
  std::vector<std::int64_t> order;
  serial.parallel_for(3, [&](std::int64_t i, std::int64_t worker) {
    EXPECT_EQ(worker, 0);
    order.push_back(i);
  });
  EXPECT_EQ(order, (std::vector<std::int64_t>{0, 1, 2}));
}

}  // namespace
}  // namespace sla2::test
